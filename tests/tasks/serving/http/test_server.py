"""The command itself, over sockets: its client, several workers, and its end."""

from __future__ import annotations

import http.client
import io
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from flows.commands.main import app
from tasks.inputs.queries import load_queries
from tasks.serving.answers import Answer
from tasks.serving.attributor import Attributor
from tasks.serving.client import Asked, AskedShares, Client, ServiceError
from tasks.serving.shares import published_shares
from tests.tasks.serving.http.running import Running, running
from tests.tasks.whole_runs import WholeRun

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def served(similar: WholeRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("serve"), "--workspace", str(similar.workspace.root)) as found:
        yield found


def test_the_client_has_the_answers_of_python(served: Running, similar: WholeRun) -> None:
    client, attributor = served.client(), Attributor(similar.workspace)
    query = load_queries(similar.run.artifacts["queries"])[1]
    found = client.attribute(Asked(image=query.encoded, caption=query.caption, k=5, where="train_id < 20"))
    expected = attributor.attribute(query.image, query.caption, 5, where="train_id < 20")
    assert [hit.train_id for hit in found.hits] == [hit.train_id for hit in expected.hits]
    assert (found.lineage, found.versions, found.agreement) == (
        expected.lineage,
        expected.versions,
        expected.agreement,
    )
    stored = client.attribute(Asked(query_id=query.query_id, k=3, exclude=[hit.train_id for hit in found.hits[:1]]))
    assert found.hits[0].train_id not in [hit.train_id for hit in stored.hits]
    bare = client.attribute(Asked(query_id=query.query_id, k=3, around=0))
    assert bare.lineage == attributor.attribute_query(query.query_id, 3, around=0).lineage != stored.lineage
    assert client.attribute(Asked(query_id=query.query_id, k=3)).lineage != bare.lineage
    beside = client.attribute(Asked(query_id=query.query_id, k=3, beside=True)).beside
    assert beside == attributor.attribute_query(query.query_id, 3, beside=True).beside != []
    several = list(client.attribute_many([Asked(query_id=query.query_id, k=2), Asked(query_id="nobody")]))
    assert isinstance(several[0], Answer) and isinstance(several[1], ServiceError)
    shares = client.shares(AskedShares("key", split="test"))
    assert shares == published_shares(similar.workspace, "key", split="test")
    with pytest.raises(ServiceError, match="k is 0") as refused:
        client.attribute(Asked(query_id=query.query_id, k=0))
    assert (refused.value.status, refused.value.where) == (400, "k")


def test_the_client_has_images_and_facts(served: Running, similar: WholeRun) -> None:
    client = served.client()
    rows = client.queries(split="test")
    assert {row["split"] for row in rows} == {"test"} and len(rows) == 2
    assert Image.open(io.BytesIO(client.sample_image(3, size=16))).size == (16, 16)
    assert client.query_image(rows[0]["query_id"]).startswith(b"\x89PNG")
    facts = client.sample(3)
    assert (facts["key"], facts["width"], facts["metadata"]) == ("s0003", 24, {})
    assert [each["served"] for each in client.indexes()["indexes"]] == [True]


def test_a_head_that_never_ends_and_a_body_that_never_comes_hold_nobody_up(served: Running) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    slow = [http.client.HTTPConnection(host, int(port)) for _ in range(50)]
    for connection in slow:
        connection.putrequest("POST", "/v1/attribute")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"{")
    started = time.monotonic()
    assert served.client().queries()
    assert time.monotonic() - started < 5
    for connection in slow:
        connection.close()


def test_two_workers_add_up_their_figures_and_end_when_told(similar: WholeRun, tmp_path: Path) -> None:
    with running(tmp_path, "--workspace", str(similar.workspace.root), "--workers", "2") as found:
        client = Client(found.url)
        for _ in range(20):
            client.attribute(Asked(query_id="s0000", k=2))
        host, port = found.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port))
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        name = 'fastgda_serve_request_seconds_count{route="/v1/attribute",status="200"} '
        (count,) = (line.removeprefix(name) for line in text.splitlines() if line.startswith(name))
        assert float(count) == 20
        assert f'index="{similar.index.artifact.key}"' in text
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(60) == 0


def test_a_service_that_is_told_to_end_answers_what_is_under_way(similar: WholeRun, tmp_path: Path) -> None:
    with running(tmp_path, "--workspace", str(similar.workspace.root)) as found:
        query = load_queries(similar.run.artifacts["queries"])[0]
        outcomes: list[str] = []
        begun = threading.Event()

        def ask() -> None:
            client = Client(found.url)
            for _ in range(10_000):
                try:
                    client.attribute(Asked(image=query.encoded, caption=query.caption, k=3))
                    outcomes.append("answered")
                except ServiceError as error:
                    outcomes.append(f"{error.status}")
                    return
                except OSError as error:  # nobody listens any more, or a connection was not taken up
                    outcomes.append(type(error).__name__)
                    return
                begun.set()

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for each in clients:
            each.start()
        assert begun.wait(30)
        time.sleep(0.3)
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(60) == 0
        for each in clients:
            each.join(30)
        ends = [outcome for outcome in outcomes if outcome != "answered"]
        assert len(ends) == 4 and set(ends) <= {"URLError", "ConnectionResetError", "RemoteDisconnected"}
        assert outcomes.count("answered") > 4
        assert "Traceback" not in found.log.read_text()


def test_a_connection_that_is_kept_waits_for_no_acknowledgement(served: Running) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    took = []
    for _ in range(30):
        started = time.monotonic()
        connection.request("GET", "/v1/queries?limit=1")
        connection.getresponse().read()
        took.append(time.monotonic() - started)
    assert sorted(took)[5] < 0.035  # with Nagle's algorithm each but the first takes 40 ms, however idle the machine


def refused(*arguments: str) -> str:
    with pytest.raises(UsageError) as error:
        CliRunner().invoke(app, ["serve", *arguments], catch_exceptions=False)
    return str(error.value)


def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "`make demo` or `fastgda demo` here first" in refused("--demo")
    assert "there are no keys" in refused("--workspace", str(tmp_path), "--host", "0.0.0.0")
    (tmp_path / "limits.yaml").write_text("body_bites: 1\n")
    assert "limits.yaml: body_bites" in refused("--workspace", str(tmp_path), "--limits", "limits.yaml")
    (tmp_path / "limits.yaml").write_text("pixels: many\n")
    assert "limits.yaml: pixels" in refused("--workspace", str(tmp_path), "--limits", "limits.yaml")
