"""What an Attributor answers from: the published state, each part of it loaded when it is first asked for."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath
from storage_schemas.heads.records import read_head_record
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tasks.inputs.queries import Query, load_queries, queries_artifact
from tasks.serving.agreement import agreements
from tasks.serving.answers import Agreement, Tier
from tasks.serving.catalogue import Catalogue
from tasks.serving.exact import ExactTier
from tasks.serving.fast import FastTier
from tasks.serving.sketched import SketchTier
from tasks.serving.untuned import Untuned
from tasks.serving.versions import served_versions

Part = TypeVar("Part")


class Loaded:
    """The published state as it was when this object was made; concurrent calls may share it.

    Raises:
        NotPublished: nothing is published.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.published = workspace, read_published(workspace)
        self._lock = threading.RLock()
        self._parts: dict[str, object] = {}
        self.versions = served_versions(workspace, self.published)

    @property
    def fast(self) -> FastTier:
        return self._once("fast", lambda: FastTier(self.workspace, self.published))

    @property
    def sketch(self) -> SketchTier:
        return self._once("sketch", lambda: SketchTier(self.workspace, self.published.run))

    @property
    def exact(self) -> ExactTier:
        return self._once("exact", lambda: ExactTier(self.workspace, self.published.run))

    @property
    def has_fast(self) -> bool:
        """Whether a head and an index are published."""
        return self.published.head is not None and self.published.index is not None

    @property
    def untuned(self) -> Untuned | str:
        """The untuned features of the samples; or why there are none."""

        def load() -> Untuned | str:
            fast = self.fast
            try:
                return Untuned(self.workspace, self.published.run, fast.space, fast.samples_path)
            except (UsageError, StoreError) as error:
                return str(error)

        return self._once("untuned", load)

    def catalogue(self, path: AnyPath | None = None) -> Catalogue:
        """Return a table of samples, unless told otherwise those that are published."""
        if path is None:
            relative = self.published.index_samples or self.published.samples
            if relative is None:
                raise UsageError(f"{self.workspace.root} has no samples: what is published was imported without them")
            path = self.workspace.file(relative)
        return self._once(f"samples {path}", lambda: Catalogue(self.workspace, path))

    @functools.cached_property
    def agreements(self) -> dict[Tier, Agreement]:
        """How far each tier agrees with the teacher."""
        head = self.published.head
        kind = read_head_record(self.workspace.file(head)).kind if head else ""
        return agreements(self.workspace, self.published, kind)

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the published labels say that negative scores carry nothing."""
        return any(part.negatives == "tie" for part in read_snapshot(self.workspace, self.published.snapshot).parts)

    @functools.cached_property
    def queries(self) -> dict[str, Query]:
        """The published queries, by query_id; of several sets' queries of one name, the last set's."""
        sets = [queries_artifact(self.workspace.file(path)) for path in self.published.queries]
        return {query.query_id: query for each in sets for query in load_queries(each)}

    def _once(self, name: str, load: Callable[[], Part]) -> Part:
        with self._lock:
            if name not in self._parts:
                self._parts[name] = load()
            found: Part = self._parts[name]  # type: ignore[assignment]  # of the kind that `load` gives
            return found
