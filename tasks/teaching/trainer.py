"""Train a model by a command of the user's own: started, followed, stopped, and what it wrote read and checked."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
from safetensors import SafetensorError

from fastgda_core.diffusion.folder import DENOISERS
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.pretrained import load_frozen
from fastgda_core.errors import UsageError
from fastgda_core.interruption import checkpoint
from storage_schemas.files import write_atomically
from tasks.config.judging import TrainerConfig
from tasks.printable import printable
from tasks.teaching import trainer_guard

LOOK_SECONDS = 0.2  # between two looks whether the command has ended, or has to
LAST_LINES, LAST_BYTES = 5, 4096  # of the log, in the message about a training that failed
REMOVED, OUTPUT, FINISHED = "removed.csv", "output", "finished"


class TrainingFailed(RuntimeError):
    """The user's trainer did not make a model; another try is made only when somebody asks for it."""


@dataclass(frozen=True)
class Trainer:
    """The training of one model by a command.

    folder: of this training alone, on this machine's disk. In it are what the command is told and what it writes, from
        which another start goes on, until the model's losses are kept.
    log: file to which the command's output is added.
    """

    config: TrainerConfig
    folder: Path
    log: Path

    @property
    def output(self) -> Path:
        """The folder that the command writes the model into."""
        return self.folder / OUTPUT

    @contextmanager
    def alone(self) -> Iterator[int]:
        """Let one process at a time train this model; give the handle of a lock, which goes with all who hold it.

        A command whose worker was killed may still be writing for some seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not _locked(handle):
                checkpoint()
                time.sleep(LOOK_SECONDS)
            yield handle
        finally:
            os.close(handle)

    def train(self, removed: pa.Table, seed: int, device: str, lock: int) -> None:
        """Run the command to its end, unless it ended well before.

        Args:
            removed: what is left out: train_id, key and shard of each sample.
            seed: of the model.
            device: where the command should train.
            lock: of `alone`; held by what this process starts, too.

        Raises:
            TrainingFailed: the command ended with another exit status than 0.
        """
        if (self.folder / FINISHED).exists():
            return
        self.output.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(removed, sink)
        write_atomically(self.folder / REMOVED, sink.getvalue())
        words = self.config.words(removed=self.folder / REMOVED, seed=seed, output=self.output, device=device)
        status, begun = self._run(words, lock)
        if status:
            raise TrainingFailed(f"judge.retrain.command ended with exit status {status}{self._told(begun)}")

    def _run(self, words: list[str], lock: int) -> tuple[int, int]:
        """Run a command in a session of its own; return its exit status, and where its part of the log begins."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {' '.join(words)}\n".encode())
            log.flush()
            begun = log.tell()
            try:
                guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", trainer_guard.__file__, *words],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    cwd=self.config.folder,
                    start_new_session=True,
                    pass_fds=[lock],
                )
            except OSError as error:  # the folder is not there
                raise UsageError(f"judge.retrain.folder {self.config.folder}: {error.strerror}") from error
            try:
                return _waited_for(guard), begun
            finally:
                _ended(guard)

    def load(self, model: DiffusionModel) -> Any:
        """Load the denoiser that the command wrote, in float32 on the model's device, and note that it is whole.

        Args:
            model: the attributed one: the denoiser has to be of its class, with parameters of the same shapes.

        Raises:
            TrainingFailed: there is none, or another one.
        """
        places = [self.output / part for part in DENOISERS]
        place = next((place for place in places if place.is_dir()), None)
        if place is None:
            raise self._unusable(f"has no folder {' or '.join(DENOISERS)}")
        try:
            denoiser = load_frozen(type(model.denoiser), place, model.device).float()
        except (UsageError, OSError, AttributeError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise self._unusable(f"does not load: {' '.join(str(error).split())[:300]}") from error
        if strange := _other_shapes(denoiser, model.denoiser):
            raise self._unusable(f"holds another architecture than model.folder: {strange[0]} differs")
        write_atomically(self.folder / FINISHED, b"")
        return denoiser

    def _unusable(self, why: str) -> TrainingFailed:
        return TrainingFailed(f"judge.retrain.command ended well, but {self.output} {why}{self._told(0)}")

    def _told(self, begun: int) -> str:
        """Return where the log is, with its last lines from an offset on."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(begun, size - LAST_BYTES))
            text = log.read().decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
        return f"; {self.log} ends with: {printable(' / '.join(lines))}" if lines else f"; {self.log} is empty"

    def clear(self) -> None:
        """Delete what the training left, but for its log."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _waited_for(guard: subprocess.Popen[bytes]) -> int:
    """Wait for the guard's end; look now and then whether the work has to stop."""
    while True:
        checkpoint()
        try:
            return guard.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def _ended(guard: subprocess.Popen[bytes]) -> None:
    """End the command if it is still there: the guard does so at the end of its input."""
    assert guard.stdin is not None
    guard.stdin.close()
    try:
        guard.wait(trainer_guard.GRACE_SECONDS + 2)
    except subprocess.TimeoutExpired:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def _other_shapes(denoiser: Any, model: Any) -> list[str]:
    """Return the names of parameters that one of two denoisers lacks, or has in another shape."""
    shapes = [{name: tensor.shape for name, tensor in each.state_dict().items()} for each in (denoiser, model)]
    return sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
