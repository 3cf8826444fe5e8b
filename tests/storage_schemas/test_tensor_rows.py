"""Rows by byte range: the right ones, and little more than these, from disk and from object stores."""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, any_path
from storage_schemas.tensor_rows import HEAD_BYTES, SLACK, Span, read_heads, read_spans
from tests.object_store import bytes_sent, empty_workspace, requests_counted

PARTS, ROWS, WIDTH = 4, 256, 500


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.integration), "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnyPath:
    if request.param == "disk":
        return tmp_path
    if request.param == "memory":
        return any_path(f"memory://bucket-{uuid.uuid4().hex[:8]}/workspace")
    return empty_workspace(request.getfixturevalue("s3"), monkeypatch)


def drawn(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "numbers": draw.integers(2**60, size=ROWS),
        "values": draw.normal(size=(ROWS, 5, WIDTH // 5)).astype(np.float32),
        "text": draw.integers(256, size=70 * ROWS).astype(np.uint8),
    }


def written(folder: AnyPath) -> list[tuple[AnyPath, dict[str, np.ndarray]]]:
    parts = [(folder / f"part-{number}.safetensors", drawn(number)) for number in range(PARTS)]
    for path, tensors in parts:
        path.write_bytes(save(tensors))
    return parts


def test_a_head_tells_types_shapes_and_bytes(folder: AnyPath) -> None:
    parts = written(folder)
    for head, (_, tensors) in zip(read_heads([path for path, _ in parts]), parts, strict=True):
        assert {name: each.shape for name, each in head.tensors.items()} == {n: t.shape for n, t in tensors.items()}
        assert {name: each.dtype for name, each in head.tensors.items()} == {
            "numbers": "I64",
            "values": "F32",
            "text": "U8",
        }
        for name, tensor in tensors.items():
            assert bytes(head.read(name)) == tensor.tobytes()


def test_scattered_rows_come_in_the_order_asked_for_and_at_few_other_bytes(folder: AnyPath) -> None:
    parts = written(folder)
    paths, draw = [path for path, _ in parts], np.random.default_rng(9)
    counted_before = _read_by_this_process()
    with bytes_sent() as sent, requests_counted() as asked:
        heads = read_heads(paths)
        chosen = np.stack([draw.integers(PARTS, size=60), draw.integers(ROWS, size=60)], axis=1).tolist()
        spans = [heads[part].tensors["values"].rows(row, row + 1) for part, row in chosen]
        spans += [heads[part].tensors["text"].rows(70 * row, 70 * row + row % 70) for part, row in chosen]
        contents = read_spans(spans)
    expected = [parts[part][1]["values"][row].tobytes() for part, row in chosen]
    expected += [parts[part][1]["text"][70 * row : 70 * row + row % 70].tobytes() for part, row in chosen]
    assert [bytes(content) for content in contents] == expected
    wanted = sum(span.size for span in set(spans))
    most = PARTS * HEAD_BYTES + (1 + SLACK) * wanted
    if isinstance(folder, Path):
        assert wanted <= _read_by_this_process() - counted_before <= most + 10_000, "and what the test itself reads"
    elif "s3" in str(folder):
        assert wanted <= sent["GET"] <= most
        assert asked["GET"] < PARTS + len(set(spans)) and not asked["HEAD"] and not asked["LIST"]


def _read_by_this_process() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_rows_side_by_side_are_read_in_one_go(folder: AnyPath) -> None:
    (path, tensors), *_ = written(folder)
    (head,) = read_heads([path])
    with requests_counted() as asked:
        contents = read_spans([head.tensors["values"].rows(row, row + 1) for row in range(40, 90)])
    assert b"".join(contents) == tensors["values"][40:90].tobytes()
    assert asked["GET"] == (1 if "s3" in str(folder) else 0)


@pytest.mark.parametrize("content", [b"", b"\xff" * 90, b"\1" + b"\0" * 7 + b"["])
def test_what_is_no_safetensors_file_is_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "part"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="part is no safetensors file"):
        read_heads([path])


def test_a_file_that_is_cut_short_is_refused_in_a_line(tmp_path: Path) -> None:
    (path, _), *_ = written(tmp_path)
    (head,) = read_heads([path])
    path.write_bytes(path.read_bytes()[:-500])
    text = head.tensors["text"]
    with pytest.raises(StoreError, match="is cut short"):
        read_spans([text.rows(0, 10), text.rows(70 * ROWS - 70, 70 * ROWS)])
    assert bytes(read_spans([Span(path, 5, 5)])[0]) == b""
