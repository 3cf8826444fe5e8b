"""A PostgreSQL server of the tests' own, on loopback, gone afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgres_server() -> Iterator[str]:
    """libpq connection string of an empty server, without `dbname`."""
    programs = _programs()
    # PostgreSQL refuses to run as root, and another user cannot enter root's temporary folders.
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    folder = Path(tempfile.mkdtemp(prefix="fastgda-postgres-"))
    shutil.chown(folder, user)
    data, port = folder / "data", _free_port()

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        done = subprocess.run(
            command,
            cwd=folder,
            user=user if os.geteuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=(folder / "out").open("a"),
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == 0, (folder / "out").read_text()

    run("initdb", "-D", str(data), "-U", "fastgda", "-A", "trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    run("pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"host=127.0.0.1 port={port} user=fastgda"
    finally:
        run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


def prefect_url(connection: str) -> str:
    """The database `postgres` of a server, as a Prefect server is told of its own."""
    at = dict(word.split("=") for word in connection.split())
    return f"postgresql+asyncpg://{at['user']}@{at['host']}:{at['port']}/postgres"


def _programs() -> Path:
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if folders:
        return folders[-1]
    if os.environ.get("FASTGDA_REQUIRE_POSTGRES"):
        pytest.fail("PostgreSQL is not installed, and FASTGDA_REQUIRE_POSTGRES asks for it")
    pytest.skip("PostgreSQL is not installed")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
