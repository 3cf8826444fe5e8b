from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from storage_schemas.commit import Manifest, commit, committed, file_sha256, input_key, manifest_path, write_atomically

ROOT = Path(__file__).parents[2]
KEYS = ("a" * 16, "b" * 16)


def commit_bytes(path: Path, content: bytes, key: str = KEYS[0], rows: int = 3) -> Manifest:
    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    return commit(path, write, key=key, rows=rows, started=time.monotonic(), device="cpu")


def test_a_committed_file_is_found_with_its_digest_rows_and_size(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "part-00000.parquet"
    made = commit_bytes(path, b"some bytes", rows=7)
    found = committed(path, KEYS[0])
    assert found == made
    assert found is not None
    assert (found.rows, found.size, found.sha256) == (7, 10, file_sha256(path))
    assert path.read_bytes() == b"some bytes"


def test_a_file_that_was_never_written_is_not_committed(tmp_path: Path) -> None:
    assert committed(tmp_path / "absent.parquet", KEYS[0]) is None


def test_a_file_made_from_other_inputs_is_not_committed(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_bytes(path, b"some bytes", key=KEYS[0])
    assert committed(path, KEYS[1]) is None


def test_a_file_without_its_manifest_is_not_committed(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_bytes(path, b"some bytes")
    manifest_path(path).unlink()
    assert committed(path, KEYS[0]) is None


def test_a_manifest_without_its_file_is_not_committed(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_bytes(path, b"some bytes")
    path.unlink()
    assert committed(path, KEYS[0]) is None


def test_a_truncated_file_is_not_committed(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_bytes(path, b"some bytes")
    path.write_bytes(b"some byt")
    assert committed(path, KEYS[0]) is None


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"input_key": "aaaaaaaaaaaaaaaa"}'])
def test_a_garbage_manifest_is_not_trusted(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_bytes(path, b"some bytes")
    manifest_path(path).write_bytes(garbage)
    assert committed(path, KEYS[0]) is None


def test_committing_again_replaces_the_file_and_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    commit_bytes(path, b"first", key=KEYS[0])
    commit_bytes(path, b"second", key=KEYS[1])
    assert committed(path, KEYS[0]) is None
    found = committed(path, KEYS[1])
    assert found is not None and found.sha256 == file_sha256(path)


def test_a_failing_writer_leaves_neither_file_nor_temporary(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of ")
        raise RuntimeError("disk gone")

    path = tmp_path / "part-00000.parquet"
    with pytest.raises(RuntimeError, match="disk gone"):
        commit(path, write, key=KEYS[0], rows=1, started=time.monotonic())
    assert list(tmp_path.iterdir()) == []
    assert committed(path, KEYS[0]) is None


def test_a_failing_writer_leaves_an_earlier_commit_whole(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of ")
        raise RuntimeError("disk gone")

    path = tmp_path / "part-00000.parquet"
    before = commit_bytes(path, b"some bytes")
    with pytest.raises(RuntimeError, match="disk gone"):
        commit(path, write, key=KEYS[0], rows=1, started=time.monotonic())
    assert committed(path, KEYS[0]) == before
    assert path.read_bytes() == b"some bytes"


def test_a_file_in_the_making_is_invisible_to_readers_of_parts(tmp_path: Path) -> None:
    seen: list[list[Path]] = []

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        assert temporary.parent == tmp_path
        seen.append(list(tmp_path.glob("part-*.parquet")))

    commit(tmp_path / "part-00000.parquet", write, key=KEYS[0], rows=1, started=time.monotonic())
    assert seen == [[]]


def test_a_small_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "current.json"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


# Commits one path over and over, under either key in turn. Lengths differ by number, or are all the same.
WRITER = """
import itertools, sys, time
from pathlib import Path
from storage_schemas.commit import commit

path, lengths, keys = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
sys.stdin.readline()
for number in itertools.count():
    key = keys[number % 2]
    content = f"{key} {number:09d} ".encode() * (2000 if lengths == "equal" else 1000 + number % 97)
    commit(path, lambda temporary: temporary.write_bytes(content), key=key, rows=number, started=time.monotonic())
    if number == 0:
        print("committing", flush=True)
"""


@pytest.mark.integration
@pytest.mark.parametrize("lengths", ["different", "equal"])
def test_a_writer_killed_at_any_instant_leaves_nothing_that_is_trusted_wrongly(tmp_path: Path, lengths: str) -> None:
    path = tmp_path / "part-00000.parquet"
    waits = random.Random(0)
    command = [sys.executable, "-c", WRITER, str(path), lengths, *KEYS]
    for _ in range(2):
        writers = [
            subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(8)
        ]
        try:
            for writer in writers:
                assert writer.stdin is not None and writer.stdout is not None
                writer.stdin.write("go\n")
                writer.stdin.flush()
                assert writer.stdout.readline() == "committing\n"
                time.sleep(waits.uniform(0, 0.02))
                writer.send_signal(signal.SIGKILL)
                writer.wait()
                assert writer.returncode == -signal.SIGKILL
                assert_nothing_is_trusted_wrongly(path)
        finally:
            for writer in writers:
                writer.kill()
                writer.communicate()


def assert_nothing_is_trusted_wrongly(path: Path) -> None:
    assert list(path.parent.glob("part-*.parquet")) == [path]
    for key in KEYS:
        manifest = committed(path, key)
        if manifest is not None:
            assert file_sha256(path) == manifest.sha256
            assert path.read_bytes().startswith(key.encode())
            assert path.stat().st_size == manifest.size


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def typed(value: object) -> object:
    """Equal exactly where two JSON documents are equal: True is not 1."""
    if isinstance(value, dict):
        return ("dict", frozenset((name, typed(inner)) for name, inner in value.items()))
    if isinstance(value, list):
        return ("list", tuple(typed(inner) for inner in value))
    return (type(value).__name__, value)


@given(JSON, JSON)
def test_keys_are_equal_exactly_when_the_inputs_are(one: object, other: object) -> None:
    assert (input_key(one) == input_key(other)) == (typed(one) == typed(other))


@given(st.lists(JSON, max_size=4))
def test_a_key_tells_how_its_inputs_were_grouped(parts: list[object]) -> None:
    assert input_key(*parts) != input_key(parts)
    assert input_key(*parts) != input_key(*parts, None)


@given(st.dictionaries(st.text(max_size=4), JSON, min_size=2, max_size=5))
def test_the_order_of_a_mapping_does_not_change_its_key(mapping: dict[str, object]) -> None:
    backwards = dict(reversed(mapping.items()))
    assert list(backwards) != list(mapping)
    assert input_key(backwards) == input_key(mapping)


class Settings(BaseModel):
    folder: Path
    steps: int


def test_models_and_paths_can_be_part_of_a_key() -> None:
    settings = Settings(folder=Path("/data"), steps=3)
    assert input_key(settings) == input_key({"steps": 3, "folder": Path("/data")})
    assert input_key(settings) != input_key(Settings(folder=Path("/data"), steps=4))
    assert input_key(Path("/data")) != input_key(Path("/other"))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j])
def test_what_has_no_stable_text_cannot_be_part_of_a_key(value: object) -> None:
    with pytest.raises(TypeError, match=f"{type(value).__name__} cannot be part of an input key"):
        input_key({"inner": [value]})
