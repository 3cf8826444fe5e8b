"""The noise plan of a run that asked for an agreement: what its pilot chose, and by what."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, read_if_there, read_whole
from storage_schemas.runs.liveness import read_assignment
from storage_schemas.workspace import Workspace, part

NOISE_PLAN = "noise plan"  # the kind of its one part


class Expected(BaseModel):
    """A plan of the ladder, and how two such plans are expected to agree."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    timesteps: list[int] = Field(description="of the schedule")
    draws: int = Field(description="at each timestep; antithetic pairs where there is more than one")
    agreement: float = Field(description="expected rank correlation with another such plan")
    of_schedule: float = Field(description="the same where the timesteps were drawn anew as well")


class NoisePlanRecord(BaseModel):
    """The content of the part: the plan chosen, and all that it was chosen from, ascending in cost."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    asked: float = Field(description="teacher.agreement")
    chosen: Expected
    samples: int = Field(description="training samples of the pilot")
    queries: int = Field(description="queries of the pilot")
    ladder: list[Expected]

    def __str__(self) -> str:
        chosen = self.chosen
        return (
            f"T={len(chosen.timesteps)}, draws={chosen.draws}{' (antithetic)' if chosen.draws > 1 else ''}, expected "
            f"agreement {chosen.agreement:.2f} ({self.asked:g} asked; pilot of {self.samples} samples)"
        )


def read_noise_plan(folder: AnyPath) -> NoisePlanRecord:
    """Read the plan that a pilot chose."""
    return NoisePlanRecord.model_validate_json(read_whole(part(folder, 0, "json")))


def noise_plan_of(workspace: Workspace, run: str) -> NoisePlanRecord | None:
    """Return the plan that a run's pilot chose; None where it has none, or has not chosen yet."""
    try:
        stages = read_assignment(workspace, run).stages
    except (StoreError, ValidationError):
        return None  # imported, or another release's
    if NOISE_PLAN not in stages:
        return None
    path = part(workspace.file(stages[NOISE_PLAN].path), 0, "json")
    content = read_if_there(path)
    return None if content is None else NoisePlanRecord.model_validate_json(content)
