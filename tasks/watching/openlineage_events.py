"""OpenLineage events of jobs and datasets: https://openlineage.io/docs/spec/object-model.

A dataset is a thing that configurations of one name make again and again: its name stays, its version is our key. What
a run cannot send it loses: events never hold work up and never end it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa

from fastgda_core.extras import installed
from storage_schemas import tables
from storage_schemas.commit import code_version
from storage_schemas.files import AnyPath
from storage_schemas.table import Table
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig

if TYPE_CHECKING:
    from openlineage.client import OpenLineageClient

PACKAGE = "openlineage"
PRODUCER = "https://github.com/fastgda/fastgda"
# In the environment, as the client reads it: https://openlineage.io/docs/client/python/configuration
SWITCHES = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__TRANSPORT", "OPENLINEAGE__TRANSPORT__TYPE")
NAMESPACE = "OPENLINEAGE_NAMESPACE"
WAITING = 1_000  # events that are not sent yet, at most
LOST_IN_A_ROW = 5  # after so many the receiver is given up
FLUSH_SECONDS = 10.0  # that the end of a command waits for what is not sent yet
TABLES = {
    "samples": tables.SAMPLES,
    "queries": tables.QUERIES,
    "candidates": tables.CANDIDATES,
    "base losses": tables.BASE_LOSSES,
    "teacher scores": tables.SCORES,
    "rank labels": tables.RANKS,
    "evaluation": tables.METRICS,
}
log = logging.getLogger("fastgda.openlineage")


def wanted(config: PipelineConfig) -> bool:
    """Return whether events are to be sent: the configuration says so, or the environment, as for all of its users.

    Where the environment does and the package is missing, one line says so.
    """
    if os.environ.get("OPENLINEAGE_DISABLED", "").lower() == "true":
        return False
    if config.execution.openlineage is not None:
        return True
    switch = next((name for name in SWITCHES if os.environ.get(name)), None)
    if switch is None:
        return False
    if not installed(PACKAGE):
        log.warning("%s is set and openlineage-python is not installed: pip install 'fastgda[lineage]'", switch)
        return False
    return True


@dataclass(frozen=True)
class Job:
    """A run of a job: its name, the id of this run, the job that it is a part of, and the outermost one."""

    namespace: str
    name: str
    run: str
    parent: Job | None = None

    @property
    def root(self) -> Job:
        return self if self.parent is None else self.parent.root


@dataclass
class Sender:
    """Sends events in their order, by a thread of its own; a receiver that fails is told of once."""

    client: OpenLineageClient
    _events: queue.Queue[Any] = field(default_factory=lambda: queue.Queue(WAITING))
    _lost: int = 0
    _told: bool = False

    def __post_init__(self) -> None:
        threading.Thread(target=self._send_all, name="OpenLineage", daemon=True).start()

    def send(self, event: Any) -> None:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._tell("it is too slow")

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Wait until all is sent, no longer than this."""
        sent = threading.Event()
        try:
            self._events.put(sent, timeout=seconds)
        except queue.Full:
            return
        if not sent.wait(seconds):
            self._tell(f"it has not answered for {seconds:.0f} s")

    def _send_all(self) -> None:
        while True:
            event = self._events.get()
            if isinstance(event, threading.Event):
                event.set()
            elif self._lost < LOST_IN_A_ROW:
                try:
                    self.client.emit(event)
                    self._lost = 0
                except Exception as error:
                    self._lost += 1
                    self._tell(f"{type(error).__name__}: {error}")

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            log.warning("OpenLineage events are lost, and the run goes on: %s", " ".join(why.split())[:300])


def sender_of(config: PipelineConfig) -> Sender:
    """Return a sender to where the configuration says, and else to where the client's own configuration does."""
    import attr  # noqa: F401  # a dependency of the client, named where it is missing
    from openlineage.client import OpenLineageClient
    from openlineage.client.event_v2 import set_producer

    set_producer(PRODUCER)
    # The client tells of each failure by itself, with a traceback; `Sender` tells of the first one.
    logging.getLogger("openlineage").setLevel(logging.CRITICAL)
    url = config.execution.openlineage.url if config.execution.openlineage else None
    if url is None:
        return Sender(OpenLineageClient())
    transport: dict[str, Any] = {"type": "http", "url": url, "retry": {"total": 2}}
    if key := os.environ.get("OPENLINEAGE_API_KEY"):
        transport["auth"] = {"type": "api_key", "apiKey": key}
    return Sender(OpenLineageClient(config={"transport": transport}))


