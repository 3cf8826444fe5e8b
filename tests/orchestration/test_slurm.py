"""A curation in a Slurm of Debian's packages: controller, node and tasks are this machine's.

`apt-get install slurmctld slurmd slurm-client munge` brings it; the test starts its own daemons, which only root can.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage_schemas.runs.attempts import read_attempts
from storage_schemas.runs.ledger import run_names
from storage_schemas.runs.liveness import Beat, read_beats
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.orchestration.chaos_case import QUERIES, SAMPLES, lay_out
from tests.prefect_processes import BIN, ROOT, free_port

pytestmark = pytest.mark.slow
DAEMONS = ("munged", "slurmctld", "slurmd")
# https://slurm.schedmd.com/slurm.conf.html; the node is this machine, whatever it is called.
CONFIGURATION = """
ClusterName=fastgda
SlurmctldHost=localhost
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
KillWait=5
MaxArraySize=3
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Slurm, and the environment of those who use it."""
    if os.getuid() != 0 or any(shutil.which(each) is None for each in (*DAEMONS, "sbatch")):
        pytest.skip("needs slurmctld, slurmd, slurm-client, munge, and root")
    folder = tmp_path / "slurm"
    for each in ("state", "spool"):
        (folder / each).mkdir(parents=True)
    configuration = folder / "slurm.conf"
    ports = {"controller": free_port(), "node": free_port()}
    configuration.write_text(CONFIGURATION.format(folder=folder, cpus=os.cpu_count(), **ports))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    places = [f"--{option}={folder / name}" for option, name in {**munge, "seed-file": "seed"}.items()]
    environment = {
        **os.environ,
        "SLURM_CONF": str(configuration),
        "PYTHONPATH": str(ROOT),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "OMP_NUM_THREADS": "1",
        "FASTGDA_LOG_LEVEL": "info",
    }
    environment.pop("PREFECT_API_URL", None)
    try:
        subprocess.run(["munged", "--force", *places], check=True, capture_output=True)
        subprocess.run(["slurmctld", "-f", configuration], check=True, capture_output=True, env=environment)
        subprocess.run(["slurmd", "-f", configuration, "-N", "localhost"], check=True, env=environment)
        wait_until(lambda: " idle " in said(environment, "sinfo"))
        yield environment
    finally:
        said(environment, "scancel", f"--user={os.getuid()}")
        for daemon in reversed(DAEMONS):
            pid = folder / f"{daemon}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)


def said(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def wait_until(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)


def curate(config: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [str(BIN / "fastgda"), "curate", str(config)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, cwd=config.parent, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def at_scores(workspace: Workspace) -> list[Beat]:
    return [beat for run in run_names(workspace) for beat in read_beats(workspace, run) if beat.kind == "scores"]


def test_a_task_that_is_killed_and_tasks_at_their_time_limit_cost_no_row(
    tmp_path: Path, model_folder: Path, slurm: dict[str, str]
) -> None:
    # A task has a minute, leaves its part 15 seconds before the end, and takes some to start.
    tasks = {"tasks": 4, "at_once": 2, "time": "1:00", "poll_seconds": 1.0, "idle_seconds": 30}
    config = lay_out(tmp_path / "user", model_folder, shards=504, runner="slurm", slurm=tasks)
    workspace = Workspace.at(config.parent / "workspace")
    run = curate(config, slurm)
    try:
        wait_until(lambda: at_scores(workspace), 400)
        beat = at_scores(workspace)[0]
        name = run_names(workspace)[0]
        shown = said(slurm, str(BIN / "fastgda"), "status", "--workspace", str(workspace.root))
        assert f"Slurm {beat.slurm}" in " ".join(shown.split()) and "Slurm job" in shown
        os.kill(int(beat.worker.rpartition(":")[2]), signal.SIGKILL)
        output, _ = run.communicate(timeout=500)
    finally:
        run.kill()
    assert run.returncode == 0, output
    assert f"task {beat.slurm} is over: FAILED" in output
    rows = "SELECT count(*) AS n, count(DISTINCT (query_id, train_id)) AS d FROM scores"
    assert query(workspace.root, rows).to_pylist() == [{"n": QUERIES * SAMPLES, "d": QUERIES * SAMPLES}]
    logs = [path.read_text() for path in sorted((workspace.runs / name / "slurm").glob("*.log"))]  # type: ignore[union-attr]
    assert sum("it was told to end" in log for log in logs) >= 2, "they came to their time limit"
    attempts = read_attempts(workspace, name)
    assert any(len({each.worker for each in of_part}) == 2 for of_part in attempts.values()), "made again by another"
    wait_until(lambda: said(slurm, "squeue", "--noheader") == "", 30)


def test_a_run_that_is_cancelled_leaves_nothing_in_the_queue_and_goes_on_later(
    tmp_path: Path, model_folder: Path, slurm: dict[str, str]
) -> None:
    tasks = {"tasks": 5, "at_once": 1, "poll_seconds": 1.0}
    config = lay_out(tmp_path / "user", model_folder, shards=504, runner="slurm", slurm=tasks)
    workspace = Workspace.at(config.parent / "workspace")
    run = curate(config, slurm)
    try:
        wait_until(lambda: at_scores(workspace), 400)
        arrays = {line.partition("_")[0] for line in said(slurm, "squeue", "--noheader", "--format=%i").split()}
        assert len(arrays) >= 2, "the cluster takes three tasks in an array"
        cancel = said(
            slurm, str(BIN / "fastgda"), "cancel", run_names(workspace)[0], "--workspace", str(workspace.root)
        )
        assert "cleared" in cancel
        output, _ = run.communicate(timeout=90)
        assert run.returncode == 1 and "was cancelled" in output, output
        assert said(slurm, "squeue", "--noheader") == ""
        run = curate(config, slurm)
        wait_until(lambda: "RUNNING" in said(slurm, "squeue", "--noheader", "--format=%T"))
        run.send_signal(signal.SIGINT)
        output, _ = run.communicate(timeout=60)
        assert run.returncode == 130 and "goes on where it stopped" in output, output
        wait_until(lambda: said(slurm, "squeue", "--noheader") == "", 30)
    finally:
        run.kill()
