"""The HTTP service under load, beside its encoders alone in one process: latency, saturation, thumbnails.

    python -m benchmarks.service WORKSPACE [--rows 118287] [--kind SQfp16] [--workers 1] [--clients 8] [--share 0.8]

WORKSPACE has a published index and stored queries; it is only read. With --rows a copy of hard links is asked instead,
whose samples are the workspace's again and again, and whose index holds their vectors with a little noise. Clients are
processes of their own. "80 %" is an open loop: requests begin at random times at 80 % of the rate that was measured
before (--share), and a latency counts from the time at which a request should have begun.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NOISE = 0.05  # of a grown index's vectors, against their length
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Figures:
    """What one measurement found: requests a second, and quantiles of their latency in milliseconds."""

    what: str
    requests: int
    per_second: float
    p50: float
    p99: float
    failed: int = 0

    @classmethod
    def of(cls, what: str, seconds: Sequence[float], took: float, failed: int = 0) -> Figures:
        ordered = sorted(seconds)
        quantile = lambda share: 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
        return cls(what, len(ordered), len(ordered) / took, quantile(0.5), quantile(0.99), failed)


Request = tuple[str, str, bytes | None, dict[str, str]]  # method, path, body, headers


def ask(address: str, requests: Sequence[Request], seconds: float, rate: float | None, seed: int, out: Any) -> None:
    """A client: send requests at random, one after the other or at a rate, and put latencies and failures into a pipe.

    Args:
        rate: a second, at random times; None: the next begins when the last was answered.
    """
    draw, latencies, failed = random.Random(seed), [], 0
    connection = http.client.HTTPConnection(address, timeout=60)
    out.send("ready")
    out.recv()
    begun = due = time.perf_counter()
    while due - begun < seconds:
        method, path, body, headers = draw.choice(requests)
        if rate is not None:
            due += draw.expovariate(rate)
            time.sleep(max(0.0, due - time.perf_counter()))
        else:
            due = time.perf_counter()
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        latencies.append(time.perf_counter() - due)
        failed += response.status >= 400
    out.send((latencies, failed, time.perf_counter() - begun))


def load(
    what: str, address: str, requests: Sequence[Request], clients: int, seconds: float, rate: float | None = None
) -> Figures:
    """Let clients ask for some seconds, at a rate for all together where one is given."""
    context = multiprocessing.get_context("spawn")
    share = None if rate is None else rate / clients
    pipes, processes = [], []
    for number in range(clients):
        ours, theirs = context.Pipe()
        process = context.Process(target=ask, args=(address, requests, seconds, share, number, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    found = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    latencies = [each for mine, _, _ in found for each in mine]
    return Figures.of(what, latencies, max(took for *_, took in found), sum(failed for _, failed, _ in found))


@contextlib.contextmanager
def service(workspace: Path, workers: int, limits: dict[str, Any]) -> Iterator[str]:
    """The command in a process of its own; gives its address when it can answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "limits.yaml"
        path.write_text(json.dumps(limits))
        command = [str(Path(sys.executable).with_name("fastgda")), "--log-level", "warning", "serve", "--port", "0"]
        command += ["--workspace", str(workspace), "--workers", str(workers), "--limits", str(path)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            address = next(found[1] for line in lines if (found := re.search(r"http://([\d.]+:\d+)", line)))
            while not _ready(address):
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait()


def _ready(address: str) -> bool:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False


def alone(workspace: Path, seconds: float) -> tuple[Figures, list[list[float]]]:
    """Encode stored queries one after the other in this process, by one thread; return also some of their vectors."""
    import torch

    from storage_schemas.workspace import Workspace
    from tasks.serving.attributor import Attributor

    torch.set_num_threads(1)
    attributor = Attributor(Workspace.at(str(workspace)))
    queries = [(query.image, query.caption) for query in list(attributor.queries.values())[:64]]
    latencies: list[float] = []
    vectors = [attributor.encode_many([image], [caption])[0].tolist() for image, caption in queries[:8]]
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        image, caption = queries[len(latencies) % len(queries)]
        started = time.perf_counter()
        attributor.encode_many([image], [caption])
        latencies.append(time.perf_counter() - started)
    return Figures.of("encoders alone, one thread", latencies, time.perf_counter() - begun), vectors


def questions(workspace: Path) -> tuple[list[Request], list[Request], int]:
    """Return requests with images, requests by stored query, and how many samples there are."""
    from storage_schemas.workspace import Workspace
    from tasks.serving.attributor import Attributor

    attributor = Attributor(Workspace.at(str(workspace)))
    stored = list(attributor.queries.values())[:64]
    with_images = [_form({"caption": query.caption, "k": "20", "around": "0"}, query.encoded) for query in stored]
    by_query = [_plain({"query_id": query.query_id, "k": 20, "around": 0}) for query in stored]
    return with_images, by_query, len(attributor.catalogue())


def _plain(fields: dict[str, Any]) -> Request:
    return "POST", "/v1/attribute", json.dumps(fields).encode(), JSON


def _form(fields: dict[str, str], image: bytes) -> Request:
    parts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename="q.png"\r\n\r\n' + image + b"\r\n--b--\r\n"
    body = "".join(parts).encode() + file
    return "POST", "/v1/attribute", body, {"Content-Type": "multipart/form-data; boundary=b"}


def grown(workspace: Path, folder: Path, rows: int, kind: str) -> int:
    """Make a workspace of so many samples from one with fewer; return how many of them have pictures."""
    import faiss
    import numpy as np
    import pyarrow as pa

    from fastgda_core.search.build import add, faiss_version, new_index, train, write_index
    from storage_schemas import tables
    from storage_schemas.commit import commit, commit_table
    from storage_schemas.heads.records import INDEX_FILE, INDEX_IDS, IndexRecord, as_json
    from storage_schemas.publishing.publish import update_published
    from storage_schemas.snapshots.published import read_published
    from storage_schemas.workspace import Workspace
    from tasks.inputs.samples import samples_table

    shutil.copytree(workspace, folder, copy_function=os.link)
    place = Workspace.at(str(folder))
    published, draw, started = read_published(place), np.random.default_rng(0), time.monotonic()
    assert published.index and published.head and published.samples
    table, old = (
        samples_table(place.file(published.samples)),
        faiss.read_index(str(folder / published.index / "index.faiss")),
    )
    pictures, times = table.num_rows, -(-rows // table.num_rows)
    columns = pa.concat_tables([table] * times).slice(0, rows).to_pydict()
    columns["train_id"] = list(range(rows))
    for row in range(pictures, rows):  # no two look the same, or one would be folded under the other
        columns["image_sha256"][row] = draw.bytes(32).hex()
        columns["image_look"][row] = draw.bytes(len(columns["image_look"][row]))
    samples = place.samples("grown")
    grown_table = pa.Table.from_pydict(columns, schema=tables.SAMPLES.schema)
    commit_table(samples, grown_table, tables.SAMPLES, key="grown", started=started)
    near = old.reconstruct_n(0, old.ntotal)
    vectors = np.tile(near, (times, 1))[:rows]
    vectors[pictures:] += NOISE * near.std() * draw.standard_normal(vectors[pictures:].shape, np.float32)
    index, version = new_index(kind, vectors.shape[1]), place.index("grown")
    ids = np.arange(rows, dtype=np.int64)
    train(index, vectors, kind=kind)
    add(index, vectors, ids)
    commit(version / "index.faiss", lambda path: write_index(index, path), key="grown", rows=rows, started=started)
    commit_table(
        version / INDEX_IDS, tables.INDEX_IDS.rows(train_id=ids), tables.INDEX_IDS, key="grown", started=started
    )
    mean = place.file(published.index) / "mean.safetensors"
    if mean.exists():
        shutil.copy(str(mean), str(version / "mean.safetensors"))
    record = IndexRecord(
        head=published.head.rsplit("/", 1)[-1], samples=place.relative(samples), kind=kind, faiss=faiss_version()
    )
    (version / INDEX_FILE).write_bytes(as_json(record))
    named = {
        "samples": place.relative(samples),
        "index_samples": place.relative(samples),
        "index": place.relative(version),
    }
    update_published(place, lambda before: before.model_copy(update=named) if before else None)
    return pictures


def measure(
    workspace: Path, pictures: int | None, workers: int, clients: int, seconds: float, shares: Sequence[float]
) -> list[Figures]:
    """Return all figures of one workspace.

    Args:
        pictures: how many samples have one; None: all of them.
        shares: of saturation, at which images come at random times.
    """
    by_itself, vectors = alone(workspace, seconds)
    with_images, by_query, samples = questions(workspace)
    by_vector = [_plain({"vector": vector, "k": 20, "around": 0}) for vector in vectors]
    thumbnails: list[Request] = [
        ("GET", f"/v1/samples/{number}/image?size=256", None, {}) for number in range(min(pictures or samples, 2000))
    ]
    found = [by_itself]
    with service(workspace, workers, {"queue": 1024}) as address:

        def run(what: str, requests: Sequence[Request], count: int = clients, rate: float | None = None) -> Figures:
            found.append(load(what, address, requests, count, seconds, rate))
            return found[-1]

        load("warm", address, with_images, 2, min(seconds, 2.0))
        run("images, one client", with_images, 1)
        saturated = run(f"images, {clients} clients", with_images)
        for share in shares:
            run(f"images, {share:.0%} of that", with_images, max(clients, 16), share * saturated.per_second)
        load("warm", address, by_query, 2, min(seconds, 2.0))
        run(f"stored queries, {clients} clients", by_query)
        run(f"vectors, {clients} clients", by_vector)
        run(f"thumbnails, {clients} clients", thumbnails)
        run(f"thumbnails kept, {clients} clients", thumbnails[:50])
    return found


def print_figures(found: Sequence[Figures]) -> None:
    """Print a line for each measurement, with its quantiles against those of the first one."""
    base = found[0]
    names = ("requests", "/s", "p50 ms", "p99 ms", "p50 x", "p99 x", "failed")
    print(f"{'':36s}" + "".join(f"{name:>10s}" for name in names))
    for each in found:
        figures = (each.per_second, each.p50, each.p99, each.p50 / base.p50, each.p99 / base.p99)
        print(f"{each.what:36s}{each.requests:10d}" + "".join(f"{x:10.2f}" for x in figures) + f"{each.failed:10d}")


def main(arguments: Sequence[str] | None = None) -> list[Figures]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--rows", type=int, help="grow a copy to so many samples")
    parser.add_argument("--kind", default="SQfp16", help="FAISS's name of the grown index")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--share", type=float, nargs="+", default=[0.8], help="of saturation, for the open loop")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    given = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        workspace, pictures = given.workspace, None
        if given.rows:
            beside = stack.enter_context(tempfile.TemporaryDirectory(dir=workspace.parent))  # links stay in one disk
            workspace = Path(beside) / "workspace"
            pictures = grown(given.workspace, workspace, given.rows, given.kind)
        found = measure(workspace, pictures, given.workers, given.clients, given.seconds, given.share)
    print_figures(found)
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in found], indent=2))
    return found


if __name__ == "__main__":
    main()
