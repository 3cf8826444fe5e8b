"""The teacher's work: base losses and score shards."""

from __future__ import annotations

import functools
import time

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import TransientError
from fastgda_core.teachers.teachers import TEACHERS
from fastgda_core.teachers.training_loss import training_losses
from storage_schemas import tables
from storage_schemas.commit import commit_table, committed, input_key
from storage_schemas.ledger import AttemptLog
from storage_schemas.workspace import Workspace, part
from tasks.config import PipelineConfig
from tasks.context import Context, Stage, stage_of_parts
from tasks.progress import stage
from tasks.samples import load_block
from tasks.score_plan import ScoreRun, ScoreShard
from tasks.unlearning import QueryUpdates

BASE_LOSS_PART = 512


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


@task(task_run_name="base losses", cache_policy=NO_CACHE)
def compute_base_losses(context: Context, latents: Stage) -> Stage:
    """L(z_i, theta_0) of every sample under the noise plan, in parts of 512: what the exact teacher subtracts."""
    plan = noise_plan(context.config)
    key = input_key("base losses", latents.key, plan, context.config.teacher.precision)
    folder = context.workspace.base_losses(key)
    starts = range(0, latents.rows, BASE_LOSS_PART)
    paths = [part(folder, number) for number in range(len(starts))]
    missing = [number for number, path in enumerate(paths) if committed(path, key) is None]
    with stage("base losses", len(missing)) as advance:
        for number in missing:
            started = time.monotonic()
            stop = min(starts[number] + BASE_LOSS_PART, latents.rows)
            block = load_block(context, latents, list(range(starts[number], stop)))
            losses = training_losses(context.teacher_model(), plan, block, context.micro_batch("losses")).cpu()
            table = tables.BASE_LOSSES.rows(
                train_id=block.train_ids.cpu().repeat_interleave(block.flips).numpy(),
                flip=np.tile(np.arange(block.flips, dtype=np.int32), len(losses)),
                base_loss=losses.flatten().numpy(),
            )
            commit_table(paths[number], table, tables.BASE_LOSSES, key=key, started=started, device=str(context.device))
            advance(1)
    return stage_of_parts("base losses", key, folder, paths, latents.rows, reused=not missing)


@functools.lru_cache(maxsize=1)
def _load_base_losses(base_losses: Stage) -> Tensor:
    """L(z_i, theta_0), (samples, f), row number = train_id."""
    flat = tables.read_parts(base_losses.path, tables.BASE_LOSSES)["base_loss"].to_numpy().copy()
    return torch.from_numpy(flat).view(base_losses.rows, -1)


@task(
    task_run_name="scores {shard.name}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=lambda _task, _run, state: isinstance(state.result(raise_on_failure=False), TransientError),
)
def score_shard(
    context: Context, score_run: ScoreRun, shard: ScoreShard, latents: Stage, updates: Stage, base_losses: Stage | None
) -> int:
    """Score one shard and commit its rows; a shard that is there already costs nothing."""
    path, key = context.workspace.score_shard(score_run.run, shard.number), score_run.shard_key(shard)
    manifest = committed(path, key)
    if manifest is not None:
        return manifest.rows
    started = time.monotonic()
    with _attempt_log(context.workspace, score_run.run).attempt(shard.number, str(context.device)):
        table = _score(context, score_run, shard, latents, updates, base_losses)
        commit_table(path, table, tables.SCORES, key=key, started=started, device=str(context.device))
    return table.num_rows


@functools.lru_cache(maxsize=4)
def _attempt_log(workspace: Workspace, run: str) -> AttemptLog:
    """One file of attempt records a process and run."""
    return AttemptLog(workspace, run)


def _score(
    context: Context, score_run: ScoreRun, shard: ScoreShard, latents: Stage, updates: Stage, base_losses: Stage | None
) -> pa.Table:
    config, model = context.config.teacher, context.teacher_model()
    block = load_block(context, latents, shard.train_ids)
    scores = TEACHERS[config.name].scores(
        model,
        context.layers(model),
        noise_plan(context.config),
        block,
        QueryUpdates(updates, shard.query_numbers, config.loaded_queries, context.device),
        _load_base_losses(base_losses)[block.train_ids.cpu()].to(context.device) if base_losses else None,
        context.micro_batch("losses" if base_losses else "gradients"),
    )
    return _pair_rows(score_run, shard, block.train_ids.cpu().numpy(), scores.cpu().numpy())


def _pair_rows(
    score_run: ScoreRun, shard: ScoreShard, train_ids: NDArray[np.int64], scores: NDArray[np.float64]
) -> pa.Table:
    """The (query, sample) pairs of a shard that are candidates, as score rows."""
    chosen = score_run.is_candidate[np.ix_(shard.query_numbers, train_ids)]
    query, sample = np.nonzero(chosen)
    names = np.array([score_run.query_ids[number] for number in shard.query_numbers], dtype=object)
    chosen_scores = scores[query, sample]
    if not np.isfinite(chosen_scores).all():
        # They have no rank. A score that is no number comes from the model, not from the machine: trying again is idle.
        where = int(np.flatnonzero(~np.isfinite(chosen_scores))[0])
        raise FloatingPointError(
            f"{np.count_nonzero(~np.isfinite(chosen_scores))} of {len(chosen_scores)} scores are not finite, first "
            f"that of query {names[query][where]} and train_id {train_ids[sample][where]}: "
            "use teacher.precision float32 and look at the model's loss on that sample"
        )
    return tables.SCORES.rows(query_id=names[query], train_id=train_ids[sample], score=chosen_scores)
