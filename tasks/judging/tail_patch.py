"""Judge methods without retraining: the model learns what a method names for a query, and its loss has to fall."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.diffusion.loss import Condition
from fastgda_core.errors import UsageError
from fastgda_core.evaluation.counterfactual import loss_changes
from fastgda_core.evaluation.retraining import query_losses
from fastgda_core.evaluation.tail_patch import TailPatch
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from tasks.artifact import Artifact, Made, once
from tasks.config.judging import TailPatchConfig
from tasks.inputs.features import features_key
from tasks.inputs.queries import Query, load_queries
from tasks.inputs.samples import captions_of, readable_images
from tasks.judging.methods import method_scores
from tasks.judging.metric_rows import metric_rows
from tasks.progress import stage
from tasks.teaching.run import Run

FALL, RISE = "tail-patch", "tail-patch backwards"


@task(task_run_name="tail-patch", cache_policy=NO_CACHE)
def check_tail_patch(run: Run, ranks: Artifact) -> Made:
    """Measure how far a step on the first k samples of each method lowers the query's loss, and a step back raises it.

    Both are shares of the loss before. Random samples are the floor.
    """
    config, samples = run.config.tail_patch, run.artifacts["samples"]
    assert config is not None
    features = features_key(run.context, samples)
    seed = run.config.judge.seed if run.config.judge else 0  # of the random samples
    key = input_key("tail-patch", ranks.key, run.context.model_hash, config, seed, features, table=tables.METRICS)
    path = run.workspace.teacher_check(key)

    def make(started: float) -> Manifest:
        table = pa.Table.from_pylist(_rows(run, ranks, config), schema=tables.METRICS.schema)
        device = str(run.context.device)
        return commit_table(path, table, tables.METRICS, key=key, started=started, device=device)

    return once(Artifact("tail-patch", key, path, 0), path, make)


def _rows(run: Run, ranks: Artifact, config: TailPatchConfig) -> list[dict[str, object]]:
    queries = load_queries(run.artifacts["queries"])
    chosen = [number for number, query in enumerate(queries) if query.split == "test"][: config.queries]
    scores = method_scores(run, ranks, chosen)
    names = [queries[number].query_id for number in chosen]
    found: dict[tuple[str, int], list[Tensor]] = {}
    with stage("tail-patch", len(chosen)) as advance:
        patch = TailPatch(
            run.context.model(), seed=config.seed, pairs=config.pairs, micro_batch=run.context.micro_batch("gradients")
        )
        for row, number in enumerate(chosen):
            for method, k, changes in _changes(run, patch, queries[number], {m: s[row] for m, s in scores.items()}):
                found.setdefault((method, k), []).append(changes)
            advance(1)
    rows: list[dict[str, object]] = []
    for (method, k), several in found.items():
        fall, rise = torch.stack(several, dim=1)
        rows += metric_rows(FALL, method, fall, names, cutoff=k)
        rows += metric_rows(RISE, method, rise, names, cutoff=k)
    return rows


def _changes(run: Run, patch: TailPatch, query: Query, scores: dict[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield method, k, and how far a query's loss fell and rose, (2,) float64.

    Args:
        scores: of every sample by method, (samples,).
    """
    config, model = run.config.tail_patch, patch.model
    assert config is not None
    latent, condition = model.encode_images([query.image])[0], model.encode_captions([query.caption])

    def measure(denoiser: torch.nn.Module) -> Tensor:
        losses, _ = query_losses(
            model, denoiser, latent, condition,
            owner=query.owner, seed=config.seed, pairs=config.draws, micro_batch=run.context.micro_batch("losses"),
        )  # fmt: skip
        return losses[:, None]

    before = measure(model.denoiser)
    for method, each in scores.items():
        for k in config.k:
            first = each.topk(min(k, len(each))).indices.sort().values
            step = patch.step(*_learned(run, first.tolist()))
            fall, rise = (loss_changes(patch.after(step, sign * config.length, measure), before) for sign in (1, -1))
            yield method, k, torch.cat([-fall, rise])


def _learned(run: Run, train_ids: list[int]) -> tuple[Tensor, Tensor, Condition]:
    """Return ids, latents and conditions of those of some samples that can be read; of captions the first.

    Raises:
        UsageError: none of them can.
    """
    path, model = run.artifacts["samples"].path, run.context.model()
    images, faults = readable_images(path, train_ids)
    if len(faults) == len(train_ids):
        train_id, reason = next(iter(faults.items()))
        raise UsageError(f"tail_patch has nothing to learn: sample {train_id} cannot be read ({reason}): mend it")
    read = [(train_id, image) for train_id, image in zip(train_ids, images, strict=True) if train_id not in faults]
    known = [train_id for train_id, _ in read]
    captions = [several[0] for several in captions_of(path, known)]
    return torch.tensor(known), model.encode_images([image for _, image in read]), model.encode_captions(captions)
