"""Questions over HTTP: what comes back is what Python computes, and what is no question is refused with a reason."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tasks.distilling.versions import load_trained_head
from tasks.inputs.features import load_features
from tasks.inputs.queries import load_queries
from tasks.serving.attributor import Attributor
from tasks.serving.http.cache import Answers
from tasks.serving.http.questions import Question
from tests.tasks.serving.http.conftest import serving, settings_of
from tests.tasks.whole_runs import WholeRun


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def truth(similar: WholeRun) -> dict[str, list[int]]:
    """For each query the train_ids by the head's cosine, by NumPy."""
    artifacts, context = similar.run.artifacts, similar.context
    head = load_trained_head(similar.head.artifact.path)
    samples = head(load_features(context, artifacts["samples"], artifacts["samples"])).numpy()
    asked = head.queries(load_features(context, artifacts["queries"], artifacts["samples"])).numpy()
    orders = np.argsort(-(asked @ samples.T), axis=1, kind="stable").tolist()
    return {query.query_id: order for query, order in zip(load_queries(artifacts["queries"]), orders, strict=True)}


def named(answer: dict[str, Any]) -> list[int]:
    return [hit["train_id"] for hit in answer["hits"]]


def test_a_form_json_and_a_stored_query_have_the_answer_that_numpy_computes(
    client: TestClient, similar: WholeRun, truth: dict[str, list[int]]
) -> None:
    for query in load_queries(similar.run.artifacts["queries"])[:3]:
        expected = truth[query.query_id][:4]
        fields = {"caption": query.caption, "k": 4}
        image = png(query.image)
        form = client.post("/v1/attribute", files={"image": ("../../x.svg", image)}, data=fields)
        plain = client.post("/v1/attribute", json={**fields, "image": base64.b64encode(image).decode()})
        stored = client.post("/v1/attribute", json={"query_id": query.query_id, "k": 4})
        for response in (form, plain, stored):
            assert response.status_code == 200, response.text
            assert named(response.json()) == expected
            assert [hit["rank"] for hit in response.json()["hits"]] == [1, 2, 3, 4]


def test_a_batch_has_a_line_for_each_question_in_order(client: TestClient, truth: dict[str, list[int]]) -> None:
    names = [*truth, *truth, *truth]
    questions: list[dict[str, Any]] = [{"query_id": name, "k": 3} for name in names]
    questions[2] = {"query_id": "nobody"}
    questions[5] = {"image": "no base64!", "caption": "x"}
    response = client.post("/v1/attribute:batch", json={"questions": questions})
    assert response.headers["content-type"].startswith("application/x-ndjson")
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert [line["index"] for line in lines] == list(range(len(names)))
    for number, line in enumerate(lines):
        if number in (2, 5):
            assert line["error"] and "answer" not in line
        else:
            assert named(line["answer"]) == truth[names[number]][:3]


def test_columns_come_with_an_answer_that_asks_for_them(client: TestClient, similar: WholeRun) -> None:
    expected = Attributor(similar.workspace).attribute_query("s0001", 3, around=0, beside=True).as_json()
    fields = {"query_id": "s0001", "k": 3, "around": 0}
    plain = client.post("/v1/attribute", json=fields).json()
    first, again = (client.post("/v1/attribute", json={**fields, "beside": True}).json() for _ in range(2))
    assert plain["beside"] == [] and plain["hits"] == first["hits"]
    assert [column["way"] for column in first["beside"]] == ["exact", "images"]
    assert first["beside"] == expected["beside"] == again["beside"] and first["lineage"] == expected["lineage"]


