"""Score shards: the teacher's scores of (query, training sample) pairs."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.teachers.registry import TEACHERS
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table
from storage_schemas.files import AnyPath
from tasks.context import Context, Stage, noise_plan
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.base_losses import load_base_losses, without_base_loss
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.score_plan import ScoreRun, ScoreShard
from tasks.teaching.unlearning import QueryUpdates


class ScoreParts:
    """The score shards of a run."""

    kind = "scores"

    def __init__(
        self, context: Context, score_run: ScoreRun, latents: Stage, updates: Stage, base_losses: Stage | None
    ) -> None:
        self.context, self.score_run = context, score_run
        self.latents, self.updates, self.base_losses = latents, updates, base_losses
        self.count = len(score_run.shards)

    def path(self, number: int) -> AnyPath:
        return self.context.workspace.score_shard(self.score_run.run, number)

    def key(self, number: int) -> str:
        return self.score_run.shard_key(self.score_run.shards[number])

    def rows(self, number: int) -> int:
        return self.score_run.pairs_of(self.score_run.shards[number])

    def make(self, number: int) -> Manifest:
        started = time.monotonic()
        shard = self.score_run.shards[number]
        known = unreadable_samples(self.latents, shard.train_ids.tolist())
        if self.base_losses is not None:
            known |= without_base_loss(self.base_losses, shard.train_ids)
        nothing = torch.empty(len(shard.query_numbers), 0, dtype=torch.float64)
        good, scores, bad = without_bad_samples(
            shard.train_ids, known, lambda chosen: self._scores(shard, chosen), nothing
        )
        rows = _pair_rows(self.score_run, shard, good, scores.numpy())
        path, key, device = self.path(number), self.key(number), str(self.context.device)
        return commit_table(path, rows, tables.SCORES, key=key, started=started, device=device, quarantined=bad)

    def _scores(self, shard: ScoreShard, train_ids: NDArray[np.int64]) -> Tensor:
        """(queries, n) float64 of some of the shard's samples."""
        context = self.context
        config, model = context.config.teacher, context.teacher_model()
        block = load_block(context, self.latents, train_ids.tolist())
        base = load_base_losses(self.base_losses)[block.train_ids.cpu()] if self.base_losses else None
        return (
            TEACHERS[config.name]
            .scores(
                model,
                context.layers(model),
                noise_plan(context.config),
                block,
                QueryUpdates(self.updates, shard.query_numbers, config.loaded_queries, context.device),
                base.to(context.device) if base is not None else None,
                context.micro_batch("gradients" if base is None else "losses"),
            )
            .cpu()
        )


def _pair_rows(
    score_run: ScoreRun, shard: ScoreShard, train_ids: NDArray[np.int64], scores: NDArray[np.float64]
) -> pa.Table:
    """The (query, sample) pairs of a shard that are candidates, as score rows."""
    chosen = np.stack([score_run.chosen(number, train_ids) for number in shard.query_numbers])
    query, sample = np.nonzero(chosen)
    names = np.array([score_run.query_ids[number] for number in shard.query_numbers], dtype=object)
    chosen_scores = scores[query, sample]
    if not np.isfinite(chosen_scores).all():
        # They have no rank. Losses were numbers, so what is not comes from the model: trying again is idle.
        where = int(np.flatnonzero(~np.isfinite(chosen_scores))[0])
        raise FloatingPointError(
            f"{np.count_nonzero(~np.isfinite(chosen_scores))} of {len(chosen_scores)} scores are not finite, first "
            f"that of query {names[query][where]} and train_id {train_ids[sample][where]}: "
            "use teacher.precision float32 and look at the model's loss on that sample"
        )
    return tables.SCORES.rows(query_id=names[query], train_id=train_ids[sample], score=chosen_scores)
