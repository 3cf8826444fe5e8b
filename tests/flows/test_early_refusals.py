"""What is wrong is said before anything heavy is imported or started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage_schemas.runs.liveness import Assignment, write_assignment
from storage_schemas.workspace import Workspace
from tests.flows.test_command_line import write_config
from tests.storage_schemas.workspaces import plan_run
from tests.tasks.configs import document
from tests.tiny import draw

# Runs several commands one after the other, as processes take a second to start, in one that cannot import these.
COMMANDS = """
import contextlib, io, json, sys

class Heavy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "diffusers", "prefect", "faiss", "lightning"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Heavy())
from flows.commands import main

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fastgda", *arguments]
    said = main.err.file = io.StringIO()
    try:
        code = main._run()
    except SystemExit as end:
        code = end.code
    print(json.dumps([code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, configs and a workspace with a planned run."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "good.jpg").write_bytes(draw(1)[0])
    (folder / "text.jpg").write_text("no image")
    os.mkfifo(folder / "pipe.jpg")
    write_config(folder / "typo", teacher__alhpa=1.0)
    write_config(folder / "two", execution={"workers": 2})
    stored = document(workspace="elsewhere", execution={"workers": 2})
    plan_run(folder / "workspace", "run-1", config=stored)
    execution = stored.pop("execution")
    found = Assignment(run="run-1", config=stored, model_hash="m", stages={}, execution=execution, generation=0)
    write_assignment(Workspace.at(folder / "workspace"), found)
    return folder


ATTRIBUTE = ("attribute", "good.jpg", "--caption")
RUN = ("retry", "run-1")
CASES: list[tuple[tuple[str, ...], str]] = [
    (("attribute", "absent.jpg", "--caption", "x"), "absent.jpg: [Errno 2] No such file"),
    (("attribute", "text.jpg", "--caption", "x"), "text.jpg: image does not decode"),
    (("attribute", "pipe.jpg", "--caption", "x"), "pipe.jpg: is no file"),
    (("attribute", ".", "--caption", "x"), ".: is no file"),
    ((*ATTRIBUTE, "x", "--first", "9"), "--first is of tiers sketch and exact: add --tier sketch or --tier exact"),
    ((*ATTRIBUTE, "x", "--relative"), "--relative is of tier sketch: add --tier sketch"),
    (("attribute",), "give an image and its caption, or --query QUERY_ID for a stored query"),
    (("attribute", "good.jpg", "--query", "q0000"), "give an image and its caption, or --query QUERY_ID for a stored"),
    ((*ATTRIBUTE, ""), "--caption is empty"),
    ((*ATTRIBUTE, " \n"), "--caption is empty"),
    ((*ATTRIBUTE, "x"), "has no published run"),
    (("status", "unknown"), "has no run unknown; it has: run-1"),
    (("retry", "unknown"), "has no run unknown; it has: run-1"),
    ((*RUN, "--shard", "5-2"), "'5-2' is no list of part numbers"),
    ((*RUN, "--shard", ","), "',' is no list of part numbers"),
    ((*RUN, "--shard", ""), "'' names no shard of run run-1"),
    ((*RUN, "--shard", "0-2,7"), "run run-1 has no shard 7: it has 3"),
    ((*RUN, "--runner", "pool"), "--runner pool: execution: workers belongs to runners local, ray and dask"),
    (("judge", "two/my_config.yaml", "--output", "table.txt"), "--output table.txt: end it in .csv, .md, .html"),
    (("judge", "two/my_config.yaml", "--output", "table.md"), "give the config a section judge"),
    (("run", "two/my_config.yaml", "--runner", "pool"), "--runner pool: execution: workers belongs to"),
]
CONFIG_COMMANDS = ("run", "plan", "curate", "judge", "train", "study", "index", "evaluate", "backfill")
CASES += [
    ((command, "typo/my_config.yaml"), "teacher.alhpa: no such field: did you mean alpha?")
    for command in CONFIG_COMMANDS
]
CASES.append((("import-head", "x.pth", "typo/my_config.yaml"), "teacher.alhpa: no such field"))


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[tuple[str, ...], tuple[int, str]]:
    """Exit code and message of every command."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTGDA_WORKSPACE"}
    commands = json.dumps([arguments for arguments, _ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, commands],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES), done.stderr
    return {arguments: tuple(json.loads(line)) for (arguments, _), line in zip(CASES, lines, strict=True)}


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(arguments) for arguments, _ in CASES])
def test_what_is_wrong_is_said_in_one_line_before_anything_is_loaded(
    told: dict[tuple[str, ...], tuple[int, str]], arguments: tuple[str, ...], message: str
) -> None:
    code, said = told[arguments]
    assert code == 2
    assert message in said
    assert len(said.splitlines()) == 1


HELP = """
import sys

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("duckdb", "fsspec", "numpy", "prefect", "pyarrow", "pydantic", "torch", "upath"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Slow())
sys.argv = ["fastgda", "--help"]
from flows.commands.main import main

main()
"""


def test_help_waits_for_nothing_that_only_commands_need() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "attribute" in done.stdout
