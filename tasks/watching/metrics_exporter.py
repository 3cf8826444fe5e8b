"""Prometheus metrics of every run of a workspace, from its files alone.

Everything is derived when somebody asks: no process has to report, and an exporter that was away has missed nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TypeAlias

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, matching
from storage_schemas.runs.attempts import Attempt, ShardState, read_attempts
from storage_schemas.runs.ledger import run_names
from storage_schemas.runs.liveness import Beat, read_assignment, read_beats
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tasks.progress import console
from tasks.watching.run_status import RunStatus, run_status

SHOWN_SECONDS = 3600.0  # a worker that fell silent is shown this long: an alert sees it, a long run does not keep it
SETTLED_SECONDS = 2.0  # two changes within one tick of the file system's clock leave the same time behind
_DAMAGED = (StoreError, ValueError, OSError)  # what reading a run's files raises when one is broken or gone

Stamp: TypeAlias = tuple[tuple[int, int], ...]
Series: TypeAlias = Iterable[tuple[tuple[str, ...], float]]  # label values and the figure


@dataclass(frozen=True)
class RunFigures:
    """Figures from the files of one run."""

    status: RunStatus
    retries: dict[str, int]
    beats: list[Beat]

    @property
    def settled(self) -> bool:
        """True if they stay the same while no file changes: none depends on a live process or on the time."""
        return not self.status.workers and not self.status.shards[ShardState.running]


class RunCollector(Collector):
    """The metrics of a workspace at the moment of a scrape; figures of runs at rest are kept between scrapes."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._kept: dict[str, tuple[Stamp, RunFigures]] = {}

    def collect(self) -> Iterator[Metric]:
        figures: list[RunFigures] = []
        unreadable: dict[str, bool] = {}
        for run in run_names(self._workspace):
            try:
                figures.append(self._figures(run))
                unreadable[run] = False
            except _DAMAGED:
                unreadable[run] = True
        yield from _progress_metrics(figures)
        yield from _failure_metrics(figures)
        yield from _worker_metrics(figures, datetime.now(UTC))
        yield _gauge(
            "fastgda_run_published_timestamp_seconds",
            "When the rows that readers see were published, for each run that they came from; Unix time.",
            ("run",),
            _published(self._workspace),
        )
        yield _gauge(
            "fastgda_run_unreadable",
            "1 where files of the run are damaged or gone, so that it has no other metrics.",
            ("run",),
            (((run,), float(damaged)) for run, damaged in unreadable.items()),
        )

    def _figures(self, run: str) -> RunFigures:
        stamp = _stamp(self._workspace, run)  # before the files are read: what changes meanwhile changes it again
        kept = self._kept.get(run)
        if stamp is not None and kept is not None and kept[0] == stamp:
            return kept[1]
        figures = _derive(self._workspace, run)
        if stamp is not None and figures.settled:
            self._kept[run] = (stamp, figures)
        else:
            self._kept.pop(run, None)
        return figures


def exposition(workspace: Workspace) -> str:
    """Return all metrics at this moment, in Prometheus' text format."""
    return generate_latest(_registry(workspace)).decode()


@contextmanager
def listening(workspace: Workspace, host: str, port: int) -> Iterator[int]:
    """Answer scrapes while the block runs, and yield the port, which the system chooses where it is 0.

    Raises:
        UsageError: nobody can listen there.
    """
    try:
        server, thread = start_http_server(port, host, _registry(workspace))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"cannot listen on {host}:{port} ({reason}): choose another --port or --host") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serve(workspace: Workspace, host: str, port: int) -> None:
    """Answer scrapes until interrupted.

    Raises:
        UsageError: nobody can listen there, for instance as the port is in use.
    """
    with listening(workspace, host, port) as bound_port, suppress(KeyboardInterrupt):
        console.print(f"metrics: http://{host}:{bound_port}/metrics; Ctrl-C ends it", highlight=False, soft_wrap=True)
        Event().wait()


def _registry(workspace: Workspace) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(RunCollector(workspace))
    return registry


def _derive(workspace: Workspace, run: str) -> RunFigures:
    return RunFigures(
        status=run_status(workspace, run),
        retries=_retries(read_attempts(workspace, run)),
        beats=read_beats(workspace, run),
    )


def _stamp(workspace: Workspace, run: str) -> Stamp | None:
    """Return a stamp that differs once any file that the run's figures come from has changed.

    None where a change could go unseen: just after one, and in an object store, whose folders have no time of change.
    """
    if not isinstance(workspace.root, Path):
        return None
    try:
        stages = [workspace.file(record.path) for record in read_assignment(workspace, run).stages.values()]
    except StoreError:  # imported
        stages = []
    # Files come, go and are replaced by rename, which changes the time of their folder; attempt files are appended to.
    folder = workspace.run(run).parent
    folders = [folder, workspace.scores(run), workspace.ranks(run), *stages]
    files = [*matching(folder, "*"), *matching(folder, "attempts*/*.jsonl")]
    stamp = tuple(_changed(path) for path in (*folders, *files))
    age = time.time_ns() - max(changed for changed, _ in stamp)
    return stamp if age > SETTLED_SECONDS * 1e9 else None


