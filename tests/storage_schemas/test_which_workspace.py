from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from storage_schemas.errors import StoreError
from storage_schemas.which_workspace import command, default_location
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import plan_run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and no workspace in the environment."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("FASTGDA_WORKSPACE", raising=False)
    return folder


@pytest.mark.parametrize("place", [".", "workspace", "demo/workspace"])
def test_the_only_workspace_here_is_meant(here: Path, place: str) -> None:
    (here / "runs" / "tensorboard").mkdir(parents=True)  # of another program
    plan_run(here / place)
    assert default_location() == place


def test_inside_a_workspace_no_other_one_is_meant(here: Path) -> None:
    plan_run(here)
    plan_run(here / "demo" / "workspace")
    assert default_location() == "."


def test_with_two_or_none_one_has_to_be_named(here: Path) -> None:
    with pytest.raises(StoreError, match=r"has none .*--workspace PATH.*-c CONFIG"):
        default_location()
    plan_run(here / "demo" / "workspace")
    plan_run(here / "workspace")
    with pytest.raises(StoreError, match=r"has two \(workspace and demo/workspace\)"):
        default_location()


def test_a_command_that_is_shown_names_its_workspace_where_it_has_to(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_run(here / "demo" / "workspace")
    demo, mine, far = (Workspace.at(here / name) for name in ("demo/workspace", "it's mine", "../../" * 9 + "tmp"))
    assert command(demo, "retry run-1") == "`fastgda retry run-1`"
    assert command(far, "retry run-1") == "`fastgda retry run-1 --workspace /tmp`"
    shown = command(mine, "retry run-1").strip("`")
    assert shlex.split(shown) == ["fastgda", "retry", "run-1", "--workspace", "it's mine"]
    monkeypatch.setenv("FASTGDA_WORKSPACE", "it's mine")
    assert command(mine, "retry run-1") == "`fastgda retry run-1`"
    assert command(demo, "retry run-1") == "`fastgda retry run-1 --workspace demo/workspace`"
    assert command(Workspace.at("memory://bucket/w"), "verify") == "`fastgda verify --workspace memory://bucket/w`"
