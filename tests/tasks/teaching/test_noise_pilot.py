"""The noise plan that a pilot chooses: made once, in force everywhere, and as good as it says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.ranking_metrics import spearman
from fastgda_core.teachers.scores import first_order_scores
from storage_schemas.runs.liveness import write_assignment
from storage_schemas.runs.noise_plan import NOISE_PLAN, read_noise_plan
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.execution.plan import run_artifacts, run_name
from tasks.teaching.base_losses import base_losses_of
from tasks.teaching.families import family_of
from tasks.teaching.latents import load_block
from tasks.teaching.noise import noise_plan, plan_inputs, run_plan
from tasks.teaching.noise_pilot import PlanParts, pilot_plan_of
from tasks.teaching.run import Run
from tasks.teaching.updates import QueryUpdates
from tasks.watching.trust import trust_in
from tests.tasks.whole_runs import SAMPLES, WholeRun

MARK = 0.6


def asking(run: WholeRun, agreement: float | None, **settings: object) -> Context:
    """The context of a run that asks for an agreement in place of a plan."""
    plan = {"agreement": agreement, "timesteps": 10, "draws": 1} if agreement is not None else {}
    teacher = run.config.teacher.model_copy(update={**plan, **settings})
    return replace(run.context, config=run.config.model_copy(update={"teacher": teacher, "sketches": None}))


def planned_run(run: WholeRun, context: Context) -> Run:
    """The run with this context; unlearning steps are those that are there."""
    artifacts = run_artifacts(context, run.run.artifacts["samples"], run.run.artifacts["queries"])
    name = run_name(context, artifacts)
    return Run(context, {**artifacts, "scores": Artifact("scores", name, context.workspace.scores(name), 1)})


@pytest.fixture(scope="module")
def chosen(unlearned: WholeRun) -> Run:
    """A run whose pilot has chosen."""
    run = planned_run(unlearned, asking(unlearned, MARK))
    parts = run.parts[NOISE_PLAN]
    assert parts.missing() == [0] and parts.make(0).rows == SAMPLES and parts.missing() == []
    return run


def test_the_plan_is_a_part_between_the_steps_and_what_rests_on_it(chosen: Run) -> None:
    assert list(chosen.parts)[:5] == ["latents", "curvature", "unlearning steps", NOISE_PLAN, "scores"]
    assert chosen.artifacts["unlearning steps"].key in str(chosen.parts["unlearning steps"].artifact.path)


def test_a_runs_status_tells_the_choice(chosen: Run) -> None:
    assert trust_in(chosen.workspace, chosen.name).plan == "", "it is not begun"
    write_assignment(chosen.workspace, chosen.assignment(0, ""))
    record = read_noise_plan(chosen.artifacts[NOISE_PLAN].path)
    told = dict(trust_in(chosen.workspace, chosen.name).facts)["noise plan"]
    assert told.startswith(f"T={len(record.chosen.timesteps)}, draws={record.chosen.draws}")
    assert f"expected agreement {record.chosen.agreement:.2f} (0.6 asked; pilot of {SAMPLES} samples)" in told


@pytest.mark.heavy
def test_the_choice_follows_from_the_inputs_alone(unlearned: WholeRun, chosen: Run) -> None:
    plan = chosen.artifacts[NOISE_PLAN]
    first = chosen.parts[NOISE_PLAN].path(0).read_bytes()
    elsewhere = replace(plan, path=plan.path.with_name("again"))
    updates, latents = chosen.artifacts["unlearning steps"], chosen.artifacts["latents"]
    again = PlanParts(asking(unlearned, MARK), latents, chosen.artifacts["queries"], updates, elsewhere)
    again.make(0)
    assert again.path(0).read_bytes() == first


def test_what_is_made_under_it_uses_it(unlearned: WholeRun, chosen: Run) -> None:
    """Scores of the run are those of its plan given in words."""
    record, context = read_noise_plan(chosen.artifacts[NOISE_PLAN].path), chosen.context
    said = {"timesteps": 10, "timestep_list": tuple(record.chosen.timesteps), "draws": record.chosen.draws}
    same = asking(unlearned, None, **said, antithetic=record.chosen.draws > 1)
    plan = run_plan(context, chosen.artifacts[NOISE_PLAN])
    assert plan == noise_plan(same.config)
    assert run_plan(context, chosen.artifacts[NOISE_PLAN], seed=7) == noise_plan(same.config, seed=7)
    some = np.array([1, 4, 9])
    found = family_of(context.config).scores(context, chosen.artifacts, [0, 2], some)
    artifacts = {name: each for name, each in chosen.artifacts.items() if name != NOISE_PLAN}
    expected = family_of(same.config).scores(same, artifacts, [0, 2], some)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.heavy
def test_two_such_plans_agree_as_the_pilot_expects(unlearned: WholeRun, chosen: Run) -> None:
    """On the samples of the pilot, which are all that there are; four plans of other seeds, six pairs."""
    context, record = chosen.context, read_noise_plan(chosen.artifacts[NOISE_PLAN].path)
    assert record.asked == MARK <= record.chosen.of_schedule <= record.chosen.agreement
    cheaper = [each for each in record.ladder if each.of_schedule >= MARK]
    assert record.chosen == cheaper[0]
    queries = list(range(8))  # behind them come those of the twin test, which have no say
    assert (record.queries, record.samples) == (len(queries), SAMPLES)
    block = load_block(context, chosen.artifacts["latents"], list(range(SAMPLES)))
    updates = QueryUpdates(context, chosen.artifacts["unlearning steps"], queries, len(queries))
    model, size = context.teacher_model(), context.micro_batch("gradients")
    scores = [
        first_order_scores(
            model, context.layers(model), run_plan(context, chosen.artifacts[NOISE_PLAN], seed), block, updates, size
        )
        for seed in range(11, 15)
    ]
    pairs = [spearman(scores[a], scores[b]).mean() for a in range(4) for b in range(a)]
    measured, error = torch.stack(pairs).mean(), torch.stack(pairs).std() / math.sqrt(2)
    # Pilot and measurement are estimates, from 24 samples each.
    assert abs(measured - record.chosen.agreement) < 0.1 + 2 * error


def test_a_mark_that_no_plan_reaches_is_refused_with_what_can_be_had(unlearned: WholeRun) -> None:
    run = planned_run(unlearned, asking(unlearned, 0.999999))
    with pytest.raises(UsageError, match=r"agreement is 0\.999999.* up to 320 forwards.*better than 0\.\d\d"):
        run.parts[NOISE_PLAN].make(0)
    assert run.parts[NOISE_PLAN].missing() == [0]


def test_keys_are_of_the_mark_and_ties_have_a_say(unlearned: WholeRun) -> None:
    updates, latents = (unlearned.run.artifacts[name] for name in ("unlearning steps", "latents"))
    contexts = [
        asking(unlearned, MARK),
        asking(unlearned, 0.7),
        asking(unlearned, MARK, negatives="tie"),
    ]
    plans = [pilot_plan_of(context, updates) for context in contexts]
    assert len({plan.key for plan in plans}) == 3
    assert len({planned_run(unlearned, context).name for context in contexts}) == 3
    assert len({base_losses_of(context, latents, plan).key for context, plan in zip(contexts, plans, strict=True)}) == 3
    fixed = asking(unlearned, None)
    assert plan_inputs(fixed, None) == noise_plan(fixed.config)
    with pytest.raises(UsageError, match="pilot choose the noise plan"):
        noise_plan(contexts[0].config)
