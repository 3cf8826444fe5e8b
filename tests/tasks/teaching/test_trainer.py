"""Models that a command of the user's own trains: a real script, killed, stopped, failing, and writing rubbish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.errors import Stopped, UsageError
from fastgda_core.interruption import checked_by
from tasks.config.judging import TrainerConfig
from tasks.teaching import trainer_guard
from tasks.teaching.trainer import Trainer, TrainingFailed
from tests.tasks.teaching import a_trainer

REMOVED = pa.table({"train_id": [1, 4], "key": ["s0001", 'a "b", c'], "shard": ["x.tar", "x.tar"]})


@pytest.fixture(scope="module")
def model(model_folder: Path) -> DiffusionModel:
    return load_model(model_folder, torch.device("cpu"))


def trainer_of(folder: Path, model_folder: Path, way: str = "") -> Trainer:
    script = [sys.executable, a_trainer.__file__, str(model_folder), "{removed}", "{seed}", "{output}"]
    config = TrainerConfig.model_validate({"command": [*script, *filter(None, [way])], "folder": str(folder)})
    return Trainer(config, folder / "m.begun", folder / "logs" / "m.log")


def trained(trainer: Trainer, seed: int = 5) -> None:
    with trainer.alone() as lock:
        trainer.train(REMOVED, seed, "cpu", lock)


def expected(model_folder: Path, seed: int) -> dict[str, np.ndarray]:
    """The script's weights, computed here."""
    found = {name: each.numpy() for name, each in load_file(model_folder / "unet" / a_trainer.NAME).items()}
    for step in range(a_trainer.STEPS):
        draw = np.random.default_rng([seed, step, 1, 4])
        found = {name: each + 0.01 * draw.standard_normal(each.shape, np.float32) for name, each in found.items()}
    return found


def check(denoiser: torch.nn.Module, weights: dict[str, np.ndarray]) -> None:
    there = denoiser.state_dict()
    assert there.keys() == weights.keys()
    assert all(np.array_equal(there[name].numpy(), each) for name, each in weights.items())


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


