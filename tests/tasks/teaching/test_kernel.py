"""The teachers of gradient features from tars to scores, held against the same computed here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgda_core.curvature.layers import input_rows
from fastgda_core.diffusion.sampling import journey
from fastgda_core.errors import UsageError
from fastgda_core.teachers.gradients import output_gradients, weight_gradient
from fastgda_core.teachers.kernel import KERNEL_TEACHERS
from flows.curation import curate, plan_run
from storage_schemas import tables
from storage_schemas.tables import PSEUDO, TWIN
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, open_context
from tasks.execution.cost import run_costs
from tasks.inputs.queries import TWIN_NUMBERS, load_queries
from tasks.teaching.cost import Size
from tasks.teaching.families import family_of
from tasks.teaching.kernel_parts import ASKED, FEATURES, KERNEL, KernelParts, ScratchTiles, projection_of
from tasks.teaching.latents import load_block
from tasks.teaching.noise import noise_plan
from tasks.teaching.run import Run
from tests import tiny
from tests.tasks.configs import document
from tests.tasks.without_prefect import without_prefect

SAMPLES = 12
NOISES = {"timesteps": 4, "gradient_pairs": 8, "shard_samples": 5, "loaded_queries": 2}


def configuration(folder: Path, model: Path, name: str, **teacher: object) -> PipelineConfig:
    """Three generated queries, and two of the twin test of either kind."""
    if not (folder / "shapes.tar").exists():
        tiny.write_tar(folder / "shapes.tar", tiny.sample_members(range(SAMPLES)))
    settings = NOISES | teacher
    if KERNEL_TEACHERS[name].each_timestep:
        del settings["gradient_pairs"]
    whole = document(
        workspace=str(folder / "workspace"),
        data__shards=str(folder / "shapes.tar"),
        model__folder=str(model),
        queries__twins=1,
        queries__steps=3,
        features={"space": "pixel"},
        teacher={"name": name, **settings},
    )
    return PipelineConfig.model_validate(whole)


def planned(config: PipelineConfig) -> Run:
    with without_prefect():
        return plan_run(config)


def curated(config: PipelineConfig) -> Run:
    with without_prefect():
        return curate(config).run


def scores_of(run: Run) -> Tensor:
    """All scores, (queries, samples), from the run's committed shards."""
    names = [query.query_id for query in load_queries(run.artifacts["queries"])]
    found = torch.full((len(names), SAMPLES), torch.nan, dtype=torch.float64)
    for number in range(run.scores.count):
        for row in tables.read(run.scores.path(number), tables.SCORES).to_pylist():
            found[names.index(row["query_id"]), row["train_id"]] = row["score"]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def features_of(run: Run, kind: str = FEATURES) -> Tensor:
    parts = run.parts[kind]
    found = [load_file(parts.path(number)) for number in range(parts.count)]
    return torch.cat([each["features"].double() * each["units"] for each in found]).squeeze(1)


def asked_of(run: Run, kind: str = ASKED) -> Tensor:
    parts = run.parts[kind]
    return torch.stack([load_file(parts.path(number))["feature"].double() for number in range(parts.count)])


@pytest.mark.parametrize("name", KERNEL_TEACHERS)
def test_scores_are_inner_products_of_features_with_the_kernel_between(
    folder: Path, model_folder: Path, name: str
) -> None:
    method = KERNEL_TEACHERS[name]
    ridge = {"ridge": 3.0} if method.ridge is not None else {}
    run = curated(configuration(folder, model_folder, name, projection=64, **ridge))
    phi, asked = features_of(run), asked_of(run)
    assert phi.shape == (SAMPLES, 64 * (4 if method.each_timestep else 1))
    between = torch.eye(phi.shape[1], dtype=torch.float64)
    if method.ridge is not None:
        between = torch.linalg.inv(phi.T @ phi + 3.0 / 64 * between)
    expected = asked @ between @ phi.T
    found = scores_of(run)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    check_costs(run)


