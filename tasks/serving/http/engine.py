"""What a worker answers from: one published version at a time, replaced as a whole when a newer one is published."""

from __future__ import annotations

import logging
import threading
import time

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.snapshots.published import newest_version
from storage_schemas.workspace import Workspace
from tasks.inputs.queries import Query
from tasks.serving.answers import Hit
from tasks.serving.attributor import Attributor
from tasks.serving.catalogue import RemovedSample
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.problems import Problem, one_line
from tasks.serving.http.threads import one_thread

log = logging.getLogger("fastgda.serving")

LOADING = "the published version is being loaded"


class Engine:
    """The served version. Requests take `current` once, and keep what they took to their end.

    A thread looks for a newer version, loads it beside the old one, and puts it in its place by one assignment.
    """

    def __init__(self, workspace: Workspace, metrics: ServiceMetrics, poll_seconds: float) -> None:
        self.workspace, self._metrics, self._poll = workspace, metrics, poll_seconds
        self._current: Attributor | None = None
        self._loaded = -1  # number of the published state that was loaded or refused last
        self._loading = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)
        self.missing = LOADING

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def current(self) -> Attributor:
        """What is served now.

        Raises:
            Problem: nothing is, and why.
        """
        self.check()
        assert self._current is not None
        return self._current

    def check(self) -> None:
        """Raise Problem where nothing is served yet."""
        if self._current is None:
            raise Problem(503, f"not ready: {self.missing}", headers={"Retry-After": "5"})

    def query(self, query_id: str) -> Query:
        """Return a published query.

        Raises:
            Problem: there is none of this name.
        """
        found = self.current.queries.get(query_id)
        if found is None:
            raise Problem(404, f"no query {query_id[:100]} is published: GET /v1/queries lists them", "query_id")
        return found

    def sample(self, train_id: int) -> tuple[Attributor, Hit]:
        """Return what is known of a training sample, and the version that knows it.

        Raises:
            Problem: there is none of this number, or it is taken down.
        """
        attributor = self.current
        try:
            return attributor, attributor.sample(train_id)
        except RemovedSample as error:
            raise Problem(410, one_line(error), "train_id") from None
        except UsageError as error:
            raise Problem(404, one_line(error), "train_id") from None

    @property
    def ready(self) -> bool:
        return self._current is not None

    def refresh(self) -> None:
        """Load what is published now, unless it is served: whoever published it need not wait for the next look."""
        with self._loading:
            number, content = newest_version(self.workspace)
            if number == self._loaded and self._current is not None:
                return
            if content is None:
                self.missing = f"{self.workspace.root} has no published run yet"
                return
            self._load(number)

    def _load(self, number: int) -> None:
        started, first = time.monotonic(), self._current is None
        try:
            fresh = Attributor(self.workspace)
            fresh.fast.index.prepare()  # no question shall wait for it
            _ = fresh.queries  # else the first request that names one reads them, on the event loop
        except (UsageError, StoreError, OSError) as error:
            if number != self._loaded:
                log.error("published version %d cannot be served: %s", number, one_line(error))
                self._metrics.swaps.labels("refused").inc()
            self.missing, self._loaded = one_line(error), number
            return
        # The version may have been published after `number` was read.
        self._current, self._loaded = fresh, fresh.versions.published
        self._tell(fresh)
        if not first:
            self._metrics.swaps.labels("served").inc()
        log.info("published version %d is served, loaded in %.1f s", self._loaded, time.monotonic() - started)

    def _tell(self, fresh: Attributor) -> None:
        versions, metrics = fresh.versions, self._metrics
        metrics.version.clear()
        metrics.version.labels(versions.index or "", versions.head or "", versions.run, versions.index_kind).set(1)
        metrics.published.set(versions.published)
        metrics.vectors.set(versions.vectors)
        for at, value in (("10", versions.recall_at_10), ("100", versions.recall_at_100)):
            if value is not None:
                metrics.recall.labels(at).set(value)
        metrics.ready.set(1)

    def _watch(self) -> None:
        one_thread()
        while not self._end.is_set():
            try:
                self.refresh()
            except Exception:  # a store that is away for a moment must not end the watch
                log.exception("the published version could not be read")
            self._end.wait(self._poll)
