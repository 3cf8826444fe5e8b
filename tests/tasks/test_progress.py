from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from tasks import progress


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a person sees, or finds in a log."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, force_terminal=request.param, width=200))
    return file


def test_a_stage_within_a_stage_is_shown_beside_it(shown: io.StringIO) -> None:
    def nested() -> None:
        with progress.stage("outer", 2) as outer:
            outer(1)
            with progress.stage("inner", 1) as inner:
                inner(1)
            outer(1)

    thread = threading.Thread(target=nested, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "it waits for itself"
    assert "outer" in shown.getvalue() and "inner" in shown.getvalue()
    with progress.stage("next", 1) as advance:
        advance(1)
    assert "next" in shown.getvalue()


def test_nothing_done_after_a_while_is_no_error(shown: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_PLAIN_INTERVAL", 0.0)
    with progress.stage("latents", 4) as advance:
        advance(0)
        advance(3)
        advance(1)
    assert "4/4" in shown.getvalue()
