"""Messages to where people read them: a real HTTP address on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed

from fastgda_core.errors import TransientError, UsageError
from tasks.watching.alerts import VARIABLE, addresses, send_alert


@pytest.fixture
def heard() -> Iterator[tuple[str, list[dict], list[int]]]:
    """An address, what it was sent, and what it answers."""
    messages: list[dict] = []
    statuses = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(statuses[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"json://127.0.0.1:{server.server_port}", messages, statuses
        server.shutdown()
        thread.join()


def test_an_alert_goes_to_every_address(monkeypatch: pytest.MonkeyPatch, heard: tuple) -> None:
    url, messages, statuses = heard
    monkeypatch.setenv(VARIABLE, f"{url} {url}/second")
    assert len(addresses()) == 2
    send_alert.fn("run x", "2 parts failed")
    send_alert.fn("only a title", "")
    assert [(each["title"], each["message"]) for each in messages] == [
        ("run x", "2 parts failed"), ("run x", "2 parts failed"),
        ("only a title", "only a title"), ("only a title", "only a title"),
    ]  # fmt: skip
    statuses[0] = 503
    with pytest.raises(TransientError, match="did not take the alert 'run x'"):
        send_alert.fn("run x", "text")


def test_an_address_that_is_none_is_named_by_its_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "nothing://user:password@here")
    with pytest.raises(UsageError, match="URL number 1 is none") as caught:
        send_alert.fn("a", "b")
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(("error", "again"), [(TransientError("away"), True), (UsageError("no such URL"), False)])
def test_a_message_that_was_not_taken_is_sent_again_and_a_wrong_address_is_told_at_once(
    error: Exception, again: bool
) -> None:
    run = TaskRun.model_construct()
    assert send_alert.retry_condition_fn(send_alert, run, Failed(data=error)) is again