def namespace_of(config: PipelineConfig) -> str:
    """Return the namespace of the configuration's jobs."""
    section = config.execution.openlineage
    return section.namespace if section and section.namespace else os.environ.get(NAMESPACE, "fastgda")


def event(
    job: Job,
    state: str,
    *,
    inputs: Iterable[Any] = (),
    outputs: Iterable[Any] = (),
    error: str = "",
    at: datetime | None = None,
) -> Any:
    """Return an event of a job.

    Args:
        state: START, COMPLETE, FAIL or ABORT.
        at: when it happened; now where not given.
    """
    from openlineage.client import event_v2
    from openlineage.client.facet_v2 import RunFacet, error_message_run, job_type_job, parent_run, processing_engine_run

    version = code_version()
    facets: dict[str, RunFacet] = {
        "processing_engine": processing_engine_run.ProcessingEngineRunFacet(version=version, name="FastGDA")
    }
    if job.parent is not None:
        root = parent_run.Root(
            run=parent_run.RootRun(runId=job.root.run),
            job=parent_run.RootJob(namespace=job.root.namespace, name=job.root.name),
        )
        facets["parent"] = parent_run.ParentRunFacet(
            run=parent_run.Run(runId=job.parent.run),
            job=parent_run.Job(namespace=job.parent.namespace, name=job.parent.name),
            root=root,
        )
    if error:
        facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(message=error, programmingLanguage="Python")
    kind = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="FASTGDA", jobType="JOB")
    return event_v2.RunEvent(
        eventType=event_v2.RunState(state),
        eventTime=(at or datetime.now(UTC)).isoformat(),
        run=event_v2.Run(runId=job.run, facets=facets),
        job=event_v2.Job(namespace=job.namespace, name=job.name, facets={"jobType": kind}),
        inputs=list(inputs),
        outputs=list(outputs),
    )


def made_dataset(config: PipelineConfig, artifact: Artifact, *, output: bool) -> Any:
    """Return the dataset that an artifact is a version of, with its rows where it is an output."""
    from openlineage.client import event_v2
    from openlineage.client.facet_v2 import output_statistics_output_dataset

    namespace, place = _place(config.workspace)
    name = f"{place.rstrip('/')}/{config.name}/{artifact.name.replace(' ', '_')}"
    facets = _facets(artifact.key, str(artifact.path), TABLES.get(artifact.name))
    if not output:
        return event_v2.InputDataset(namespace=namespace, name=name, facets=facets)
    rows = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(rowCount=artifact.rows)
    return event_v2.OutputDataset(
        namespace=namespace, name=name, facets=facets, outputFacets={"outputStatistics": rows}
    )


def given_dataset(path: str | AnyPath, version: str = "") -> Any:
    """Return the dataset of files that the user gave: tars by their pattern, a model's folder with its hash."""
    from openlineage.client import event_v2

    namespace, name = _place(str(path))
    return event_v2.InputDataset(namespace=namespace, name=name, facets=_facets(version, str(path), None))


def _facets(version: str, place: str, table: Table | None) -> dict[str, Any]:
    from openlineage.client.facet_v2 import (
        dataset_version_dataset,
        datasource_dataset,
        documentation_dataset,
        schema_dataset,
    )

    namespace, name = _place(place)
    uri = f"file://{name}" if namespace == "file" else f"{namespace}/{name}"
    facets: dict[str, Any] = {"dataSource": datasource_dataset.DatasourceDatasetFacet(name=namespace, uri=uri)}
    if version:
        facets["version"] = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=version)
    if table is not None:
        facets["schema"] = schema_dataset.SchemaDatasetFacet(fields=[_field(column) for column in table.schema])
        facets["documentation"] = documentation_dataset.DocumentationDatasetFacet(description=table.comment)
    return facets


def _field(column: pa.Field) -> Any:
    from openlineage.client.facet_v2 import schema_dataset

    comment = (column.metadata or {}).get(b"comment", b"").decode()
    return schema_dataset.SchemaDatasetFacetFields(name=column.name, type=str(column.type), description=comment or None)


def _place(location: str) -> tuple[str, str]:
    """Return namespace and name of a place: https://openlineage.io/docs/spec/naming."""
    if "://" not in location:
        return "file", str(Path(location).absolute())
    url = urlsplit(location)
    return f"{url.scheme}://{url.netloc}", url.path.strip("/") or "/"
