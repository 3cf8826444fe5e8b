"""Shares over HTTP: of scored queries and of a picture, the same as in Python."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from tasks.inputs.queries import Query, load_queries
from tasks.serving.client import AskedShares
from tasks.serving.loaded import Loaded
from tasks.serving.picture_shares import PictureShares
from tasks.serving.shares import published_shares
from tests.tasks.serving.http.conftest import serving, settings_of
from tests.tasks.whole_runs import WholeRun

CAPTION = {"caption": "a red circle"}


@pytest.fixture(scope="module")
def sketched(unlearned: WholeRun) -> Iterator[TestClient]:
    with serving(settings_of(unlearned, limits={"caption": 100, "pixels": 4096})) as client:
        yield client


@pytest.fixture(scope="module")
def query(unlearned: WholeRun) -> Query:
    return load_queries(unlearned.run.artifacts["queries"])[2]


@pytest.mark.heavy
def test_a_picture_has_the_shares_that_python_gives_it(sketched: TestClient, unlearned: WholeRun, query: Query) -> None:
    expected = PictureShares(Loaded(unlearned.workspace)).shares(query.image, query.caption, "key", "sketch").as_json()
    fields = {"by": "key", "caption": query.caption, "tier": "sketch"}
    form = sketched.post("/v1/shares", files={"image": ("x", query.encoded)}, data=fields)
    asked = AskedShares(image=query.encoded, caption=query.caption, by="key", tier="sketch")
    plain = sketched.post("/v1/shares", json=asked.fields())
    assert form.json() == plain.json() == expected, form.text
    few = sketched.post("/v1/shares", files={"image": ("x", query.encoded)}, data={"caption": query.caption})
    assert few.status_code == 400 and "3 are needed: ask tier sketch" in few.json()["error"]


def test_scored_queries_have_the_shares_that_python_gives_them(sketched: TestClient, unlearned: WholeRun) -> None:
    asked = AskedShares("key", split="test", since=datetime(2020, 1, 1, tzinfo=UTC))
    expected = published_shares(unlearned.workspace, "key", split="test").as_json()
    assert sketched.post("/v1/shares", json=asked.fields()).json() == expected
    assert sketched.post("/v1/shares", json={"query_ids": ["nobody"]}).json()["where"] == "by"


DOT = base64.b64encode(b"no picture").decode()


@pytest.mark.parametrize(
    ("body", "status", "where"),
    [
        ({"image": DOT, **CAPTION}, 400, "image"),
        ({"image": "http://127.0.0.1/x.png", **CAPTION}, 400, "image"),
        ({"image": DOT}, 400, "caption"),
        (CAPTION, 400, "image"),
        ({"tier": "sketch"}, 400, "image"),
        ({"image": DOT, "caption": " "}, 400, "caption"),
        ({"image": DOT, "caption": "x" * 101}, 400, "caption"),
        ({"image": DOT, **CAPTION, "split": "test"}, 400, "split"),
        ({"image": DOT, **CAPTION, "tier": "exact"}, 400, "tier"),
        ({"unknown": 1}, 400, "unknown"),
    ],
)
def test_what_is_no_question_of_shares_is_refused_and_the_field_named(
    sketched: TestClient, body: dict[str, Any], status: int, where: str
) -> None:
    response = sketched.post("/v1/shares", json=body)
    assert (response.status_code, response.json()["where"]) == (status, where), response.text


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(sketched: TestClient) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (65, 64)).save(buffer, "PNG")
    response = sketched.post("/v1/shares", files={"image": ("x", buffer.getvalue())}, data=CAPTION)
    assert response.status_code == 413, response.text
