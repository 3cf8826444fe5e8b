"""One self-contained HTML page: what the pipeline found, next to what the teacher says."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.diffusion.objective import Objective
from fastgda_core.evaluation.ranking_metrics import descending_ranks, top_mask
from fastgda_core.extras import installed
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit, input_key
from storage_schemas.heads.records import read_head_record, read_index_record
from storage_schemas.tombstones import removed_ids
from tasks.artifact import Artifact, Made, once
from tasks.context import Context
from tasks.distilling.answering import answering_head
from tasks.distilling.loss_curve import NO_CURVE, loss_curve
from tasks.distilling.ranks import candidate_scores, rows_of_split, sample_features
from tasks.inputs.features import load_features
from tasks.inputs.queries import Query, load_queries
from tasks.inputs.samples import captions_of, sample_images
from tasks.judging.head import answers, untuned_cosines
from tasks.judging.judge_table import table_of
from tasks.judging.sketches import BYTES, SECONDS, SKETCH, by_sketches
from tasks.reporting.attribution_sheet import spread
from tasks.reporting.judged import judged_part, templates, templates_text
from tasks.teaching.sketch_scores import StoredSketches
from tasks.watching.trust import (
    CAPTIONS,
    KINDS,
    OTHER_CURVATURE,
    OTHER_GRADIENT,
    OTHER_NOISE,
    OTHER_TEACHER,
    by_itself,
    compared,
    trust_of,
)

THUMBNAIL = 96


@dataclass(frozen=True)
class Picture:
    """A training image as the page shows it."""

    data: str
    caption: str
    value: str
    agrees: bool


@dataclass(frozen=True)
class Row:
    title: str
    note: str
    pictures: list[Picture]


@dataclass(frozen=True)
class QueryPanel:
    query: Query
    image: str
    precision: dict[str, float]
    rows: list[Row]


@task(task_run_name="report", cache_policy=NO_CACHE)
def write_report(context: Context, run: str, stages: list[Made]) -> Made:
    """Write `reports/<run>/report.html`, anew when anything that it shows has changed."""
    path = context.workspace.report(run)
    artifacts = {made.artifact.name: made.artifact for made in stages}
    shown = _measures(context.config.evaluation.cutoffs), templates_text(), installed("matplotlib")
    removed = removed_ids(context.workspace, artifacts["samples"].path).tolist()
    left_out = [removed] if removed else []  # a page that is written after a take-down is without its images
    key = input_key("report", [each.key for each in artifacts.values()], context.config.evaluation, shown, *left_out)

    def make(started: float) -> Manifest:
        html = _render(context, run, artifacts, stages, removed).encode()
        return commit(path, lambda temporary: temporary.write_bytes(html), key=key, rows=1, started=started)

    return once(Artifact("report", key, path, 1), path, make)


_WHOSE = {
    Objective.output_norm: "output's squared norm",
    Objective.loss: "loss",
    Objective.ratio: "loss, against its size",
    None: "",
}


def _render(
    context: Context, run: str, artifacts: dict[str, Artifact], stages: list[Made], removed: Sequence[int]
) -> str:
    metrics = tables.read(artifacts["evaluation"].path, tables.METRICS).to_pylist()
    head = read_head_record(artifacts["rank head"].path)
    means = {(row["metric"], row["space"], row["cutoff"]): row for row in metrics if not row["query_id"]}
    cutoff = context.config.evaluation.validation_cutoff
    precision = {
        (row["query_id"], row["space"]): row["value"]
        for row in metrics
        if row["metric"] == "AP" and row["cutoff"] == cutoff
    }
    curve = loss_curve(head, cutoff, format="svg") if head.history else None
    spaces = [space for space in ("untuned", "tuned", SKETCH) if ("mAP", space, cutoff) in means]
    took, size = (means.get((figure, SKETCH, 0)) for figure in (SECONDS, BYTES))
    table = table_of(metrics) if context.config.judge is not None else None
    template = templates().get_template("report.html")
    return template.render(
        run=run,
        config=context.config,
        measures=_measures(context.config.evaluation.cutoffs),
        means=means,
        headline=cutoff,
        parts=[OTHER_NOISE, OTHER_GRADIENT, OTHER_CURVATURE],
        other_teacher=OTHER_TEACHER,
        captions=CAPTIONS,
        spaces=spaces,
        sketched={"seconds": took["value"], "bytes": size["value"]} if took and size else None,
        ceiling=means.get(("spearman", OTHER_TEACHER, 0)),
        trust=trust_of(
            by_itself(metrics, head.kind), _objective(context), checkpoints=bool(context.config.teacher.checkpoints)
        ),
        kinds=KINDS,
        objective=_WHOSE[_objective(context)],
        agreement=means.get(("spearman", "exact vs first order", 0)),
        loss_curve=curve[curve.index(b"<svg") :].decode() if curve else "" if head.solved else NO_CURVE,
        solved=head.solved,
        panels=_panels(context, run, artifacts, precision, spaces, removed),
        stages=stages,
        samples=artifacts["samples"].rows,
        queries=sum(query.split not in KINDS for query in load_queries(artifacts["queries"])),
        index=read_index_record(artifacts["index"].path) if "index" in artifacts else None,
        index_version=artifacts["index"].key if "index" in artifacts else "",
        judged=judged_part(table, context.config) if table else None,
    )


def _objective(context: Context) -> Objective | None:
    return compared(context.config.teacher.name, context.config.teacher.objective)


def _measures(cutoffs: list[int]) -> list[tuple[str, str, int]]:
    """Return (label, metric, cutoff) of the rows of the table."""
    least = min(cutoffs)
    rows = [(f"mAP({cutoff})", "mAP", cutoff) for cutoff in cutoffs]
    rows += [(f"NDCG@{cutoff}", "ndcg", cutoff) for cutoff in cutoffs]
    rows += [(f"first {cutoff} in common", "overlap", cutoff) for cutoff in cutoffs]
    rows += [(f"teacher's first {least} in {cutoff}", "recall", cutoff) for cutoff in cutoffs if cutoff > least]
    return [*rows, ("Spearman", "spearman", 0), ("Kendall", "kendall", 0)]


def _panels(
    context: Context,
    run: str,
    artifacts: dict[str, Artifact],
    precision: dict[tuple[str, str], float],
    spaces: list[str],
    removed: Sequence[int],
) -> list[QueryPanel]:
    """Return the panels of the shown test queries.

    Args:
        precision: average precision by (query_id, space).
        spaces: the rankings that were measured, beside the teacher's.
        removed: train_ids that are left out.
    """
    samples, queries, config = artifacts["samples"], artifacts["queries"], context.config.evaluation
    several = load_queries(queries)
    test = rows_of_split([queries], "test")
    test = test[spread(len(test), config.shown_queries)]
    names = [several[number].query_id for number in test.tolist()]
    scores = candidate_scores(context.workspace, artifacts["rank labels"], names, removed)
    captions = [several[number].caption for number in test.tolist()]
    phi = load_features(context, queries, samples)[test], sample_features(context, samples)
    score = "AbU+ score" if _objective(context) else "cosine"
    gradient = read_head_record(artifacts["rank head"].path).kind == "gradient"
    rankings = [
        ("Untuned features", "nearest by the frozen encoders", untuned_cosines(scores, *phi)),
        (
            "Gradient head" if gradient else "Tuned features",
            f"{'highest by a predicted gradient' if gradient else 'nearest by the rank head'}: FastGDA's answer",
            answers(scores, answering_head(context.workspace, artifacts["rank head"].path), captions, *phi),
        ),
    ]
    if SKETCH in spaces:
        stored = StoredSketches(context, artifacts, run)
        sketched = [
            by_sketches(stored, several[number], train_ids[known])
            for number, train_ids, known in zip(test.tolist(), scores.train_ids, scores.known, strict=True)
        ]
        found = torch.nn.utils.rnn.pad_sequence(sketched, batch_first=True, padding_value=-torch.inf)
        rankings.append(("Sketches", "highest by the query's own gradient: FastGDA's slower, better answer", found))
    rankings.append(("Teacher", f"what the answers are held against, by {score}", scores.scores))
    cutoff = config.validation_cutoff
    teacher_rank, relevant = descending_ranks(scores.scores), top_mask(scores.scores, cutoff)
    panels = []
    for row, number in enumerate(test.tolist()):
        query = several[number]
        judged = scores.train_ids[row], teacher_rank[row], relevant[row]
        rows = [
            Row(title, note, _pictures(samples, ranking[row].topk(config.neighbors).indices, *judged))
            for title, note, ranking in rankings
        ]
        mine = {space: precision[query.query_id, space] for space in spaces}
        panels.append(QueryPanel(query, _data_url(query.image), mine, rows))
    return panels


def _pictures(
    samples: Artifact, chosen: Tensor, candidates: Tensor, teacher_rank: Tensor, relevant: Tensor
) -> list[Picture]:
    """Return some of a query's candidates, by their places among all, (n,); `relevant` says which of these agree."""
    train_ids = candidates[chosen].tolist()
    captions = captions_of(samples.path, train_ids)
    judged = zip(teacher_rank[chosen].tolist(), relevant[chosen].tolist(), strict=True)
    return [
        Picture(_data_url(image), several[0], f"teacher's #{rank}", agrees)
        for image, several, (rank, agrees) in zip(sample_images(samples.path, train_ids), captions, judged, strict=True)
    ]


def _data_url(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
