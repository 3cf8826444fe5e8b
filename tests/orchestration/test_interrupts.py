"""Ctrl-C: the command ends soon, says how to go on, leaves nothing behind, and goes on where it stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.pipeline_case import environment, fastgda
from tests.orchestration.test_runs import SHARDS, shard_files, small, wait_for, with_faults
from tests.prefect_processes import ROOT, ask, free_port, kill_marked, marked

SOON = 20.0  # seconds on a loaded machine; a micro-batch of these runs takes 0.5 s, and without an answer it is minutes
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    yield
    kill_marked(str(tmp_path))


def start(config: Path, home: Path, faults: dict[str, str], *, own_server: bool) -> subprocess.Popen[str]:
    """A curation in a process group of its own, as a shell starts it."""
    variables = {**environment(home), **faults, "TMPDIR": str(config.parent)}
    if own_server:
        variables.pop("PREFECT_API_URL", None)
        variables["PREFECT_HOME"] = str(config.parent / "prefect")
    command = [str(BIN / "fastgda"), "curate", str(config)]
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[float, list[str]]:
    """Seconds until the process was gone, and what it wrote to standard error, but for its log."""
    started = time.monotonic()
    _, errors = process.communicate(timeout=SOON)
    return time.monotonic() - started, [line for line in errors.splitlines() if not line[:4].isdigit()]


def go_on(config: Path) -> str:
    return f"interrupted; `fastgda curate {config}` goes on where it stopped"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_run_at_once_and_the_same_command_goes_on(
    tmp_path: Path, model_folder: Path, home: Path, workers: int
) -> None:
    slow = with_faults(tmp_path / "faults", slow=1.0, slow_seconds=0.5)
    config = small(tmp_path, model_folder, workers=workers)
    process = start(config, home, slow, own_server=True)
    wait_for(lambda: len(shard_files(tmp_path)) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    seconds, errors = ended(process)
    print(f"Ctrl-C to the prompt, {workers} workers: {seconds:.1f} s")
    assert process.returncode == 130 and errors == [go_on(config)]
    assert not marked(str(tmp_path)), "it left a process behind"
    assert not list(tmp_path.glob("fastgda-prefect-*")) and not (tmp_path / "prefect" / "prefect.db").exists()
    kept = shard_files(tmp_path)
    assert 2 <= len(kept) < SHARDS
    fastgda("curate", config, home=home)
    assert len(shard_files(tmp_path)) == SHARDS and shard_files(tmp_path).items() >= kept.items()


@pytest.mark.parametrize(
    ("sent", "code", "word"),
    [
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
        (signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_signal_to_the_process_alone_ends_the_flow_runs_on_a_server_too(
    tmp_path: Path, model_folder: Path, home: Path, sent: signal.Signals, code: int, word: str
) -> None:
    slow = with_faults(tmp_path / "faults", slow=1.0, slow_seconds=0.5)
    config = small(tmp_path, model_folder)
    process = start(config, home, slow, own_server=False)
    wait_for(lambda: len(shard_files(tmp_path)) >= 2, process)
    process.send_signal(sent)
    _, errors = ended(process)
    assert process.returncode == code and errors == [go_on(config).replace("interrupted", word)]
    url = (home / "server_url").read_text()
    assert not ask(url, "flow_runs/filter", flow_runs={"state": {"type": {"any_": ["RUNNING"]}}})


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_ctrl_c_while_the_command_still_starts(tmp_path: Path, model_folder: Path, home: Path, seconds: float) -> None:
    config = small(tmp_path, model_folder)
    process = start(config, home, {}, own_server=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = ended(process)
    assert process.returncode in (130, -signal.SIGINT), "Python itself answers before the first line of ours"
    assert len(errors) == 1 and errors[0].startswith("interrupted")
    wait_for(lambda: not marked(str(tmp_path)))
    assert not list(tmp_path.glob("fastgda-prefect-*"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, model_folder: Path, home: Path) -> None:
    hang = with_faults(tmp_path / "faults")
    (tmp_path / "faults" / "hang-1").touch()
    config = small(tmp_path, model_folder)
    process = start(config, home, hang, own_server=True)
    wait_for(lambda: not list((tmp_path / "faults").glob("hang-*")), process)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None, "a micro-batch is under way"
    os.killpg(process.pid, signal.SIGINT)
    seconds, errors = ended(process)
    assert seconds < 2 and process.returncode == 130 and errors == [go_on(config)]
    wait_for(lambda: not marked(str(tmp_path)))


def test_ctrl_c_is_how_a_server_ends_well(tmp_path: Path, home: Path) -> None:
    command = [str(BIN / "fastgda"), "metrics", "--port", str(free_port()), "--workspace", str(tmp_path)]
    server = subprocess.Popen(
        command, env={**environment(home), "TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None and "Ctrl-C ends it" in server.stderr.readline()
    server.send_signal(signal.SIGINT)
    assert server.wait(SOON) == 0 and server.stderr.read() == ""


@pytest.mark.slow
def test_sigterm_after_a_worker_was_killed_ends_the_command(tmp_path: Path, model_folder: Path, home: Path) -> None:
    slow = with_faults(tmp_path / "faults", slow=1.0, slow_seconds=0.5)
    config = small(tmp_path, model_folder, workers=2)
    process = start(config, home, slow, own_server=True)
    wait_for(lambda: len(shard_files(tmp_path)) >= 2, process)
    listing = ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)]
    children = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    worker = next(line for line in children if "multiprocessing.spawn" in line)
    os.kill(int(worker.split()[0]), signal.SIGKILL)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, written = process.communicate(timeout=SOON + 35)  # at the latest when the grace of 35 seconds is over
    errors = written.splitlines()
    assert process.returncode == 143
    assert go_on(config).replace("interrupted", "terminated") in errors and not any(
        "Traceback" in line for line in errors
    )


SWALLOWED = """
import time
from prefect import flow
from flows.commands import interruption
interruption.GRACE_SECONDS, interruption.ANSWER_SECONDS = 1.0, 0.2

@flow
def deaf():
    while True:
        try:
            print("begun", flush=True)  # a signal that it brings about is swallowed, too
            time.sleep(60)
        except BaseException:
            pass

interruption.watch(begun=True)
interruption.starting(lambda: None)
interruption.under_way()
deaf()
"""


def test_a_sigterm_that_somebody_swallows_ends_the_command_all_the_same(home: Path) -> None:
    """As where Prefect's answer came up inside a library that makes another error of it."""
    command = [sys.executable, "-c", SWALLOWED]
    process = subprocess.Popen(
        command, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SOON)
    assert process.returncode == 143
    assert "terminated; `fastgda` goes on where it stopped" in errors.splitlines()
