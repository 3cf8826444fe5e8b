"""The teacher's work: curvature, one unlearning step per query, base losses, score shards."""

from __future__ import annotations

import functools
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgda_core.curvature.ekfac import EkfacFisher, fit_ekfac, load_ekfac
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key, uniform
from fastgda_core.errors import TransientError
from fastgda_core.search.index import build_index, search
from fastgda_core.teachers.gradients import cross_attention_kv_layers
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import training_losses
from fastgda_core.teachers.unlearning import query_gradient, unlearning_update
from storage_schemas import tables
from storage_schemas.commit import commit, commit_table, committed, input_key
from storage_schemas.workspace import part
from tasks.config import TeacherConfig
from tasks.context import Context, Stage, stage_of_parts
from tasks.features import load_features
from tasks.progress import stage
from tasks.queries import Query, load_queries
from tasks.samples import load_block
from tasks.score_plan import ScoreRun, ScoreShard

CURVATURE_BATCH = 32
BASE_LOSS_PART = 512


@task(task_run_name="curvature", cache_policy=NO_CACHE)
def fit_curvature(context: Context, latents: Stage) -> Stage:
    """EK-FAC factors of the cross-attention key/value layers over sampled (training image, eps, t)."""
    config = context.config.curvature
    key = input_key("curvature", latents.key, config)
    path = context.workspace.curvature(key)
    manifest = committed(path, key)
    reused = manifest is not None
    if manifest is None:
        started = time.monotonic()
        with stage("curvature", config.samples) as advance:
            model = context.model()

            def loss(unet: torch.nn.Module, batch: list[Tensor]) -> Tensor:
                # kronfluence passes over the data twice: for A and B, then for Lambda.
                advance(len(batch[0]) / 2)
                return per_sample_loss(unet, model.scheduler, *batch).sum()

            fisher = fit_ekfac(
                model.unet,
                list(cross_attention_kv_layers(model.unet)),
                _curvature_dataset(context, latents),
                loss,
                CURVATURE_BATCH,
                context.device,
            )
        manifest = commit(path, fisher.save, key=key, rows=config.samples, started=started, device=str(context.device))
    return Stage("curvature", key, path, manifest.rows, manifest.seconds, reused)


def _curvature_dataset(context: Context, latents: Stage) -> torch.utils.data.TensorDataset:
    """(latent, text, timestep, noise) rows: random samples, timesteps spread evenly over the schedule."""
    config, model = context.config.curvature, context.model()
    draw = random.Random(config.seed)
    population = range(latents.rows)
    if config.samples <= latents.rows:
        chosen = draw.sample(population, config.samples)
    else:
        chosen = draw.choices(population, k=config.samples)
    block = load_block(context, latents, chosen)
    first_caption = torch.nonzero(block.caption_number == 0).flatten()
    row = torch.arange(config.samples)
    steps = model.scheduler.config.num_train_timesteps
    offsets = uniform(stream_key(config.seed, "curvature timesteps"), 0, config.samples)
    timesteps = ((row + offsets) / config.samples * steps).long().clamp_(max=steps - 1)
    timesteps = timesteps[torch.randperm(config.samples, generator=torch.Generator().manual_seed(config.seed))]
    noise = gaussian_noise(stream_key(config.seed, "curvature noise"), row, timesteps, row % 2**16, model.latent_shape)
    return torch.utils.data.TensorDataset(block.latents.cpu(), block.text[first_caption].cpu(), timesteps, noise)


@task(task_run_name="unlearning steps", cache_policy=NO_CACHE)
def unlearn_queries(context: Context, latents: Stage, curvature: Stage, queries: Stage) -> Stage:
    """Delta theta of every query, one file each."""
    config = context.config.teacher
    training_size = config.training_size or latents.rows
    key = input_key(
        "updates", curvature.key, queries.key, config.alpha, training_size, config.gradient_pairs, config.seed
    )
    folder = context.workspace.updates(key)
    paths = [part(folder, number, "safetensors") for number in range(queries.rows)]
    missing = [number for number, path in enumerate(paths) if committed(path, key) is None]
    with stage("unlearning steps", len(missing)) as advance:
        fisher = load_ekfac(curvature.path).to(context.device) if missing else None
        for number in missing:
            assert fisher is not None
            started = time.monotonic()
            update = _unlearn(context, load_queries(queries)[number], fisher, training_size)
            commit(
                paths[number],
                functools.partial(save_file, update),
                key=key,
                rows=1,
                started=started,
                device=str(context.device),
            )
            advance(1)
    return stage_of_parts("unlearning steps", key, folder, paths, queries.rows, reused=not missing)


