"""Pooled leave-out: one model without what a method named for many queries; these have to suffer, others not.

Source: the pooled evaluation of MUCS (arXiv 2605.17938), which spares a retraining for every query.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.counterfactual import separation, union_of_first
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key
from tasks.artifact import Artifact, Made, once
from tasks.inputs.features import features_key
from tasks.inputs.queries import load_queries
from tasks.judging.methods import RANDOM, method_scores
from tasks.judging.metric_rows import metric_row, metric_rows
from tasks.judging.removals import NOTHING, Removals, ahead_rows
from tasks.judging.rivals import Rivals
from tasks.teaching.retrainings import REMOVAL_PLAN
from tasks.teaching.run import Run
from tasks.watching.trust import TEACHER

CHANGE, OF_CONTROLS, SEPARATION = "loss change", "loss change of controls", "targets apart from controls"
Removal = tuple[str, int, list[str], list[int], bool]  # method, k, queries, samples, pooled: columns of the plan


@task(task_run_name="removal plan", cache_policy=NO_CACHE)
def plan_removals(run: Run, ranks: Artifact) -> Made:
    """Write down what each method names: what models are trained again without."""
    judge = run.config.judge
    assert judge is not None and judge.leave_out is not None
    plan, config = run.artifacts[REMOVAL_PLAN], judge.leave_out
    features = features_key(run.context, run.artifacts["samples"])
    rivals = [each for each in Rivals.of(run).key if each[0] in config.methods]
    key = input_key("removals", ranks.key, config, judge.seed, features, *rivals, table=tables.REMOVALS)

    def make(started: float) -> Manifest:
        rows = [*_pooled(run, ranks), *_of_each(run, ranks)]
        method, k, targets, removed, pooled = (list(column) for column in zip(*rows, strict=True))
        table = tables.REMOVALS.rows(method=method, k=k, targets=targets, removed=removed, pooled=pooled)
        return commit_table(plan.path, table, tables.REMOVALS, key=key, started=started)

    return once(Artifact(REMOVAL_PLAN, key, plan.path, 0), plan.path, make)


def _pooled(run: Run, ranks: Artifact) -> Iterator[Removal]:
    """Yield what is removed for all targets together."""
    judge = run.config.judge
    assert judge is not None and judge.leave_out is not None
    if not judge.leave_out.targets:
        return
    targets, _ = _targets_and_controls(run)
    scores, names = _removing(run, ranks, targets), _names(run, targets)
    for k in judge.leave_out.pooled_k:
        for method, removed in _named(scores, k, judge.seed).items():
            yield method, k, names, removed, True


def _of_each(run: Run, ranks: Artifact) -> Iterator[Removal]:
    """Yield what is removed for one query alone."""
    judge = run.config.judge
    assert judge is not None and judge.leave_out is not None
    if not judge.leave_out.each:
        return
    test = _test_queries(run)
    each = judge.leave_out.each
    # Evenly along the list, in which captions of a kind stand together.
    chosen = [test[len(test) * number // each] for number in range(each)]
    scores, names = _removing(run, ranks, chosen), _names(run, chosen)
    for k in judge.leave_out.own_k:
        for method, several in scores.items():
            if k >= several.shape[1]:
                raise UsageError(f"judge.leave_out removes all {several.shape[1]:,} samples with k {k}: lower it")
            for name, row in zip(names, several, strict=True):
                yield method, k, [name], sorted(row.topk(k).indices.tolist()), False


def _removing(run: Run, ranks: Artifact, chosen: list[int]) -> dict[str, Tensor]:
    """Return scores of all samples for some queries by the methods whose samples are removed, (queries, samples)."""
    judge = run.config.judge
    assert judge is not None and judge.leave_out is not None
    rivals = Rivals.of(run).scores(judge.leave_out.methods, left_out=-torch.inf)
    known = method_scores(run, ranks, chosen) | {name: each[chosen] for name, each in rivals.items()}
    wanted = (TEACHER, *judge.leave_out.methods, RANDOM)
    return {name: known[name] for name in wanted if name in known}


def _test_queries(run: Run) -> list[int]:
    several = load_queries(run.artifacts["queries"])
    return [number for number, query in enumerate(several) if query.split == "test"]


def _names(run: Run, numbers: list[int]) -> list[str]:
    several = load_queries(run.artifacts["queries"])
    return [several[number].query_id for number in numbers]


def _targets_and_controls(run: Run) -> tuple[list[int], list[int]]:
    """Return numbers of the test queries whose samples are removed together, and of the others."""
    judge, test = run.config.judge, _test_queries(run)
    assert judge is not None and judge.leave_out is not None
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


def leave_out_rows(run: Run, removals: Removals) -> list[dict[str, object]]:
    """Return how much the targets of each method lost without what it named, and the controls with them."""
    targets, controls = _targets_and_controls(run)
    pooled = {
        (each["method"], each["k"]): removals.changes(tuple(each["removed"]))
        for each in removals.plan
        if each["pooled"]
    }
    rows = list(ahead_rows(CHANGE, {choice: changes[targets] for choice, changes in pooled.items()}))
    for (method, k), changes in pooled.items():
        apart, error = separation(changes[targets], changes[controls])
        alone = metric_row(SEPARATION, method, torch.tensor([apart], dtype=torch.float64), cutoff=k)
        rows += [
            *metric_rows(CHANGE, method, changes[targets], _names(run, targets), cutoff=k),
            metric_row(OF_CONTROLS, method, changes[controls], cutoff=k),
            alone | {"standard_error": error, "queries": len(targets)},
        ]
    return [*rows, *_regeneration_rows(run, removals, targets, controls)]


def _regeneration_rows(
    run: Run, removals: Removals, targets: list[int], controls: list[int]
) -> Iterator[dict[str, object]]:
    """Yield how far the pictures of targets and of controls are, without what each method named and with all."""
    pooled = [(each["method"], each["k"], each["removed"]) for each in removals.plan if each["pooled"]]
    for method, k, removed in [(NOTHING, 0, []), *pooled] if pooled else []:
        names = _names(run, targets)
        for name, values in removals.distances(tuple(removed), names).items():
            yield from metric_rows(f"regeneration {name}", method, values, names, cutoff=k)
        for name, values in removals.distances(tuple(removed), _names(run, controls)).items():
            yield metric_row(f"regeneration {name} of controls", method, values, cutoff=k)
