"""The sketch tier answers about any image, and says how sure it is and how much it names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgda_core.errors import UsageError
from fastgda_core.sketches.int8 import Int8Vectors
from storage_schemas.sql.views import query
from tasks.inputs.queries import load_queries
from tasks.serving.attribute import AttributionService
from tasks.serving.question import check_sketched
from tasks.serving.sketches import SketchService
from tests.tasks.whole_runs import SAMPLES, WholeRun


@pytest.fixture
def service(unlearned: WholeRun) -> SketchService:
    return SketchService(unlearned.workspace)


@pytest.fixture
def image(unlearned: WholeRun) -> Image.Image:
    return load_queries(unlearned.run.artifacts["queries"])[2].image


def test_an_answer_names_the_highest_scores_and_their_share(service: SketchService, image: Image.Image) -> None:
    answer = service.attribute(image, "a red circle", 5)
    found = service.sketches.scores(service.sketches.ask(image, "a red circle"))
    order = sorted(range(SAMPLES), key=lambda sample: -float(found.scores[sample]))[:5]
    assert [each.train_id for each in answer.samples] == order
    assert [each.position for each in answer.samples] == [1, 2, 3, 4, 5]
    for each in answer.samples:
        assert each.score == float(found.scores[each.train_id])
        assert each.standard_error == float(found.standard_errors[each.train_id])
        (row,) = service.samples.slice(each.train_id, 1).to_pylist()
        assert (each.key, each.caption, each.shard) == (row["key"], row["captions"][0], row["shard"])
    values = found.scores.tolist()
    assert answer.scored == SAMPLES
    assert answer.positive == pytest.approx(sum(value for value in values if value > 0))
    assert answer.negative == pytest.approx(sum(value for value in values if value < 0))
    assert answer.share == pytest.approx(
        sum(values[sample] for sample in order if values[sample] > 0) / answer.positive
    )


def test_sql_tells_what_a_run_keeps(unlearned: WholeRun) -> None:
    (row,) = query(unlearned.workspace.root, "SELECT * FROM sketches").to_pylist()
    parts = unlearned.run.parts["sketches"]
    sizes = [parts.path(number).stat().st_size for number in range(parts.count)]
    assert (row["run"], row["kind"], row["samples"]) == (unlearned.run.name, "principal", SAMPLES)
    assert (row["parts"], row["done"], row["bytes"]) == (2, 2, sum(sizes))
    assert row["size"] <= SAMPLES and row["coordinates_energy"] == pytest.approx(1)
    assert row["directions_energy"] == pytest.approx(1, abs=1e-6)


def test_metrics_hold_how_far_sketches_rank_as_the_teacher(unlearned: WholeRun, service: SketchService) -> None:
    root = unlearned.workspace.root
    rows = query(root, "SELECT metric, cutoff, query_id, value FROM metrics WHERE space = 'sketch'").to_pylist()
    found = {(row["metric"], row["cutoff"], row["query_id"]): row["value"] for row in rows}
    correlations = []
    for asked in load_queries(unlearned.run.artifacts["queries"]):
        if asked.split == "test":
            scored = f"SELECT score FROM scores WHERE query_id = '{asked.query_id}' ORDER BY train_id"
            teacher = query(root, scored)["score"].to_numpy()
            mine = service.sketches.scores(service.sketches.ask(asked.image, asked.caption)).scores.numpy()
            first, second = (values.argsort().argsort() for values in (teacher, mine))
            correlations.append(np.corrcoef(first, second)[0, 1])
            assert found["spearman", 0, asked.query_id] == pytest.approx(correlations[-1])
    assert found["spearman", 0, ""] == pytest.approx(np.mean(correlations)) and len(correlations) == 2
    assert {("mAP", cutoff, "") for cutoff in (2, 4)} <= found.keys()
    values, scales = service.sketches._loaded[1:]
    assert found["bytes a sample", 0, ""] == (values.nbytes + scales.nbytes) / SAMPLES
    assert found["seconds", 0, ""] > 0


def test_the_same_question_has_the_same_answer_and_another_has_another(
    service: SketchService, image: Image.Image
) -> None:
    first, again = service.attribute(image, "a red circle", 5), service.attribute(image.copy(), "a red circle", 5)
    assert first == again
    assert service.attribute(image, "a blue square", 5) != first


def test_two_stages_score_the_fast_tiers_first_alone(
    service: SketchService, image: Image.Image, unlearned: WholeRun
) -> None:
    near = AttributionService(unlearned.workspace).attribute(image, "a red circle", 6)
    answer = service.attribute(image, "a red circle", 3, first=6)
    whole = service.attribute(image, "a red circle", SAMPLES)
    chosen = {each.train_id for each in near}
    expected = [each for each in whole.samples if each.train_id in chosen]
    assert [each.train_id for each in answer.samples] == [each.train_id for each in expected[:3]]
    assert answer.scored == 6
    assert [each.score for each in answer.samples] == pytest.approx([each.score for each in expected[:3]], rel=1e-4)


def test_a_relative_answer_divides_by_the_length_of_the_samples_gradient(
    service: SketchService, image: Image.Image
) -> None:
    found = service.sketches.scores(service.sketches.ask(image, "a red circle"))
    parts = service.sketches.parts
    stored = [load_file(parts.path(number)) for number in range(parts.count)]
    sketches = [Int8Vectors(part["values"][:, 0], part["scales"][:, 0]).dense() for part in stored]
    lengths = torch.cat(sketches).double().norm(dim=1)
    torch.testing.assert_close(found.norms, lengths, rtol=1e-5, atol=0)
    answer = service.attribute(image, "a red circle", SAMPLES, relative=True)
    for each in answer.samples:
        assert each.score == pytest.approx(float(found.scores[each.train_id] / found.norms[each.train_id]))
    assert sorted(each.score for each in answer.samples)[::-1] == [each.score for each in answer.samples]


def test_a_run_that_keeps_no_sketches_is_told_how_to(similar: WholeRun, unlearned: WholeRun) -> None:
    check_sketched(unlearned.workspace, unlearned.run.name)
    with pytest.raises(UsageError, match=f"run {similar.run.name} keeps no sketches: give its configuration a section"):
        check_sketched(similar.workspace, similar.run.name)
