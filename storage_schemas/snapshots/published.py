"""The published state, which readers see: a snapshot of rank labels, and the head and index that answer from it.

It changes in one step: `published/<number>.json` is created, which fails where the number is taken. A writer that comes
second looks again and changes what is there now, so that no writer undoes what another one did. The highest number is
what readers see. `current.json` is a copy of it, and one that lags behind does no harm.
"""

from __future__ import annotations

import json
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas.errors import StoreError
from storage_schemas.files import is_there, read_if_there
from storage_schemas.runs.ledger import published_versions
from storage_schemas.workspace import Workspace

LAYOUT_VERSION = "3"  # of current.json and of what it names


class Served(BaseModel):
    """What answered before something else did: paths relative to the workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: str
    head: str
    index_samples: str
    metrics: str | None = None
    snapshot: str = Field(description="that the metrics are of")

    @property
    def index_version(self) -> str:
        return _last_name(self.index)

    @property
    def head_version(self) -> str:
        return _last_name(self.head)


class Published(BaseModel):
    """`published/<number>.json`: the files that SQL, `attribute` and the report read, relative to the workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout_version: str
    version: int = Field(default=0, description="its number; 0 where an earlier release wrote it, as `current.json`")
    snapshot: str
    run: str = Field(description="the run published last; samples, config and checks are its own")
    teacher: str
    created_at: datetime
    samples: str | None = None
    rejected_samples: str | None = None
    queries: list[str] = Field(default_factory=list)
    candidates: list[str] = Field(default_factory=list)
    base_losses: str | None = Field(default=None, description="folder")
    exact_check: str | None = Field(default=None, description="folder of pairs that the exact teacher scored too")
    metrics: str | None = None
    study: str | None = Field(default=None, description="metrics of a study, as earlier releases wrote them")
    compared_heads: str | None = Field(default=None, description="table of a study of its rank labels")
    head: str | None = None
    index: str | None = None
    index_samples: str | None = Field(default=None, description="table that the index's train_ids number")
    served_before: list[Served] = Field(default_factory=list, description="where a rollback leads, the last first")
    pruned: list[str] = Field(default_factory=list, description="index versions that are being deleted")
    snapshot_before: str | None = Field(default=None, description="the snapshot that was published before this one")
    config: dict[str, object] = Field(description="the pipeline's configuration")

    @property
    def index_version(self) -> str:
        """The version of the index that answers; empty where none does."""
        return _last_name(self.index)

    @property
    def head_version(self) -> str:
        """The version of the head that answers; empty where none does."""
        return _last_name(self.head)


class NotPublished(StoreError):
    """The workspace holds no published run, or one that this release cannot read."""


class CannotPublish(StoreError):
    """These runs cannot stand in one snapshot."""


class OtherRelease(NotPublished):
    """The published state cannot be read by this release."""


def read_published(workspace: Workspace) -> Published:
    """Read what is published.

    Raises:
        NotPublished: no run of this workspace is published, or another release published it.
    """
    _, content = newest_version(workspace)
    if content is None:
        raise NotPublished(
            f"{workspace.root} has no published run: run `fastgda demo` or `fastgda run CONFIG` first, "
            "or name another folder with --workspace"
        )
    return parsed(workspace, content)


def published_or_none(workspace: Workspace) -> Published | None:
    """Read what is published; None where nothing is, or another release published it."""
    try:
        return read_published(workspace)
    except NotPublished:
        return None


def parsed(workspace: Workspace, content: bytes) -> Published:
    """Parse what is published.

    Raises:
        OtherRelease: another release wrote it.
    """
    try:
        published = Published.model_validate_json(content)
    except ValidationError:
        published = None
    if published is None or published.layout_version != LAYOUT_VERSION:
        raise OtherRelease(
            f"{workspace.current} was written by another release: run `fastgda run CONFIG` again, "
            "which reuses the scores that are there and publishes them anew"
        )
    return published


NOTHING = b"null\n"  # what a version holds when the last run was retracted


def newest_version(workspace: Workspace) -> tuple[int, bytes | None]:
    """Return number and content of what is published, from the pointer and the versions after it; else no content.

    The folder is listed only where the pointer leads nowhere.
    """
    pointed = read_if_there(workspace.current)
    number = 0 if pointed is None else _number(pointed)
    if number == 0:  # nothing, or of an earlier release
        return listed_version(workspace)
    while is_there(workspace.published(number + 1)):
        number += 1
    # Vacuum takes the lowest number first: as long as a version is there, the next was not taken, but never was.
    content = read_if_there(workspace.published(number))
    if content is None:
        return listed_version(workspace)
    return number, None if content == NOTHING else content


def listed_version(workspace: Workspace) -> tuple[int, bytes | None]:
    """As `newest_version`, wherever the pointer leads: for a writer that another one came before."""
    while True:
        number = max(published_versions(workspace), default=0)
        pointed = read_if_there(workspace.current)
        if pointed is not None:
            # One without a number is of an earlier release, which knows of no others and wrote last.
            told = _number(pointed)
            if told == 0 or told >= number:
                return max(number, told), pointed
        if number == 0:
            return 0, None
        content = read_if_there(workspace.published(number))
        if content is not None:  # else it is vacuumed, and there are newer ones
            return number, None if content == NOTHING else content


def _last_name(path: str | None) -> str:
    return (path or "").rsplit("/", 1)[-1]


def _number(content: bytes) -> int:
    try:
        return int(json.loads(content).get("version", 0))
    except (ValueError, TypeError, AttributeError):  # another release's, or damaged
        return 0
