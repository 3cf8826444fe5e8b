from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest

from storage_schemas.errors import StoreError
from storage_schemas.files import any_path, local_copy, local_files, private_folder
from storage_schemas.workspace import Workspace


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("prepared", ["open to all", "a link"])
def test_a_folder_that_somebody_prepared_is_not_trusted(temporary: Path, prepared: str) -> None:
    folder = temporary / f"fastgda-copies-{os.getuid()}"
    if prepared == "a link":
        (temporary / "theirs").mkdir()
        folder.symlink_to(temporary / "theirs")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(StoreError, match="is not yours alone: delete it"):
        private_folder("copies")


def test_a_url_of_no_known_kind_of_store_is_refused_in_a_line() -> None:
    with pytest.raises(StoreError, match=r"^nonsense://x: .*'nonsense': name a folder, or a store as s3://[\w/]+$"):
        any_path("nonsense://x")


def test_where_nothing_can_be_written_there_is_no_workspace() -> None:
    with pytest.raises(StoreError, match=r"^https://example.org/w: a workspace is written to: name a folder, or a "):
        Workspace.at("https://example.org/w")


def test_copies_of_objects_that_nobody_asks_for_any_more_go() -> None:
    root = any_path(f"memory://{uuid.uuid4().hex}")
    copies = []
    for name in ("old", "used", "new"):
        (root / name).write_bytes(name.encode())
        if name == "new":
            for copy in copies:
                os.utime(copy.parent, (time.time() - 8 * 86_400,) * 2)
            local_copy(root / "used")
        copies.append(local_copy(root / name))
    assert [copy.exists() for copy in copies] == [False, True, True]
    assert local_copy(root / "old").read_bytes() == b"old"


def test_files_of_one_folder_of_objects_lie_together_and_are_fetched_again_when_one_changes() -> None:
    root = any_path(f"memory://{uuid.uuid4().hex}")
    for folder in ("first", "second"):
        for name in ("head.json", "head.safetensors"):
            (root / folder / name).write_bytes(f"{folder} {name}".encode())
    names = ["head.json", "head.safetensors"]
    first, second = local_files(root / "first", names), local_files(root / "second", names)
    assert {path.name for path in first.iterdir()} == set(names)
    assert (second / "head.json").read_bytes() == b"second head.json"
    assert local_files(root / "first", names) == first
    (root / "first" / "head.json").write_bytes(b"changed")
    assert (local_files(root / "first", names) / "head.json").read_bytes() == b"changed"
    assert (first / "head.json").read_bytes() == b"first head.json", "who reads the old ones keeps them"


def test_what_a_broken_connection_leaves_of_an_object_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    path = any_path(f"memory://{uuid.uuid4().hex}") / "index.faiss"
    path.write_bytes(b"whole")

    def break_off(_store: object, _path: str, local: str) -> None:
        Path(local).write_bytes(b"wh")
        raise ConnectionError("broken")

    with monkeypatch.context() as patched, pytest.raises(ConnectionError):
        patched.setattr(type(path.fs), "get_file", break_off)
        local_copy(path)
    assert local_copy(path).read_bytes() == b"whole"
