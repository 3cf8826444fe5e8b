from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.runs.liveness import RunRequest, ask
from storage_schemas.workspace import Workspace
from tasks.watching.run_status import run_status
from tasks.watching.status_text import duration, status_markdown, status_table
from tests.storage_schemas.workspaces import plan_run
from tests.tasks.whole_runs import WholeRun


def test_errors_cannot_move_the_cursor(tmp_path: Path) -> None:
    plan_run(tmp_path)
    error = ValueError("the caption \x1b]0;title\x07 and \x9b2J of \u202e[red]x.jpg")
    AttemptLog(Workspace(tmp_path), "run-1", worker="elsewhere:1").record(
        0, ShardState.failed, device="cuda:0", error=error
    )
    stream = io.StringIO()
    Console(file=stream, width=200).print(status_table(run_status(Workspace(tmp_path), "run-1")))
    shown = stream.getvalue()
    assert "\\u001b]0;title\\u0007 and \\u009b2J of \\u202e[red]x.jpg" in shown
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, "unknown"), (0.4, "0 s"), (59.6, "1 min 0 s"), (3_725, "1 h 2 min"), (2 * 86_400 + 3_600, "2 d 1 h")],
)
def test_a_duration_has_two_units_at_most(seconds: float | None, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.heavy
def test_a_finished_run_is_told_in_full_as_markdown(similar: WholeRun) -> None:
    status = run_status(similar.workspace, similar.run.name)
    text = status_markdown(status)
    assert status.state == "done" and "| state | done |" in text
    assert f"100.0%  {status.pairs} of {status.pairs} |" in text
    assert "| twins found |" in text and "fastgda retry" not in text


def test_of_many_failures_the_first_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    plan_run(tmp_path, queries=[f"q{number:02d}" for number in range(25)])
    log = AttemptLog(Workspace(tmp_path), "run-1", worker="elsewhere:1")
    for number in range(25):
        log.record(number, ShardState.running)
        log.record(number, ShardState.failed, error=KeyError("a | b"))
    text = status_markdown(run_status(Workspace(tmp_path), "run-1"))
    assert "| scores 00019 | failed | 1 | elsewhere:1 | KeyError: 'a \\| b' |" in text
    assert "scores 00020" not in text and "and 5 more" in text
    assert "fastgda retry run-1" in text and "| failed attempts | 25 KeyError |" in text


def test_what_to_do_with_a_paused_run_is_said(tmp_path: Path) -> None:
    plan_run(tmp_path)
    ask(Workspace(tmp_path), "run-1", RunRequest.pause)
    status = run_status(Workspace(tmp_path), "run-1")
    assert status.state == "paused" and "fastgda resume run-1" in status_markdown(status)