def _changed(path: AnyPath) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def _retries(attempts: dict[int, list[Attempt]]) -> dict[str, int]:
    """Count failed attempts after which the same shard was started again, by class of the error."""
    retries: Counter[str] = Counter()
    for of_shard in attempts.values():
        started = False
        for attempt in reversed(of_shard):
            if attempt.state == ShardState.running:
                started = True
            elif attempt.state == ShardState.failed and started:
                retries[attempt.error_class] += 1
    return dict(retries)


def _progress_metrics(runs: list[RunFigures]) -> Iterator[Metric]:
    statuses = [figures.status for figures in runs]
    yield _gauge(
        "fastgda_shards",
        "Score shards of a run by state.",
        ("run", "state"),
        (((s.run, state), count) for s in statuses for state, count in s.shards.items()),
    )
    yield _gauge(
        "fastgda_parts",
        "Parts of a run's stages before the scores, by kind and state.",
        ("run", "kind", "state"),
        (
            ((s.run, stage.kind, state), count)
            for s in statuses
            for stage in s.stages
            for state, count in (
                ("done", stage.done),
                ("failed", stage.failed),
                ("pending", stage.parts - stage.done - stage.failed),
            )
        ),
    )
    yield _counter(
        "fastgda_rows_total",
        "Score rows that are committed; falls when shards are thrown away to be made again.",
        ("run",),
        (((s.run,), s.rows) for s in statuses),
    )
    yield _gauge("fastgda_pairs", "Score rows that the run planned.", ("run",), (((s.run,), s.pairs) for s in statuses))
    yield _counter(
        "fastgda_device_seconds_total",
        "Seconds that devices spent on the score shards that are done.",
        ("run",),
        (((s.run,), s.device_hours * 3600) for s in statuses),
    )
    yield _gauge(
        "fastgda_rows_per_second",
        "Score rows committed a second, over the last 10 minutes; 0 where no worker is alive.",
        ("run",),
        (((s.run,), s.rows_per_second) for s in statuses),
    )
    yield _gauge(
        "fastgda_seconds_left",
        "Seconds until the last score row at this speed; absent where the speed is 0 or the run is done.",
        ("run",),
        (((s.run,), s.seconds_left) for s in statuses if s.seconds_left is not None),
    )


def _failure_metrics(runs: list[RunFigures]) -> Iterator[Metric]:
    yield _counter(
        "fastgda_failed_attempts_total",
        "Attempts at score shards that ended in an error, since the shard was last released by `fastgda retry`.",
        ("run", "error_class"),
        (((f.status.run, name), count) for f in runs for name, count in f.status.failed_attempts.items()),
    )
    yield _counter(
        "fastgda_retries_total",
        "Those of the failed attempts after which the shard was started again.",
        ("run", "error_class"),
        (((f.status.run, name), count) for f in runs for name, count in f.retries.items()),
    )
    yield _gauge(
        "fastgda_quarantined_samples",
        "Training samples that the run left out as they cannot be used.",
        ("run",),
        (((f.status.run,), len(f.status.left_out)) for f in runs),
    )


def _worker_metrics(runs: list[RunFigures], now: datetime) -> Iterator[Metric]:
    every = [(f.status.run, beat, (now - beat.at).total_seconds()) for f in runs for beat in f.beats]
    shown = [(run, beat, silent) for run, beat, silent in every if _shown(beat, silent)]
    yield _counter(
        "fastgda_out_of_memory_total",
        "How often a worker halved a micro-batch as its device was out of memory; kept when the worker has ended.",
        ("run", "worker"),
        (
            ((run, beat.worker), beat.out_of_memory)
            for run, beat, silent in every
            if beat.out_of_memory or _shown(beat, silent)
        ),
    )
    yield _gauge(
        "fastgda_worker_device_memory_bytes",
        "Device memory that a worker held at most.",
        ("run", "worker", "device"),
        (((run, beat.worker, beat.device), beat.device_memory) for run, beat, _ in shown),
    )
    yield _gauge(
        "fastgda_worker_seconds_since_beat",
        "Seconds since a worker's last sign of life, by the two hosts' clocks; absent an hour after it, or once the "
        "worker has ended.",
        ("run", "worker"),
        # A worker's clock may be a little ahead of this host's: seconds are not negative.
        (((run, beat.worker), max(0.0, silent)) for run, beat, silent in shown),
    )
    yield _gauge(
        "fastgda_worker_part_seconds",
        "Seconds that a worker had been at its part when it last gave a sign of life; absent between parts.",
        ("run", "worker", "kind"),
        (((run, beat.worker, beat.kind), beat.part_seconds) for run, beat, _ in shown if beat.kind),
    )


def _shown(beat: Beat, silent: float) -> bool:
    return not beat.ended and silent < SHOWN_SECONDS


def _published(workspace: Workspace) -> Series:
    try:
        published = read_published(workspace)
        runs = read_snapshot(workspace, published.snapshot).runs
    except (NotPublished, ValueError):
        return []
    return [((run,), published.created_at.timestamp()) for run in runs]


def _gauge(name: str, documentation: str, labels: tuple[str, ...], series: Series) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for values, figure in series:
        family.add_metric(values, figure)
    return family


def _counter(name: str, documentation: str, labels: tuple[str, ...], series: Series) -> Metric:
    family = CounterMetricFamily(name, documentation, labels=labels)
    for values, figure in series:
        family.add_metric(values, figure)
    return family
