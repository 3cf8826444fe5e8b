"""Score shards: the teacher's scores of (query, training sample) pairs."""

from __future__ import annotations

import functools
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table
from storage_schemas.files import is_there
from storage_schemas.runs.attempts import ShardState
from storage_schemas.runs.ledger import read_ledger
from storage_schemas.which_workspace import command
from tasks.context import Context
from tasks.parts import Parts, RunRefused, Standing
from tasks.teaching.families import Artifacts, BlockScores, Family
from tasks.teaching.score_plan import ScoreRun, ScoreShard, plan_scores

MOST_LEFT_OUT = 0.1  # of the samples


class ScoreParts(Parts):
    """The score shards of a run."""

    kind = "scores"
    title = "teacher scores"

    def __init__(self, context: Context, family: Family, artifacts: Artifacts) -> None:
        self.context, self.family, self.artifacts = context, family, artifacts
        self.artifact = artifacts["scores"]

    @functools.cached_property
    def score_run(self) -> ScoreRun:
        """The plan of the run's pairs, made again from its candidates."""
        shape = self.family.shard_shape(self.context.config, self.artifacts["queries"].rows)
        return plan_scores(self.artifacts["candidates"], self.artifacts["queries"], shape)

    @functools.cached_property
    def _planned(self) -> dict[int, int]:
        """Pairs of each shard, from the stored plan: no pair is looked at."""
        plan = tables.read(self.context.workspace.plan_shards(self.artifact.key), tables.PLAN_SHARDS)
        return dict(zip(plan["shard"].to_pylist(), plan["pairs"].to_pylist(), strict=True))

    @property
    def count(self) -> int:
        return len(self._planned)

    def key(self, number: int) -> str:
        return self.score_run.shard_key(self.score_run.shards[number])

    def rows(self, number: int) -> int:
        return self._planned[number]

    def make(self, number: int) -> Manifest:
        started, shard = time.monotonic(), self.score_run.shards[number]
        block = self.family.scores(self.context, self.artifacts, shard.query_numbers, shard.train_ids)
        rows = _pair_rows(self.score_run, shard, block)
        path, key, device = self.path(number), self.key(number), str(self.context.device)
        return commit_table(
            path, rows, tables.SCORES, key=key, started=started, device=device, quarantined=block.left_out
        )

    def standing(self) -> Standing:
        """Return how far the shards are, by plan and ledger alone: shards may lie in large files by now."""
        ledger = read_ledger(self.context.workspace, self.artifact.key)
        open_shards = ledger.filter(pc.not_equal(ledger["state"].cast(pa.string()), ShardState.done.value))
        return Standing(sorted(open_shards["shard"].to_pylist()), float(sum(ledger["seconds"].to_pylist())))

    def check(self) -> None:
        """Raise RunRefused where too many samples were left out for the samples to be to blame."""
        workspace, run = self.context.workspace, self.artifact.key
        path = workspace.quarantined_samples(run)
        if not is_there(path):
            return
        reasons, samples = tables.read(path, tables.QUARANTINED_SAMPLES)["reason"], self.artifacts["samples"].rows
        if len(reasons) > max(2, MOST_LEFT_OUT * samples):
            raise RunRefused(
                f"run {run}: {len(reasons):,} of {samples:,} samples had to be left out, the first because: "
                f"{reasons[0].as_py()}: look at the model and the tars, then {command(workspace, f'retry {run}')}"
            )


def _pair_rows(score_run: ScoreRun, shard: ScoreShard, block: BlockScores) -> pa.Table:
    """Return the (query, sample) pairs of a shard that are candidates, as score rows."""
    train_ids = block.train_ids
    chosen = np.stack([score_run.chosen(number, train_ids) for number in shard.query_numbers])
    query, sample = np.nonzero(chosen)
    names = np.array([score_run.query_ids[number] for number in shard.query_numbers], dtype=object)
    chosen_scores, errors = (values.numpy()[query, sample] for values in (block.scores, block.errors))
    if not np.isfinite(chosen_scores).all():
        # Such scores have no rank. The losses were numbers, so the model is to blame: trying again does not help.
        where = int(np.flatnonzero(~np.isfinite(chosen_scores))[0])
        raise FloatingPointError(
            f"{np.count_nonzero(~np.isfinite(chosen_scores))} of {len(chosen_scores)} scores are not finite, first "
            f"that of query {names[query][where]} and train_id {train_ids[sample][where]}: "
            "use teacher.precision float32 and look at the model's loss on that sample"
        )
    return tables.SCORES.rows(
        query_id=names[query],
        train_id=train_ids[sample],
        score=chosen_scores,
        standard_error=pa.array(errors, pa.float32(), from_pandas=True),  # NaN: null
    )
