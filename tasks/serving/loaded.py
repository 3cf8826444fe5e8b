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
from tasks.serving.added import extends, left_out
from tasks.serving.agreement import agreements
from tasks.serving.answers import Agreement, Way
from tasks.serving.catalogue import Catalogue
from tasks.serving.exact import ExactTier
from tasks.serving.fast import FastTier
from tasks.serving.question import check_sketched
from tasks.serving.sketched import SketchTier
from tasks.serving.untuned import Kind, Untuned, numbers_of
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
        return self.once("fast", lambda: FastTier(self.workspace, self.published))

    @property
    def sketch(self) -> SketchTier:
        return self.once("sketch", lambda: SketchTier(self.workspace, self.published.run))

    @property
    def exact(self) -> ExactTier:
        return self.once("exact", lambda: ExactTier(self.workspace, self.published.run))

    @property
    def has_fast(self) -> bool:
        """Whether a head and an index are published."""
        return self.published.head is not None and self.published.index is not None

    @functools.cached_property
    def has_sketches(self) -> bool:
        """Whether the published run keeps sketches."""
        try:
            check_sketched(self.workspace, self.published.run)
        except (UsageError, StoreError):
            return False
        return True

    def untuned(self, kind: Kind | None = None) -> Untuned | str:
        """Return the untuned features of the samples, of both kinds or of one; or why there are none."""

        def load() -> Untuned | str:
            fast = self.fast
            try:
                numbers = slice(None) if kind is None else numbers_of(kind, fast.widths)
                found = Untuned(self.workspace, self.published.run, fast.space, numbers)
            except (UsageError, StoreError) as error:
                return str(error)
            if not self.extends(fast.samples_path, found.samples_path):
                return "the published run is of other training samples than the index"
            return found

        return self.once(f"untuned {kind}", load)

    def extends(self, path: AnyPath, base: AnyPath) -> bool:
        """Return whether a table of samples is another one, or that one with samples added behind its own."""

        def compare() -> bool:
            return extends(self.catalogue(path).table, self.catalogue(base).table)

        return path == base or self.once(f"{path} extends {base}", compare)

    def catalogue(self, path: AnyPath | None = None) -> Catalogue:
        """Return a table of samples, unless told otherwise those that are published."""
        if path is None:
            relative = self.published.index_samples or self.published.samples
            if relative is None:
                raise UsageError(f"{self.workspace.root} has no samples: what is published was imported without them")
            path = self.workspace.file(relative)
        return self.once(f"samples {path}", lambda: Catalogue(self.workspace, path))

    @functools.cached_property
    def agreements(self) -> dict[Way, Agreement]:
        """How far each tier, and each kind of untuned features, agrees with the teacher."""
        head = self.published.head
        record = read_head_record(self.workspace.file(head)) if head else None
        return agreements(self.workspace, self.published, record)

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the published labels say that negative scores carry nothing."""
        return any(part.negatives == "tie" for part in read_snapshot(self.workspace, self.published.snapshot).parts)

    @functools.cached_property
    def queries(self) -> dict[str, Query]:
        """The published queries, by query_id; of several sets' queries of one name, the last set's."""
        sets = [queries_artifact(self.workspace.file(path)) for path in self.published.queries]
        return {query.query_id: query for each in sets for query in load_queries(each)}

    def left_out(self, path: AnyPath, by: str) -> list[str]:
        """Return a line that says how many samples of the served index a table of the run's lacks, if there are any.

        Args:
            path: the table.
            by: why these are left out.
        """
        relative = self.published.index_samples
        if relative is None or not self.extends(whole := self.workspace.file(relative), path):
            return []
        catalogue, known = self.catalogue(whole), len(self.catalogue(path))
        present = catalogue.present().mask
        added = len(catalogue) - known if present is None else int(present[known:].sum())
        return left_out(added, by)

    def once(self, name: str, load: Callable[[], Part]) -> Part:
        """Return a part by its name, which is loaded the first time."""
        with self._lock:
            if name not in self._parts:
                self._parts[name] = load()
            found: Part = self._parts[name]  # type: ignore[assignment]  # of the kind that `load` gives
            return found
