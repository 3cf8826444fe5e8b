"""Whether somebody cancelled the flow run in Prefect, asked of a server now and then."""

from __future__ import annotations

import time
from types import SimpleNamespace
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.execution import cancellation


class Client:
    """What a server says of a flow run, and how often it was asked."""

    def __init__(self) -> None:
        self.state: StateType | Exception | None = StateType.RUNNING
        self.asked = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def read_flow_run(self, _id: object) -> SimpleNamespace:
        self.asked += 1
        if isinstance(self.state, Exception):
            raise self.state
        return SimpleNamespace(state=SimpleNamespace(type=self.state) if self.state else None)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    found, own = Client(), str(uuid4())
    monkeypatch.setattr(cancellation, "get_client", lambda **_: found)
    monkeypatch.setattr(cancellation.flow_run, "get_id", lambda: own)
    monkeypatch.setattr(cancellation, "_looked", {})
    return found


def test_nobody_is_asked_without_a_flow_run_or_a_server(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    with temporary_settings({PREFECT_API_URL: None}):
        assert not cancellation.requested()
    monkeypatch.setattr(cancellation.flow_run, "get_id", lambda: None)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert not cancellation.requested()
    assert client.asked == 0


def test_the_server_is_asked_now_and_then_and_a_cancellation_stays(
    monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        assert not cancellation.requested() and not cancellation.requested()
        assert client.asked == 1, "the last look is recent"
        now = time.monotonic()
        monkeypatch.setattr(cancellation.time, "monotonic", lambda: now + 10)
        client.state = httpx.ConnectError("away")
        assert not cancellation.requested() and client.asked == 2, "a server that is away cancels nothing"
        monkeypatch.setattr(cancellation.time, "monotonic", lambda: now + 20)
        client.state = StateType.CANCELLING
        assert cancellation.requested() and client.asked == 3
        monkeypatch.setattr(cancellation.time, "monotonic", lambda: now + 60)
        client.state = StateType.RUNNING
        assert cancellation.requested() and client.asked == 3, "nobody takes it back"
