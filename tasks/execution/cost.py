"""The speed of a device, by configuration, by earlier runs or by a trial."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow.compute as pc
import torch

from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.commit import Manifest
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath
from storage_schemas.runs.ledger import read_run, run_names
from storage_schemas.runs.liveness import read_assignment
from storage_schemas.runs.noise_plan import noise_plan_of
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.config.stored import lifted
from tasks.context import Context
from tasks.inputs.samples import caption_counts
from tasks.teaching.cost import KindCost, Size, scores_of
from tasks.teaching.families import family_of
from tasks.teaching.noise import planned
from tasks.teaching.retraining_costs import retraining_costs

TRIAL_SECONDS = 1.0
TRIAL_SHARES = 4  # of that time for each number of forwards at a time


@dataclass(frozen=True)
class Rate:
    """Forward passes a second of one device, and the source of the figure.

    of_whole_parts: it is of whole score shards, so that whatever they do beside the passes is in it.
    """

    forwards_per_second: float
    source: str
    of_whole_parts: bool = False


def run_costs(context: Context, size: Size) -> list[KindCost]:
    """Return what each kind of part takes, the judge's pool included."""
    return costs_of(context.config, size)


def costs_of(config: PipelineConfig, size: Size) -> list[KindCost]:
    """Return the same of a configuration whose model and tars need not be there."""
    return [*family_of(config).costs(config, size), *retraining_costs(config, size, Workspace.at(config.workspace))]


def known_rate(context: Context) -> Rate | None:
    """Return the rate by the configuration, else by earlier runs of this model here; None where neither tells."""
    configured = context.config.execution.forwards_per_second
    if configured is not None:
        return Rate(configured, "execution.forwards_per_second")
    return _measured(context.workspace, context.model_hash)


def rate(context: Context) -> Rate:
    """Return `known_rate`, else the rate of a short trial on this machine's device."""
    return known_rate(context) or _trial(context)


def _measured(workspace: Workspace, model_hash: str) -> Rate | None:
    forwards = seconds = 0.0
    for run in run_names(workspace):
        try:
            assignment = read_assignment(workspace, run)
        except StoreError:
            continue
        if assignment.model_hash != model_hash or not workspace.ledger(run).exists():
            continue
        ledger = tables.read(workspace.ledger(run), tables.SHARDS).to_pydict()
        done = [s for s, state in zip(ledger["seconds"], ledger["state"], strict=True) if state == "done"]
        if not done:
            continue
        try:
            config, _ = lifted(PipelineConfig, assignment.config, f"run {run}")
        except UsageError:
            continue  # another release's, which is no reason why this one should not run
        if (pilots := noise_plan_of(workspace, run)) is not None:
            config = planned(config, pilots.chosen.timesteps, pilots.chosen.draws)
        record = read_run(workspace, run)
        queries = assignment.stages["queries"].rows
        samples = assignment.stages["samples"]
        captions = mean_captions(workspace.file(samples.path))
        size = Size(samples.rows, captions, queries, record.pairs // queries)
        run_forwards = scores_of(family_of(config).costs(config, size)).forwards * len(done) / record.shards
        if run_forwards:  # else it never ran the model
            forwards += run_forwards
            seconds += sum(done)
    return Rate(forwards / seconds, "earlier runs of this model here", of_whole_parts=True) if seconds else None


def mean_captions(samples: AnyPath) -> float:
    """Return the mean number of captions of a training sample."""
    captions, rows = 0, 0
    for counts in caption_counts(samples):
        captions, rows = captions + pc.sum(counts).as_py(), rows + len(counts)
    return captions / rows


@torch.no_grad()
def _trial(context: Context) -> Rate:
    model = context.at_checkpoints()[0].teacher_model()
    rows, fastest = 1, 0.0
    while True:
        try:
            fastest = max(fastest, _forwards_per_second(model, rows))
        except torch.OutOfMemoryError:
            if not fastest:
                raise
            return Rate(fastest, f"a trial of {TRIAL_SECONDS:.0f} s on {context.device}, {rows // 2} at a time")
        if rows >= context.config.model.micro_batch or 2 * rows > fastest * TRIAL_SECONDS:
            return Rate(fastest, f"a trial of {TRIAL_SECONDS:.0f} s on {context.device}, {rows} at a time")
        rows = min(2 * rows, context.config.model.micro_batch)


def _forwards_per_second(model: DiffusionModel, rows: int) -> float:
    """Return the forwards a second of so many at a time, over a part of the trial's time; at least one pass counts."""
    condition = model.encode_captions(["a trial"] * rows)
    noise = torch.zeros(rows, *model.latent_shape, device=model.device)
    timesteps = torch.zeros(rows, dtype=torch.long, device=model.device)

    def forward() -> None:
        model.losses(noise, condition, timesteps, noise).sum().item()

    forward()
    started, count = time.monotonic(), 0
    while not count or time.monotonic() - started < TRIAL_SECONDS / TRIAL_SHARES:
        forward()
        count += rows
    return count / (time.monotonic() - started)


def median_seconds(manifests: Iterable[Manifest]) -> float | None:
    """Return the median seconds of the work behind some parts; None where there are fewer than three."""
    seconds = sorted(manifest.seconds for manifest in manifests)
    return seconds[len(seconds) // 2] if len(seconds) >= 3 else None
