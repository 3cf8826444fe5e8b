"""Log records: what each says of itself, where they go, how they are asked for."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest
import torch
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Log
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from rich.console import Console
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch
from flows.commands.main import app
from storage_schemas.commit import worker_name
from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.workspace import Workspace
from tasks import logs, progress
from tasks.execution import fan_out
from tasks.execution.fan_out import make_part, quarantine_deadly
from tests.storage_schemas.workspaces import plan_run

HOSTILE = 'a "cat"\x1b[2J\n\x9b31m \u202e \x7f {"level": "error"}'
log = logging.getLogger("fastgda.tests")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (logs.LEVEL, logs.FORMAT):
        monkeypatch.setenv(name, "")
    yield
    logs.set_up("warning", "text")


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    """JSON records on standard error, with nothing on standard output."""
    shown = capsys.readouterr()
    assert shown.out == ""
    return [json.loads(line) for line in shown.err.splitlines()]


def test_every_record_says_of_what_it_is_and_who_wrote_it(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "json")

    def part(number: int) -> None:
        with logs.about(kind="scores", part=number), logs.about(run=f"run-{number}"):
            log.debug("in a thread")

    with logs.about(run="run-1", kind="latents"), ThreadPoolExecutor(2) as pool:
        list(pool.map(part, range(8)))
        log.info("of a kind")
    logging.getLogger("fastgda").error("of nothing")
    *threads, of_kind, of_nothing = ([record[field] for field in logs.FIELDS] for record in told(capsys))
    assert sorted(threads) == [[f"run-{number}", "scores", f"{number:05d}", worker_name()] for number in range(8)]
    assert of_kind == ["run-1", "latents", "", worker_name()]
    assert of_nothing == ["", "", "", worker_name()]


def test_records_of_other_libraries_are_left_as_they_are() -> None:
    logs.set_up("debug", "json")
    record = logging.getLogger("ray").makeRecord("ray", logging.INFO, "", 0, "", (), None, extra={"worker": "theirs"})
    assert vars(record)["worker"] == "theirs" and not hasattr(record, "kind")


def test_json_is_one_line_whatever_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", "json")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        with logs.about(run=HOSTILE):
            log.warning("about %s", HOSTILE, exc_info=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isascii() and line.isprintable()
    record = json.loads(line)
    assert record["message"] == f"about {HOSTILE}" and record["run"] == HOSTILE
    assert record["level"] == "warning" and record["logger"] == "fastgda.tests"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["ts"])
    assert record["exception"].startswith("Traceback") and HOSTILE in record["exception"]


def test_text_is_one_line_that_no_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("warning", "text")
    log.info("not shown")
    with logs.about(run="run-1", part=3):
        log.warning("%s", HOSTILE)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and "Z warning a " in line
    assert line.endswith(f"[run=run-1 part=00003 worker={worker_name()}]")


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "file"])
def test_a_record_stands_beside_the_progress_and_both_have_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], live: bool
) -> None:
    bars = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=bars, force_terminal=live, width=60))
    logs.set_up("info", "json")
    with progress.stage("latents", 2) as advance:
        log.info("a long record is not folded " * 5)
        advance(2)
    log.info("after it")
    lines = [line for line in (bars.getvalue() + capsys.readouterr().err).splitlines() if '"ts"' in line]
    records = [json.loads(line[line.index("{") :]) for line in lines]
    messages = {record["message"].split(",")[0] for record in records}
    assert messages >= {("a long record is not folded " * 5), "after it"}
    assert live or "latents: 2/2" in messages


@pytest.mark.parametrize(
    ("option", "variable", "shown"), [("info", "error", True), ("", "error", False), ("", "", True)]
)
def test_the_level_is_an_option_of_all_commands_or_in_the_environment(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    variable: str,
    shown: bool,
) -> None:
    plan_run(tmp_path, "run-1")
    monkeypatch.setenv(logs.LEVEL, variable)
    given = ["--log-level", option] if option else []
    done = CliRunner().invoke(app, [*given, "status", "--json", "--workspace", str(tmp_path)], catch_exceptions=False)
    assert json.loads(done.stdout)["run"] == "run-1" and done.stderr == ""
    assert os.environ[logs.LEVEL] == (option or variable or "info"), "processes that it starts inherit it"
    log.info("a record")
    assert ("a record" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("given", [["--log-level", "loud"], ["--log-format", "xml"]])
def test_a_level_or_format_that_is_none_is_refused_in_one_line(given: list[str]) -> None:
    with pytest.raises(UsageError, match=f"^{given[0]} .*'{given[1]}': choose one of") as error:
        CliRunner().invoke(app, [*given, "status"], catch_exceptions=False)
    assert len(str(error.value).splitlines()) == 1


def test_a_quarantined_part_and_a_halved_micro_batch_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("info", "json")
    AttemptLog(Workspace(tmp_path), "run-1").record(7, ShardState.running)
    quarantine_deadly(Workspace(tmp_path), "run-1", "scores", [7], max_deaths=1)

    def compute(stretch: slice) -> None:
        if stretch.stop - stretch.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    list(MicroBatch(4).run(4, compute))
    quarantined, halved = told(capsys)
    assert quarantined["level"] == "warning" and "1 worker processes died" in quarantined["message"]
    assert [quarantined[field] for field in logs.FIELDS[:3]] == ["run-1", "scores", "00007"]
    assert halved["level"] == "info" and "2 rows at a time" in halved["message"]


@pytest.mark.heavy
def test_prefect_keeps_records_of_a_command_which_imports_it_late() -> None:
    handlers = "logging.getLogger('fastgda').handlers"
    code = f"import logging, flows, prefect.main; print(*(type(each).__name__ for each in {handlers}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "APILogHandler" in done.stdout


def records_of(url: str, run: UUID) -> list[Log]:
    """What a Prefect server keeps of a flow run."""
    for handler in logging.getLogger(logs.ROOT).handlers:
        handler.flush()
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        return client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))


def test_a_part_that_is_tried_again_is_told_here_and_in_the_log_of_its_flow_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = iter([ConnectionResetError(104, "reset"), KeyError("a bug")])

    def load(*_: object) -> None:
        raise next(errors)

    @flow
    def parts() -> UUID:
        patient = make_part.with_options(retries=3, retry_delay_seconds=0)
        assert patient("here", "run-1", "key", "scores", 7, None, return_state=True).is_failed()
        return UUID(flow_run.get_id())

    monkeypatch.setattr(fan_out, "load_run", load)
    logs.set_up("warning", "json")
    url = (home / "server_url").read_text()
    with temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_ENABLED: True}):
        run = parts()
    again, failed = [
        record for line in capsys.readouterr().err.splitlines() if line.startswith("{") for record in [json.loads(line)]
    ]
    for record in (again, failed):
        assert [record[field] for field in logs.FIELDS] == ["run-1", "scores", "00007", worker_name()]
    assert again["level"] == "warning" and "again after attempt 1 of 4: ConnectionResetError" in again["message"]
    assert failed["level"] == "error" and "for good at attempt 2: KeyError: 'a bug'" in failed["message"]
    kept = [record for record in records_of(url, run) if record.name == "fastgda.execution.parts"]
    assert [record.message for record in kept] == [again["message"], failed["message"]]
    assert all(record.task_run_id for record in kept)
