"""The section of the job arrays that make a run's parts in a Slurm cluster."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from tasks.config.section import Section

# What a run decides by itself, in sbatch's long and short forms.
OURS = ("--array", "-a", "--job-name", "-J", "--output", "-o", "--error", "-e", "--signal", "--parsable", "--wrap")
FIELD_OF = {"--partition": "partition", "--gres": "gres", "--time": "time", "--account": "account"}


class SlurmConfig(Section):
    """Tasks that wait in Slurm's queue and make parts, each one process with one device."""

    tasks: int = Field(
        default=8, ge=1, description="tasks of job arrays that wait or run at a time; may change from start to start"
    )
    at_once: int | None = Field(
        default=None, ge=1, description="of these, how many may run at a time (sbatch's %N); default: all"
    )
    partition: str | None = Field(default=None, description="default: the cluster's own")
    gres: str | None = Field(default=None, description="of each task, as gpu:1 or gpu:a100:1; default: none")
    time: str | None = Field(
        default=None,
        pattern=r"^(\d+-)?\d+(:\d+){0,2}$",
        description='limit of a task, as "2:00:00" or "1-12" (a day and 12 hours); one that comes to it leaves its '
        "part to others; default: the partition's own",
    )
    account: str | None = Field(default=None, description="that pays; default: the user's own")
    sbatch: tuple[str, ...] = Field(
        default=(), description="more options of sbatch, as --constraint=a100 or --mem=32G, one an entry"
    )
    setup: tuple[str, ...] = Field(
        default=(), description="lines of shell before a task starts, as `module load cuda` or `. venv/bin/activate`"
    )
    python: str | None = Field(
        default=None,
        description="words of shell that start Python with FastGDA on a node, as `apptainer exec --nv fastgda.sif "
        "python`; default: the interpreter of the run itself",
    )
    logs: str | None = Field(
        default=None,
        description="folder of the tasks' output, on a disk that nodes share; default: the run's own in the workspace, "
        "or `fastgda-slurm` in the current folder where the workspace is an object store",
    )
    idle_seconds: float = Field(
        default=120.0, ge=0, description="that a task waits for the next stage before it frees its device"
    )
    poll_seconds: float = Field(default=20.0, ge=0.1, description="between two looks into Slurm's queue (squeue)")

    @property
    def time_seconds(self) -> int | None:
        """The limit of a task in seconds; None where it is the partition's own.

        https://slurm.schedmd.com/sbatch.html: minutes, minutes:seconds, hours:minutes:seconds, and behind days, hours,
        hours:minutes or hours:minutes:seconds.
        """
        if self.time is None:
            return None
        days, dash, rest = self.time.rpartition("-")
        fields = [int(each) for each in rest.split(":")]
        units = (3600, 60, 1) if dash or len(fields) == 3 else (60, 1)
        return 86400 * int(days or 0) + sum(unit * each for unit, each in zip(units, fields, strict=False))

    @field_validator("sbatch", "setup")
    @classmethod
    def _one_line_each(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        broken = [line for line in lines if "\n" in line or not line.strip()]
        if broken:
            raise ValueError(f"{broken[0]!r} is not one line: write one entry a line")
        return lines

    @model_validator(mode="after")
    def _options_are_sbatchs(self) -> Self:
        for option in self.sbatch:
            name = option.partition("=")[0].split()[0]
            if not name.startswith("-"):
                raise ValueError(f"sbatch: {option!r} is no option: write it as --constraint=a100")
            if name in OURS:
                raise ValueError(f"sbatch: {name} is set by the run itself: remove it")
            if name in FIELD_OF:
                raise ValueError(f"sbatch: {name} has a field of its own: set execution.slurm.{FIELD_OF[name]}")
        if self.at_once is not None and self.at_once > self.tasks:
            raise ValueError(f"at_once is {self.at_once}, more than tasks, {self.tasks}: raise tasks or remove it")
        return self
