"""Pooled leave-out: one model without what a method named for many queries; these have to suffer, others not.

Source: the pooled evaluation of MUCS (arXiv 2605.17938), which spares a retraining for every query.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.counterfactual import loss_changes, separation, union_of_first
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from tasks.artifact import Artifact, Made, once
from tasks.inputs.features import features_key
from tasks.inputs.queries import load_queries
from tasks.judging.methods import RANDOM, method_scores
from tasks.judging.metric_rows import metric_row
from tasks.teaching.retrainings import REMOVAL_PLAN, RemovalParts, Retraining
from tasks.teaching.run import Run
from tasks.watching.trust import TEACHER

CHANGE, OF_CONTROLS, SEPARATION = "loss change", "loss change of controls", "targets apart from controls"


@task(task_run_name="removal plan", cache_policy=NO_CACHE)
def plan_removals(run: Run, ranks: Artifact) -> Made:
    """Write down what each method names for the targets: what models are trained again without."""
    judge = run.config.judge
    assert judge is not None and judge.leave_out is not None
    plan, config = run.artifacts[REMOVAL_PLAN], judge.leave_out
    key = input_key("removals", ranks.key, config, judge.seed, features_key(run.context, run.artifacts["samples"]))
    targets, _ = _targets_and_controls(run)

    def make(started: float) -> Manifest:
        scores = method_scores(run, ranks, targets)
        rows = [(method, k, removed) for k in config.k for method, removed in _named(scores, k, judge.seed).items()]
        queries = load_queries(run.artifacts["queries"])
        table = tables.REMOVALS.rows(
            method=[method for method, _, _ in rows],
            k=[k for _, k, _ in rows],
            targets=[[queries[number].query_id for number in targets]] * len(rows),
            removed=[removed for _, _, removed in rows],
        )
        return commit_table(plan.path, table, tables.REMOVALS, key=key, started=started)

    return once(Artifact(REMOVAL_PLAN, key, plan.path, 0), plan.path, make)


def _targets_and_controls(run: Run) -> tuple[list[int], list[int]]:
    """Return numbers of the test queries whose samples are removed, and of the others."""
    judge = run.config.judge
    assert judge is not None and judge.leave_out is not None
    several = load_queries(run.artifacts["queries"])
    test = [number for number, query in enumerate(several) if query.split == "test"]
    return test[: judge.leave_out.targets], test[judge.leave_out.targets :]


def _named(scores: Mapping[str, Tensor], k: int, seed: int) -> dict[str, list[int]]:
    """Return what is removed by method: all that is among the first k of any target; by chance as many as the teacher.

    Args:
        scores: (targets, samples) by method.
    """
    found: dict[str, list[int]] = {method: union_of_first(each, k).tolist() for method, each in scores.items()}
    samples, draw = scores[TEACHER].shape[1], torch.Generator().manual_seed(seed)
    most = max(map(len, found.values()))
    if most == samples:
        raise UsageError(f"judge.leave_out removes all {samples:,} samples with k {k}: lower k or targets")
    found[RANDOM] = sorted(torch.randperm(samples, generator=draw)[: len(found[TEACHER])].tolist())
    return found


def leave_out_rows(run: Run) -> list[dict[str, object]]:
    """Return how much the targets of each method lost without what it named, and the controls with them."""
    parts = run.parts[RemovalParts.kind]
    assert isinstance(parts, RemovalParts) and parts.config.leave_out is not None
    targets, controls = _targets_and_controls(run)
    seeds = range(parts.config.seed, parts.config.seed + parts.config.leave_out.seeds)
    rows: list[dict[str, object]] = []
    for removal in tables.read(parts.plan.path, tables.REMOVALS).to_pylist():
        changes = _mean_change(parts, tuple(removal["removed"]), seeds)
        row = functools.partial(metric_row, cutoff=removal["k"])
        apart = torch.tensor([separation(changes[targets], changes[controls])], dtype=torch.float64)
        rows += [
            row(CHANGE, removal["method"], changes[targets]),
            row(OF_CONTROLS, removal["method"], changes[controls]),
            row(SEPARATION, removal["method"], apart) | {"queries": len(targets)},
        ]
    return rows


def _mean_change(parts: RemovalParts, removed: tuple[int, ...], seeds: range) -> Tensor:
    """Return the change of each query's loss, as a share, mean over seeds: (queries,) float64."""
    pairs = [(parts.losses_of(Retraining(seed, removed=removed)), parts.losses_of(Retraining(seed))) for seed in seeds]
    return torch.stack([loss_changes(*pair) for pair in pairs]).mean(0)
