"""The process of one task of a job array: `python -m tasks.execution.array_task WORKSPACE RUN`.

Slurm starts it on a node. It needs the workspace and nothing else.
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from fastgda_core.interruption import stop_here, stopping
from storage_schemas.runs.liveness import read_assignment
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.config.execution import ExecutionConfig
from tasks.config.stored import lifted
from tasks.execution.taken_parts import TakenParts
from tasks.execution.worker import slurm_task

NOTHING_MADE = 75  # exit code of a task that had no time to make a part (EX_TEMPFAIL)
log = logging.getLogger("fastgda.execution.taken")


def main(location: str, run: str) -> int:
    """Make parts of the run until there are none, or Slurm tells this process to end; return its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_here())
    logs.set_up_once()
    execution, _ = lifted(ExecutionConfig, read_assignment(Workspace.at(location), run).execution, f"run {run}")
    taken = TakenParts(location, run, execution, _share())
    with logs.about(run=run):
        log.info("task %s is begun on %s", slurm_task() or os.getpid(), os.uname().nodename)
        why = taken.make_all()
        log.info("task %s is over after %d parts: %s", slurm_task() or os.getpid(), taken.made, why)
    return NOTHING_MADE if stopping() and not (taken.made or taken.idle) else 0


def _share() -> float:
    """Return this task's place in its array, from 0 to 1."""
    first, last, own = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", "0")) for name in ("MIN", "MAX", "ID"))
    return (own - first) / (last - first + 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
