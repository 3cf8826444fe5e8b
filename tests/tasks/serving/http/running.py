"""The real command in processes of its own, and what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.serving.client import Client

WAIT = 120.0  # for imports on a busy machine


@dataclass
class Running:
    """A service that listens; `log` is where its standard error goes."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def client(self, key: str | None = None) -> Client:
        return Client(self.url, key)


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Running]:
    """`fastgda serve` on a free port until the block ends, ready to answer."""
    log = folder / "serve.log"
    command = [str(Path(sys.executable).with_name("fastgda")), "serve", "--port", "0", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=environment, cwd=folder)
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                url = found.group()
                break
        assert url, log.read_text()
        client, until = Client(url), time.monotonic() + WAIT
        while not client.ready():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield Running(process, url, log)
    finally:
        process.kill()
        process.wait()
