"""Records of a run: its plan, its labelling, its large files."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from storage_schemas.commit import code_version
from storage_schemas.errors import StoreError


class UnknownRun(StoreError):
    """The workspace holds no such run."""


class RunRecord(BaseModel):
    """`runs/<run>/run.json`: a planned run; paths are relative to the workspace, None where it has no such file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    name: str = Field(description="the configuration's name")
    teacher: str
    created_at: datetime
    code_version: str = Field(default_factory=code_version)
    shards: int = Field(ge=0, description="score shards planned")
    pairs: int = Field(ge=0, description="score rows planned")
    samples: str | None = None
    rejected_samples: str | None = None
    queries: str | None = None
    candidates: str | None = None
    base_losses: str | None = Field(default=None, description="folder")
    origin: str = Field(default="", description="the Prefect flow run that planned it")
    config: dict[str, object] = Field(description="the pipeline's configuration")


Negatives: TypeAlias = Literal["keep", "tie"]


class Labelling(BaseModel):
    """`runs/<run>/labelling.json`: the way in which a run's scores become rank labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    negatives: Negatives = Field(
        default="keep", description="scores that are not above 0: ranked as all are, or ties at the last rank"
    )


class Part(BaseModel):
    """One large, sorted, immutable file of rank labels that holds all rows of some queries."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    path: str = Field(description="relative to the workspace")
    rows: int = Field(ge=0)
    queries: int = Field(ge=0)
    first_query: str = Field(description="least query_id in it")
    last_query: str = Field(description="greatest query_id in it")
    sha256: str
    negatives: Negatives = Field(default="keep", description="of the labelling that its ranks are of")


class Compaction(BaseModel):
    """`runs/<run>/compaction.json`: the parts that together hold all rows of a finished run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: list[Part]