def _unlearn(context: Context, query: Query, fisher: EkfacFisher, training_size: int) -> dict[str, Tensor]:
    config, model = context.config.teacher, context.model()
    gradient = query_gradient(
        model,
        model.encode_images([query.image])[0],
        model.encode_captions([query.caption])[0],
        owner=query.owner,
        seed=config.seed,
        pairs=config.gradient_pairs,
        micro_batch=context.config.model.micro_batch,
    )
    update = unlearning_update(fisher, gradient, alpha=config.alpha, training_size=training_size)
    return {name: layer.cpu().contiguous() for name, layer in update.items()}


@functools.lru_cache(maxsize=1)
def _load_updates(updates: Stage, numbers: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Delta theta of some queries by layer, (queries, d_out, d_in)."""
    loaded = [load_file(part(updates.path, number, "safetensors")) for number in numbers]
    return {name: torch.stack([update[name] for update in loaded]).to(device) for name in loaded[0]}


@task(task_run_name="candidates", cache_policy=NO_CACHE)
def choose_candidates(context: Context, run: str, samples: Stage, queries: Stage) -> Stage:
    """Each query's candidates: its nearest training samples in the untuned feature space, or all of them."""
    config = context.config
    path = context.workspace.candidates(run)
    manifest = committed(path, run)
    reused = manifest is not None
    if manifest is None:
        started = time.monotonic()
        k = config.candidates.k or samples.rows
        sample_features = torch.nn.functional.normalize(load_features(context, samples), dim=1).numpy()
        query_features = torch.nn.functional.normalize(load_features(context, queries), dim=1).numpy()
        similarity, train_ids = search(build_index(sample_features, np.arange(samples.rows)), query_features, k)
        names = [query.query_id for query in load_queries(queries)]
        table = pa.table(
            {
                "query_id": np.repeat(np.array(names, dtype=object), k),
                "train_id": train_ids.ravel(),
                "neighbor_rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(names)),
                "similarity": similarity.ravel(),
            }
        )
        manifest = commit_table(path, table, tables.CANDIDATES, key=run, started=started)
    return Stage("candidates", run, path, manifest.rows, manifest.seconds, reused)


def noise_plan(config: TeacherConfig) -> NoisePlan:
    return NoisePlan(
        seed=config.seed, timesteps=config.timesteps, draws=config.draws, first_timestep=config.first_timestep
    )


@task(task_run_name="base losses", cache_policy=NO_CACHE)
def compute_base_losses(context: Context, latents: Stage) -> Stage:
    """L(z_i, theta_0) of every sample under the noise plan, in parts of 512: what the exact teacher subtracts."""
    plan = noise_plan(context.config.teacher)
    key = input_key("base losses", latents.key, plan.seed, plan.timesteps, plan.first_timestep, plan.draws)
    folder = context.workspace.base_losses(key)
    starts = range(0, latents.rows, BASE_LOSS_PART)
    paths = [part(folder, number) for number in range(len(starts))]
    missing = [number for number, path in enumerate(paths) if committed(path, key) is None]
    with stage("base losses", len(missing)) as advance:
        for number in missing:
            started = time.monotonic()
            stop = min(starts[number] + BASE_LOSS_PART, latents.rows)
            block = load_block(context, latents, list(range(starts[number], stop)))
            losses = training_losses(context.model(), plan, block, context.config.model.micro_batch)
            table = pa.table({"train_id": block.train_ids.cpu().numpy(), "base_loss": losses.cpu().numpy()})
            commit_table(paths[number], table, tables.BASE_LOSSES, key=key, started=started)
            advance(1)
    return stage_of_parts("base losses", key, folder, paths, latents.rows, reused=not missing)


@functools.lru_cache(maxsize=1)
def _load_base_losses(base_losses: Stage) -> Tensor:
    return torch.from_numpy(tables.read_parts(base_losses.path, tables.BASE_LOSSES)["base_loss"].to_numpy().copy())


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
    path = part(context.workspace.scores(score_run.run), shard.number)
    manifest = committed(path, score_run.shard_key(shard))
    if manifest is not None:
        return manifest.rows
    started = time.monotonic()
    block = load_block(context, latents, shard.train_ids)
    numbers = tuple(shard.query_numbers)
    deltas = _load_updates(updates, numbers, context.device)
    plan, micro_batch = noise_plan(context.config.teacher), context.config.model.micro_batch
    if base_losses is None:
        scores = first_order_scores(context.model(), plan, block, deltas, micro_batch)
    else:
        base = _load_base_losses(base_losses)[block.train_ids.cpu()].to(context.device)
        update = {name: delta[0] for name, delta in deltas.items()}
        scores = exact_scores(context.model(), plan, block, base, update, micro_batch)[None]
    table = _pair_rows(score_run, shard, block.train_ids.cpu().numpy(), scores.cpu().numpy())
    key = score_run.shard_key(shard)
    commit_table(path, table, tables.SCORES, key=key, started=started, device=str(context.device))
    return table.num_rows


def _pair_rows(
    score_run: ScoreRun, shard: ScoreShard, train_ids: NDArray[np.int64], scores: NDArray[np.float64]
) -> pa.Table:
    """The (query, sample) pairs of a shard that are candidates, as score rows."""
    chosen = score_run.is_candidate[np.ix_(shard.query_numbers, train_ids)]
    query, sample = np.nonzero(chosen)
    names = np.array([score_run.query_ids[number] for number in shard.query_numbers], dtype=object)
    return pa.table({"query_id": names[query], "train_id": train_ids[sample], "score": scores[query, sample]})


@task(task_run_name="exact check", cache_policy=NO_CACHE)
def check_against_exact(context: Context, score_run: ScoreRun, latents: Stage, queries: Stage, updates: Stage) -> Stage:
    """Score a few test queries with the exact teacher too, on candidates spread evenly over the first-order ranking."""
    config = context.config.exact_check
    assert config is not None
    run = score_run.run
    key = input_key("exact check", run, config)
    folder = context.workspace.exact_check(key)
    chosen = [number for number, query in enumerate(load_queries(queries)) if query.split == "test"][: config.queries]
    paths = {number: part(folder, number) for number in chosen}
    missing = [number for number in chosen if committed(paths[number], key) is None]
    with stage("exact check", len(missing)) as advance:
        scores = tables.read_parts(context.workspace.scores(run), tables.SCORES) if missing else None
        for number in missing:
            assert scores is not None
            started = time.monotonic()
            mine = scores.filter(pc.equal(scores["query_id"], score_run.query_ids[number])).sort_by(
                [("score", "descending"), ("train_id", "ascending")]
            )
            take = np.unique(np.linspace(0, mine.num_rows - 1, config.candidates).round().astype(int))
            block = load_block(context, latents, sorted(mine["train_id"].take(take).to_pylist()))
            plan, micro_batch = noise_plan(context.config.teacher), context.config.model.micro_batch
            base = training_losses(context.model(), plan, block, micro_batch)
            update = {name: delta[0] for name, delta in _load_updates(updates, (number,), context.device).items()}
            exact = exact_scores(context.model(), plan, block, base, update, micro_batch)
            names = [score_run.query_ids[number]] * len(exact)
            table = pa.table(
                {"query_id": names, "train_id": block.train_ids.cpu().numpy(), "score": exact.cpu().numpy()}
            )
            commit_table(paths[number], table, tables.SCORES, key=key, started=started)
            advance(1)
    rows = tables.read_parts(folder, tables.SCORES).num_rows
    return stage_of_parts("exact check", key, folder, list(paths.values()), rows, reused=not missing)
