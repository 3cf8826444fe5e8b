"""Who may ask, from where, how often, and what every response carries."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from storage_schemas.errors import StoreError
from tasks.serving.http.keys import Keys, add_key, read_keys, revoke_key
from tasks.serving.http.rates import Buckets
from tests.tasks.serving.http.conftest import serving, settings_of
from tests.tasks.whole_runs import WholeRun


def test_a_page_that_its_dns_led_here_is_refused_by_its_name(client: TestClient) -> None:
    assert client.get("/v1/queries").status_code == 200
    for name in ("evil.example", "127.0.0.1.evil.example", "evil.example:80", ""):
        response = client.get("/v1/queries", headers={"host": name})
        assert response.status_code == 421, name
    for name in ("localhost:8000", "LOCALHOST", "127.0.0.1:1"):
        assert client.get("/v1/queries", headers={"host": name}).status_code == 200


def test_what_a_page_of_another_origin_sends_is_refused(client: TestClient) -> None:
    body = {"query_id": "s0000", "k": 1}
    for origin in ("https://evil.example", "null", "http://127.0.0.1:81"):
        response = client.post("/v1/attribute", json=body, headers={"origin": origin})
        assert (response.status_code, response.json()["where"]) == (403, "origin")
        assert "access-control-allow-origin" not in response.headers
    assert client.post("/v1/attribute", json=body, headers={"origin": "http://127.0.0.1"}).status_code == 200


def test_origins_that_were_named_may_ask(similar: WholeRun) -> None:
    origin = "https://studio.example"
    with serving(settings_of(similar, cors=[origin])) as client:
        body = {"query_id": "s0000", "k": 1}
        response = client.post("/v1/attribute", json=body, headers={"origin": origin})
        assert response.headers["access-control-allow-origin"] == origin
        asks = {"origin": origin, "access-control-request-method": "POST"}
        assert client.options("/v1/attribute", headers=asks).status_code == 200
        other = client.options("/v1/attribute", headers={**asks, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_every_response_carries_the_headers_of_security(client: TestClient) -> None:
    for path in ("/v1/queries", "/v1/samples/0/image?size=32", "/nothing", "/v1/samples/x", "/docs", "/healthz"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe-eval" not in policy
        assert "frame-ancestors 'none'" in policy or "sandbox" in policy
        assert headers["x-frame-options"] == "DENY"
        assert len(headers["x-request-id"]) >= 8
        assert "server" not in headers


def test_a_key_is_kept_as_its_hash_and_read_and_admin_are_told_apart(keys: Path) -> None:
    token, boss = add_key(keys, "studio", "read"), add_key(keys, "boss", "admin")
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert token not in keys.read_text() and boss not in keys.read_text()
    known = Keys(keys)
    callers = [known.caller(each) for each in (token, boss, token[:-1], "", "fgda_" + "A" * 43)]
    assert [(each.name, each.scope) if each else None for each in callers] == [
        ("studio", "read"),
        ("boss", "admin"),
        None,
        None,
        None,
    ]
    with pytest.raises(StoreError, match="has a key studio already"):
        add_key(keys, "studio", "admin")
    with pytest.raises(StoreError, match="is no name of a key"):
        add_key(keys, "../x", "read")
    revoke_key(keys, "studio")
    assert known.caller(token) is None and known.caller(boss) is not None
    keys.write_text("damaged")
    assert known.caller(boss) is None


def test_a_file_of_keys_that_others_may_write_to_is_refused(keys: Path) -> None:
    add_key(keys, "studio", "read")
    keys.chmod(0o666)
    with pytest.raises(StoreError, match="chmod go-w"):
        read_keys(keys)


def test_with_keys_nothing_is_answered_without_one(similar: WholeRun, keys: Path) -> None:
    token = add_key(keys, "studio", "read")
    with serving(settings_of(similar, keys=str(keys), hosts=[])) as client:
        for path in ("/v1/queries", "/v1/samples/0", "/v1/indexes", "/v1/samples/0/image"):
            response = client.get(path)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert client.get(path, headers={"authorization": f"Bearer {token}"}).status_code == 200
            assert client.get(path, headers={"x-api-key": token}).status_code == 200
            assert client.get(path, headers={"authorization": f"Basic {token}"}).status_code == 401
        for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        revoke_key(keys, "studio")
        assert client.get("/v1/queries", headers={"x-api-key": token}).status_code == 401


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    now = 0.0
    buckets = Buckets(2.0, 3, lambda: now)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 1]
    assert buckets.take("b") == 0
    now = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 1]
    now = 100.0
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 1]
    assert not any(Buckets(None, 1).take("a") for _ in range(100))


def test_whoever_asks_too_often_is_told_when_to_come_again(similar: WholeRun) -> None:
    with serving(settings_of(similar, limits={"rate": 0.001, "burst": 2})) as client:
        found = [client.get("/v1/queries") for _ in range(3)]
        assert [each.status_code for each in found] == [200, 200, 429]
        assert int(found[2].headers["retry-after"]) > 100
        assert client.get("/healthz").status_code == 200


def test_the_access_log_holds_no_question(
    similar: WholeRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.logs.shown", lambda level: level == "info")
    with serving(settings_of(similar)) as client:
        capsys.readouterr()
        client.post("/v1/attribute", json={"query_id": "s0000", "k": 1, "where": "key = 'secret'"})
        client.get("/v1/queries?split=secret", headers={"x-request-id": "mine-1"})
        client.get("/v1/queries/secret")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "fastgda.access" in line]
    assert [line["route"] for line in lines] == ["/v1/attribute", "/v1/queries", "/v1/queries/{query_id}"]
    assert lines[1]["request_id"] == "mine-1" and lines[1]["status"] == 200 and lines[1]["sent"] > 0
    assert "secret" not in json.dumps(lines)
