"""Solve a head of kind gradient: training samples stand for queries, and no teacher is asked."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.evaluation.ranking_metrics import average_precision, top_mask
from fastgda_core.ranking.query_tower import GradientHead, TowerMoments, principal_axes
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from storage_schemas.commit import Manifest, code_version, commit, input_key
from storage_schemas.heads.records import HEAD_FILE, as_json
from tasks.artifact import Artifact, Made, once
from tasks.context import Context
from tasks.distilling.answering import predicted_sketches
from tasks.distilling.head_space import space_record
from tasks.distilling.labels import Labels
from tasks.distilling.ranks import candidate_scores, rows_of_split
from tasks.inputs.features import load_features, load_query_features
from tasks.inputs.queries import joined_queries
from tasks.progress import stage
from tasks.teaching.latents import load_block
from tasks.teaching.run import read_run_anew
from tasks.teaching.sketch_scores import StoredSketches

RIDGES = (1.0, 10.0, 100.0)
COSINES = (0.0, 0.125, 0.25, 0.5)  # deviations of the features' inner product, to one of the sketches'
BLOCK = 256  # samples whose latents are loaded together


@task(task_run_name="gradient head", cache_policy=NO_CACHE)
def fit_gradient_head(context: Context, labels: Labels, features: Artifact) -> Made:
    """Solve a head, unless it is there: `head.safetensors` and `head.json` of a head version.

    Ridge and weight of the features are those with the best mAP on the validation queries.
    """
    config, workspace = context.config.head.gradient, context.workspace
    run = read_run_anew(str(workspace.root), labels.run)
    stored = StoredSketches(run.context, run.artifacts, run.name)
    sketches, cutoff = run.artifacts["sketches"], context.config.evaluation.validation_cutoff
    key = input_key("gradient head 2", labels.ranks.key, features.key, sketches.key, config, cutoff)
    folder = workspace.head(key)

    def make(started: float) -> Manifest:
        phi = load_features(context, labels.samples, labels.samples)
        moments = _moments(context, stored, F.normalize(phi, dim=1))
        head, solved = best_head(context, labels, stored, phi, moments)
        record = space_record(context.config.features, workspace).model_copy(
            update={
                "kind": "gradient",
                "loss": "ridge",
                "features": phi.shape[1],
                "run": labels.run,
                "snapshot": labels.ranks.key,
                "solved": solved,
                "origin": flow_run.get_id() or "",
                "code_version": code_version(),
            }
        )
        write = functools.partial(Path.write_bytes, data=as_json(record))
        commit(folder / HEAD_FILE, write, key=key, rows=len(solved), started=started)
        rows, device = min(config.queries, labels.samples.rows), str(context.device)
        return commit(folder / "head.safetensors", head.save, key=key, rows=rows, started=started, device=device)

    return once(Artifact("rank head", key, folder, 0), folder / "head.safetensors", make, alone_in=workspace)


def _moments(context: Context, stored: StoredSketches, phi: Tensor) -> TowerMoments:
    """Sum over training samples, taken as queries, what a tower is solved from."""
    config, moments = context.config.head.gradient, TowerMoments()
    known = stored.train_ids
    chosen = np.random.default_rng(config.seed).permutation(known)[: config.queries]
    with stage("gradient head", len(chosen)) as advance:
        for train_ids, gradients in gradients_as_queries(context, stored, np.sort(chosen)):
            moments.add(gradients, phi[train_ids].to(stored.context.device))
            advance(len(train_ids))
    return moments


def gradients_as_queries(
    context: Context, stored: StoredSketches, train_ids: NDArray[np.int64]
) -> Iterator[tuple[Tensor, SampleGradients]]:
    """Yield some samples at a time, with their gradients over the whole schedule, as queries have them."""
    config, taught = context.config.head.gradient, stored.context
    model = taught.teacher_model()
    model = model.with_objective(model.objective.of_query)
    spacing = model.schedule.train_timesteps // config.timesteps
    plan = NoisePlan(seed=config.seed, timesteps=config.timesteps, draws=1, first_timestep=spacing // 2)
    for start in range(0, len(train_ids), BLOCK):
        some = train_ids[start : start + BLOCK]
        block = load_block(taught, stored.artifacts["latents"], some.tolist())
        first = 0
        for gradients in sample_gradients(model, taught.layers(model), plan, block, taught.micro_batch("gradients")):
            last = first + gradients.count // gradients.flips
            yield torch.from_numpy(some[first:last]), gradients
            first = last


def best_head(
    context: Context, labels: Labels, stored: StoredSketches, phi: Tensor, moments: TowerMoments
) -> tuple[GradientHead, dict[str, float]]:
    """Return the head with the best mAP on the validation queries, and the mAP of every choice by name."""
    config, cutoff = context.config.head.gradient, context.config.evaluation.validation_cutoff
    several, rows = joined_queries(labels.queries), rows_of_split(labels.queries, "validation")
    asked = [several[row] for row in rows.tolist()]
    captions = [query.caption for query in asked]
    scores = candidate_scores(context.workspace, labels.ranks, [query.query_id for query in asked])
    relevant = top_mask(scores.scores, cutoff)
    of_queries = load_query_features(context, labels.queries, labels.samples)[rows]
    axes = principal_axes(F.normalize(phi, dim=1), config.axes)
    near = scores.cosines(F.normalize(of_queries, dim=1) @ axes, lambda ids: F.normalize(phi[ids], dim=1) @ axes)
    heads: dict[str, GradientHead] = {}
    solved: dict[str, float] = {}
    for ridge in RIDGES:
        tower = moments.tower(ridge, stored.sketch, config.size)
        answers = F.normalize(predicted_sketches(stored.context, tower, of_queries, captions).cpu(), dim=1)
        found = scores.cosines(answers, lambda ids: stored.dense(ids)[:, : config.size].cpu())
        unit = _deviation(found, scores.known) / _deviation(near, scores.known) if len(axes.T) else 0.0
        for share in COSINES:
            name = f"ridge {ridge:g}, features {share:g}"
            heads[name] = GradientHead(tower, axes.to(stored.context.device), share * unit)
            both = (found + share * unit * near).masked_fill(~scores.known, -torch.inf)
            solved[name] = average_precision(both, relevant).mean().item()
    return heads[max(solved, key=solved.__getitem__)], solved


def _deviation(scores: Tensor, known: Tensor) -> float:
    """Return the mean over queries of the deviation over a query's candidates."""
    return float(torch.stack([row[mine].std() for row, mine in zip(scores, known, strict=True)]).mean())
