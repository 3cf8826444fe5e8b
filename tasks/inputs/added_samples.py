"""Training samples that come after an index was built: a longer table, whose first rows are those of the old one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.commit import commit_table, committed, input_key
from storage_schemas.files import stamps
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.inputs.samples import (
    describe,
    rejection_rows,
    sample_rows,
    samples_artifact,
    samples_table,
    tell_of_several_pictures,
    warn_of_rejections,
)
from tasks.inputs.tars import RULES, Rejection, ShardSample, scan
from tasks.progress import stage


def append_samples(workspace: Workspace, before: Artifact, tars: Sequence[Path]) -> Artifact:
    """Return the samples `before` and those of some tars behind them, whose train_ids continue; old ones keep theirs.

    A sample whose key is taken is rejected, as in the first reading.

    Raises:
        UsageError: a tar is missing, or there is no usable new sample in them.
    """
    for tar in tars:
        if not tar.is_file():
            raise UsageError(f"{tar} is no file: name WebDataset tars")
    shards = sorted(tar.resolve() for tar in tars)
    key = input_key("samples added", before.key, RULES, stamps(shards), table=tables.SAMPLES)
    path, rejected_path = workspace.samples(key), workspace.rejected_samples(key)
    if committed(path, key) is None or committed(rejected_path, key) is None:
        started = time.monotonic()
        with stage("samples", len(shards)) as advance:
            found, rejections = scan(shards, lambda: advance(1))
        tell_of_several_pictures(each.shard for each in found if each.pictures > 1)
        new, taken = _new_ones(before, found)
        rejections += taken
        if not new:
            first = f"; the first fault: {describe(rejections[0])}" if rejections else ""
            raise UsageError(f"{', '.join(map(str, tars))} holds no usable new sample{first}")
        rejected = rejection_rows(rejections)
        if rejections:
            warn_of_rejections(rejected, workspace)
        commit_table(rejected_path, rejected, tables.REJECTED_SAMPLES, key=key, started=started)
        added = sample_rows(new, before.rows)
        old = samples_table(before.path).cast(added.schema)
        commit_table(path, pa.concat_tables([old, added]), tables.SAMPLES, key=key, started=started)
    return samples_artifact(path)


def _new_ones(before: Artifact, found: list[ShardSample]) -> tuple[list[ShardSample], list[Rejection]]:
    """Part samples whose key is free from those whose key an old sample has."""
    old = samples_table(before.path)
    place = dict(zip(old["key"].to_pylist(), old["shard"].to_pylist(), strict=True))
    new = [sample for sample in found if sample.key not in place]
    reason = "duplicate key, first seen in {}: rename one"
    taken = [Rejection(each.shard, each.key, reason.format(place[each.key])) for each in found if each.key in place]
    return new, taken
