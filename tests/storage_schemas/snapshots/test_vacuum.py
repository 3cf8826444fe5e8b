from __future__ import annotations

import inspect
import json
import os
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from storage_schemas.audit.verify import verify
from storage_schemas.database import open_database
from storage_schemas.files import any_path, temporary_name
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import commit_index, publish_run

LONG_AGO = time.time() - 100 * 86_400


def age(folder: Path) -> None:
    """Make everything in a folder old, links themselves included."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder by its path: what a file holds, where a link leads."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        linked = str(path.readlink()) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = linked or (path.read_bytes() if path.is_file() else "folder")
    return found


def write(path: Path, content: str = "theirs") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def other_things(root: Path, elsewhere: Path) -> None:
    """What the root of somebody's project holds: git, a virtual environment, keys, links, folders that are called as
    some of ours are."""
    git = ["git", "-C", str(root), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    write(root / "train.py")
    subprocess.run([*git, "add", "train.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    for name in (
        *(".venv/bin/python", ".venv/lib/.hidden/.pth", ".ssh/id_ed25519", ".env", ".notes.swp", ".cache/.x"),
        *("runs/.tensorboard", "samples/.DS_Store", "heads/.ipynb_checkpoints/a.ipynb", "scores/.keep"),
        *("scores/run-1/.part-00000.parquet.swp", "scores/run-1/part-a.parquet", "ranks/run-1/part-mine.parquet"),
        *("web/app.manifest.json", ".venv/x.manifest.json", f"web/{temporary_name('not ours: a folder of theirs')}"),
        *(f".venv/{temporary_name('x')}", "fastgda-tmp-notes", ".spill-notes/x"),
    ):
        write(root / name)
    write(root / "snapshots" / "page.json", json.dumps(["a test's"]))
    write(elsewhere / temporary_name("behind a link"))
    write(elsewhere / "part-00000.parquet")
    for name in ("runs/elsewhere", "scores/linked", "latents", temporary_name("link")):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(elsewhere)


@pytest.mark.heavy
def test_vacuum_in_somebodys_project_deletes_what_is_ours_and_old(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    root.mkdir()
    other_things(root, elsewhere)
    before, beyond = contents(root), contents(elsewhere)
    publish_run(root, "run-1")
    ours = [
        temporary_name("spill-1") + "/x",
        "heads/v/" + temporary_name("head.json"),
        "runs/r/w/" + temporary_name("b"),
    ]
    for name in ours:
        write(root / name, "ours")
    age(root)
    age(elsewhere)
    young = root / "indexes" / "v" / temporary_name("index.faiss")
    write(young, "ours, of a process that lives")
    gone = vacuum(Workspace(root), older_than=timedelta(hours=24))
    assert {str(path.relative_to(root)) for path in gone if isinstance(path, Path)} == {
        *(name.removesuffix("/x") for name in ours),
        *(f"scores/run-1/part-0000{shard}.parquet" for shard in range(3)),
    }
    after = contents(root)
    assert {name: after.get(name) for name in before} == before
    assert contents(elsewhere) == beyond
    assert young.exists() and not any((root / name).exists() for name in ours)
    subprocess.run(["git", "-C", str(root), "fsck", "--strict"], check=True, capture_output=True)
    assert verify(Workspace(root)) == []
    assert {name: contents(root).get(name) for name in before} == before


def test_shards_of_a_run_behind_a_link_are_left(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "workspace", tmp_path / "larger disk"
    publish_run(root)
    (root / "scores").rename(elsewhere)
    (root / "scores").symlink_to(elsewhere)
    assert vacuum(Workspace(root), older_than=timedelta(0)) == []
    assert len(list(elsewhere.glob("run-1/part-*.parquet"))) == 3


def test_what_a_finished_index_was_built_from_goes_and_what_an_unfinished_one_needs_stays(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    commit_index(workspace, "done", publish_run(tmp_path).samples or "")
    names = ("trained.faiss", "part-00000.faiss", "part-00000.faiss.manifest.json", "grown-00003.faiss", "notes.faiss")
    for version in ("done", "begun"):
        for name in names:
            write(tmp_path / "indexes" / version / "building" / name)
    vacuum(workspace, older_than=timedelta(0))
    left = {str(path.relative_to(tmp_path / "indexes")) for path in tmp_path.glob("indexes/*/building/*")}
    assert left == {"done/building/notes.faiss", *(f"begun/building/{name}" for name in names)}
    assert (tmp_path / "indexes" / "done" / "index.faiss").exists()


def test_what_is_spilled_is_known_by_its_name(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path)

    def hidden() -> Iterator[str]:
        return (path.name for path in tmp_path.rglob("*") if path.name.startswith("."))

    assert not list(hidden())
    with open_database(workspace, memory_gigabytes=1.0, threads=1):
        assert [name.startswith(".fastgda-tmp-") for name in hidden()] == [True]
    assert not list(hidden())


def test_every_path_of_a_workspace_lies_in_a_folder_that_is_known_as_ours() -> None:
    workspace = Workspace(any_path("/w"))
    paths = []
    for name, method in inspect.getmembers(Workspace, inspect.isfunction):
        if not name.startswith("_") and name not in {"at", "relative", "file"}:
            needed = [one for one in inspect.signature(method).parameters.values() if one.default is one.empty]
            paths.append(method(workspace, *(1 if one.annotation == "int" else "x" for one in needed[1:])))
    paths += [workspace.parts(kind, "x") for kind in Workspace.OWN_FOLDERS]
    assert len(paths) > 25
    assert {str(workspace.relative(path)).split("/")[0] for path in paths} == set(Workspace.FOLDERS)
