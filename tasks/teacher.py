"""The teacher's work: base losses and score shards."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import NonFiniteLoss
from fastgda_core.teachers.teachers import TEACHERS
from fastgda_core.teachers.training_loss import training_losses
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from storage_schemas.files import AnyPath
from storage_schemas.workspace import part
from tasks.config import PipelineConfig
from tasks.context import Context, Stage
from tasks.samples import load_block, unreadable_samples
from tasks.score_plan import ScoreRun, ScoreShard
from tasks.unlearning import QueryUpdates

BASE_LOSS_PART = 512
FEW_SAMPLES = 2  # of which nothing can be said about the model


def noise_plan(config: PipelineConfig, seed: int | None = None) -> NoisePlan:
    """The run's noise plan, or the same one with other noise."""
    teacher = config.teacher
    return NoisePlan(
        seed=teacher.seed if seed is None else seed,
        timesteps=teacher.timestep_list or teacher.timesteps,
        draws=teacher.draws,
        first_timestep=teacher.first_timestep,
        weights=teacher.timestep_weights,
        antithetic=teacher.antithetic,
    )


def base_losses_of(context: Context, latents: Stage) -> Stage:
    """Where L(z_i, theta_0) of every sample under the noise plan lies, or will: what the exact teacher subtracts."""
    teacher = context.config.teacher
    noise = noise_plan(context.config)
    key = input_key("base losses", latents.key, noise, teacher.precision, teacher.objective, table=tables.BASE_LOSSES)
    return Stage("base losses", key, context.workspace.base_losses(key), latents.rows, 0.0, True)


class BaseLossParts:
    """L(z_i, theta_0) of every sample under the noise plan, in parts of 512."""

    kind = "base losses"

    def __init__(self, context: Context, latents: Stage, base_losses: Stage) -> None:
        self.context, self.latents, self.stage = context, latents, base_losses
        self.count = -(-latents.rows // BASE_LOSS_PART)

    def path(self, number: int) -> AnyPath:
        return part(self.stage.path, number)

    def key(self, number: int) -> str:
        return self.stage.key

    def rows(self, number: int) -> int:
        return min(BASE_LOSS_PART, self.latents.rows - number * BASE_LOSS_PART)

    def make(self, number: int) -> Manifest:
        context, started = self.context, time.monotonic()
        first = number * BASE_LOSS_PART
        train_ids = np.arange(first, first + self.rows(number))

        def losses_of(chosen: NDArray[np.int64]) -> Tensor:
            block = load_block(context, self.latents, chosen.tolist())
            model, plan = context.teacher_model(), noise_plan(context.config)
            return training_losses(model, plan, block, context.micro_batch("losses")).cpu()

        known, flips = unreadable_samples(self.latents, train_ids.tolist()), 2 if context.config.model.flips else 1
        good, losses, bad = without_bad_samples(train_ids, known, losses_of, torch.empty(0, flips, dtype=torch.float64))
        whole = torch.full((len(train_ids), losses.shape[1]), torch.nan, dtype=torch.float64)
        whole[torch.from_numpy(np.isin(train_ids, good))] = losses
        table = tables.BASE_LOSSES.rows(
            train_id=np.repeat(train_ids, whole.shape[1]),
            flip=np.tile(np.arange(whole.shape[1], dtype=np.int32), len(train_ids)),
            base_loss=whole.flatten().numpy(),
        )
        path, key, device = self.path(number), self.key(number), str(context.device)
        return commit_table(path, table, tables.BASE_LOSSES, key=key, started=started, device=device, quarantined=bad)


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
            known |= _without_base_loss(self.base_losses, shard.train_ids)
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
        base = _load_base_losses(self.base_losses)[block.train_ids.cpu()] if self.base_losses else None
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


def without_bad_samples(
    train_ids: NDArray[np.int64],
    known: Mapping[int, str],
    compute: Callable[[NDArray[np.int64]], Tensor],
    nothing: Tensor,
) -> tuple[NDArray[np.int64], Tensor, dict[int, str]]:
    """`compute` of those samples whose losses are numbers: which those are, its result, and why the others are not.

    Args:
        train_ids: ascending.
        known: some of them that have none, and why.
        nothing: the result where none of them has one.

    Raises:
        NonFiniteLoss: more than half of several have none: the model is to blame, not they.
    """
    found: dict[int, str] = {}
    while True:
        good = train_ids[~np.isin(train_ids, list(known) + list(found))]
        try:
            return good, compute(good) if len(good) else nothing, {**known, **found}
        except NonFiniteLoss as error:
            found |= dict.fromkeys(error.train_ids, str(error))
            if len(found) > max(FEW_SAMPLES, len(train_ids) // 2):
                raise


def forget() -> None:
    """Load base losses anew when they are next needed."""
    _load_base_losses.cache_clear()


@functools.lru_cache(maxsize=1)
def _load_base_losses(base_losses: Stage) -> Tensor:
    """L(z_i, theta_0), (samples, f), row number = train_id; NaN of samples that have none."""
    flat = tables.read_parts(base_losses.path, tables.BASE_LOSSES)["base_loss"].to_numpy().copy()
    return torch.from_numpy(flat).view(base_losses.rows, -1)


def _without_base_loss(base_losses: Stage, train_ids: NDArray[np.int64]) -> dict[int, str]:
    missing = _load_base_losses(base_losses)[torch.from_numpy(train_ids)].isnan().any(1).numpy()
    return dict.fromkeys(train_ids[missing].tolist(), "it has no base loss")


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
