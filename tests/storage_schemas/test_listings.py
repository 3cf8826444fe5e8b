"""What is committed in a folder, from one listing of it."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from storage_schemas import listings
from storage_schemas.commit import MANIFEST, commit, manifest_path
from storage_schemas.files import AnyPath, any_path
from storage_schemas.listings import committed_parts, folder_manifests, list_folder, list_tree, quarantined_in
from storage_schemas.workspace import part

KEY = "k" * 16


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    return tmp_path / "parts" if request.param == "disk" else any_path(f"memory://{uuid.uuid4().hex}/parts")


def write(folder: AnyPath, number: int, content: bytes = b"x", key: str = KEY) -> AnyPath:
    path = part(folder, number)
    commit(path, lambda temporary: temporary.write_bytes(content), key=key, rows=1, started=time.monotonic())
    return path


def test_a_folder_that_is_not_there_holds_nothing(folder: AnyPath) -> None:
    assert list_folder(folder) == {} == list_tree(folder) == committed_parts(folder, KEY) == folder_manifests(folder)


def test_a_file_that_is_gone_before_it_is_looked_at_hides_no_other(tmp_path: Path) -> None:
    """As a temporary file that another process renames meanwhile: a link that leads nowhere is as gone."""
    written = write(tmp_path, 0)
    (tmp_path / ".fastgda-tmp-1").symlink_to(tmp_path / "renamed")
    assert list_folder(tmp_path).keys() == {written.name, manifest_path(written).name}
    assert committed_parts(tmp_path, KEY).keys() == {written.name}


def test_a_tree_is_listed_by_the_paths_of_its_files(folder: AnyPath) -> None:
    for name in ("a", "b"):
        write(folder / name, 0)
    before = list_tree(folder)
    assert before.keys() == {f"{name}/part-00000.parquet{end}" for name in ("a", "b") for end in ("", MANIFEST)}
    part(folder / "a", 0).unlink()
    write(folder / "b", 0, b"another")
    after = list_tree(folder)
    assert before.keys() - after.keys() == {"a/part-00000.parquet"}
    assert after["b/part-00000.parquet"] != before["b/part-00000.parquet"]


def test_a_part_counts_when_file_and_manifest_fit_the_key(folder: AnyPath) -> None:
    for number in range(5):
        write(folder, number, b"x" * (number + 1))
    assert list(committed_parts(folder, KEY)) == [part(folder, number).name for number in range(5)]
    part(folder, 0).unlink()
    manifest_path(part(folder, 1)).unlink()
    part(folder, 2).write_bytes(b"cut")
    part(folder, 2).write_bytes(b"c")
    manifest_path(part(folder, 3)).write_bytes(b"{")
    write(folder, 4, key="of other inputs")
    write(folder, 5)
    assert list(committed_parts(folder, KEY)) == [part(folder, 5).name]
    assert [path.name for path in folder_manifests(folder)] == [part(folder, number).name for number in (0, 2, 4, 5)]


def test_a_manifest_is_read_once_and_again_when_it_changed(folder: AnyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write(folder, number)
    read: list[AnyPath] = []
    real = listings.read_manifest
    monkeypatch.setattr(listings, "read_manifest", lambda path: (read.append(path), real(path))[1])
    first = committed_parts(folder, KEY)
    read.clear()
    assert committed_parts(folder, KEY) == first and read == []
    time.sleep(0.01)  # in memory a file's stamp is its time
    write(folder, 1, b"longer")
    changed = committed_parts(folder, KEY)
    assert changed.keys() == first.keys() and changed[part(folder, 1).name].size == 6
    assert read in ([], [part(folder, 1)]), "nothing but what changed, and in an object store by one request for all"


def test_an_object_store_is_asked_twice_however_many_parts_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = any_path(f"memory://{uuid.uuid4().hex}/parts")
    for number in range(40):
        write(folder, number)
    asked: list[str] = []
    for name in ("ls", "cat", "info", "cat_file", "open"):
        real = getattr(MemoryFileSystem, name)

        def counted(self, *args, _real=real, _name=name, **kwargs):
            asked.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, name, counted)
    assert len(committed_parts(folder, KEY)) == 40
    assert (asked.count("ls"), asked.count("cat")) == (1, 1) and "info" not in asked
    asked.clear()
    assert len(committed_parts(folder, KEY)) == 40
    assert asked == ["ls"], "manifests that are known are not read again"


def test_what_parts_of_several_folders_left_out_is_told_by_sample(folder: AnyPath) -> None:
    def leave_out(path: AnyPath, samples: dict[int, str]) -> AnyPath:
        write = lambda temporary: temporary.write_bytes(b"x")  # noqa: E731
        commit(path, write, key=KEY, rows=1, started=time.monotonic(), quarantined=samples)
        return path

    parts = [leave_out(part(folder / "a", 0), {3: "grey", 4: "torn"}), leave_out(part(folder / "b", 0), {9: "late"})]
    manifest_path(part(folder, 7)).write_bytes(b"{")
    asked = [*parts, part(folder, 7), part(folder, 8)]
    assert quarantined_in(asked, range(4, 20)) == {4: "torn", 9: "late"}
    assert quarantined_in([], [4]) == {}
