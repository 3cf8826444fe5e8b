"""Days, and other sets of queries, curated one after the other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import curation
from flows.curation import backfill
from tasks.config.pipeline import PipelineConfig
from tasks.execution.outcomes import RunCancelled
from tasks.execution.partitions import PartitionOutcome
from tests.tasks.configs import ABSENT, document


@pytest.fixture
def config(tmp_path: Path) -> PipelineConfig:
    queries = {"queries__captions": ABSENT, "queries__shards": str(tmp_path / "{partition}.tar")}
    return PipelineConfig.model_validate(document(**queries))


@pytest.fixture
def curated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The partitions that were curated; `b` fails, and in `c` somebody cancels the run."""
    partitions: list[str] = []

    def curate(config: PipelineConfig) -> SimpleNamespace:
        name = config.queries.partition
        partitions.append(name)
        if name == "b":
            raise FileNotFoundError("no tar \x1b[31m of b")
        if name == "c":
            raise RunCancelled(name)
        return SimpleNamespace(run=SimpleNamespace(name=f"run-{name}"))

    monkeypatch.setattr(curation, "curate", curate)
    return partitions


def test_a_partition_that_fails_does_not_stop_the_others_and_is_told_of(
    config: PipelineConfig, curated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = backfill.fn(config, partitions=["a", "d"])
    assert outcomes == [PartitionOutcome("a", "run-a"), PartitionOutcome("d", "run-d")]
    with pytest.raises(RuntimeError, match="1 of 3 partitions failed\nb: FileNotFoundError: no tar"):
        backfill.fn(config, partitions=["a", "b", "d"])
    assert curated == ["a", "d", "a", "b", "d"]
    said = capsys.readouterr().err
    assert "partition b: no tar" in said and "\x1b[31m of b" not in said


def test_what_is_cancelled_goes_on_with_no_other_partition(config: PipelineConfig, curated: list[str]) -> None:
    with pytest.raises(RunCancelled, match="c"):
        backfill.fn(config, partitions=["c", "d"])
    assert curated == ["c"]
