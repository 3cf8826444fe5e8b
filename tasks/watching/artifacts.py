"""Artifacts that show a run in Prefect: a live table, what failed, pictures, curves, links."""

from __future__ import annotations

import base64
import re
import time
from types import TracebackType
from typing import Self
from uuid import UUID

from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.runtime import flow_run

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.workspace import Workspace
from tasks.watching.prefect_answers import tolerated
from tasks.watching.run_status import run_status
from tasks.watching.status_text import status_markdown

UPDATE_SECONDS = 10.0


def artifact_key(*words: str) -> str:
    """Return a key for Prefect, which takes lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def publish_markdown(key: str, text: str, description: str) -> UUID | None:
    """Publish a new version of an artifact; None where there is no flow run or no server to hear of it."""
    if flow_run.get_id() is None:
        return None
    with tolerated(f"keep the artifact {artifact_key(key)}"):
        made = create_markdown_artifact(text, key=artifact_key(key), description=description)
        return made if isinstance(made, UUID) else None
    return None


def publish_image(key: str, picture: bytes, description: str) -> None:
    """Publish a JPEG or PNG as an artifact that holds it, as no store may be reachable from a browser."""
    if flow_run.get_id() is None:
        return
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    url = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    with tolerated(f"keep the artifact {artifact_key(key)}"):
        create_image_artifact(url, key=artifact_key(key), description=description)


class Board:
    """The run's progress as one artifact, replaced in place while the block runs; a server that is away is no fault."""

    def __init__(self, workspace: Workspace, run: str) -> None:
        self.workspace, self.run = workspace, run
        self.artifact: UUID | None = None
        self.due = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.artifact is not None or flow_run.get_id() is not None:
            self.update(now=True)

    def update(self, *, now: bool = False) -> None:
        """Show how the run stands, if the last time is long enough ago."""
        started = time.monotonic()
        if not now and started < self.due:
            return
        try:
            text = status_markdown(run_status(self.workspace, self.run))
        except (StoreError, UsageError, OSError):
            return
        # The status of a large run takes a while to derive: it may cost a twentieth of the time at most.
        self.due = time.monotonic() + max(UPDATE_SECONDS, 20 * (time.monotonic() - started))
        if self.artifact is None:
            self.artifact = publish_markdown(f"progress {self.run}", text, f"Progress of run {self.run}")
            return
        with tolerated("show how the run stands"), get_client(sync_client=True) as client:
            client.update_artifact(self.artifact, ArtifactUpdate(data=text))
