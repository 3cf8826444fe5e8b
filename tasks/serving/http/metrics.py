"""Figures of the service for Prometheus; those of several worker processes are added up."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from storage_schemas.runs.liveness import process_lives

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # where prometheus_client's processes leave their figures


class ServiceMetrics:
    """All series of the service, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.seconds = Histogram(
            "fastgda_serve_request_seconds",
            "Seconds from a request's head to the end of its response.",
            ("route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = _gauge("requests_in_flight", "Requests that are being answered.", "livesum", registry)
        self.queue = _gauge("queue", "Questions that wait or are at work.", "livesum", registry)
        self.batch_size = Histogram(
            "fastgda_serve_batch_size",
            "Questions that were encoded together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.encode_seconds = Histogram(
            "fastgda_serve_encode_seconds", "Seconds of encoding a batch.", buckets=SECONDS, registry=registry
        )
        self.rejections = Counter(
            "fastgda_serve_rejections", "Requests that were refused, by reason.", ("reason",), registry=registry
        )
        self.swaps = Counter(
            "fastgda_serve_swaps", "Newly published versions that were loaded.", ("result",), registry=registry
        )
        self.recall = _gauge("recall", "Recall of the served index as measured.", "livemostrecent", registry, "at")
        self.vectors = _gauge("index_vectors", "Vectors of the served index.", "livemostrecent", registry)
        self.published = _gauge("published_version", "Number of the served state.", "livemin", registry)
        self.version = _gauge(
            "index_info", "1 of the served index.", "livemax", registry, "index", "head", "run", "index_kind"
        )
        self.ready = _gauge("ready", "1 of a worker that can answer.", "livesum", registry)
        self.jobs = _gauge("jobs", "Questions of tier exact that wait or are at work.", "livesum", registry)
        self.thumbnails = Counter(
            "fastgda_serve_thumbnails", "Resized pictures, by where they came from.", ("source",), registry=registry
        )

    def exposition(self) -> bytes:
        """Return all series in Prometheus's text format."""
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        _forget_dead_processes(Path(os.environ[SHARED]))
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)


def _forget_dead_processes(folder: Path) -> None:
    """Drop the gauges of processes that are gone: one that was killed would be counted beside its successor."""
    for path in folder.glob("gauge_live*_*.db"):
        process = path.stem.rsplit("_", 1)[1]
        if not process_lives(f"{os.uname().nodename}:{process}"):
            with contextlib.suppress(FileNotFoundError):  # another process forgets, too
                mark_process_dead(int(process), str(folder))  # type: ignore[no-untyped-call]


def _gauge(name: str, what: str, mode: str, registry: CollectorRegistry, *labels: str) -> Gauge:
    return Gauge(f"fastgda_serve_{name}", what, labels, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]
