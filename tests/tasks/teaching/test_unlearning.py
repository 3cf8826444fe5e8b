"""What the unlearning teachers keep on disk, against the same computed here and now."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from fastgda_core.diffusion.objective import Objective
from fastgda_core.teachers.scores import base_losses, exact_scores, first_order_scores_and_errors
from fastgda_core.teachers.training_loss import training_losses
from storage_schemas import tables
from tasks.context import Context
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import sample_images, samples_table
from tasks.teaching.base_losses import BaseLossParts, base_losses_of, load_base_losses
from tasks.teaching.families import family_of
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.noise import noise_plan
from tasks.teaching.updates import QueryUpdates
from tests.tasks.whole_runs import SAMPLES, WholeRun


def exact(run: WholeRun, objective: Objective = Objective.loss) -> Context:
    """The context of a run, taught by the exact teacher."""
    teacher = run.config.teacher.model_copy(update={"name": "abu_plus", "objective": objective})
    return replace(run.context, config=run.config.model_copy(update={"teacher": teacher}))


def test_latents_are_those_of_the_pictures_and_blocks_their_rows(unlearned: WholeRun) -> None:
    run = unlearned.run
    context, latents = run.context, run.artifacts["latents"]
    whole, some = (load_block(context, latents, chosen) for chosen in (list(range(SAMPLES)), [3, 7]))
    assert some.train_ids.tolist() == [3, 7]
    assert torch.equal(some.latents, whole.latents[[3, 7]])
    images = sample_images(run.artifacts["samples"].path, [3, 7])
    torch.testing.assert_close(some.latents[:, 0], context.model().encode_images(images))
    captions = samples_table(run.artifacts["samples"].path)["captions"].take([3, 7]).to_pylist()
    condition = context.model().encode_captions([several[0] for several in captions])
    for name, tensor in condition.items():
        torch.testing.assert_close(some.condition[name], tensor)
    assert unreadable_samples(latents, range(SAMPLES)) == {}


def test_base_losses_are_the_models_losses_and_exact_scores_their_rise(unlearned: WholeRun) -> None:
    run, context = unlearned.run, exact(unlearned)
    latents = run.artifacts["latents"]
    family, artifact = family_of(context.config), base_losses_of(context, latents)
    parts = BaseLossParts(context, latents, artifact)
    assert parts.missing() == [0] and parts.make(0).rows == SAMPLES
    block = load_block(context, latents, list(range(SAMPLES)))
    model, plan = context.teacher_model(), noise_plan(context.config)
    torch.testing.assert_close(
        load_base_losses(context, artifact).means, training_losses(model, plan, block, context.micro_batch("losses"))
    )

    (check,) = (each.artifact for each in unlearned.checks if each.artifact.name == "exact check")
    checked = tables.read_parts(check.path, tables.SCORES).to_pylist()
    numbers = {query.query_id: number for number, query in enumerate(load_queries(run.artifacts["queries"]))}
    artifacts = {**run.artifacts, "base losses": artifact}
    assert artifact in family.artifacts(context, run.artifacts["samples"], run.artifacts["queries"])
    for query_id in {row["query_id"] for row in checked}:
        mine = {row["train_id"]: row["score"] for row in checked if row["query_id"] == query_id}
        found = family.scores(context, artifacts, [numbers[query_id]], np.array(sorted(mine)))
        assert found.left_out == {} and found.train_ids.tolist() == sorted(mine)
        np.testing.assert_allclose(found.scores[0], [mine[train] for train in sorted(mine)], rtol=1e-4, atol=2e-7)


def test_of_ratios_the_losses_of_every_draw_are_kept(unlearned: WholeRun) -> None:
    """The mean beside them is the loss's own; scores from what was kept are those of losses made anew."""
    run, context, plain = unlearned.run, exact(unlearned, Objective.ratio), exact(unlearned)
    latents = run.artifacts["latents"]
    artifact = base_losses_of(context, latents)
    assert artifact.key != base_losses_of(plain, latents).key
    BaseLossParts(context, latents, artifact).make(0)
    kept, chosen = load_base_losses(context, artifact), [2, 3, 11]
    model, plan, size = context.teacher_model(), noise_plan(context.config), context.micro_batch("losses")
    block = load_block(context, latents, chosen)
    fresh = base_losses(model, plan, block, size)
    torch.testing.assert_close(kept.of(block), fresh, rtol=1e-5, atol=0)  # in batches of other sizes
    means = training_losses(model.with_objective(Objective.loss), plan, block, size)
    torch.testing.assert_close(kept.means[chosen], means, rtol=1e-5, atol=0)
    stored = tables.read_parts(artifact.path, tables.BASE_LOSSES)
    assert {len(each) for each in stored["row_losses"].to_pylist()} == {len(fresh) // len(chosen)}
    artifacts = {**run.artifacts, "base losses": artifact}
    found = family_of(context.config).scores(context, artifacts, [0], np.array(chosen)).scores[0]
    (updates,) = QueryUpdates(context, run.artifacts["unlearning steps"], [0], 1)
    one = {name: change[0] for name, change in updates.items()}
    expected = exact_scores(model, context.layers(model), plan, block, fresh, one, size)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=3e-7)  # a small step's, in float32


def test_a_block_has_the_cores_standard_errors_and_single_draws_have_none(unlearned: WholeRun) -> None:
    run = unlearned.run
    stored = tables.read_parts(run.artifacts["scores"].path, tables.SCORES)
    assert stored["standard_error"].null_count == stored.num_rows > 0  # the run's plan has one draw a timestep
    teacher = run.config.teacher.model_copy(update={"draws": 2})
    context = replace(run.context, config=run.config.model_copy(update={"teacher": teacher}))
    found = family_of(context.config).scores(context, run.artifacts, [0, 2], np.array([1, 4, 5]))
    model, block = context.teacher_model(), load_block(context, run.artifacts["latents"], [1, 4, 5])
    updates = QueryUpdates(context, run.artifacts["unlearning steps"], [0, 2], 2)
    layers, size = context.layers(model), context.micro_batch("gradients")
    plan = noise_plan(context.config)
    expected = first_order_scores_and_errors(model, layers, plan, block, updates, size)
    assert bool((found.errors > 0).all())
    torch.testing.assert_close(found.scores, expected.values)
    torch.testing.assert_close(found.errors, expected.errors)
