"""The sketch tier answers about any image, and says how sure it is and how much it names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgda_core.errors import UsageError
from fastgda_core.sketches.int8 import Int8Vectors
from storage_schemas.sql.views import query
from tasks.inputs.queries import load_queries
from tasks.serving.attributor import Attributor
from tasks.serving.question import check_sketched
from tests.tasks.whole_runs import SAMPLES, WholeRun


@pytest.fixture
def service(unlearned: WholeRun) -> Attributor:
    return Attributor(unlearned.workspace, load=["sketch"])


@pytest.fixture
def image(unlearned: WholeRun) -> Image.Image:
    return load_queries(unlearned.run.artifacts["queries"])[2].image


def test_an_answer_names_the_highest_scores_and_their_share(service: Attributor, image: Image.Image) -> None:
    answer = service.attribute(image, "a red circle", 5, "sketch")
    found = service._loaded.sketch.stored.scores(service._loaded.sketch.stored.ask(image, "a red circle"))
    order = sorted(range(SAMPLES), key=lambda sample: -float(found.scores[sample]))[:5]
    assert [each.train_id for each in answer.hits] == order
    assert [each.rank for each in answer.hits] == [1, 2, 3, 4, 5]
    for each in answer.hits:
        assert each.score == float(found.scores[each.train_id])
        assert each.standard_error == float(found.standard_errors[each.train_id])
    values = found.scores.tolist()
    assert answer.influence is not None and answer.influence.scored == SAMPLES
    assert answer.influence.positive == pytest.approx(sum(value for value in values if value > 0))
    assert answer.influence.negative == pytest.approx(sum(value for value in values if value < 0))
    assert answer.influence.share == pytest.approx(
        sum(values[sample] for sample in order if values[sample] > 0) / answer.influence.positive
    )


def test_sql_tells_what_a_run_keeps(unlearned: WholeRun) -> None:
    (row,) = query(unlearned.workspace.root, "SELECT * FROM sketches").to_pylist()
    parts = unlearned.run.parts["sketches"]
    sizes = [parts.path(number).stat().st_size for number in range(parts.count)]
    assert (row["run"], row["kind"], row["samples"]) == (unlearned.run.name, "principal", SAMPLES)
    assert (row["parts"], row["done"], row["bytes"]) == (2, 2, sum(sizes))
    assert row["size"] <= SAMPLES and row["coordinates_energy"] == pytest.approx(1)
    assert row["directions_energy"] == pytest.approx(1, abs=1e-6)


def test_metrics_hold_how_far_sketches_rank_as_the_teacher(unlearned: WholeRun, service: Attributor) -> None:
    root = unlearned.workspace.root
    rows = query(root, "SELECT metric, cutoff, query_id, value FROM metrics WHERE space = 'sketch'").to_pylist()
    found = {(row["metric"], row["cutoff"], row["query_id"]): row["value"] for row in rows}
    correlations = []
    for asked in load_queries(unlearned.run.artifacts["queries"]):
        if asked.split == "test":
            scored = f"SELECT score FROM scores WHERE query_id = '{asked.query_id}' ORDER BY train_id"
            teacher = query(root, scored)["score"].to_numpy()
            mine = service._loaded.sketch.stored.scores(
                service._loaded.sketch.stored.ask(asked.image, asked.caption)
            ).scores.numpy()
            first, second = (values.argsort().argsort() for values in (teacher, mine))
            correlations.append(np.corrcoef(first, second)[0, 1])
            assert found["spearman", 0, asked.query_id] == pytest.approx(correlations[-1])
    assert found["spearman", 0, ""] == pytest.approx(np.mean(correlations)) and len(correlations) == 2
    assert {("mAP", cutoff, "") for cutoff in (2, 4)} <= found.keys()
    values, scales = service._loaded.sketch.stored._loaded[1:]
    assert found["bytes a sample", 0, ""] == (values.nbytes + scales.nbytes) / SAMPLES
    assert found["seconds", 0, ""] > 0


def test_the_same_question_has_the_same_answer_and_another_has_another(service: Attributor, image: Image.Image) -> None:
    first, again = (service.attribute(each, "a red circle", 5, "sketch") for each in (image, image.copy()))
    assert replace(first, seconds=0.0) == replace(again, seconds=0.0)
    other = service.attribute(image, "a blue square", 5, "sketch")
    assert other.lineage != first.lineage and other.hits != first.hits


def test_two_stages_score_the_fast_tiers_first_alone(
    service: Attributor, image: Image.Image, unlearned: WholeRun
) -> None:
    near = service.attribute(image, "a red circle", 6).hits
    answer = service.attribute(image, "a red circle", 3, "sketch", first=6)
    whole = service.attribute(image, "a red circle", SAMPLES, "sketch")
    chosen = {each.train_id for each in near}
    expected = [each for each in whole.hits if each.train_id in chosen]
    assert [each.train_id for each in answer.hits] == [each.train_id for each in expected[:3]]
    assert answer.influence is not None and answer.influence.scored == 6
    assert [each.score for each in answer.hits] == pytest.approx([each.score for each in expected[:3]], rel=1e-4)


def test_a_relative_answer_divides_by_the_length_of_the_samples_gradient(
    service: Attributor, image: Image.Image
) -> None:
    found = service._loaded.sketch.stored.scores(service._loaded.sketch.stored.ask(image, "a red circle"))
    parts = service._loaded.sketch.stored.parts
    stored = [load_file(parts.path(number)) for number in range(parts.count)]
    sketches = [Int8Vectors(part["values"][:, 0], part["scales"][:, 0]).dense() for part in stored]
    lengths = torch.cat(sketches).double().norm(dim=1)
    torch.testing.assert_close(found.norms, lengths, rtol=1e-5, atol=0)
    answer = service.attribute(image, "a red circle", SAMPLES, "sketch", relative=True)
    for each in answer.hits:
        assert each.score == pytest.approx(float(found.scores[each.train_id] / found.norms[each.train_id]))
    assert sorted(each.score for each in answer.hits)[::-1] == [each.score for each in answer.hits]


def test_a_run_that_keeps_no_sketches_is_told_how_to(similar: WholeRun, unlearned: WholeRun) -> None:
    check_sketched(unlearned.workspace, unlearned.run.name)
    with pytest.raises(UsageError, match=f"run {similar.run.name} keeps no sketches: give its configuration a section"):
        check_sketched(similar.workspace, similar.run.name)
