"""The nda teacher from tars to published ranks, and its parts by themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgda_core.images import square
from fastgda_core.teachers.nda import PatchPlan, log_partitions, patch_scores
from storage_schemas.snapshots.snapshots import read_ranks
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.execution.estimate import estimate
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples, readable_images_ahead
from tasks.teaching.cost import Size
from tasks.teaching.nda import FAMILY, PICTURE_PART, query_heat_maps
from tests.tasks.configs import document
from tests.tasks.whole_runs import SAMPLES, WholeRun, configuration, whole_run
from tests.tasks.without_prefect import without_prefect

pytestmark = pytest.mark.heavy
TEACHER = {"name": "nda", "patch_sizes": [3, 6], "timestep_list": [10, 50], "shard_samples": 7, "patch_matches": 20}


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    folder = tmp_path_factory.mktemp("patched")
    return whole_run(configuration(folder, model_folder, teacher=TEACHER))


def pictures(run: WholeRun) -> tuple[Tensor, Tensor]:
    """The queries' and the samples' pictures as the model sees them."""
    (side, _), artifacts = run.context.model().resolution, run.run.artifacts
    images = next(iter(readable_images_ahead(artifacts["samples"].path, list(range(SAMPLES)), SAMPLES)))[0]
    queries = [query.image for query in load_queries(artifacts["queries"])]
    asked, kept = (
        torch.stack([torch.from_numpy(np.array(square(image, side))).permute(2, 0, 1) / 127.5 - 1 for image in several])
        for several in (queries, images)
    )
    return asked, kept


def expected(run: WholeRun, flips: bool = False) -> Tensor:
    asked, kept = pictures(run)
    plan, schedule = PatchPlan((10, 50), (3, 6), 20), run.context.model().schedule
    several = [kept, kept.flip(-1)] if flips else [kept]
    partitions = log_partitions(plan, schedule, asked, several)
    return torch.stack([patch_scores(plan, schedule, asked, partitions, each) for each in several]).sum(0)


def test_published_scores_are_shares_of_the_patches_of_the_models_own_pictures(patched: WholeRun) -> None:
    whole = expected(patched)
    names = [query.query_id for query in load_queries(patched.run.artifacts["queries"])]
    found = read_ranks(patched.workspace, patched.curation.ranks.key, names).to_pylist()
    assert len(found) >= 8 * SAMPLES
    for row in found:
        assert row["score"] == pytest.approx(float(whole[names.index(row["query_id"]), row["train_id"]]), rel=1e-3)
        assert row["standard_error"] is None
    first = {row["query_id"]: row["train_id"] for row in found if row["rank"] == 1}
    assert [first[f"s{number:04d}"] for number in range(8)] == list(range(8)), "a query that is a sample finds it"


def made(context: Context, samples: Artifact, queries: Artifact) -> dict[str, Artifact]:
    artifacts = {each.name: each for each in (samples, queries, *FAMILY.artifacts(context, samples, queries))}
    for parts in FAMILY.parts(context, artifacts):
        for number in parts.missing():
            parts.make(number)
    return artifacts


def test_scores_are_the_same_in_shards_of_any_shape(patched: WholeRun) -> None:
    artifacts, everyone = patched.run.artifacts, np.arange(SAMPLES)
    numbers = list(range(artifacts["queries"].rows))
    whole = FAMILY.scores(patched.context, artifacts, numbers, everyone).scores
    for queries, samples in (([3], everyone), (numbers[5:], everyone[4:9]), (numbers, everyone[-1:])):
        found = FAMILY.scores(patched.context, artifacts, queries, samples)
        assert found.train_ids.tolist() == samples.tolist() and found.errors.isnan().all()
        torch.testing.assert_close(found.scores, whole[queries][:, samples], rtol=1e-4, atol=1e-10)


def test_mirrored_images_count_where_the_model_saw_them(patched: WholeRun) -> None:
    config = patched.config.model_copy(update={"model": patched.config.model.model_copy(update={"flips": True})})
    context, artifacts = dataclasses.replace(patched.context, config=config), patched.run.artifacts
    again = made(context, artifacts["samples"], artifacts["queries"])
    assert again["patch pictures"] == artifacts["patch pictures"]
    numbers = list(range(artifacts["queries"].rows))
    found = FAMILY.scores(context, again, numbers, np.arange(SAMPLES)).scores
    torch.testing.assert_close(found, expected(patched, flips=True), rtol=1e-3, atol=1e-10)


def test_a_heat_map_has_the_score_as_its_mean(patched: WholeRun) -> None:
    artifacts, train_ids = patched.run.artifacts, np.array([0, 3, 20])
    maps = query_heat_maps(patched.context, artifacts, [0, 9], train_ids)
    side, _ = patched.context.model().resolution
    assert maps.shape == (2, 3, side, side)
    scores = FAMILY.scores(patched.context, artifacts, [0, 9], train_ids).scores
    torch.testing.assert_close(maps.mean((2, 3)), scores, rtol=1e-6, atol=1e-12)


def test_a_sample_whose_picture_cannot_be_read_is_left_out_and_takes_no_share(
    patched: WholeRun, tmp_path: Path, model_folder: Path
) -> None:
    config = configuration(tmp_path, model_folder, teacher={**TEACHER, "patch_matches": None})
    context = dataclasses.replace(patched.context, config=config)
    with without_prefect():
        samples = ingest_samples.fn(context).artifact
        queries = make_queries.fn(context, samples).artifact
    content = bytearray((tmp_path / "shapes.tar").read_bytes())
    content[700:720] = bytes(20)  # in the first sample's image
    (tmp_path / "shapes.tar").write_bytes(content)
    artifacts = made(context, samples, queries)
    found = FAMILY.scores(context, artifacts, [0, 5], np.arange(SAMPLES))
    assert list(found.left_out) == [0] and found.train_ids.tolist() == list(range(1, SAMPLES))
    torch.testing.assert_close(found.scores.sum(1), torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)


def test_an_estimate_counts_the_parts_and_says_that_their_time_is_unknown(patched: WholeRun) -> None:
    found = estimate(patched.config)
    assert {kind.kind: kind.parts for kind in found.kinds} == {
        kind: parts.count for kind, parts in patched.run.parts.items()
    }
    told = [line for line in found.shown() if isinstance(line, str)]
    assert "the time of patch posteriors and of scores is not among the device-hours: they run no model" in told


def test_costs_name_every_kind_of_part_and_no_forward_pass() -> None:
    config = PipelineConfig.model_validate(document(teacher={"name": "nda"}))
    costs = FAMILY.costs(config, Size(samples=1000, captions=1.0, queries=20, candidates=1000))
    assert [(cost.kind, cost.parts, cost.forwards) for cost in costs] == [
        ("patch pictures", -(-1000 // PICTURE_PART), 0.0),
        ("patch posteriors", 3, 0.0),
        ("scores", 4, 0.0),
    ]
