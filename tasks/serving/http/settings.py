"""What a service may be told: where it listens, who may ask, and how much of everything it takes."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from fastgda_core.errors import UsageError
from tasks.config.section import Section

ENVIRONMENT = "FASTGDA_SERVE"  # the settings as JSON, for worker processes
MEBIBYTE = 1 << 20


class Limits(Section):
    """Bounds of a request, of what waits, and of what is kept. Beyond them a request is refused with a reason."""

    body_bytes: int = Field(default=16 * MEBIBYTE, ge=1024, description="bytes of a request")
    batch_bytes: int = Field(default=64 * MEBIBYTE, ge=1024, description="bytes of a request to :batch")
    body_seconds: float = Field(default=30.0, gt=0, description="seconds in which a request's bytes have to come")
    pixels: int = Field(default=4096 * 4096, ge=1, description="pixels of an image, counted before it is decoded")
    k: int = Field(default=1000, ge=1, description="hits of an answer")
    caption: int = Field(default=2000, ge=1, description="characters of a caption")
    where: int = Field(default=1000, ge=1, description="characters of a filter")
    exclude: int = Field(default=10_000, ge=1, description="train_ids that a question excludes")
    questions: int = Field(default=256, ge=1, description="questions of one request to :batch")
    rate: float | None = Field(
        default=None, gt=0, description="requests a second for each key, on average; null: any number"
    )
    burst: int = Field(default=20, ge=1, description="requests that a key may send at once, above its rate")
    queue: int = Field(
        default=64, ge=1, description="questions that may wait or be at work; more are answered with 503"
    )
    batch_size: int = Field(default=16, ge=1, description="questions that are encoded together, at most")
    batch_milliseconds: float = Field(
        default=5.0, ge=0, description="the longest wait for others that are on their way"
    )
    threads: int | None = Field(
        default=None, ge=1, description="threads that encode and search; null: one a core and worker"
    )
    jobs: int = Field(default=1, ge=1, description="questions of tier exact at work at a time")
    waiting_jobs: int = Field(default=8, ge=0, description="questions of tier exact that wait")
    job_seconds: float = Field(default=3600.0, gt=0, description="how long an answer of tier exact is kept")
    thumbnail: int = Field(default=1024, ge=16, description="pixels of a resized picture's longer side")
    thumbnail_bytes: int = Field(
        default=128 * MEBIBYTE, ge=0, description="bytes of resized pictures that are kept in memory"
    )


class ServiceSettings(Section):
    """Everything that a worker process of the service needs to know."""

    workspace: str
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1)
    keys: str | None = Field(
        default=None, description="file of API keys; without one the service answers this machine alone"
    )
    hosts: list[str] = Field(default_factory=list, description="names by which it may be asked; none: any")
    cors: list[str] = Field(default_factory=list, description="origins whose pages may read answers")
    page: bool = True
    audit: str | None = Field(default=None, description="file that gets a line for each call of an administrator")
    runtime: str | None = Field(default=None, description="folder that the workers of one service share")
    poll_seconds: float = Field(default=1.0, gt=0, description="how often a worker looks for a newly published version")
    limits: Limits = Limits()

    def stored(self) -> None:
        """Hand the settings to worker processes, by the environment."""
        os.environ[ENVIRONMENT] = self.model_dump_json()

    @classmethod
    def from_environment(cls) -> ServiceSettings:
        """Return what `stored` handed over."""
        return cls.model_validate_json(os.environ[ENVIRONMENT])


def read_limits(path: Path) -> Limits:
    """Read limits from a YAML file.

    Raises:
        UsageError: there is no such file, or a field is unknown or out of range.
    """
    try:
        content = yaml.safe_load(path.read_text()) or {}
        return Limits.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {error}: give a YAML file of limits; see docs/serving.md") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all"
        raise UsageError(f"{path}: {where}: {first['msg']}; docs/serving.md lists the limits") from None
