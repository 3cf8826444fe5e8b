"""The part of a study that is of gradient heads: which features the query tower sees, how many samples it learns from.

Of the other questions, losses, candidates and outside probabilities are the symmetric head's alone: a tower is solved,
and asks no teacher.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch.nn import functional as F

from fastgda_core.evaluation.ranking_metrics import average_precision, top_mask
from fastgda_core.features import encoder_names
from fastgda_core.ranking.query_tower import GradientHead, TowerMoments
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, committed, input_key
from storage_schemas.files import AnyPath
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.distilling.answering import ByGradients
from tasks.distilling.gradient_heads import best_head, gradients_as_queries
from tasks.distilling.labels import Labels, extract_query_features
from tasks.distilling.ranks import candidate_scores, rows_of_split
from tasks.inputs.features import extract_features, features_key, in_space, load_features, load_query_features
from tasks.inputs.queries import joined_queries
from tasks.judging.head import answers
from tasks.judging.metric_rows import metric_rows
from tasks.progress import stage
from tasks.teaching.run import read_run_anew
from tasks.teaching.sketch_scores import StoredSketches


@dataclass(frozen=True)
class TowerVariant:
    """One gradient head of a study: its question, its value there, and how it differs from the configured one.

    samples: share of `head.gradient.queries` that stand for queries.
    """

    question: str
    value: str
    space: str
    samples: float = 1.0


def tower_variants(config: PipelineConfig) -> list[TowerVariant]:
    """Return the gradient heads of a study: none, unless the configured head is of that kind."""
    if config.head.kind != "gradient":
        return []
    study, space = config.study, config.features.space
    spaces = study.spaces or list(dict.fromkeys([*encoder_names(space), space]))
    found = [TowerVariant("gradient head: feature space", each, each) for each in spaces]
    shares = [TowerVariant("gradient head: samples", f"{each:g}", space, each) for each in study.query_shares]
    return found + shares


def measure_towers(context: Context, labels: Labels, folder: AnyPath) -> tuple[list[AnyPath], list[Manifest], bool]:
    """Solve every variant and measure it on the test queries, unless that is done.

    Returns:
        The file of each variant, their manifests, and whether all were there before.
    """
    several = tower_variants(context.config)
    if not several:
        return [], [], True
    run = read_run_anew(str(context.workspace.root), labels.run)
    stored = StoredSketches(run.context, run.artifacts, run.name)
    config = context.config
    behind = labels.ranks.key, run.artifacts["sketches"].key, config.head.gradient
    measured = config.evaluation.cutoffs, config.evaluation.validation_cutoff
    keys = {
        variant: input_key(
            "tower variant",
            behind,
            measured,
            dataclasses.astuple(variant),
            features_key(in_space(context, space=variant.space), labels.samples),
            table=tables.STUDY,
        )
        for variant in several
    }
    paths = {variant: folder / f"{key}.parquet" for variant, key in keys.items()}
    missing = [variant for variant in several if committed(paths[variant], keys[variant]) is None]
    started = time.monotonic()
    for variant, head in _solved(context, labels, stored, missing):
        rows = pa.Table.from_pylist(list(_rows(context, labels, stored, variant, head)), schema=tables.STUDY.schema)
        commit_table(paths[variant], rows, tables.STUDY, key=keys[variant], started=started)
        started = time.monotonic()
    manifests = [committed(paths[variant], keys[variant]) for variant in several]
    return list(paths.values()), [manifest for manifest in manifests if manifest], not missing


def _solved(
    context: Context, labels: Labels, stored: StoredSketches, missing: list[TowerVariant]
) -> Iterator[tuple[TowerVariant, GradientHead]]:
    """Yield variants with their heads, those of few samples first; the samples' gradients, which take long, serve all.

    Samples that stand for queries are the first of one order, so that those of a small share are among a larger's.
    """
    config = context.config.head.gradient
    phi = {}
    for space in dict.fromkeys(variant.space for variant in missing):
        there = in_space(context, space=space)
        extract_features(there, labels.samples)
        extract_query_features(there, labels)
        phi[space] = load_features(there, labels.samples, labels.samples)
    unit = {space: F.normalize(found, dim=1) for space, found in phi.items()}
    moments = {space: TowerMoments() for space in phi}
    order = np.random.default_rng(config.seed).permutation(stored.train_ids)[: config.queries]
    sizes = {variant: max(1, round(variant.samples * len(order))) for variant in missing}
    done = 0
    with stage("gradient heads of the study", max(sizes.values(), default=0)) as advance:
        for size in sorted(set(sizes.values())):
            for train_ids, gradients in gradients_as_queries(context, stored, np.sort(order[done:size])):
                for space, sums in moments.items():
                    sums.add(gradients, unit[space][train_ids].to(stored.context.device))
                advance(len(train_ids))
            done = size
            for variant in (each for each in missing if sizes[each] == size):
                there, space = in_space(context, space=variant.space), variant.space
                yield variant, best_head(there, labels, stored, phi[space], moments[space])[0]


def _rows(
    context: Context, labels: Labels, stored: StoredSketches, variant: TowerVariant, head: GradientHead
) -> Iterator[dict[str, object]]:
    """Yield mAP of a head on the test queries, as a study has it."""
    there = in_space(context, space=variant.space)
    test, several = rows_of_split(labels.queries, "test"), joined_queries(labels.queries)
    asked = [several[row] for row in test.tolist()]
    names = [query.query_id for query in asked]
    scores = candidate_scores(context.workspace, labels.ranks, names)
    queries = load_query_features(there, labels.queries, labels.samples)[test]
    samples = load_features(there, labels.samples, labels.samples)
    found = answers(scores, ByGradients(head, stored), [query.caption for query in asked], queries, samples)
    answered = {"question": variant.question, "choice": variant.value, "seed": 0}
    for cutoff in context.config.evaluation.cutoffs:
        precision = average_precision(found, top_mask(scores.scores, cutoff))
        yield from (answered | row for row in metric_rows("mAP", "tuned", precision, names, cutoff=cutoff))
