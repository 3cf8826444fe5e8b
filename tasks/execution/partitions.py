"""Partitions of the queries: days, or query sets of another kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from prefect.runtime import flow_run

from fastgda_core.errors import UsageError
from tasks.config.pipeline import PipelineConfig
from tasks.printable import printable
from tasks.progress import console


def in_partition(config: PipelineConfig, partition: str) -> PipelineConfig:
    """Return the configuration for the queries of one partition, to be published beside what is there already.

    Raises:
        UsageError: the configuration's queries come in no partitions.
    """
    if "{partition}" not in (config.queries.shards or ""):
        raise UsageError("queries.shards has no {partition} in it: write it where the name of the day or set stands")
    queries = config.queries.model_copy(update={"partition": partition})
    return PipelineConfig.model_validate({**config.model_dump(), "queries": queries.model_dump(), "publish": "add"})


def scheduled_partition(days_back: int) -> str:
    """Return the date some days before the flow run's scheduled start, which a late start does not change."""
    start = flow_run.get_scheduled_start_time() or datetime.now(UTC)
    return (start.date() - timedelta(days=days_back)).isoformat()


def partition_names(first: date | None, last: date | None, partitions: Sequence[str] | None) -> list[str]:
    """Return the days from the first date to the last, or the partitions named.

    Raises:
        UsageError: dates and names are both given or both missing, or the dates are the wrong way round.
    """
    if (first is None) == (partitions is None):
        raise UsageError("give either a first date, with or without a last one, or a list of partitions")
    if partitions is not None:
        return list(partitions)
    assert first is not None
    days = ((last or first) - first).days
    if days < 0:
        raise UsageError(f"the last date, {last}, is before the first, {first}: swap them")
    return [(first + timedelta(days=day)).isoformat() for day in range(days + 1)]


@dataclass(frozen=True)
class PartitionOutcome:
    """The end of the curation of one partition: its run, or why there is none."""

    partition: str
    run: str = ""
    error: str = ""


def failed_partition(partition: str, error: Exception) -> PartitionOutcome:
    """The outcome of a partition that failed, which is told at once."""
    console.print(printable(f"partition {partition}: {error}", lines=True), markup=False, highlight=False)
    return PartitionOutcome(partition, error=f"{type(error).__name__}: {error}")


def all_curated(outcomes: list[PartitionOutcome]) -> list[PartitionOutcome]:
    """These outcomes.

    Raises:
        RuntimeError: at least one partition failed; the others are done.
    """
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        lines = [f"{outcome.partition}: {outcome.error}" for outcome in failed]
        raise RuntimeError(f"{len(failed)} of {len(outcomes)} partitions failed\n" + "\n".join(lines))
    return outcomes
