"""Days, and other sets of queries, one after the other."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tasks.execution import partitions
from tasks.execution.outcomes import RunCancelled
from tasks.execution.partitions import PartitionOutcome, scheduled_partition


def test_a_partition_that_fails_does_not_stop_the_others_and_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    curated: list[str] = []

    def curate(name: str) -> str:
        curated.append(name)
        if name == "b":
            raise FileNotFoundError("no tar \x1b[31m of b")
        return f"run-{name}"

    assert PartitionOutcome.of_all(["a", "c"], curate) == [
        PartitionOutcome("a", "run-a", ""), PartitionOutcome("c", "run-c", ""),
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="1 of 3 partitions failed\nb: FileNotFoundError: no tar"):
        PartitionOutcome.of_all(["a", "b", "c"], curate)
    assert curated == ["a", "c", "a", "b", "c"]
    assert "\x1b[31m of b" not in capsys.readouterr().err


def test_what_is_cancelled_goes_on_with_no_other_partition() -> None:
    def curate(name: str) -> str:
        raise RunCancelled(name)

    with pytest.raises(RunCancelled, match="a"):
        PartitionOutcome.of_all(["a", "b"], curate)


def test_the_partition_of_a_schedule_is_of_the_planned_start_however_late_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = datetime(2026, 3, 1, 23, 59, tzinfo=UTC)
    monkeypatch.setattr(partitions.flow_run, "get_scheduled_start_time", lambda: planned)
    assert scheduled_partition(1) == "2026-02-28" and scheduled_partition(0) == "2026-03-01"
