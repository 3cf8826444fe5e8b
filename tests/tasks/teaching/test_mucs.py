"""MUCS as a run: what its parts hold, and its scores by hand from them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.noise import gaussian_noise, stream_key
from storage_schemas import tables
from storage_schemas.snapshots.snapshots import read_ranks
from tasks.config.pipeline import PipelineConfig
from tasks.context import Loaded, load_tensors
from tasks.inputs.queries import load_queries
from tasks.teaching.cost import Size
from tasks.teaching.families import family_of
from tasks.teaching.latents import load_block
from tasks.teaching.mucs import AscentParts, ascents_of
from tasks.teaching.updates import relative_errors
from tests.fastgda_core.blocks import double_denoiser, squared_residual
from tests.tasks.configs import document
from tests.tasks.teaching.test_plan_keys import keys
from tests.tasks.whole_runs import SAMPLES, WholeRun, configuration, whole_run

TIMESTEPS = (31, 60, 95)
TEACHER = {
    "name": "mucs",
    "learning_rate": 3e-3,
    "most_steps": 4,
    "gradient_pairs": 16,
    "timestep_list": list(TIMESTEPS),
}


@pytest.fixture(scope="module")
def mucs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    """Taught by MUCS, mirrored images and all, by a model that has a smaller loss than an untrained one."""
    folder = tmp_path_factory.mktemp("mucs")
    shutil.copytree(model_folder, folder / "model")
    path = folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_out.weight"] *= 0.5
    save_file(weights, path, metadata={"format": "pt"})
    return whole_run(configuration(folder, folder / "model", teacher=TEACHER, model__flips=True))


def parts_of(run: WholeRun, **changes: object) -> AscentParts:
    """The ascents of the run's queries, in a process that has loaded nothing."""
    teacher = run.config.teacher.model_copy(update=changes)
    config = run.config.model_copy(update={"teacher": teacher})
    context, artifacts = replace(run.context, loaded=Loaded(), config=config), run.run.artifacts
    latents, queries = artifacts["latents"], artifacts["queries"]
    return AscentParts(context, latents, queries, ascents_of(context, latents, queries))


def test_scores_are_the_ratios_of_losses_before_and_after_by_hand(mucs: WholeRun) -> None:
    """One forward at a time in float64, all samples at one noise; of a sample's two flips the larger counts."""
    run, model = mucs.run, mucs.context.teacher_model()
    block = load_block(mucs.context, run.artifacts["latents"], list(range(SAMPLES)))
    key, queries = stream_key(0, "training samples"), load_queries(run.artifacts["queries"])
    for number in (0, 3):
        kept = load_tensors(parts_of(mucs).path(number))
        denoisers = double_denoiser(model), double_denoiser(model)
        for name, change in kept.items():
            if not name.startswith("/"):
                weight = denoisers[1].get_submodule(name).weight
                weight.data += change[:, : weight[0].numel()].reshape(weight.shape)
        expected = []
        for sample in range(SAMPLES):
            of_flips = []
            for flip in range(2):
                ratios = []
                for caption in (block.owner == sample).nonzero().flatten().tolist():
                    for timestep in TIMESTEPS:
                        place = torch.zeros(1, dtype=torch.long), torch.tensor([timestep]), torch.zeros(1).long()
                        noise = gaussian_noise(key, *place, model.latent_shape)
                        text = block.condition["encoder_hidden_states"][caption][None]
                        with torch.no_grad():
                            before, after = (
                                squared_residual(model, each, block.latents[sample, [flip]], text, place[1], noise)
                                for each in denoisers
                            )
                        ratios.append(((after - before) / (after + before + 1e-3)).item())
                of_flips.append(np.mean(ratios))
            expected.append(max(of_flips))
        ranked = read_ranks(mucs.workspace, mucs.curation.ranks.key, [queries[number].query_id]).to_pylist()
        found = {row["train_id"]: row["score"] for row in ranked}
        np.testing.assert_allclose([found[sample] for sample in range(SAMPLES)], expected, atol=2e-5)
        assert max(map(abs, expected)) > 1e-3


def test_a_part_is_the_same_bit_for_bit_in_any_order_and_when_it_was_lost(mucs: WholeRun) -> None:
    parts = parts_of(mucs)
    before = {number: parts.path(number).read_bytes() for number in (4, 1)}
    for number in before:
        shutil.copy(parts.path(number), parts.path(number).with_suffix(".before"))
        parts.path(number).unlink()
    assert parts.missing() == [1, 4]
    for number, content in before.items():  # not as they were made
        parts.make(number)
        assert parts.path(number).read_bytes() == content
    assert parts.missing() == []


def test_a_part_says_how_far_the_ascent_came_and_the_log_that_it_was_not_far_enough(
    mucs: WholeRun, caplog: pytest.LogCaptureFixture
) -> None:
    parts = parts_of(mucs, most_steps=2, seed=1)
    parts.make(0)
    kept = load_tensors(parts.path(0))
    assert kept["/steps"] == 2 and kept["/forget_loss"] < 0.95 * kept["/null_loss"]
    assert "after 2 steps: raise teacher.most_steps" in caplog.text
    model = mucs.context.teacher_model()
    assert {name for name in kept if not name.startswith("/")} == select_layers(model.denoiser, "mlp").keys()


