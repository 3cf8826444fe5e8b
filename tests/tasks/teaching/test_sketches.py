"""Sketches of a run: made beside its scores, read again, asked, and refused where they are another run's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgda_core.errors import NonFiniteLoss, UsageError
from fastgda_core.teachers.sample_gradients import sample_gradients
from fastgda_core.teachers.scores import first_order_scores
from storage_schemas.commit import read_manifest
from storage_schemas.runs.attempts import read_attempts
from storage_schemas.workspace import part
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.queries import load_queries
from tasks.teaching.families import family_of
from tasks.teaching.latents import load_block
from tasks.teaching.noise import noise_plan
from tasks.teaching.run import Run
from tasks.teaching.sketch_scores import GROUPS, StoredSketches
from tasks.teaching.sketches import BasisParts, SketchParts
from tasks.teaching.updates import device_fisher, gradients_of, owner_of, update_of
from tests.tasks.configs import document
from tests.tasks.whole_runs import SAMPLES, WholeRun

CAPTION = "a red circle"


@pytest.fixture
def run(unlearned: WholeRun) -> Run:
    return unlearned.run


@pytest.fixture
def stored(run: Run) -> StoredSketches:
    return StoredSketches(run.context, run.artifacts, run.name)


def elsewhere(run: Run, folder: Path) -> SketchParts:
    """The same parts in an empty folder."""
    names = ("latents", "curvature", "sketch basis")
    sketches = replace(run.artifacts["sketches"], path=folder)
    return SketchParts(run.context, *(run.artifacts[name] for name in names), sketches)


def test_sketches_are_made_of_the_gradients_that_scores_are_made_of(run: Run) -> None:
    parts = run.parts["sketches"]
    manifests = [read_manifest(parts.path(number)) for number in range(parts.count)]
    assert [manifest.rows for manifest in manifests if manifest] == [16, 8]
    assert read_attempts(run.workspace, run.name, "sketches") == {}  # nobody set out to make them
    assert read_attempts(run.workspace, run.name, "scores") != {}


def test_a_part_made_by_itself_is_the_one_that_was_made_beside_scores(run: Run, tmp_path: Path) -> None:
    alone = elsewhere(run, tmp_path)
    for number in range(alone.count):
        assert alone.make(number).rows == alone.rows(number)
        mine, other = load_file(alone.path(number)), load_file(run.parts["sketches"].path(number))
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_scores_are_the_teachers_for_an_image_that_it_never_saw(run: Run, stored: StoredSketches) -> None:
    context, image = run.context, load_queries(run.artifacts["queries"])[0].image
    asked = stored.ask(image, CAPTION)
    found = stored.scores(asked)
    assert found.train_ids.tolist() == list(range(SAMPLES)) and asked.shape[0] == GROUPS

    groups = first_order(context, run, gradients_of(context, image, CAPTION, **noise_of(image), groups=GROUPS))
    expected = groups.mean(0)
    assert (found.scores - expected).norm() < 0.02 * expected.norm()  # one byte a number
    errors = (groups - expected).square().sum(0).div(GROUPS - 1).sqrt() / GROUPS**0.5
    assert (found.standard_errors - errors).norm() < 0.02 * errors.norm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.teaching.sketch_scores._AT_ONCE", 1)
        torch.testing.assert_close(stored.scores(asked).scores, found.scores)


def noise_of(image: Image.Image) -> dict[str, int]:
    return {"owner": owner_of(image, CAPTION), "seed": 0}


def first_order(context: Context, run: Run, groups: dict[str, Tensor]) -> Tensor:
    """The teacher's scores of all samples by each group's gradient, (groups, samples)."""
    model, fisher = context.teacher_model(), device_fisher(context, run.artifacts["curvature"])
    updates = update_of(context, groups, fisher, SAMPLES)
    block = load_block(context, run.artifacts["latents"], list(range(SAMPLES)))
    layers, plan = context.layers(model), noise_plan(context.config)
    return first_order_scores(model, layers, plan, block, [updates], context.micro_batch("gradients")).cpu()


def test_some_samples_are_read_row_by_row_and_score_as_among_all(run: Run, stored: StoredSketches) -> None:
    asked = stored.ask(load_queries(run.artifacts["queries"])[1].image, CAPTION)
    whole, some = stored.scores(asked), stored.scores(asked, np.array([23, 3, 15, 16, 3]))
    assert some.train_ids.tolist() == [3, 15, 16, 23]
    for mine, all_of_them in zip(some[1:], whole[1:], strict=True):
        torch.testing.assert_close(mine, all_of_them[..., [3, 15, 16, 23]])


def test_a_sample_whose_loss_is_no_number_is_left_out_and_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either way of making a part; a part may lose all its samples."""
    bad = {3, *range(16, 24)}

    def gradients(model, layers, plan, block, micro_batch):  # type: ignore[no-untyped-def]
        if found := bad & set(block.train_ids.tolist()):
            raise NonFiniteLoss("loss of a sample is nan", sorted(found)[:2])
        return sample_gradients(model, layers, plan, block, micro_batch)

    monkeypatch.setattr("tasks.teaching.sketches.sample_gradients", gradients)
    monkeypatch.setattr("tasks.teaching.bad_samples.FEW_SAMPLES", 100)
    alone = elsewhere(run, tmp_path)
    made = [alone.make(number) for number in range(alone.count)]
    assert [manifest.rows for manifest in made] == [15, 0]
    assert [set(manifest.quarantined) for manifest in made] == [{3}, set(range(16, 24))]

    beside = elsewhere(run, tmp_path / "beside").beside(np.arange(16))
    assert beside is not None
    block = load_block(run.context, run.artifacts["latents"], [each for each in range(16) if each != 3])
    model = run.context.teacher_model()
    plan, micro_batch = noise_plan(run.config), run.context.micro_batch("gradients")
    for _ in range(2):  # as where the first time another sample was found to be bad
        beside.begin()
        for some in sample_gradients(model, run.context.layers(model), plan, block, micro_batch):
            beside.look(some)
    beside.commit(block.train_ids.numpy(), {3: "loss of a sample is nan"})
    mine, other = (load_file(part(folder, 0, "safetensors")) for folder in (tmp_path, tmp_path / "beside"))
    assert all(torch.equal(mine[name], other[name]) for name in mine)

    stored = StoredSketches(run.context, {**run.artifacts, "sketches": replace(alone.artifact)}, run.name)
    asked = stored.ask(load_queries(run.artifacts["queries"])[0].image, CAPTION)
    assert stored.scores(asked).train_ids.tolist() == [each for each in range(16) if each != 3]
    assert stored.scores(asked, np.array([3, 17])).train_ids.tolist() == []
    assert stored.dense(torch.tensor([3, 4, 20])).norm(dim=1).tolist()[::2] == [0, 0]


