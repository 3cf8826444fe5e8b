"""Trainers of a user's own under the real command: stopped with the run, whatever process waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.flows.pipeline_case import environment, fastgda, sql
from tests.orchestration.test_interrupts import ended
from tests.orchestration.test_runs import small, wait_for
from tests.prefect_processes import ROOT, kill_marked, marked
from tests.tasks.teaching import a_trainer


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    kill_marked(str(tmp_path))


def judged(folder: Path, model: Path, **execution: object) -> Path:
    """A configuration whose judge has four models, trained by `trainer.py` beside it."""
    config = small(folder, model, **execution)
    document = yaml.safe_load(config.read_text())
    words = [sys.executable, "trainer.py", str(model), "{removed}", "{seed}", "{output}"]
    document["judge"] = {"retrain": {"command": words}, "subsets": 3, "again": 0, "draws": 2}
    config.write_text(yaml.safe_dump(document))
    return config


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_the_trainer_and_the_same_command_goes_on(
    tmp_path: Path, model_folder: Path, home: Path, workers: int
) -> None:
    config, script = judged(tmp_path, model_folder, workers=workers), Path(a_trainer.__file__).read_text()
    fastgda("curate", config, home=home)
    (tmp_path / "trainer.py").write_text(script.replace('way == "slow"', "step == 1"))
    variables = {**environment(home), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("fastgda")), "judge", str(config)],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    begun = "workspace/retrainings/*/*.begun/output/at_work"
    wait_for(lambda: len(list(tmp_path.glob(begun))) == workers, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = ended(process)
    assert process.returncode == 130
    assert errors == [f"interrupted; `fastgda judge {config}` goes on where it stopped"]
    wait_for(lambda: not marked(str(tmp_path)))
    (tmp_path / "trainer.py").write_text(script)
    fastgda("judge", config, home=home)
    found = sql(tmp_path, "SELECT count(DISTINCT retraining) AS models FROM retrained_losses", home)
    assert found == [{"models": "4"}]
    logs = [path.read_text().count("without ") for path in tmp_path.glob("workspace/retrainings/*/*.log")]
    assert sorted(logs) == [1] * (4 - workers) + [2] * workers, "what was begun was begun again in the same folder"
    assert not list(tmp_path.glob("workspace/retrainings/*/*.begun"))