def test_a_low_rank_is_kept_and_its_loss_told(mucs: WholeRun) -> None:
    parts = parts_of(mucs, update_rank=2)
    assert parts.make(2).size < 0.7 * parts_of(mucs).path(2).stat().st_size
    (error,) = relative_errors(parts.artifact, [2])
    assert 0 < error < 1


def test_base_losses_of_every_draw_are_kept_for_all_queries(mucs: WholeRun) -> None:
    stored = tables.read_parts(mucs.run.artifacts["base losses"].path, tables.BASE_LOSSES)
    assert stored.num_rows == 2 * SAMPLES
    assert {len(each) % len(TIMESTEPS) for each in stored["row_losses"].to_pylist()} == {0}


def test_what_it_costs_is_told_by_the_most_steps_that_it_may_take(mucs: WholeRun) -> None:
    size = Size(samples=1000, captions=1.0, queries=10, candidates=100)
    costs = {cost.kind: cost for cost in family_of(mucs.config).costs(mucs.config, size)}
    assert list(costs) == ["unlearning steps", "base losses", "scores"]
    assert costs["unlearning steps"].parts == 10
    assert costs["unlearning steps"].forwards == pytest.approx(10 * (2000 + 4 * 2 * 16 * 2.6))
    assert (costs["base losses"].forwards, costs["scores"].forwards) == (1000 * 6, 10 * 100 * 6)


def test_the_published_settings_are_its_defaults() -> None:
    document_ = document(teacher={"name": "mucs", "learning_rate": 2e-5})
    teacher = PipelineConfig.model_validate(document_).teacher
    assert (teacher.objective, teacher.layers, teacher.gradient_pairs, teacher.forget_weight) == (
        "ratio",
        "mlp",
        100,
        0.2,
    )
    assert teacher.timestep_list is not None
    assert len(teacher.timestep_list) == 100 and min(teacher.timestep_list) >= 300 and max(teacher.timestep_list) == 999
    own = PipelineConfig.model_validate(document(teacher={**TEACHER, "layers": "all", "objective": "loss"})).teacher
    assert (own.layers, own.objective, own.timestep_list) == ("all", "loss", TIMESTEPS)
    again = PipelineConfig.model_validate(document(teacher=own.model_dump(mode="json"))).teacher
    assert again == own, "a stored configuration names every setting and loads again"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": None}, "learning_rate\n.*is missing"),
        ({"alpha": 1e-4}, "alpha is no setting of teacher mucs"),
        ({"timesteps": 5, "timestep_list": None}, "timesteps is no setting of teacher mucs"),
        ({"damping": 1.0}, "damping is no setting of teacher mucs"),
        ({"checkpoints": ["a", "b"]}, "checkpoints of teacher mucs are at most one"),
        ({"objective": "output_norm"}, "objective of teacher mucs is ratio, or loss"),
        ({"precision": "bf16"}, "use float32"),
        ({"agreement": 0.9}, "agreement is no setting of teacher mucs"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        PipelineConfig.model_validate(document(teacher={**TEACHER, **changes}))


def test_its_settings_are_none_of_other_teachers() -> None:
    with pytest.raises(ValidationError, match="most_steps is no setting of teacher abu_plus"):
        PipelineConfig.model_validate(document(teacher__most_steps=7))


EVERYTHING = {"latents", "unlearning steps", "base losses", "run"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"samples": "other"}, EVERYTHING),
        ({"model": "other"}, EVERYTHING),
        ({"queries": "other"}, {"unlearning steps", "run"}),
        ({"teacher__layers": "all"}, {"unlearning steps", "run"}),
        ({"teacher__learning_rate": 1e-3}, {"unlearning steps", "run"}),
        ({"teacher__forget_weight": 0.5}, {"unlearning steps", "run"}),
        ({"teacher__most_steps": 9}, {"unlearning steps", "run"}),
        ({"teacher__gradient_pairs": 9}, {"unlearning steps", "run"}),
        ({"teacher__update_rank": 2}, {"unlearning steps", "run"}),
        ({"teacher__seed": 1}, {"unlearning steps", "base losses", "run"}),
        ({"teacher__precision": "float64"}, {"unlearning steps", "base losses", "run"}),
        ({"teacher__objective": "loss"}, {"base losses", "run"}),
        ({"teacher__timestep_list": [5]}, {"base losses", "run"}),
        ({"teacher__draws": 2}, {"base losses", "run"}),
        ({"teacher__negatives": "tie"}, set()),
        ({"model__micro_batch": 7}, set()),
    ],
)
def test_a_setting_changes_the_keys_of_what_depends_on_it_and_no_others(
    tmp_path: Path, changes: dict[str, object], expected: set[str]
) -> None:
    before, after = keys(tmp_path, teacher=TEACHER), keys(tmp_path, teacher=dict(TEACHER), **changes)  # type: ignore[arg-type]
    assert {name for name in before if before[name] != after[name]} == expected
