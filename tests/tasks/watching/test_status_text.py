from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.workspace import Workspace
from tasks.watching.run_status import run_status
from tasks.watching.status_text import status_table
from tests.storage_schemas.workspaces import plan_run


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