CAPTION = {"caption": "a red circle"}
DOT = base64.b64encode(png(Image.new("RGB", (4, 4), "teal"))).decode()


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "image"),
        ({"query_id": "x", "image": DOT, **CAPTION}, "image"),
        ({"query_id": "s0000", "k": 0}, "k"),
        ({"query_id": "s0000", "k": 10**9}, "k"),
        ({"query_id": "s0000", "k": "many"}, "k"),
        ({"query_id": "s0000", "tier": "best"}, "tier"),
        ({"query_id": "s0000", "exclude": ["a"]}, "exclude"),
        ({"query_id": "s0000", "unknown": 1}, "unknown"),
        ({"image": "http://127.0.0.1/x.png", **CAPTION}, "image"),
        ({"image": DOT, "caption": " "}, "caption"),
        ({"caption": " "}, "caption"),
        ({"image": DOT, "caption": "x" * 2001}, "caption"),
        ({"vector": [1.0, 2.0]}, "vector"),
        ({"vector": []}, "vector"),
        ({"vector": [1.0], "beside": True}, "beside"),
    ],
)
def test_what_is_no_question_is_refused_and_the_field_named(
    client: TestClient, body: dict[str, Any], where: str
) -> None:
    response = client.post("/v1/attribute", json=body)
    assert response.status_code == 400, response.text
    told = response.json()
    assert set(told) == {"error", "where"} and told["error"] and "\n" not in told["error"]
    assert told["where"].split(".")[0] == where


def test_bodies_of_other_types_are_refused(client: TestClient) -> None:
    for kind, content, status in (
        ("text/plain", b"hello", 415),
        ("application/json", b"{", 400),
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b"[1]", 400),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Dispo", 400),
    ):
        response = client.post("/v1/attribute", content=content, headers={"content-type": kind})
        assert response.status_code == status, (kind, response.text)
        assert response.json()["error"]


def test_a_body_is_counted_as_it_comes_and_not_by_what_its_head_says(similar: WholeRun) -> None:
    with serving(settings_of(similar, limits={"body_bytes": 2048})) as client:
        told = client.post("/v1/attribute", content=b"x" * 5000, headers={"content-type": "application/json"})
        read = 0

        def pieces() -> Any:
            nonlocal read
            for _ in range(1000):
                read += 1024
                yield b"x" * 1024

        streamed = client.post("/v1/attribute", content=pieces(), headers={"content-type": "application/json"})
        assert "content-length" not in streamed.request.headers
        for response in (told, streamed):
            assert response.status_code == 413 and "2048 bytes" in response.json()["error"]


def test_a_question_without_a_published_index_is_told_what_is_missing(tmp_path: Any) -> None:
    from tasks.serving.http.app import create_app
    from tasks.serving.http.settings import ServiceSettings

    with TestClient(create_app(ServiceSettings(workspace=str(tmp_path), poll_seconds=0.01))) as client:
        assert client.get("/healthz").text == "ok\n"
        for _ in range(100):
            found = client.get("/readyz")
            if "no published run" in found.text:
                break
        assert found.status_code == 503 and "no published run" in found.json()["error"]
        asked = client.post("/v1/attribute", json={"query_id": "x"})
        assert asked.status_code == 503 and asked.headers["retry-after"]


def test_an_answer_to_a_stored_query_is_kept_until_a_version_or_a_take_down_is_new(
    client: TestClient, similar: WholeRun
) -> None:
    attributor = Attributor(similar.workspace)
    asked = [Question(query_id="s0001", k=k) for k in (3, 3, 4)]
    keys = [Answers.key(attributor, question) for question in asked]
    assert keys[0] == keys[1] != keys[2] and None not in keys
    assert Answers.key(attributor, Question(vector=[1.0])) is None
    kept, answer = Answers(most=2), attributor.attribute_query("s0001", 3)
    kept.put(keys[0], answer)
    found = kept.get(keys[1], 0.0)
    assert found is not None and found.hits == answer.hits and found.seconds != answer.seconds
    assert kept.get(keys[2], 0.0) is None
    for number in range(2):
        kept.put(number, answer)
    assert kept.get(keys[0], 0.0) is None
    first, second = (client.post("/v1/attribute", json={"query_id": "s0002", "k": 5}).json() for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
