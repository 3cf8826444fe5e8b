"""Images of samples and queries: as they lie in tars, resized, and once for a client that has them."""

from __future__ import annotations

import asyncio
import io
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from storage_schemas.tombstones import Tombstones, read_tombstones
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import sample_images
from tasks.serving import catalogue
from tasks.serving.http.cache import Pictures
from tasks.serving.http.thumbnails import resized
from tests import tiny
from tests.tasks.whole_runs import WholeRun


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_an_image_is_the_tars_bytes(client: TestClient) -> None:
    for number in (0, 7):
        response = client.get(f"/v1/samples/{number}/image")
        assert response.content == tiny.draw(number)[0]
        assert response.headers["content-type"] == "image/jpeg"
        assert "sandbox" in response.headers["content-security-policy"]


def test_a_thumbnail_is_the_image_resized_and_never_enlarged(client: TestClient, similar: WholeRun) -> None:
    (image,) = sample_images(similar.run.artifacts["samples"].path, [3])
    for size, side in ((16, 16), (24, 24), (256, 24)):
        response = client.get(f"/v1/samples/3/image?size={size}")
        found, expected = opened(response.content), image.resize((side, side), Image.Resampling.BICUBIC)
        assert found.size == (side, side)
        assert np.abs(np.asarray(found, float) - np.asarray(expected, float)).mean() < 12
        assert client.get(f"/v1/samples/3/image?size={size}").content == response.content
    assert client.get("/v1/samples/3/image?size=2000").status_code == 422
    assert client.get("/v1/samples/3/image?size=1").status_code == 422


def test_a_small_thumbnail_has_the_pixels_of_its_picture_and_a_large_one_is_jpeg(
    client: TestClient, similar: WholeRun
) -> None:
    (image,) = sample_images(similar.run.artifacts["samples"].path, [3])
    for size in (16, 256):
        response = client.get(f"/v1/samples/3/image?size={size}")
        expected = image.copy()
        expected.thumbnail((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
        assert response.headers["content-type"] == "image/png"
        assert np.array_equal(np.asarray(opened(response.content)), np.asarray(expected))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    for size, kind, shape in ((1024, "JPEG", (400, 300)), (160, "JPEG", (160, 120)), (128, "PNG", (128, 96))):
        found = Image.open(io.BytesIO(resized(buffer.getvalue, size)))
        assert (found.format, found.size) == (kind, shape)


def test_a_client_that_has_an_image_gets_304(client: TestClient) -> None:
    for path in ("/v1/samples/1/image", "/v1/samples/1/image?size=16", "/v1/queries/s0001/image?size=16"):
        first = client.get(path)
        tag = first.headers["etag"]
        for given in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = client.get(path, headers={"if-none-match": given})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
        assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
        assert "max-age" in first.headers["cache-control"] and "private" in first.headers["cache-control"]
    tags = {client.get(f"/v1/samples/{number}/image?size=16").headers["etag"] for number in range(4)}
    assert len(tags) == 4


def test_a_query_and_its_image_are_shown(client: TestClient, similar: WholeRun) -> None:
    queries = load_queries(similar.run.artifacts["queries"])
    listed = client.get("/v1/queries?limit=1000").json()
    assert [row["query_id"] for row in listed["queries"]] == [query.query_id for query in queries]
    assert listed["total"] == len(queries)
    tests = client.get("/v1/queries?split=test&limit=1&offset=1").json()
    assert tests["total"] == 2 and len(tests["queries"]) == 1 and tests["queries"][0]["split"] == "test"
    query = queries[2]
    found = opened(client.get(f"/v1/queries/{query.query_id}/image").content)
    assert np.array_equal(np.asarray(found), np.asarray(query.image))
    assert client.get(f"/v1/queries/{query.query_id}").json()["caption"] == query.caption
    assert client.get("/v1/queries/nobody").status_code == 404


def test_what_is_no_sample_is_told_so(client: TestClient) -> None:
    assert client.get("/v1/samples/5").json()["key"] == "s0005"
    for path, status in (("/v1/samples/999999", 404), ("/v1/samples/-1", 422), ("/v1/samples/x", 422)):
        response = client.get(path)
        assert response.status_code == status and response.json()["error"]
        assert client.get(f"{path}/image").status_code == status


def test_take_downs_are_looked_for_in_threads_that_no_other_request_waits_for(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Any] = []
    on_the_loop: list[Any] = []

    def look(*arguments: Any) -> Tombstones:
        with suppress(RuntimeError):
            on_the_loop.append(asyncio.get_running_loop())
        looks.append(arguments)
        return read_tombstones(*arguments)

    monkeypatch.setattr(catalogue, "read_tombstones", look)
    for place in ("/v1/samples/3", "/v1/samples/3/image", "/v1/samples/3/image?size=32"):
        assert client.get(place).status_code == 200
    for question in ({"query_id": "s0001"}, {"query_id": "s0001", "where": "width > 1"}):
        assert client.post("/v1/attribute", json=question).status_code == 200
    assert len(looks) > 5 and on_the_loop == []


def test_the_cache_forgets_what_was_asked_for_longest_ago() -> None:
    kept = Pictures(100)
    for name in "abc":
        kept.put(name, name.encode() * 30)
    assert kept.get("a") == b"a" * 30
    kept.put("d", b"d" * 30)
    assert [kept.get(name) is not None for name in "abcd"] == [True, False, True, True]
    kept.put("large", b"x" * 101)
    assert not any(kept.get(name) for name in ("a", "b", "c", "d", "large"))
    kept.put("a", b"1" * 10)
    kept.put("a", b"2" * 20)
    assert kept.get("a") == b"2" * 20
