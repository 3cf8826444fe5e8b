from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from storage_schemas.commit import Manifest, manifest_path
from storage_schemas.runs import liveness
from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.runs.ledger import write_ledger
from storage_schemas.runs.liveness import Assignment, Beat, PartsRecord, RunRequest, write_assignment, write_beat
from storage_schemas.snapshots.compaction import compact
from storage_schemas.workspace import Workspace
from tasks.watching import metrics_exporter
from tasks.watching.metrics_exporter import SHOWN_SECONDS, RunCollector, exposition, listening, serve
from tests.storage_schemas.workspaces import QUERIES, commit_shard, finish_run, plan_run, publish_run

LONG_AGO = 1_700_000_000
Figures = dict[tuple[str, ...], float]


def read(text: str) -> dict[str, Figures]:
    """Every sample of an exposition, by metric and label values: the run, then the others by label name."""
    found: dict[str, Figures] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = sorted(sample.labels.items(), key=lambda label: (label[0] != "run", label))
            found.setdefault(sample.name, {})[tuple(value for _, value in labels)] = sample.value
    return found


def scrape(collector: RunCollector) -> dict[str, Figures]:
    registry = CollectorRegistry()
    registry.register(collector)
    return read(generate_latest(registry).decode())


def beat(worker: str = "gpu-7:1", **changes: object) -> Beat:
    told: dict[str, object] = {"worker": worker, "device": "cuda:0", "beat": 3, "at": datetime.now(UTC)}
    return Beat.model_validate(told | changes)


def fail(log: AttemptLog, shard: int, error: Exception) -> None:
    with pytest.raises(type(error)), log.attempt(shard, "cuda:0"):
        raise error


def age(root: Path, to: float = LONG_AGO) -> None:
    """As if nobody had touched the workspace since then; what is older keeps its time."""
    for path in [root, *root.rglob("*")]:
        if path.stat().st_mtime > to:
            os.utime(path, (to, to))


def test_a_workspace_without_runs_has_no_series_and_every_metric_has_its_help(tmp_path: Path) -> None:
    text = exposition(Workspace(tmp_path / "nowhere"))
    assert read(text) == {}
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    plan_run(tmp_path)
    of_a_run = read(exposition(Workspace(tmp_path)))
    assert of_a_run and all(f"# TYPE {name} " in text for name in of_a_run), "whatever a run has is known before"


def test_progress_of_a_run_under_way(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path)
    commit_shard(tmp_path, "run-1", 0, QUERIES[0])
    AttemptLog(workspace, "run-1").record(1, ShardState.running, device="cuda:0")
    write_beat(workspace, "run-1", beat(kind="scores", number=1))
    found = read(exposition(workspace))
    states = {state: count for (_, state), count in found["fastgda_shards"].items()}
    assert states == {"pending": 1, "running": 1, "done": 1, "failed": 0, "quarantined": 0}
    assert found["fastgda_rows_total"] == {("run-1",): 4}
    assert found["fastgda_pairs"] == {("run-1",): 12}
    assert found["fastgda_rows_per_second"][("run-1",)] > 0
    assert 0 < found["fastgda_seconds_left"][("run-1",)] < 1e6
    assert found["fastgda_run_unreadable"] == {("run-1",): 0}


def test_device_seconds_are_those_of_the_shards_that_are_done(tmp_path: Path) -> None:
    finish_run(tmp_path)
    for shard in range(3):
        path = manifest_path(Workspace(tmp_path).score_shard("run-1", shard))
        manifest = Manifest.model_validate_json(path.read_bytes())
        path.write_text(manifest.model_copy(update={"seconds": 100.5}).model_dump_json())
    found = read(exposition(Workspace(tmp_path)))
    assert found["fastgda_device_seconds_total"][("run-1",)] == pytest.approx(301.5)
    assert found["fastgda_rows_per_second"] == {("run-1",): 0}
    assert "fastgda_seconds_left" not in found


def test_a_failure_is_a_retry_only_once_the_shard_is_started_again(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path)
    log = AttemptLog(workspace, "run-1")
    fail(log, 0, ConnectionError("away"))
    fail(log, 0, ConnectionError("away again"))
    fail(log, 0, KeyError("a bug"))
    fail(log, 1, ConnectionError("away"))
    with log.attempt(1, "cuda:0"):
        pass
    found = read(exposition(workspace))
    assert found["fastgda_failed_attempts_total"] == {("run-1", "ConnectionError"): 3, ("run-1", "KeyError"): 1}
    assert found["fastgda_retries_total"] == {("run-1", "ConnectionError"): 3}


