"""Read the tars and encode samples by the workers of a run, before it is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastgda_core.errors import UsageError
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.execution.coordinator import begin_run
from tasks.execution.worker import leave_for_good
from tasks.inputs.features import FeatureParts, extract_features
from tasks.inputs.samples import ingest_samples, missing_samples
from tasks.teaching.preparation import Preparation
from tasks.teaching.run import let_go, read_work


def make_samples(context: Context) -> Made:
    """Have the tars read in parts, as a run's parts are made, and join these into the tables of samples.

    Raises:
        UsageError: there is no tar, or no usable sample in them.
        RunIncomplete: parts failed for good.
        RunCancelled: somebody asked for it.
    """
    parts = missing_samples(context)
    if parts is not None and parts.count > 1:  # a single one is joined by the process that reads it
        make_all(Preparation.of_samples(context, parts))
    return ingest_samples(context)


def make_features(context: Context, samples: Artifact, also: Sequence[Context] = ()) -> Made:
    """Have samples encoded in parts, as a run's parts are made: each image once, for all encoders.

    Args:
        context: whose feature space is returned.
        samples: to be encoded.
        also: contexts with other feature spaces, whose encoders see the images at the same time.

    Raises:
        RunIncomplete: parts failed for good.
        RunCancelled: somebody asked for it.
    """
    parts = FeatureParts.of(context, samples, [context, *also])
    if parts.count > 1 and parts.missing():
        make_all(Preparation.of_features(context, parts))
    return extract_features(context, samples)


def stored_preparation(config: PipelineConfig, name: str) -> Preparation:
    """Return a preparation of the configuration's workspace, to be carried out as the configuration says.

    Raises:
        UsageError: it is a run.
    """
    work = read_work(config.workspace, name)
    if not isinstance(work, Preparation):
        raise UsageError(f"{name} is a run: `fastgda retry` makes what it lacks")
    return replace(work, context=replace(work.context, config=config))


def make_all(preparation: Preparation) -> None:
    """Make every part of a preparation that is missing."""
    try:
        with begin_run(preparation) as coordinator:
            for kind in preparation.parts:
                coordinator.make(kind)
    finally:
        let_go(preparation)  # with its encoders, before others need the device
        leave_for_good(str(preparation.workspace.root), preparation.name)
