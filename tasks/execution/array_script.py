"""The batch script of a run's tasks in Slurm, and the folder of their output."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from storage_schemas.workspace import Workspace
from tasks.config.slurm import SlurmConfig

WARN_SECONDS = 90  # before its time limit in which Slurm tells a task to leave its part; of a short limit, a quarter


def log_folder(workspace: Workspace, run: str, config: SlurmConfig) -> Path:
    """Return the folder of the output of the run's tasks."""
    if config.logs is not None:
        return Path(config.logs).absolute() / run
    beside = workspace.slurm(run)
    return beside.with_suffix("").absolute() if isinstance(beside, Path) else Path.cwd() / "fastgda-slurm" / run


def written_script(logs: Path, name: str, config: SlurmConfig, location: str, run: str) -> Path:
    """Write the script of the tasks, which a user may read, and submit by hand, too."""
    options = [f"--job-name={name}", f"--output={str(logs).replace('%', '%%')}/%A_%a.log"]
    options.append(f"--signal=B:TERM@{min(WARN_SECONDS, (config.time_seconds or 4 * WARN_SECONDS) // 4)}")
    fields = {"partition": config.partition, "gres": config.gres, "time": config.time, "account": config.account}
    options += [f"--{option}={value}" for option, value in fields.items() if value is not None]
    python = config.python or shlex.quote(sys.executable)
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in [*options, *config.sbatch]),
        *config.setup,
        # In the shell's place, as Slurm's warning before the time limit comes to that process alone.
        f"exec {python} -m tasks.execution.array_task {shlex.join([location, run])}",
    ]
    logs.mkdir(parents=True, exist_ok=True)
    script = logs / "tasks.sbatch"
    script.write_text("\n".join(lines) + "\n")
    return script