def test_a_silent_worker_is_seen_one_that_left_is_not_and_its_memory_shortage_is_kept(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    plan_run(tmp_path)
    now = datetime.now(UTC)
    write_beat(workspace, "run-1", beat("a:1", device_memory=5, kind="scores", part_seconds=7.5))
    write_beat(workspace, "run-1", beat("b:1", at=now - timedelta(minutes=5)))
    write_beat(workspace, "run-1", beat("c:1", out_of_memory=2, ended=True))
    write_beat(workspace, "run-1", beat("d:1", at=now - timedelta(seconds=SHOWN_SECONDS + 1)))
    write_beat(workspace, "run-1", beat("e:1", at=now + timedelta(seconds=30)))
    found = read(exposition(workspace))
    silent = found["fastgda_worker_seconds_since_beat"]
    assert {worker for _, worker in silent} == {"a:1", "b:1", "e:1"}
    assert silent["run-1", "a:1"] < 60
    assert 299 < silent["run-1", "b:1"] < 360
    assert silent["run-1", "e:1"] == 0
    assert found["fastgda_worker_device_memory_bytes"]["run-1", "cuda:0", "a:1"] == 5
    assert found["fastgda_worker_part_seconds"] == {("run-1", "scores", "a:1"): 7.5}
    shortages = {worker: count for (_, worker), count in found["fastgda_out_of_memory_total"].items()}
    assert shortages == {"a:1": 0, "b:1": 0, "c:1": 2, "e:1": 0}


def test_published_runs_say_since_when(tmp_path: Path) -> None:
    finish_run(tmp_path, "run-0")
    published = publish_run(tmp_path)
    found = read(exposition(Workspace(tmp_path)))
    assert found["fastgda_run_published_timestamp_seconds"] == {("run-1",): published.created_at.timestamp()}


@pytest.mark.parametrize("broken", ["run.json", "plan_shards.parquet", "control.json"])
def test_a_damaged_run_hides_no_other(tmp_path: Path, broken: str) -> None:
    finish_run(tmp_path, "run-1")
    plan_run(tmp_path, "run-2")
    (tmp_path / "runs" / "run-1" / broken).write_bytes(b'{"run": "ru')
    found = read(exposition(Workspace(tmp_path)))
    assert found["fastgda_run_unreadable"] == {("run-1",): 1, ("run-2",): 0}
    assert found["fastgda_pairs"] == {("run-2",): 12}


def test_a_name_with_quotes_survives_the_text_format(tmp_path: Path) -> None:
    plan_run(tmp_path, 'a "b"\\c')
    assert read(exposition(Workspace(tmp_path)))["fastgda_pairs"] == {('a "b"\\c',): 12}


@pytest.fixture
def derived(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs whose figures were derived anew, in turn."""
    found: list[str] = []
    derive = metrics_exporter._derive

    def noted(workspace: Workspace, run: str) -> metrics_exporter.RunFigures:
        found.append(run)
        return derive(workspace, run)

    monkeypatch.setattr(metrics_exporter, "_derive", noted)
    return found


def _quarantine_shard(root: Path) -> None:
    path = Workspace(root).score_shard("run-1", 1)
    manifest_path(path).unlink()
    path.unlink()


def _leave_a_sample_out(root: Path) -> None:
    path = root / "latents" / "k" / "part-00000.safetensors"
    manifest = Manifest.model_validate_json(manifest_path(Workspace(root).score_shard("run-1", 0)).read_bytes())
    short = manifest.model_copy(update={"quarantined": {3: "no image"}})
    temporary = path.with_name("new")
    temporary.write_text(short.model_dump_json())
    temporary.rename(manifest_path(path))


def _fail_again(root: Path) -> None:
    """In an attempt file that is there already."""
    (path,) = Workspace(root).attempts("run-1").glob("*.jsonl")
    with path.open("a") as file:
        file.write(path.read_text().splitlines()[-1] + "\n")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard goes": (_quarantine_shard, "fastgda_shards"),
    "an attempt fails": (_fail_again, "fastgda_failed_attempts_total"),
    "a sample is left out": (_leave_a_sample_out, "fastgda_quarantined_samples"),
    "a worker comes": (lambda root: write_beat(Workspace(root), "run-1", beat()), "fastgda_worker_seconds_since_beat"),
    "its record breaks": (lambda root: (root / "runs/run-1/run.json").write_text("{"), "fastgda_run_unreadable"),
}


def _rest(root: Path) -> None:
    """A finished run with an attempt record and a stage before the scores, untouched for long."""
    workspace = Workspace(root)
    finish_run(root)
    fail(AttemptLog(workspace, "run-1"), 0, ConnectionError("away"))
    stage = PartsRecord(key="k", path="latents/k", rows=4)
    write_assignment(workspace, Assignment(run="run-1", config={}, model_hash="m", stages={"latents": stage}))
    (root / "latents" / "k").mkdir(parents=True)
    age(root)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_a_run_at_rest_shows_at_the_next_scrape(tmp_path: Path, change: str, derived: list[str]) -> None:
    _rest(tmp_path)
    collector = RunCollector(Workspace(tmp_path))
    before = scrape(collector)
    assert scrape(collector) == before
    assert derived == ["run-1"]
    act, metric = CHANGES[change]
    act(tmp_path)
    age(tmp_path, LONG_AGO + 60)
    after = scrape(collector)
    assert after.get(metric) != before.get(metric)


def test_a_change_within_one_tick_of_the_clock_shows_too(tmp_path: Path) -> None:
    collector = RunCollector(Workspace(tmp_path))
    finish_run(tmp_path)
    tick = time.time()
    age(tmp_path, tick - 1)
    assert scrape(collector)["fastgda_shards"]["run-1", "done"] == 3
    _quarantine_shard(tmp_path)
    age(tmp_path, tick - 1)
    assert scrape(collector)["fastgda_shards"]["run-1", "done"] == 2


def test_what_does_not_change_the_figures_does_not_change_them_from_the_cache(tmp_path: Path) -> None:
    _rest(tmp_path)
    collector = RunCollector(Workspace(tmp_path))
    before = scrape(collector)
    compact(Workspace(tmp_path), "run-1")
    write_ledger(Workspace(tmp_path), "run-1")
    for path in (tmp_path / "scores" / "run-1").glob("*.parquet"):
        path.unlink()  # as vacuum does: their rows are in the large files now
    assert scrape(collector) == before
    (part,) = (tmp_path / "ranks" / "run-1").glob("*.parquet")
    age(tmp_path)
    assert scrape(collector) == before
    part.unlink()
    assert scrape(collector)["fastgda_rows_total"] == {("run-1",): 0}


def test_a_run_under_way_or_just_changed_is_not_kept(tmp_path: Path, derived: list[str]) -> None:
    collector = RunCollector(Workspace(tmp_path))
    finish_run(tmp_path)
    for _ in range(2):
        os.utime(tmp_path / "scores" / "run-1")
        scrape(collector)
    assert derived == ["run-1"] * 2
    AttemptLog(Workspace(tmp_path), "run-1").record(0, ShardState.running)
    _quarantine_shard(tmp_path)
    AttemptLog(Workspace(tmp_path), "run-1").record(1, ShardState.running)
    age(tmp_path)
    scrape(collector)
    scrape(collector)
    assert derived == ["run-1"] * 4


def test_time_goes_on_for_a_silent_worker_of_a_run_that_is_kept(
    tmp_path: Path, derived: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_run(tmp_path)
    write_beat(Workspace(tmp_path), "run-1", beat(at=datetime.now(UTC) - timedelta(minutes=5)))
    age(tmp_path)
    collector = RunCollector(Workspace(tmp_path))
    first = scrape(collector)["fastgda_worker_seconds_since_beat"]["run-1", "gpu-7:1"]
    time.sleep(0.01)
    assert scrape(collector)["fastgda_worker_seconds_since_beat"]["run-1", "gpu-7:1"] > first
    assert derived == ["run-1"]


def test_a_wish_to_cancel_ends_no_scrape(tmp_path: Path) -> None:
    plan_run(tmp_path)
    liveness.ask(Workspace(tmp_path), "run-1", RunRequest.cancel)
    assert read(exposition(Workspace(tmp_path)))["fastgda_shards"]["run-1", "pending"] == 3


def test_prometheus_scrapes_a_real_server(tmp_path: Path) -> None:
    finish_run(tmp_path)
    with listening(Workspace(tmp_path), "127.0.0.1", 0) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert read(answer.read().decode())["fastgda_rows_total"] == {("run-1",): 12}
        plan_run(tmp_path, "run-2")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert read(answer.read().decode())["fastgda_pairs"] == {("run-1",): 12, ("run-2",): 12}
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_port_in_use_is_said_in_one_line_with_the_mend(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"127.0.0.1:{port} .*in use.*choose another --port") as raised:
            serve(Workspace(tmp_path), "127.0.0.1", port)
    assert "\n" not in str(raised.value)


@pytest.mark.integration
def test_the_server_serves_until_it_is_interrupted_and_then_ends_well(tmp_path: Path) -> None:
    # Whoever starts the tests may have them ignore Ctrl-C, as a shell does with what it runs in the background.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from storage_schemas.workspace import Workspace; "
    code += "from tasks.watching.metrics_exporter import serve; serve(Workspace.at(sys.argv[1]), '127.0.0.1', 0)"
    server = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        said = server.stderr.readline()
        address = said.removeprefix("metrics: ").split(";")[0]
        with urllib.request.urlopen(address) as answer:
            assert b"fastgda_shards" in answer.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0, server.stderr.read()
    finally:
        server.kill()
        server.wait()


def test_the_command_prints_the_metrics_once(tmp_path: Path) -> None:
    import typer

    from flows.commands.metrics import metrics

    app = typer.Typer()
    app.command()(metrics)
    finish_run(tmp_path)
    answer = CliRunner().invoke(app, ["--once", "--workspace", str(tmp_path)])
    assert answer.exit_code == 0
    assert read(answer.stdout)["fastgda_rows_total"] == {("run-1",): 12}
