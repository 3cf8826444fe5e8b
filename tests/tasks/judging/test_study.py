"""A study: every variant is trained once, measured on the test queries, and drawn."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from storage_schemas import tables
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from tasks.config.distilling import StudyConfig
from tasks.config.pipeline import PipelineConfig
from tasks.distilling import gradient_heads
from tasks.distilling.answering import predicted_sketches
from tasks.distilling.labels import read_labels
from tasks.inputs.features import load_features, load_query_features
from tasks.inputs.queries import joined_queries
from tasks.judging import tower_study
from tasks.judging.study import Variant, compare_heads, draw_study, variants
from tasks.judging.study_results import Answer, answers, study_plot
from tasks.judging.tower_study import TowerVariant, tower_variants
from tasks.teaching.sketch_scores import StoredSketches
from tests.tasks.whole_runs import CUTOFFS, SAMPLES, WholeRun
from tests.tasks.without_prefect import without_prefect

SMALL = StudyConfig(
    losses=["mse"],
    query_shares=[0.5],
    candidate_shares=[0.5],
    outside_probabilities=[0.5],
    nearest=0.5,
    seeds=1,
)


def test_a_study_asks_each_question_of_each_value_and_seed(similar: WholeRun) -> None:
    config = similar.config.model_copy(update={"study": SMALL.model_copy(update={"seeds": 2})})
    found = variants(config)
    names = [(each.question, each.value, each.seed) for each in found]
    assert len(set(names)) == len(names) == 2 * 6
    fixed = [each for each in found if each.question == "queries at a fixed budget"]
    assert {each.queries * each.candidates for each in fixed} == {0.5}, "as many pairs, whatever the queries"
    assert Variant("loss", "mse", "pixel", "mse", seed=1) in found


@pytest.mark.heavy
def test_every_variant_is_measured_and_made_once(similar: WholeRun) -> None:
    context = replace(similar.context, config=similar.config.model_copy(update={"study": SMALL}))
    labels = read_labels(context.workspace, None)
    with without_prefect():
        made, again = compare_heads(context, labels), compare_heads(context, labels)
        picture = draw_study(context, labels, made.artifact)
    assert (made.reused, again.reused, made.artifact) == (False, True, again.artifact)
    found = answers(tables.read(made.artifact.path, tables.STUDY), CUTOFFS[-1])
    assert {(each.question, each.value) for each in found} >= {
        ("feature space", "pixel"), ("untuned", "pixel"), ("loss", "mse"), ("queries", "0.5"),
        ("outside probability", "0.5"),
    }  # fmt: skip
    assert all(0 <= each.mean <= 1 and each.seeds == 1 for each in found)
    (untuned,) = (each.mean for each in found if each.question == "untuned")
    assert untuned == pytest.approx(1.0), "the teacher is the features"
    assert read_published(context.workspace).compared_heads == context.workspace.relative(made.artifact.path)
    shown = "SELECT question, choice, space, value FROM study WHERE query_id = '' AND cutoff = 4"
    in_sql = {tuple(row.values()) for row in query(context.workspace.root, shown).to_pylist()}
    assert {("loss", "mse", "tuned"), ("feature space", "pixel", "untuned")} <= {row[:3] for row in in_sql}
    assert sorted(row[3] for row in in_sql) == sorted(each.mean for each in found)
    assert Image.open(picture.artifact.path).format == "PNG" and picture.artifact.path.name == "study.png"


@pytest.mark.heavy
def test_gradient_heads_are_studied_by_what_their_tower_sees_and_learns_from(solved: WholeRun) -> None:
    study = SMALL.model_copy(update={"losses": [], "outside_probabilities": [], "query_shares": [0.5, 1.0]})
    config = solved.config.model_copy(update={"study": study.model_copy(update={"spaces": ["pixel", "bottleneck"]})})
    config = PipelineConfig.model_validate(config.model_dump())
    context = replace(solved.context, config=config)
    labels = read_labels(context.workspace, None)
    with without_prefect():
        made, again = compare_heads(context, labels), compare_heads(context, labels)
    assert (made.reused, again.reused, made.artifact) == (False, True, again.artifact)
    rows = [row for row in tables.read(made.artifact.path, tables.STUDY).to_pylist() if "gradient" in row["question"]]
    questions = [(row["question"], row["choice"]) for row in rows if not row["query_id"] and row["cutoff"] == 4]
    inputs, samples = "gradient head: feature space", "gradient head: samples"
    assert questions == [(inputs, "pixel"), (inputs, "bottleneck"), (samples, "0.5"), (samples, "1")]

    configured = tables.read(solved.evaluation.metrics.artifact.path, tables.METRICS).to_pylist()
    for cutoff in CUTOFFS:
        (expected,) = (
            row["value"]
            for row in configured
            if (row["metric"], row["space"], row["cutoff"], row["query_id"]) == ("mAP", "tuned", cutoff, "")
        )
        for question, choice in ((inputs, "pixel"), (samples, "1")):
            (found,) = (
                row["value"]
                for row in rows
                if (row["question"], row["choice"], row["cutoff"], row["query_id"]) == (question, choice, cutoff, "")
            )
            assert found == pytest.approx(expected), "the configured head"


@pytest.mark.heavy
def test_a_tower_of_a_share_is_that_of_so_many_samples_alone(solved: WholeRun) -> None:
    context, labels = solved.context, read_labels(solved.workspace, None)
    stored = StoredSketches(context, solved.run.artifacts, solved.run.name)
    several = [TowerVariant("samples", f"{share}", "pixel", share) for share in (1.0, 0.25)]
    with without_prefect():
        found = {each.samples: head for each, head in tower_study._solved(context, labels, stored, several)}
    phi = F.normalize(load_features(context, labels.samples, labels.samples), dim=1)
    for share, head in found.items():
        gradient = context.config.head.gradient.model_copy(update={"queries": round(share * SAMPLES)})
        config = context.config.model_copy(
            update={"head": context.config.head.model_copy(update={"gradient": gradient})}
        )
        moments = gradient_heads._moments(replace(context, config=config), stored, phi)
        towers = [moments.tower(ridge, stored.sketch, gradient.size) for ridge in gradient_heads.RIDGES]
        captions = [query.caption for query in joined_queries(labels.queries)]
        asked = load_query_features(context, labels.queries, labels.samples)
        expected, *others = (
            predicted_sketches(stored.context, tower, asked, captions) for tower in [head.tower, *towers]
        )
        assert (
            sum(torch.allclose(each, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())) for each in others)
            == 1
        )


def test_a_study_of_a_symmetric_head_solves_no_tower(similar: WholeRun) -> None:
    assert tower_variants(similar.config) == []


def test_answers_are_the_mean_over_the_seeds() -> None:
    values = {0: 0.2, 1: 0.4}
    rows = [
        {"question": "loss", "choice": "mse", "seed": seed, "metric": "mAP", "space": "tuned", "split": "test"}
        | {"cutoff": cutoff, "query_id": query, "value": value if cutoff == 2 else 0.9}
        | {"standard_error": 0.0, "queries": 1}
        for seed, value in values.items()
        for cutoff in (2, 4)
        for query in ("", "q0")
    ]
    (found,) = answers(pa.Table.from_pylist(rows, schema=tables.STUDY.schema), 2)
    assert (found.question, found.value, found.seeds) == ("loss", "mse", 2)
    assert found.mean == pytest.approx(0.3) and found.deviation == pytest.approx(np.std([0.2, 0.4], ddof=1))


@pytest.mark.heavy
def test_a_picture_shows_a_panel_for_each_question() -> None:
    found = [Answer("feature space", "pixel", 0.5, 0.1, 3), Answer("untuned", "pixel", 0.4, 0.0, 1)]
    heights = []
    for questions in (1, 4):
        more = [Answer(f"queries {number}", "0.5", 0.5, 0.1, 3) for number in range(questions - 1)]
        heights.append(Image.open(io.BytesIO(study_plot([*found, *more], 2, 0.1, 0.9))).height)
    assert heights[1] == 2 * heights[0], "three in a line"
