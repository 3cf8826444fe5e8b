"""What commands take and say, without a pipeline run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from flows.main import app
from storage_schemas.errors import StoreError
from tests.storage_schemas.workspaces import plan_run
from tests.tasks.configs import document


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a demo in it, and no workspace in the environment."""
    plan_run(tmp_path / "demo" / "workspace", "demo-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTGDA_WORKSPACE", raising=False)
    return tmp_path


def said(*arguments: str) -> tuple[str, str]:
    """Standard output and error of a command."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def refused(*arguments: str) -> str:
    with pytest.raises((UsageError, StoreError)) as error:
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    return str(error.value)


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "my_config.yaml"
    path.write_text(yaml.safe_dump(document(**changes)))
    return path


RUNS = ("sql", "SELECT run FROM runs", "--format", "csv")


def test_a_workspace_that_was_not_named_is_said(here: Path) -> None:
    rows, note = said(*RUNS)
    assert rows.split() == ["run", "demo-1"]
    assert note.startswith("workspace demo/workspace (")
    assert said(*RUNS, "--workspace", "demo/workspace")[1] == ""


def test_a_config_stands_for_its_workspace(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(here / "configs", workspace="mine")
    plan_run(here / "configs" / "mine", "mine-1")
    monkeypatch.setenv("FASTGDA_WORKSPACE", "demo/workspace")
    for flag in ("-c", "--config", "--workspace"):
        assert said(*RUNS, flag, str(path))[0].split() == ["run", "mine-1"]
    assert "pending" in said("status", "-c", str(path))[0]
    assert said("lineage", "mine-1", "-c", str(path))[0]
    assert "does not exist" in refused("status", "-c", "absent.yaml")
    (here / "none.yaml").write_text("name: x\n")
    assert "workspace: is missing" in refused("status", "-c", "none.yaml")


def test_what_a_command_prints_can_be_pasted(here: Path) -> None:
    plan_run(here / "it's mine", "mine-1")
    hint = said("pause", "mine-1", "--workspace", "it's mine")[0]
    found = re.search(r"`fastgda (.*)`", hint)
    assert found, hint
    assert "goes on" in said(*shlex.split(found[1]))[0]


@pytest.mark.parametrize("name", ["demo-1\r", " demo-1 "])
def test_a_name_that_a_shell_cut_from_a_line_is_taken(here: Path, name: str) -> None:
    for command in ("status", "lineage"):
        assert "demo-1" in said(command, name)[0]
    assert "is not done" not in refused("resume", name)
    assert "score shards are not done" in refused("publish", name)
