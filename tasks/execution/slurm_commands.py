"""Slurm's commands, as a user's shell would call them: sbatch, squeue, sacct, scancel, scontrol."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgda_core.errors import UsageError

ANSWER_SECONDS = 60.0  # that a busy controller may take
DEFAULT_ARRAY = 1001  # MaxArraySize of a Slurm that does not say its own
# https://slurm.schedmd.com/squeue.html, "JOB STATE CODES": those in which a job is over, for good.
OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


class SlurmAway(RuntimeError):
    """Slurm's controller does not answer, or not yet: another try may do."""


class SlurmRefuses(UsageError):
    """Slurm does not take a job as it is."""


@dataclass(frozen=True)
class TaskState:
    """The state of a task, and Slurm's reason for it."""

    state: str
    reason: str = ""

    @property
    def over(self) -> bool:
        return self.state in OVER


def submit(script: Path, tasks: int, at_once: int | None) -> str:
    """Submit a job array of this many tasks; return its id.

    Raises:
        SlurmRefuses: by what sbatch says.
        SlurmAway: the controller does not answer.
    """
    array = f"0-{tasks - 1}" + (f"%{at_once}" if at_once is not None and at_once < tasks else "")
    said = _said("sbatch", "--parsable", f"--array={array}", str(script))
    return said.strip().splitlines()[-1].partition(";")[0]  # behind it the cluster's name, where there are several


def look(name: str) -> dict[str, TaskState]:
    """Return the tasks of jobs of this name that are in the queue, or left it some minutes ago, by their id.

    Raises:
        SlurmAway: the controller does not answer.
    """
    said = _said(
        *("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--name={name}"),
        "--format=%i|%T|%r",
    )
    found = {}
    for line in said.splitlines():
        task, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        if task:
            found[task] = TaskState(state, "" if reason == "None" else reason)
    return found


def accounted(tasks: Sequence[str]) -> dict[str, TaskState]:
    """Return how tasks that left the queue ended, by sacct; nothing where the cluster keeps no accounts."""
    try:
        said = _said(
            *("sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(tasks)}"),
            "--format=JobID,State,ExitCode",
        )
    except (SlurmAway, SlurmRefuses):
        return {}
    rows = [line.split("|") for line in said.splitlines() if line.count("|") == 2]
    # "CANCELLED by 1000"
    return {task: TaskState(state.split()[0], f"exit code {code}") for task, state, code in rows if state}


def call_off(name: str) -> None:
    """Take the tasks of jobs of this name out of the queue; those that run are told to end at their next micro-batch.

    Raises:
        SlurmAway: the controller does not answer.
    """
    whose = f"--user={os.getuid()}", f"--name={name}"
    _said("scancel", "--state=PENDING", *whose)
    _said("scancel", "--state=RUNNING", "--signal=TERM", "--batch", *whose)


def called_off(name: str) -> str:
    """Do as `call_off`; return why it could not be done, and nothing where it was."""
    try:
        call_off(name)
    except (SlurmAway, SlurmRefuses) as error:
        return f"tasks may be left in Slurm's queue, where they end as soon as they begin: {error}"
    return ""


def end(tasks: Sequence[str]) -> None:
    """End these tasks, whatever they are at.

    Raises:
        SlurmAway: the controller does not answer.
    """
    _said("scancel", *tasks)


@functools.cache
def most_tasks() -> int:
    """Return how many tasks an array may have, by the cluster's MaxArraySize."""
    try:
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", _said("scontrol", "show", "config"))
    except (SlurmAway, SlurmRefuses):
        found = None
    # Numbers of tasks are below it, and begin at 0.
    return max(1, int(found[1])) if found else DEFAULT_ARRAY


_AWAY = (
    "unable to contact",
    "socket timed out",
    "connection refused",
    "connection timed out",
    "try again",
    "zero bytes",
)


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        raise SlurmRefuses(f"{command[0]} not found on this machine: start the run on a login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmAway(f"{command[0]} has not answered for {ANSWER_SECONDS:.0f} s") from None
    if done.returncode == 0:
        return done.stdout
    why = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
    if any(sign in why.lower() for sign in _AWAY):
        raise SlurmAway(f"{command[0]}: {why}")
    raise SlurmRefuses(f"{command[0]}: {why}")
