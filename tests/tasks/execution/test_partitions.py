"""Which partition a schedule means."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tasks.execution import partitions
from tasks.execution.partitions import scheduled_partition


def test_the_partition_of_a_schedule_is_of_the_planned_start_however_late_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = datetime(2026, 3, 1, 23, 59, tzinfo=UTC)
    monkeypatch.setattr(partitions.flow_run, "get_scheduled_start_time", lambda: planned)
    assert scheduled_partition(1) == "2026-02-28" and scheduled_partition(0) == "2026-03-01"