def check_costs(run: Run) -> None:
    """Every kind of part is priced, but for latents: encoding is no forward of the denoiser."""
    size = Size(SAMPLES, 1.0, run.artifacts["queries"].rows, SAMPLES)
    costs = {cost.kind: cost for cost in run_costs(run.context, size)}
    assert costs.keys() == run.parts.keys() - {"latents"}
    assert all(cost.parts == run.parts[kind].count for kind, cost in costs.items())
    assert costs[FEATURES].kept_bytes and costs[FEATURES].forwards and costs[ASKED].forwards


def test_features_are_the_projected_gradients_of_the_model(folder: Path, model_folder: Path) -> None:
    run = curated(configuration(folder, model_folder, "d_trak"))
    context, sample = run.context, 7
    block = load_block(context, run.artifacts["latents"], [sample])
    model, layers = context.model().with_objective(KERNEL_TEACHERS["d_trak"].objective), context.layers(context.model())
    projection = projection_of(context)
    plan, total = noise_plan(context.config), torch.zeros(projection.size, dtype=torch.float64)
    for timestep in (0, 25, 50, 75):
        at = torch.tensor([timestep])
        zero = torch.zeros(1, dtype=torch.long)
        noise = plan.noise(block.train_ids, zero, zero, at, zero, model.latent_shape)
        _, seen, gradients = output_gradients(model, layers, block.latents[:, 0], block.condition, at, noise)
        by_layer = [
            (each, weight_gradient(gradients[each], input_rows(layers[each], seen[each])).flatten(1)) for each in layers
        ]
        total += projection.of(by_layer)[0].double() / 4
    found = features_of(run)[sample]
    assert (found - total).norm() < 2e-3 * total.norm()


def test_a_part_made_again_is_the_same_and_keys_tell_what_it_is_made_of(folder: Path, model_folder: Path) -> None:
    run = curated(configuration(folder, model_folder, "d_trak", projection=64))
    for kind in (FEATURES, ASKED, KERNEL):
        parts = run.parts[kind]
        before = load_file(parts.path(parts.count - 1))
        parts.make(parts.count - 1)
        again = load_file(parts.path(parts.count - 1))
        assert all(torch.equal(before[name], again[name]) for name in before)
    other = planned(configuration(folder, model_folder, "d_trak", projection=64, ridge=1.0))
    assert not other.parts[FEATURES].missing() and not other.parts[ASKED].missing(), "a ridge changes no feature"
    assert other.parts[KERNEL].missing() and other.name != run.name


def test_trak_and_journey_trak_share_the_samples_features_and_differ_in_the_queries(
    folder: Path, model_folder: Path
) -> None:
    trak = curated(configuration(folder, model_folder, "trak", projection=64))
    run = planned(configuration(folder, model_folder, "journey_trak", projection=64))
    assert not run.parts[FEATURES].missing()
    curated(run.config)
    for query, first, second in zip(load_queries(run.artifacts["queries"]), asked_of(trak), asked_of(run), strict=True):
        same = torch.allclose(first, second)
        assert same if query.split == PSEUDO else not same, "a training image has no journey"


def test_a_journey_ends_at_the_query(folder: Path, model_folder: Path) -> None:
    run = planned(configuration(folder, model_folder, "journey_trak"))
    context = run.context
    for query in load_queries(run.artifacts["queries"]):
        if query.split == PSEUDO:
            continue
        number = query.row
        if query.split == TWIN:
            number = TWIN_NUMBERS + int(query.query_id.split("-")[1])
        settings = context.config.queries
        *_, last = journey(
            context.model(), [query.caption], [number],
            seed=settings.seed, steps=settings.steps, guidance_scale=settings.guidance_scale,
        )  # fmt: skip
        (drawn,) = context.model().decode_images(last.latents)
        difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(query.image).astype(int))
        assert difference.max() <= 1, "made alone and not in a batch"


def test_tracin_adds_the_products_at_every_checkpoint(folder: Path, model_folder: Path) -> None:
    checkpoints = [str(tiny.save_checkpoint(model_folder, folder / f"at {seed}", seed=seed)) for seed in (1, 2)]
    run = curated(configuration(folder, model_folder, "tracin", projection=64, checkpoints=checkpoints))
    kinds = [(f"{FEATURES} of checkpoint {number}", f"{ASKED} of checkpoint {number}") for number in (1, 2)]
    products = [asked_of(run, asked) @ features_of(run, features).T for features, asked in kinds]
    assert not torch.allclose(*products)
    expected = products[0] + products[1]
    assert (scores_of(run) - expected).norm() < 1e-3 * expected.norm()


