"""Which partition a schedule means, and how a backfill ends."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tasks.execution import partitions
from tasks.execution.partitions import PartitionOutcome, all_curated, failed_partition, scheduled_partition


def test_the_partition_of_a_schedule_is_of_the_planned_start_however_late_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = datetime(2026, 3, 1, 23, 59, tzinfo=UTC)
    monkeypatch.setattr(partitions.flow_run, "get_scheduled_start_time", lambda: planned)
    assert scheduled_partition(1) == "2026-02-28" and scheduled_partition(0) == "2026-03-01"


def test_one_partition_that_failed_fails_the_backfill_and_names_itself() -> None:
    good = PartitionOutcome("2026-11-01", run="run-1")
    assert all_curated([good]) == [good]
    bad = failed_partition("2026-11-02", ValueError("no tars"))
    with pytest.raises(RuntimeError, match="1 of 2 partitions failed\n2026-11-02: ValueError: no tars"):
        all_curated([good, bad])
