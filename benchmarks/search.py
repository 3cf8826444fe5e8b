"""Search and build of indexes beside NumPy, usearch and hnswlib; prints Markdown tables.

Vectors are drawn from clusters: one centre for 200 vectors, each a centre plus 0.7 times another draw; the numbers of a
draw are normal and fall off with the square root of their place, as the spectrum of learned features does; all are
brought to length one. Queries are further draws from the same clusters. Every figure is the best of several rounds, and
what is compared is asked in turn in one process. Building, the first answer after a start and the large flat index have
processes of their own, whose peak memory is reported. usearch and hnswlib are no dependencies: where they are not
installed, the table says so.

Run: python benchmarks/search.py, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastgda_core.search.build import add, faiss, new_index, train, training_rows, write_index
from fastgda_core.search.kinds import bytes_each, choose_kind
from fastgda_core.search.recall import Neighbours, exact_neighbours, measure, recall, settings_for
from fastgda_core.search.searcher import Searcher, SearchSettings, open_index
from storage_schemas.workspace import part
from tasks.distilling.index_parts import IndexParts
from tasks.distilling.vectors import VECTOR_PART_SAMPLES, Block, blocks_of, write_vectors

Vectors = NDArray[np.float32]
K, ROUNDS = 100, 5
LADDER = (32, 64, 128, 256, 512, 1024)  # of usearch and hnswlib, until they reach the recall


class Clusters:
    """A source of vectors that can be drawn block by block, always the same ones."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.fall = rows, (np.arange(1, width + 1) ** -0.5).astype(np.float32)
        self.centres = self._normal(np.random.default_rng(0), max(16, rows // 200))

    def draw(self, count: int, seed: int) -> Vectors:
        rng = np.random.default_rng(seed)
        vectors = self.centres[rng.integers(0, len(self.centres), count)] + 0.7 * self._normal(rng, count)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def blocks(self) -> Iterator[Block]:
        for number, start in enumerate(range(0, self.rows, VECTOR_PART_SAMPLES)):
            ids = np.arange(start, min(start + VECTOR_PART_SAMPLES, self.rows))
            yield Block(ids, self.draw(len(ids), 10 + number))

    def _normal(self, rng: np.random.Generator, count: int) -> Vectors:
        return rng.standard_normal((count, len(self.fall)), dtype=np.float32) * self.fall


class Row(NamedTuple):
    """A line of a table."""

    what: str
    recall: float
    one: float
    many: float | None
    bytes_each: float


def milliseconds(ask: Callable[[], object]) -> float:
    """Return the best of several rounds."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - started)
    return 1e3 * min(taken)


def by_numpy(vectors: Vectors, queries: Vectors) -> NDArray[np.int64]:
    """Return the K nearest by a product and argpartition."""
    scores = queries @ vectors.T
    first = np.argpartition(-scores, K, axis=1)[:, :K]
    order = np.argsort(-np.take_along_axis(scores, first, 1), axis=1)
    return np.take_along_axis(first, order, 1)


def timed(what: str, ask: Callable[[Vectors], Any], queries: Vectors, truth: Neighbours, size: float) -> Row:
    """Ask for one query after the other, and for 64 at once."""
    found = np.concatenate([np.asarray(ask(queries[row : row + 1])) for row in range(len(queries))])
    few = min(16, len(queries))
    one = milliseconds(lambda: [ask(queries[row : row + 1]) for row in range(few)]) / few
    return Row(what, recall(found, truth, K), one, milliseconds(lambda: ask(queries[:64])), size)


def exact_rows(vectors: Vectors, queries: Vectors, truth: Neighbours) -> list[Row]:
    """NumPy, and the kinds of index that look at every vector."""
    rows = [timed("NumPy", lambda asked: by_numpy(vectors, asked), queries, truth, 4.0 * vectors.shape[1])]
    for kind in ("Flat", "SQfp16"):
        searcher = built(kind, vectors)
        searcher.prepare()
        rows.append(timed(kind, answers_of(searcher), queries, truth, bytes_each(kind, vectors.shape[1], len(vectors))))
    return rows


def approximate_rows(
    vectors: Vectors, queries: Vectors, truth: Neighbours, tuning: Vectors, target: float
) -> list[Row]:
    """Kinds of index, usearch and hnswlib, each with the least effort that reaches the recall on other queries."""
    count, width = vectors.shape
    known = exact_neighbours(tuning, [(np.arange(count), vectors)], K)
    lists = 1 << int(np.log2(4 * count**0.5))
    rows = []
    for kind in ("HNSW32,SQfp16", f"IVF{lists},Flat", f"RR{width},IVF{lists},RaBitQfs,Refine(SQfp16)"):
        searcher = built(kind, vectors)
        settings = settings_for(searcher, tuning, known, target)
        said = ", ".join(f"{name} {value:g}" for name, value in vars(settings).items() if value is not None)
        size = bytes_each(kind, width, count)
        rows.append(timed(f"{kind}, {said}", answers_of(searcher, settings), queries, truth, size))
    for name, build in (("usearch", by_usearch), ("hnswlib", by_hnswlib)):
        if find_spec(name) is None:
            rows.append(Row(f"{name} is not installed", float("nan"), float("nan"), None, float("nan")))
            continue
        asked, size = build(vectors)
        effort = next((each for each in LADDER if recall(asked(tuning, each), known, K) >= target), LADDER[-1])
        rows.append(timed(f"{name}, {effort}", functools.partial(asked, effort=effort), queries, truth, size))
    return rows


def answers_of(searcher: Searcher, settings: SearchSettings | None = None) -> Callable[[Vectors], Any]:
    return lambda asked: searcher.search(asked, K, settings=settings)[1]


def built(kind: str, vectors: Vectors) -> Searcher:
    """Return an index in memory."""
    index = new_index(kind, vectors.shape[1])
    train(index, vectors[: training_rows(kind)], kind=kind)
    add(index, vectors, np.arange(len(vectors)))
    return Searcher(index)


def by_usearch(vectors: Vectors) -> tuple[Callable[[Vectors, int], Any], float]:
    from usearch.index import Index  # type: ignore[import-not-found]

    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=32)
    index.add(np.arange(len(vectors)), vectors, threads=torch.get_num_threads())

    def asked(queries: Vectors, effort: int) -> Any:
        index.expansion_search = effort
        return np.asarray(index.search(queries, K, threads=torch.get_num_threads()).keys).reshape(len(queries), K)

    return asked, index.memory_usage / len(vectors)


def by_hnswlib(vectors: Vectors) -> tuple[Callable[[Vectors, int], Any], float]:
    import hnswlib  # type: ignore[import-not-found]

    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=32, ef_construction=100)
    index.set_num_threads(torch.get_num_threads())
    index.add_items(vectors)

    def asked(queries: Vectors, effort: int) -> Any:
        index.set_ef(max(effort, K))
        return index.knn_query(queries, K)[0].astype(np.int64)

    return asked, 4.0 * vectors.shape[1] + 4 * 64 + 8


def build_large(folder: Path, rows: int, width: int, kind: str, target: float) -> dict[str, Any]:
    """Build an index from parts on disk, as `fastgda index build` does, and measure it."""
    paths = sorted((folder / "vectors").glob("part-*.parquet"))
    parts = IndexParts(folder / kind, "key", kind, width, paths)
    started = time.perf_counter()
    index = parts.whole(lambda _: None)
    write_index(index, folder / f"{kind}.faiss")
    seconds, peak = time.perf_counter() - started, peak_bytes()
    clusters = Clusters(rows, width)
    tuning, queries = clusters.draw(128, 1), clusters.draw(200, 2)
    truth = exact_neighbours(np.concatenate([tuning, queries]), blocks_of(paths), K)
    searcher = Searcher(index)
    settings = settings_for(searcher, tuning, Neighbours(truth[0][:128], truth[1][:128]), target)
    rest = Neighbours(truth[0][128:], truth[1][128:])
    found = measure(searcher, queries, rest, settings)
    one = (
        milliseconds(lambda: [searcher.search(queries[row : row + 1], K, settings=settings) for row in range(16)]) / 16
    )
    return {
        **{"seconds": seconds, "peak": peak, "recall_at_10": found.at_10, "recall_at_100": found.at_100, "one": one},
        **{"settings": vars(settings), "bytes": (folder / f"{kind}.faiss").stat().st_size},
    }


def first_answer(folder: Path, rows: int, width: int, kind: str, target: float) -> dict[str, Any]:
    """Open an index and ask one query; what this process imports is there before."""
    query = Clusters(rows, width).draw(1, 3)
    path = folder / f"{kind}.faiss"
    with path.open("rb") as file:  # not from what the system keeps of it in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    open_index(path, settings=SearchSettings(16, 64, 4.0)).search(query, K)
    seconds, peak = time.perf_counter() - started, peak_bytes()
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    path.read_bytes()
    return {"seconds": seconds, "peak": peak, "reading": time.perf_counter() - started}


def write_parts(folder: Path, rows: int, width: int, kind: str, target: float) -> dict[str, Any]:
    """Write the vectors of the large index."""
    for number, block in enumerate(Clusters(rows, width).blocks()):
        write_vectors(part(folder / "vectors", number), block, key="vectors", started=time.monotonic())
    return {}


STEPS = {"write": write_parts, "build": build_large, "open": first_answer}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def apart(step: str, folder: Path, options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Run a step in a process of its own."""
    order = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--kind", kind]
    order += ["--large", str(options.large), "--width", str(options.width), "--target", str(options.target)]
    done = subprocess.run([*order, "--threads", str(options.threads)], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_rows(rows: list[Row]) -> None:
    print("| | recall@100 | ms, one query | x NumPy | ms, 64 at once | x NumPy | bytes a vector |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    first = rows[0]
    for row in rows:
        many = "" if row.many is None or first.many is None else f"{row.many:.1f} | {first.many / row.many:.1f}"
        cells = f"{row.recall:.3f} | {row.one:.2f} | {first.one / row.one:.1f} | {many or '|'} | {row.bytes_each:.0f}"
        print(f"| {row.what} | {cells} |")
    print()


def print_large(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build, measure and open the large index, beside a flat one; return what was found of the former."""
    rows, width, vectors = options.large, options.width, 4.0 * options.large * options.width
    kind = options.kind or choose_kind(rows, width, memory=vectors / 4).kind
    apart("write", folder, options, kind)
    found = {each: apart("build", folder, options, each) for each in ("Flat", kind)}
    print(f"{rows:,} x {width}, recall@100 to reach {options.target}")
    head = "| | recall@10 | recall@100 | ms, one query | x Flat | bytes / Flat | build s | peak / vectors "
    print(head + "| first answer, s | reading the file, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    flat = found["Flat"]
    for each, told in found.items():
        first = apart("open", folder, options, each)
        opened = f"{told['peak'] / vectors:.2f} | {first['seconds']:.2f} | {first['reading']:.1f}"
        recalls = f"{told['recall_at_10']:.3f} | {told['recall_at_100']:.3f} | {told['one']:.2f}"
        ratios = f"{flat['one'] / told['one']:.1f} | {told['bytes'] / flat['bytes']:.2f}"
        print(f"| {each} | {recalls} | {ratios} | {told['seconds']:.0f} | {opened} |")
    print(f"settings of {kind}: {found[kind]['settings']}\n")
    return found[kind]


def print_paper(measured: dict[str, Any], options: argparse.Namespace) -> None:
    """Reckon larger indexes from bytes a vector and from what adding one took."""
    print("| vectors | memory asked | kind | GB of the index | GB of the vectors on disk | core-hours to add |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    each = measured["seconds"] * options.threads / options.large
    for rows in (100_000_000, 400_000_000):
        for memory in (None, 64e9, 256e9):
            kind = choose_kind(rows, options.width, memory=memory).kind
            size = rows * bytes_each(kind, options.width, rows) / 1e9
            said = "any" if memory is None else f"{memory / 1e9:.0f} GB"
            # More lists to compare a vector with; a graph of their centroids makes it less than this.
            lists = (rows / options.large) ** 0.5
            hours = each * rows * lists / 3600
            disk = rows * options.width * 4 * 0.85 / 1e9
            print(f"| {rows:,} | {said} | {kind} | {size:.0f} | {disk:.0f} | < {hours:.0f} |")
    print()


def parsed() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=118_287)
    options.add_argument("--large", type=int, default=1_000_000)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--queries", type=int, default=200)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--target", type=float, default=0.95, help="recall@100 of the large index")
    options.add_argument("--small-target", type=float, default=0.98, help="of the approximate kinds of the small one")
    options.add_argument("--kind", default="", help="of the large index; default: by a quarter of Flat's memory")
    options.add_argument("--folder", type=Path, default=None, help="for the large index; default: a temporary one")
    options.add_argument("--step", choices=STEPS, default=None, help=argparse.SUPPRESS)
    return options.parse_args()


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    if options.step:
        found = STEPS[options.step](options.folder, options.large, options.width, options.kind, options.target)
        print(json.dumps(found))
        return
    if options.rows:
        clusters = Clusters(options.rows, options.width)
        vectors = np.concatenate([block.vectors for block in clusters.blocks()])
        queries = clusters.draw(max(64, options.queries), 2)
        truth = exact_neighbours(queries, [(np.arange(len(vectors)), vectors)], K)
        print(f"{len(vectors):,} x {options.width}, {options.threads} threads, top {K}\n")
        rows = exact_rows(vectors, queries, truth)
        rows += approximate_rows(vectors, queries, truth, clusters.draw(128, 1), options.small_target)
        print_rows(rows)
        del vectors
    if options.large:
        with tempfile.TemporaryDirectory() as temporary:
            print_paper(print_large(options.folder or Path(temporary), options), options)


if __name__ == "__main__":
    main()
