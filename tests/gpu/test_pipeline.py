"""A whole run on the card, from tars to answers, against the same run on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from storage_schemas.sql.views import query
from tasks.devices import pick_device
from tasks.inputs.queries import load_queries
from tasks.serving.attributor import Attributor
from tests.tasks.whole_runs import SAMPLES, WholeRun, configuration, whole_run

pytestmark = pytest.mark.gpu

TEACHER = {"name": "abu_plus_first_order", "alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4, "shard_samples": 16}


def made_on(devices: tuple[str, ...], folder: Path, model: Path, head: str) -> list[WholeRun]:
    """The same run on each device, in a workspace of its own."""
    config = configuration(
        folder,
        model,
        teacher=TEACHER,
        curvature={"samples": 16},
        sketches={},
        exact_check={"queries": 2, "candidates": 6},
        self_consistency={"queries": 2, "samples": 12},
    )
    gradient = config.head.gradient.model_copy(update={"axes": 5, "timesteps": 2})
    kind = config.head.model_copy(update={"kind": head, "gradient": gradient})
    return [
        whole_run(config.model_copy(update={"head": kind, "device": device, "workspace": str(folder / str(number))}))
        for number, device in enumerate(devices)
    ]


@pytest.fixture(scope="module", params=["symmetric", "gradient"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Path, card: torch.device
) -> tuple[WholeRun, WholeRun]:
    """The same run on the CPU and on the card."""
    here, there = made_on(("cpu", card.type), tmp_path_factory.mktemp("both"), model_folder, request.param)
    assert there.context.device.type == pick_device(card.type).type == card.type
    return here, there


def scores_of(run: WholeRun) -> np.ndarray:
    rows = query(run.workspace.root, "SELECT score FROM scores ORDER BY query_id, train_id")
    return rows["score"].to_numpy()


def test_scores_are_the_same(both: tuple[WholeRun, WholeRun]) -> None:
    here, there = (scores_of(run) for run in both)
    assert np.linalg.norm(there - here) < 1e-3 * np.linalg.norm(here)


def test_checks_say_the_same(both: tuple[WholeRun, WholeRun]) -> None:
    asked = "SELECT space, metric, cutoff, value FROM metrics WHERE query_id = '' AND metric = 'spearman' ORDER BY ALL"
    here, there = (query(run.workspace.root, asked).to_pylist() for run in both)
    named = [{name: row[name] for name in ("space", "metric", "cutoff")} for row in here]
    assert named == [{name: row[name] for name in ("space", "metric", "cutoff")} for row in there]
    compared = [(one["value"], other["value"]) for one, other in zip(here, there, strict=True)]
    assert all(one == pytest.approx(other, abs=0.1) for one, other in compared), compared


def test_sketches_answer_the_same(both: tuple[WholeRun, WholeRun]) -> None:
    image = load_queries(both[0].run.artifacts["queries"])[2].image
    answers = [
        Attributor(run.workspace, load=["sketch"]).attribute(image, "a red circle", SAMPLES, "sketch") for run in both
    ]
    here, there = ({each.train_id: each.score for each in answer.hits} for answer in answers)
    scale = max(abs(score) for score in here.values())
    assert all(there[sample] == pytest.approx(score, abs=0.02 * scale) for sample, score in here.items())
    shares = [answer.influence.share for answer in answers if answer.influence]
    assert shares[1] == pytest.approx(shares[0], abs=0.02)


def test_an_index_answers_with_neighbours_as_near(both: tuple[WholeRun, WholeRun]) -> None:
    """A head that is trained elsewhere is another one; a gradient head is solved, and is the same."""
    image = load_queries(both[0].run.artifacts["queries"])[2].image
    found = [Attributor(run.workspace).attribute(image, "a red circle", SAMPLES) for run in both]
    here, there = ({each.train_id: each.similarity for each in answer.hits} for answer in found)
    assert here.keys() == there.keys()
    if both[0].config.head.kind == "gradient":
        scale = max(abs(value) for value in here.values())
        assert all(there[sample] == pytest.approx(value, abs=0.05 * scale) for sample, value in here.items())