def test_a_query_that_a_figure_is_reported_of_has_no_say_in_the_basis(run: Run, tmp_path: Path) -> None:
    """Without the unlearning steps of all other queries the same basis is made of those of training queries."""
    updates, numbers = run.artifacts["unlearning steps"], []
    for number, query in enumerate(load_queries(run.artifacts["queries"])):
        if query.split == "train":
            numbers.append(number)
            step = load_file(part(updates.path, number, "safetensors"))
            save_file(step, part(tmp_path, number, "safetensors"))
    assert numbers
    names = ("latents", "curvature", "queries")
    basis = replace(run.artifacts["sketch basis"], path=tmp_path / "basis")
    alone = replace(updates, path=tmp_path, key="of training queries")
    BasisParts(run.context, *(run.artifacts[name] for name in names), alone, basis).make(0)
    both = basis.path, run.artifacts["sketch basis"].path
    mine, other = (load_file(part(folder, 0, "safetensors")) for folder in both)
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.parametrize(
    "change",
    [{"teacher": {"damping": 0.5}}, {"teacher": {"timesteps": 3}}, {"sketches": {"size": 7}}, {"teacher": {"seed": 4}}],
    ids=str,
)
def test_other_settings_are_other_sketches(run: Run, change: dict[str, dict[str, object]]) -> None:
    (section, fields), config = next(iter(change.items())), run.config
    changed = getattr(config, section).model_copy(update=fields)
    context = replace(run.context, config=config.model_copy(update={section: changed}))
    made = {each.name: each for each in family_of(config).artifacts(context, *inputs(run))}
    for name in ("sketch basis", "sketches"):
        assert made[name].key != run.artifacts[name].key
    same = {each.name: each for each in family_of(config).artifacts(run.context, *inputs(run))}
    assert all(same[name] == run.artifacts[name] for name in same)


def inputs(run: Run) -> tuple[object, object]:
    return run.artifacts["samples"], run.artifacts["queries"]


def test_a_run_that_lacks_sketches_says_how_to_come_by_them(run: Run, tmp_path: Path) -> None:
    few = {**run.artifacts, "sketches": replace(run.artifacts["sketches"], path=tmp_path)}
    with pytest.raises(UsageError, match=rf"lacks 2 of 2 parts of its sketches: `fastgda retry {run.name} --workspace"):
        StoredSketches(run.context, few, run.name)


def test_sketches_are_of_first_order_gradients_alone() -> None:
    with pytest.raises(ValueError, match="sketches are of the gradients that teacher abu_plus_first_order makes"):
        PipelineConfig.model_validate(document(sketches={}))
