"""What is told of a run that failed, hangs or is under way before its first score."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from storage_schemas.commit import commit
from storage_schemas.files import AnyPath
from storage_schemas.runs.attempts import AttemptLog
from storage_schemas.runs.liveness import Assignment, Beat, PartsRecord, write_assignment, write_beat
from storage_schemas.workspace import Workspace, part
from tasks.watching.metrics_exporter import exposition
from tasks.watching.run_status import RunStatus, run_status
from tasks.watching.status_text import status_markdown, status_table
from tests.storage_schemas.workspaces import plan_run

RUN = "run-1"


def begun(root: Path, **stages: PartsRecord) -> Workspace:
    """A run that was planned and given to workers."""
    plan_run(root)
    workspace = Workspace(root)
    named = {name.replace("_", " "): record for name, record in stages.items()}
    write_assignment(workspace, Assignment(run=RUN, config={}, model_hash="m", stages=named))
    return workspace


def made(path: AnyPath, key: str) -> None:
    commit(path, lambda temporary: temporary.write_bytes(b"x"), key=key, rows=1, started=time.monotonic() - 2)


def terminal(status: RunStatus) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(status_table(status))
    return captured.get()


def test_a_run_that_failed_before_its_first_score_says_where_and_why(tmp_path: Path) -> None:
    workspace = begun(tmp_path, latents=PartsRecord(key="k", path="latents/k", rows=1024, parts=2))
    made(part(workspace.parts("latents", "k"), 0, "safetensors"), "k")
    with pytest.raises(OSError, match="No space"), AttemptLog(workspace, RUN, kind="latents").attempt(1, "cpu"):
        raise OSError(28, "No space left on device", "latents/k/part-00001.safetensors")
    status = run_status(workspace, RUN)
    assert status.state == "incomplete"
    (failure,) = status.failures
    assert (failure.kind, failure.shard, failure.error_class) == ("latents", 1, "OSError")
    for text in (terminal(status), status_markdown(status)):
        assert "latents 00001" in text and "No space left on device" in text and f"fastgda retry {RUN}" in text
    (stage,) = status.as_json()["stages"]
    assert {name: stage[name] for name in ("kind", "parts", "done", "failed")} == {
        "kind": "latents", "parts": 2, "done": 1, "failed": 1,
    }  # fmt: skip
    assert f'fastgda_parts{{kind="latents",run="{RUN}",state="failed"}} 1.0' in exposition(workspace)


def test_progress_is_that_of_every_stage(tmp_path: Path) -> None:
    workspace = begun(
        tmp_path,
        latents=PartsRecord(key="k", path="latents/k", rows=512, parts=1),
        curvature=PartsRecord(key="c", path="curvature/c.safetensors", rows=9, parts=1),
        unlearning_steps=PartsRecord(key="u", path="updates/u", rows=3, parts=3),
        samples=PartsRecord(key="s", path="samples/s", rows=512),
    )
    made(part(workspace.parts("latents", "k"), 0, "safetensors"), "k")
    made(workspace.root / "curvature" / "c.safetensors", "c")
    made(part(workspace.root / "updates" / "u", 0, "safetensors"), "u")
    made(part(workspace.root / "updates" / "u", 1, "safetensors"), "of an earlier input")
    assert run_status(workspace, RUN).state == "stopped", "nobody is at work"
    at_work = Beat(worker="elsewhere:1", beat=1, at=datetime.now(UTC), kind="unlearning steps", number=1)
    write_beat(workspace, RUN, at_work)
    status = run_status(workspace, RUN)
    assert status.state == "running"
    assert [(s.kind, s.done, s.parts) for s in status.stages] == [
        ("latents", 1, 1), ("curvature", 1, 1), ("unlearning steps", 1, 3),
    ]  # fmt: skip
    left = status.stages[2].seconds_left
    assert left is not None and 2 < left < 30, "two more, of two seconds each"
    assert "1 of 3 parts" in terminal(status) and "rows/s" not in terminal(status)


def test_a_part_that_hangs_is_named_with_what_to_do(tmp_path: Path) -> None:
    workspace = begun(tmp_path, latents=PartsRecord(key="k", path="latents/k", rows=1024, parts=2))
    made(part(workspace.parts("latents", "k"), 0, "safetensors"), "k")
    beat = Beat(worker="gpu-7:4242", beat=9, at=datetime.now(UTC) - timedelta(seconds=3), kind="latents", number=1)
    write_beat(workspace, RUN, beat.model_copy(update={"part_seconds": 200.0}))
    assert run_status(workspace, RUN).stragglers == [], "too few are done to say that it is slow"
    write_beat(workspace, RUN, beat.model_copy(update={"part_seconds": 4000.0}))
    (hanging,) = run_status(workspace, RUN).stragglers
    assert hanging.hangs and hanging.number == 1
    assert "`kill -9 4242` on gpu-7" in terminal(run_status(workspace, RUN))


def test_status_reads_an_assignment_of_an_earlier_release(tmp_path: Path) -> None:
    workspace = begun(tmp_path, latents=PartsRecord(key="k", path="latents/k", rows=1024))
    assert run_status(workspace, RUN).stages == []


def test_a_part_that_takes_much_longer_than_others_took_is_a_straggler(tmp_path: Path) -> None:
    workspace = begun(tmp_path, latents=PartsRecord(key="k", path="latents/k", rows=6, parts=6))
    for number in range(5):
        made(part(workspace.parts("latents", "k"), number, "safetensors"), "k")
    beat = Beat(worker="elsewhere:1", beat=9, at=datetime.now(UTC), kind="latents", number=5, part_seconds=8.0)
    write_beat(workspace, RUN, beat)
    assert run_status(workspace, RUN).stragglers == [], "four times as long is nothing yet where parts are short"
    write_beat(workspace, RUN, beat.model_copy(update={"part_seconds": 40.0}))
    (slow,) = run_status(workspace, RUN).stragglers
    assert (slow.kind, slow.number, slow.worker, slow.hangs) == ("latents", 5, "elsewhere:1", False)
    assert slow.median == pytest.approx(2, abs=0.5) and slow.seconds == pytest.approx(40, abs=5)
    text = terminal(run_status(workspace, RUN))
    assert "slow: latents 00005 on elsewhere:1: 4" in text and "others took 2 s" in text and "kill" not in text
