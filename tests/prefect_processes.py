"""A real Prefect server, workers and deployments on loopback, as processes that a test may kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WAIT = 120.0


def ask(url: str, path: str, **wanted: Any) -> Any:
    """What a Prefect server answers; it takes its time on a machine whose cores are all at work."""
    return httpx.post(f"{url}/{path}", json=wanted, timeout=WAIT).raise_for_status().json()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Prefect:
    """A server with its own database, and the processes that were started beside it; `settings` are its own."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    database: str | None = None
    prefix: tuple[str, ...] = ()  # before each command: `ip netns exec HOST`
    settings: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/api"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3",  # a minute by default
            "PREFECT_WORKER_QUERY_SECONDS": "3",  # 10 by default
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def start(self, name: str, *command: str, extra: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A process in a group of its own, so that it can be killed with all that it started, or without."""
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            (*self.prefix, *command),
            env={**self.environment, **(extra or {})},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self.processes[name]

    def start_server(self) -> None:
        extra = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database} if self.database else {}
        arguments = ("server", "start", "--host", self.host, "--port", str(self.port))
        self.start("server", str(BIN / "prefect"), *arguments, extra={**self.settings, **extra})
        deadline = time.monotonic() + WAIT
        while True:
            if self._answers():
                return
            assert time.monotonic() < deadline, self.log("server")
            time.sleep(0.3)

    def _answers(self) -> bool:
        ask = f"import urllib.request; urllib.request.urlopen('{self.url}/health', timeout=5)"
        if self.prefix:  # another host
            done = subprocess.run([*self.prefix, sys.executable, "-c", ask], capture_output=True, check=False)
            return done.returncode == 0
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def start_worker(self, name: str, pool: str, *, extra: Mapping[str, str] | None = None, limit: int = 1) -> None:
        arguments = ("worker", "start", "--pool", pool, "--name", name, "--limit", str(limit))
        home = {"PREFECT_HOME": str(self.folder / name)}
        self.start(name, str(BIN / "prefect"), *arguments, extra={**home, **(extra or {})})

    def prefect(self, *arguments: str, extra: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            [*self.prefix, str(BIN / "prefect"), "--no-prompt", *arguments],
            env={**self.environment, **(extra or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"prefect {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def deploy(self, config: Path, name: str | None = None) -> None:
        """The two work pools, and a deployment of `deployments/prefect.yaml`, or all, by the documented command."""
        for pool in ("fastgda", "fastgda-gpu"):
            self.prefect("work-pool", "create", "--type", "process", pool)
        file = str(ROOT / "deployments" / "prefect.yaml")
        chosen = ("--all",) if name is None else ("--name", name)
        self.prefect("deploy", *chosen, "--prefect-file", file, extra={"FASTGDA_CONFIG": str(config)})

    def kill(self, name: str, *, group: bool = True) -> None:
        process = self.processes.pop(name)
        if group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


@contextmanager
def prefect_server(
    folder: Path,
    *,
    database: str | None = None,
    host: str = "127.0.0.1",
    prefix: tuple[str, ...] = (),
    settings: Mapping[str, str] | None = None,
) -> Iterator[Prefect]:
    """A running server; everything that was started through it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Prefect(folder, host=host, database=database, prefix=prefix, settings=settings or {})
    server.start_server()
    try:
        yield server
    finally:
        for name in list(server.processes):
            process = server.processes[name]
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        kill_marked(str(folder))


def kill_marked(marker: str) -> list[int]:
    """Kill every process whose environment names `marker`, as flow runs that outlived their worker; their numbers."""
    found = marked(marker)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return found


def marked(marker: str, word: str = "") -> list[int]:
    """Processes whose environment names `marker` and whose command line holds `word`, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if marker.encode() in environment and word.encode() in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found
