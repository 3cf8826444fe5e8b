from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.service import Figures, grown, main
from storage_schemas.workspace import Workspace
from tasks.serving.attributor import Attributor
from tests.tasks.whole_runs import SAMPLES, WholeRun, configuration, whole_run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    folder = tmp_path_factory.mktemp("small")
    return whole_run(
        configuration(folder, model_folder, teacher={"name": "similarity"}, candidates={"policy": "top_k", "k": 10})
    )


def test_quantiles_are_of_the_sorted_latencies() -> None:
    found = Figures.of("x", [seconds / 1000 for seconds in range(100, 0, -1)], took=2.0)
    assert (found.requests, found.per_second, found.p50, found.p99) == (100, 50.0, 51.0, 100.0)


@pytest.mark.integration
def test_a_grown_workspace_answers_and_every_figure_is_taken_without_a_failure(small: WholeRun, tmp_path: Path) -> None:
    root = Path(str(small.workspace.root))
    found = main([str(root), "--rows", "100", "--kind", "Flat", "--seconds", "0.3", "--clients", "2"])
    assert len(found) == 8
    assert all(each.requests and each.p50 <= each.p99 and not each.failed for each in found)
    assert grown(root, tmp_path / "grown", 100, "Flat") == SAMPLES
    attributor = Attributor(Workspace.at(str(tmp_path / "grown")))
    assert attributor.versions.vectors == len(attributor.catalogue()) == 100
    answer = attributor.attribute_query("s0000", 30)
    assert len({hit.train_id for hit in answer.hits}) == 30
