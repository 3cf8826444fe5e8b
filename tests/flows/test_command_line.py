"""What commands take and say, without a pipeline run."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from flows.commands import main
from flows.commands.main import app
from storage_schemas.errors import StoreError
from tests.storage_schemas.test_disk_full import mount, mounted
from tests.storage_schemas.workspaces import plan_run
from tests.tasks.configs import document
from tests.tiny import sample_members, write_tar

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"


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


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> tuple[int | str | None, str]:
    """Exit code and standard error of a command, with the errors that it explains."""
    monkeypatch.setattr(sys, "argv", ["fastgda", *map(str, arguments)])
    monkeypatch.setattr(main, "err", Console(file=io.StringIO(), width=10_000))
    try:
        code: int | str | None = main._run()
    except SystemExit as end:
        code = end.code
    return code, main.err.file.getvalue()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A workspace with a run on a file system that is mounted for reading."""
    with mounted(tmp_path / "disk", "size=1m") as folder:
        plan_run(folder)
        mount(folder, "remount,ro")
        yield folder


@contextmanager
def another_user() -> Iterator[None]:
    """Files are looked at as a user who owns none while the block runs; needs root."""
    if os.geteuid():
        pytest.skip("only root can act as somebody else")
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_place_that_cannot_be_written_is_told_in_one_line(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (("pause", "run-1"), ("ledger", "rebuild")):
        code, told = ended(monkeypatch, *command, "--workspace", read_only)
        assert code == 2
        assert "Read-only file system: choose a workspace" in told and str(read_only) in told
        assert len(told.splitlines()) == 1


def test_a_place_that_is_not_ours_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_run(tmp_path / "workspace")
    tmp_path.chmod(0o700)
    with another_user():
        code, told = ended(monkeypatch, "status", "run-1", "--workspace", tmp_path / "workspace")
    assert code == 2
    assert "Permission denied: choose a workspace" in told
    assert len(told.splitlines()) == 1


def test_a_file_in_place_of_a_folder_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_run(tmp_path)
    (tmp_path / "runs" / "run-1" / "control.json").mkdir()
    code, told = ended(monkeypatch, "pause", "run-1", "--workspace", tmp_path)
    assert code == 2
    assert "Is a directory: a folder stands where a file is needed" in told


def test_a_plan_of_a_ready_config_names_a_device_and_a_price(here: Path) -> None:
    config = shutil.copy(DEPLOYMENTS / "mscoco.yaml", here)
    told, _ = said("plan", str(config), "--device", "h100", "--price", "2.5")
    assert "not looked at: the model" in told and "719.03 device-hours, 1,797.57 USD" in told
    assert "--device h99: measured are h100, paper, cpu2" in refused("plan", str(config), "--device", "h99")


def test_a_plan_finds_bad_weights_before_it_reads_the_tars_and_writes_nothing(
    here: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(here / "shards" / "a.tar", sample_members(range(12)))
    shutil.copytree(model_folder, here / "model")
    execution = {"forwards_per_second": 1.0}
    path = write_config(here, model__folder="model", workspace="mine", execution=execution)
    weights = here / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert f"{weights} is damaged" in refused("plan", str(path))
    assert not (here / "mine").exists()
    weights.write_bytes(whole)
    assert "12 training samples" in said("plan", str(path), "--price", "2")[0]
    assert not (here / "mine").exists()


def test_a_crash_of_a_library_leaves_where_it_was() -> None:
    code = "import ctypes; from flows.commands import main; main._run = lambda: ctypes.string_at(0); main.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "in string_at" in done.stderr
