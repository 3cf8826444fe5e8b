"""Two hosts: server, coordinator and an S3 store on one, the worker on the other, and a link that is cut for a minute.

The hosts are network namespaces of this machine, which only root can make.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.orchestration.chaos_case import QUERIES, SAMPLES, lay_out
from tests.prefect_processes import BIN, Prefect, prefect_server

pytestmark = pytest.mark.slow
CUT_SECONDS = 60
HEAD, WORKER = "10.213.77.1", "10.213.77.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """What to put before a command to run it on the head host, and on the worker's."""
    names = [f"fastgda-{os.getpid()}-{host}" for host in ("head", "work")]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and iproute2")
    try:
        ip("link", "add", "vhead", "netns", names[0], "type", "veth", "peer", "name", "vwork", "netns", names[1])
        for name, link, address in zip(names, ("vhead", "vwork"), (HEAD, WORKER), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
        head, work = (("ip", "netns", "exec", name) for name in names)
        yield head, work
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def test_a_link_that_is_cut_for_a_minute_costs_no_row_and_doubles_none(
    tmp_path: Path, model_folder: Path, hosts: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    head, work = hosts
    store = {
        "AWS_ENDPOINT_URL": f"http://{HEAD}:5055",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    path = lay_out(
        tmp_path / "user", model_folder, shards=63, pools=[{"slots": 1}], job_minutes=0.5, lost_after=90, retry_delay=2
    )
    config = yaml.safe_load(path.read_text())
    config["workspace"] = "s3://fastgda/workspace"
    path.write_text(yaml.safe_dump(config))
    with prefect_server(tmp_path / "server", host=HEAD, prefix=head) as server:
        server.start("s3", str(BIN / "moto_server"), "-H", HEAD, "-p", "5055")
        make_bucket = "import s3fs; s3fs.S3FileSystem().mkdir('fastgda')"
        wait_until(lambda: _run(server, make_bucket, store) == 0)
        server.deploy(path, "process")
        # The worker's host reaches the server and the store through the link, and nothing else.
        remote = Prefect(server.folder, host=HEAD, port=server.port, prefix=work, processes=server.processes)
        remote.start_worker("worker", "fastgda-gpu", extra=store)
        coordinator = server.start("coordinator", str(BIN / "fastgda"), "curate", str(path), extra=store)
        shards = "import s3fs; print(len(s3fs.S3FileSystem().glob('fastgda/workspace/scores/*/part-*.parquet')))"
        wait_until(lambda: _count(server, shards, store) >= 5, 240)
        ip("-n", head[-1], "link", "set", "vhead", "down")
        at_cut = _count(server, shards, store)
        time.sleep(CUT_SECONDS)
        assert _count(server, shards, store) <= at_cut + 1, "the link was not cut"
        ip("-n", head[-1], "link", "set", "vhead", "up")
        assert coordinator.wait(400) == 0, server.log("coordinator")
        rows = (
            "from storage_schemas.sql.views import query; "
            "print(query('s3://fastgda/workspace', 'SELECT count(*) AS n, count(DISTINCT (query_id, train_id)) AS d, "
            "count(DISTINCT train_id) AS t FROM scores').to_pylist())"
        )
        expected = {"n": QUERIES * SAMPLES, "d": QUERIES * SAMPLES, "t": SAMPLES}
        assert str([expected]) in _output(server, rows, store)


def wait_until(what, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.5)


def _command(server: Prefect, code: str) -> list[str]:
    return [*server.prefix, str(BIN / "python"), "-c", code]


def _run(server: Prefect, code: str, store: dict[str, str]) -> int:
    environment = {**server.environment, **store}
    return subprocess.run(_command(server, code), env=environment, capture_output=True, check=False).returncode


def _output(server: Prefect, code: str, store: dict[str, str]) -> str:
    environment = {**server.environment, **store}
    done = subprocess.run(_command(server, code), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _count(server: Prefect, code: str, store: dict[str, str]) -> int:
    return int(_output(server, code, store))
