"""Runs that are made once for all tests that look at what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # see tests/conftest.py
    from tests.tasks.whole_runs import WholeRun


@pytest.fixture(scope="session")
def similar(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    """Taught by cosines, of which the truth is known."""
    from tests.tasks.whole_runs import configuration, whole_run

    folder = tmp_path_factory.mktemp("similar")
    candidates = {"policy": "top_k", "k": 10}
    patch = {"k": [1, 3], "queries": 1, "pairs": 2, "draws": 4}
    return whole_run(
        configuration(folder, model_folder, teacher={"name": "similarity"}, candidates=candidates, tail_patch=patch)
    )


@pytest.fixture(scope="session")
def unlearned(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    """Taught by first-order unlearning steps of low rank, sketched, and judged by every check."""
    from tests.tasks.whole_runs import configuration, whole_run

    teacher = {"name": "abu_plus_first_order", "alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4, "shard_samples": 16}
    return whole_run(
        configuration(
            tmp_path_factory.mktemp("unlearned"),
            model_folder,
            teacher={**teacher, "update_rank": 4},
            curvature={"samples": 16},
            sketches={},
            exact_check={"queries": 2, "candidates": 6},
            self_consistency={"queries": 2, "samples": 12},
            judge={
                "retrain": {"steps": 3, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-2},
                **{"subsets": 4, "again": 3, "draws": 4, "leave_out": {"k": [3], "targets": 1}},
            },
        )
    )


@pytest.fixture(scope="session")
def solved(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    """A run whose head is of kind gradient."""
    from tests.tasks.whole_runs import AXES, configuration, whole_run

    teacher = {"name": "abu_plus_first_order", "alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4, "shard_samples": 16}
    config = configuration(
        tmp_path_factory.mktemp("solved"),
        model_folder,
        teacher=teacher,
        curvature={"samples": 16},
        sketches={},
        self_consistency=None,
    )
    head = config.head.model_copy(
        update={"kind": "gradient", "gradient": config.head.gradient.model_copy(update={"axes": AXES, "timesteps": 2})}
    )
    return whole_run(config.model_copy(update={"head": head}))