def test_several_checkpoints_are_refused_where_they_are_not_added(folder: Path, model_folder: Path) -> None:
    checkpoints = [str(tiny.save_checkpoint(model_folder, folder / f"at {seed}", seed=seed)) for seed in (1, 2)]
    for name in ("trak", "d_trak", "journey_trak", "dmin"):
        config = configuration(folder, model_folder, name, checkpoints=checkpoints)
        with pytest.raises(UsageError, match=f"teacher {name} looks at one: name one"):
            family_of(config).check(open_context(config))
    one = configuration(folder, model_folder, "trak", checkpoints=checkpoints[:1])
    family_of(one).check(open_context(one))


def test_a_journey_of_pictures_that_were_read_is_refused(folder: Path, model_folder: Path) -> None:
    config = configuration(folder, model_folder, "journey_trak")
    queries = config.queries.model_copy(update={"captions": None, "shards": str(folder / "shapes.tar")})
    with pytest.raises(UsageError, match=r"give queries\.captions, or take teacher trak"):
        family_of(config).check(Context(config.model_copy(update={"queries": queries}), "m"))


def test_samples_whose_losses_are_no_numbers_are_left_out_and_named(folder: Path, model_folder: Path) -> None:
    run, bad = planned(configuration(folder, model_folder, "d_trak", projection=64, shard_samples=2)), [3, 8, 9]
    latents = run.parts["latents"]
    latents.make(0)
    path = latents.path(0)
    tensors = load_file(path)
    tensors["latents"][bad] = torch.nan
    path.unlink()  # not in place: the file may be mapped
    save_file(tensors, path)
    for kind in (FEATURES, ASKED, KERNEL):
        for number in range(run.parts[kind].count):
            run.parts[kind].make(number)
    everyone = np.arange(SAMPLES)
    found = family_of(run.config).scores(run.context, run.artifacts, [0, 1], everyone)
    assert found.left_out.keys() == set(bad) and "is nan" in found.left_out[3]
    assert found.train_ids.tolist() == [each for each in range(SAMPLES) if each not in bad]
    assert found.scores.shape == (2, SAMPLES - 3) and found.scores.isfinite().all()
    nobody = family_of(run.config).scores(run.context, run.artifacts, [0, 1], np.array([8, 9]))
    assert nobody.scores.shape == (2, 0) and nobody.left_out.keys() == {8, 9}


def test_tiles_on_disk_make_the_same_kernel(folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = curated(configuration(folder, model_folder, "d_trak", projection=64))
    parts = run.parts[KERNEL]
    before = load_file(parts.path(0))["kernel"]
    monkeypatch.setattr("tasks.teaching.kernel_parts.DUAL_SAMPLES", 1)
    monkeypatch.setattr("tasks.teaching.kernel_parts._TILES_IN_MEMORY", 1)
    monkeypatch.setattr("fastgda_core.teachers.kernels.TILE", 24)
    assert isinstance(parts, KernelParts)
    elsewhere = KernelParts(parts.features, parts.asked, replace(parts.artifact, path=folder / "again"))
    elsewhere.make(0)
    phi = features_of(run)
    first, second = (each.double() @ phi.T for each in (before, load_file(elsewhere.path(0))["kernel"]))
    assert (first - second).norm() < 1e-4 * first.norm(), "two forms of one kernel, in what samples see"


def test_tiles_of_a_folder_are_a_dictionary(tmp_path: Path) -> None:
    tiles = ScratchTiles(tmp_path, torch.device("cpu"))
    tiles[0, 0], tiles[1, 0] = torch.eye(2), torch.ones(2, 3).T
    assert set(tiles) == {(0, 0), (1, 0)} and len(tiles) == 2 and torch.equal(tiles[1, 0], torch.ones(3, 2))
    del tiles[0, 0]
    assert list(tiles) == [(1, 0)] and len(list(tmp_path.iterdir())) == 1