def at_work(folder: Path) -> list[int]:
    """Processes of the trainer's script that were told of this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(os.fsencode(folder)) for word in words) and b"guard" not in b" ".join(words):
            found.append(int(process.name))
    return found


def test_a_command_is_told_what_to_leave_out_and_its_model_is_read(
    tmp_path: Path, model_folder: Path, model: DiffusionModel
) -> None:
    trainer = trainer_of(tmp_path, model_folder)
    trained(trainer)
    check(trainer.load(model), expected(model_folder, seed=5))
    told = (trainer.folder / "removed.csv").read_text().splitlines()
    assert told == ['"train_id","key","shard"', '1,"s0001","x.tar"', '4,"a ""b"", c","x.tar"']
    assert "without 2 samples, seed 5" in trainer.log.read_text()
    trainer.clear()
    assert not trainer.folder.exists() and trainer.log.exists()


def test_what_is_finished_is_not_trained_again(tmp_path: Path, model_folder: Path, model: DiffusionModel) -> None:
    trainer = trainer_of(tmp_path, model_folder)
    trained(trainer)
    trained(trainer)
    assert len(trainer.log.read_text().splitlines()) == 4, "it is not known to be whole before it was read"
    trainer.load(model)
    trained(trainer)
    assert len(trainer.log.read_text().splitlines()) == 4


def test_a_stop_ends_the_command_and_another_start_goes_on(
    tmp_path: Path, model_folder: Path, model: DiffusionModel
) -> None:
    slow = trainer_of(tmp_path, model_folder, "slow")

    def stop() -> None:
        if (slow.output / "at_work").exists():
            raise Stopped

    with checked_by(stop), pytest.raises(Stopped):
        trained(slow)
    assert at_work(tmp_path) == []
    (slow.output / "steps.json").write_text("[0]")  # as if the first of its steps had been made
    draw = np.random.default_rng([5, 0, 1, 4])
    weights = load_file(model_folder / "unet" / a_trainer.NAME)
    first = {name: each.numpy() + 0.01 * draw.standard_normal(each.shape, np.float32) for name, each in weights.items()}
    a_trainer.save_file(first, slow.output / "weights.safetensors")
    again = trainer_of(tmp_path, model_folder)
    trained(again)
    check(again.load(model), expected(model_folder, seed=5))


def test_a_training_ends_with_the_worker_that_asked_for_it(tmp_path: Path, model_folder: Path) -> None:
    ask = (
        "import sys; from pathlib import Path; from tests.tasks.teaching.test_trainer import trained, trainer_of; "
        "trained(trainer_of(Path(sys.argv[1]), Path(sys.argv[2]), 'slow'))"
    )
    worker = subprocess.Popen([sys.executable, "-c", ask, str(tmp_path), str(model_folder)])
    slow = trainer_of(tmp_path, model_folder)
    wait_for((slow.output / "at_work").exists, 60)
    assert len(at_work(tmp_path)) == 2, "the worker and the trainer"
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    wait_for(lambda: at_work(tmp_path) == [])
    trained(slow)
    assert (slow.output / "unet").is_dir()


def test_a_trainer_that_will_not_stop_is_killed(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_guard, "GRACE_SECONDS", 0.0)  # the worker's patience; the guard, a process, has its own
    deaf = (
        "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[3] + '/deaf', 'w'); time.sleep(60)"
    )
    words = [sys.executable, "-c", deaf, "{removed}", "{seed}", "{output}"]
    trainer = Trainer(TrainerConfig(command=words, folder=tmp_path), tmp_path / "m.begun", tmp_path / "m.log")

    def stop() -> None:
        if (trainer.output / "deaf").exists():
            raise Stopped

    with checked_by(stop), pytest.raises(Stopped):
        trained(trainer)
    assert at_work(tmp_path) == []


def test_of_two_processes_one_trains_and_the_other_waits(tmp_path: Path, model_folder: Path) -> None:
    trainer = trainer_of(tmp_path, model_folder)
    with trainer.alone():
        other = threading.Thread(target=trained, args=[trainer])
        other.start()
        other.join(0.5)
        assert other.is_alive() and not trainer.log.exists()
    other.join(20)
    assert trainer.log.exists()


def test_a_command_that_fails_is_told_with_the_end_of_its_log(tmp_path: Path, model_folder: Path) -> None:
    trainer = trainer_of(tmp_path, model_folder, "fails")
    for _ in range(2):
        with pytest.raises(TrainingFailed, match=r"ended with exit status 3; \S+m.log ends with: ") as failed:
            trained(trainer)
        assert str(failed.value).endswith("without 2 samples, seed 5 / the cluster is full")
        assert "\n" not in str(failed.value)
    nowhere = TrainerConfig(command=["no-such-program", "{removed}{seed}{output}"], folder=tmp_path)
    with pytest.raises(
        TrainingFailed, match=r"exit status 127; .* ends with: no-such-program cannot be started: No such"
    ):
        trained(Trainer(nowhere, tmp_path / "n.begun", tmp_path / "n.log"))
    astray = nowhere.model_copy(update={"folder": tmp_path / "absent"})
    with pytest.raises(UsageError, match=r"judge.retrain.folder \S+absent: No such file"):
        trained(Trainer(astray, tmp_path / "a.begun", tmp_path / "a.log"))


def test_what_is_no_model_like_the_attributed_one_does_not_count(
    tmp_path: Path, model_folder: Path, model: DiffusionModel
) -> None:
    for way, why in (("rubbish", "does not load: "), ("other", "holds another architecture than model.folder: ")):
        trainer = trainer_of(tmp_path / way, model_folder, way)
        (tmp_path / way).mkdir()
        trained(trainer)
        with pytest.raises(TrainingFailed, match=f"ended well, but .*output {why}.* ends with: ") as failed:
            trainer.load(model)
        assert "\n" not in str(failed.value)
        mended = trainer_of(tmp_path / way, model_folder)
        trained(mended)
        check(mended.load(model), expected(model_folder, seed=5))
    empty = [sys.executable, "-c", "pass", "{removed}", "{seed}", "{output}"]
    trainer = Trainer(TrainerConfig(command=empty, folder=tmp_path), tmp_path / "e.begun", tmp_path / "e.log")
    trained(trainer)
    with pytest.raises(TrainingFailed, match="output has no folder unet or transformer; "):
        trainer.load(model)
