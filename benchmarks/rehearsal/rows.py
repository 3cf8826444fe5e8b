"""Made-up rows through the real plan, ledger, publication, SQL, labels and index, by stages that cost next to nothing.

    python -m benchmarks.rehearsal.rows FOLDER
    python -m benchmarks.rehearsal.rows FOLDER --samples 100000 --queries 10 --nearest 1000

The samples are a table whose tars are empty. Features are a few numbers out of each caption, and the teacher compares
them.
FOLDER gets the workspace and `rows.md` with seconds and memory of each stage.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.rehearsal.measure import FASTGDA, REST, ROOT, Figures, Kept, run_measured

PIECE, PER_TAR = 100_000, 10_000
VECTOR_WIDTH = 32  # of the index
THIN = [sys.executable, "-m", "benchmarks.rehearsal.thin", *FASTGDA[1:]]
ITSELF = [sys.executable, "-m", "benchmarks.rehearsal.rows"]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for everything that is made")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--nearest", type=int, default=100_000, help="candidates of each query")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    arguments.folder = arguments.folder.resolve()
    if arguments.phase:
        PHASES[arguments.phase](arguments)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(arguments.folder / "rows.json")
    for figures in rehearse(arguments):
        kept.add(figures)
        (arguments.folder / "rows.md").write_text(kept.table())
        print(f"{figures.command} {figures.stage}: {figures.seconds:.1f} s, {figures.peak / 1e9:.2f} GB", flush=True)
    print(kept.table())


def rehearse(arguments: argparse.Namespace) -> Iterator[Figures]:
    """Go the whole road, and yield each stage's figures."""
    folder: Path = arguments.folder
    log, config, workspace = folder / "log.txt", folder / "config.yaml", folder / "workspace"
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("samples", "queries", "nearest")]
    if not config.is_file():
        yield from run_measured([*ITSELF, str(folder), *sizes, "--phase", "lay-out"], "", "made up", log)
    yield from run_measured([*THIN, "plan", str(config)], "plan", REST, log)
    yield from run_measured([*THIN, "curate", str(config)], "curate", REST, log)
    yield from run_measured([*THIN, "curate", str(config)], "curate again", REST, log)
    there = ["--workspace", str(workspace)]
    yield from run_measured([*FASTGDA, "ledger", "rebuild", *there], "ledger rebuild", REST, log)
    yield from run_measured([*FASTGDA, "status", *there], "status", REST, log)
    yield from cookbook(there, log)
    for phase in ("labels", "index"):
        yield from run_measured([*ITSELF, str(folder), *sizes, "--phase", phase], phase, REST, log)


def cookbook(there: list[str], log: Path) -> Iterator[Figures]:
    """Run every statement of docs/sql.md, and yield figures of the slowest, of the largest, and of all."""
    statements = re.findall(r'^fastgda sql "(.+)"$', (ROOT / "docs" / "sql.md").read_text(), re.MULTILINE)
    found = []
    for number, statement in enumerate(statements):
        asked = ["sql", statement.replace("q0003", "q000003"), *there]
        found += run_measured([*FASTGDA, *asked], "sql", f"statement {number + 1}", log)
    slowest, largest = (max(found, key=key) for key in (lambda each: each.seconds, lambda each: each.peak))
    yield from {figures.stage: figures for figures in (slowest, largest)}.values()
    seconds, cores = (sum(getattr(each, name) for each in found) for name in ("seconds", "core_seconds"))
    yield Figures("sql", "all statements of docs/sql.md", len(found), seconds, cores, largest.peak, largest.own)


def lay_out(arguments: argparse.Namespace) -> None:
    """Write a table of samples as if their tars had been read, pictures of queries, and the configuration."""
    import yaml

    from storage_schemas import tables
    from storage_schemas.commit import commit, commit_table
    from storage_schemas.workspace import Workspace
    from tasks.inputs.samples import _index_key
    from tests import tiny

    folder: Path = arguments.folder
    tar = tiny.write_tar(folder / "data" / "none.tar", [])
    workspace, key = Workspace.at(str(folder / "workspace")), _index_key([tar.resolve()])
    started, nothing = time.monotonic(), tables.REJECTED_SAMPLES.schema.empty_table()
    commit_table(workspace.rejected_samples(key), nothing, tables.REJECTED_SAMPLES, key=key, started=started)

    pictures = folder.resolve() / "pictures"
    pictures.mkdir()
    for number in range(-(-arguments.samples // PER_TAR)):
        (pictures / f"{number:05d}.tar").touch()

    def write(path: Path) -> None:
        tables.SAMPLES.write(path, made_up(arguments.samples, pictures), {"input_key": key})

    path, rows = workspace.samples(key), arguments.samples
    commit(path, write, key=key, rows=rows, started=started, table=tables.SAMPLES)
    write_queries(folder / "queries" / "queries.tar", arguments.queries)
    fifth = max(1, arguments.queries // 5)
    config = {
        "name": "rows",
        "workspace": "workspace",
        "data": {"shards": "data/*.tar"},
        "model": {"folder": str(tiny.save_model(folder / "model").resolve())},
        "queries": {
            "shards": "queries/*.tar",
            "split": {"train": arguments.queries - 2 * fifth, "validation": fifth, "test": fifth},
            "twins": 0,
        },
        "features": {"space": "thin"},
        "candidates": {"policy": "top_k", "k": arguments.nearest},
        "teacher": {"name": "similarity", "shard_samples": max(256, arguments.nearest // 4)},
        "self_consistency": None,
        "evaluation": {"cutoffs": [100], "validation_cutoff": 100},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def made_up(samples: int, pictures: Path) -> Iterator[pa.Table]:
    """Yield rows of `tables.SAMPLES`, as wide as those of pictures with a caption of some words."""
    from storage_schemas import tables
    from tasks.inputs.looks import LOOK_BYTES

    draw = np.random.default_rng(0)
    for start in range(0, samples, PIECE):
        numbers = np.arange(start, min(start + PIECE, samples))
        text = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 9, "0")
        captions = pc.binary_join_element_wise("a made-up picture of something, number ", text, "")
        look = draw.integers(0, 256, (len(numbers), LOOK_BYTES), dtype=np.uint8).tobytes()
        digests = draw.integers(0, 2**63, (len(numbers), 4), dtype=np.int64)
        tar = pc.utf8_lpad(pa.array(numbers // PER_TAR).cast(pa.string()), 5, "0")
        yield tables.SAMPLES.rows(
            train_id=numbers,
            key=pc.binary_join_element_wise("s", text, ""),
            shard=pc.binary_join_element_wise(f"{pictures}/", tar, ".tar", ""),
            offset=(numbers % PER_TAR) * 20_480,
            size=np.full(len(numbers), 19_000),
            captions=pa.ListArray.from_arrays(np.arange(len(numbers) + 1, dtype=np.int32), captions),
            width=np.full(len(numbers), 256),
            height=np.full(len(numbers), 256),
            image_sha256=["".join(f"{part:016x}" for part in row) for row in digests.tolist()],
            image_look=pa.array([look[at : at + LOOK_BYTES] for at in range(0, len(look), LOOK_BYTES)], pa.binary()),
            metadata=pa.repeat('{"licence": "CC0-1.0", "source": "made up"}', len(numbers)),
        )


def write_queries(path: Path, queries: int) -> None:
    """Write pictures of one colour each, with captions."""
    from PIL import Image

    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number in range(queries):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (number % 256, number // 256, 90)).save(buffer, "PNG")
            caption = f"a question, number {number}".encode()
            for suffix, content in (("png", buffer.getvalue()), ("txt", caption)):
                member = tarfile.TarInfo(f"q{number:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def labels(arguments: argparse.Namespace) -> None:
    """Read what a rank head learns from."""
    import torch

    from storage_schemas.workspace import Workspace
    from tasks.distilling.labels import read_labels
    from tasks.distilling.ranks import rank_pairs
    from tasks.inputs.queries import joined_queries

    workspace = Workspace.at(str(arguments.folder / "workspace"))
    found = read_labels(workspace, None)
    names = [query.query_id for query in joined_queries(found.queries)]
    rows = torch.arange(len(names))
    pairs = rank_pairs(workspace, found.ranks, names, rows, found.samples.rows, standardised=False)
    assert len(pairs.sample) == arguments.queries * arguments.nearest


def index(arguments: argparse.Namespace) -> None:
    """Write vectors of all samples part by part, and build an index from them as `fastgda index` does."""
    from fastgda_core.search.build import write_index
    from fastgda_core.search.kinds import choose_kind
    from storage_schemas.workspace import part
    from tasks.distilling.index_parts import IndexParts
    from tasks.distilling.vectors import VECTOR_PART_SAMPLES, Block, write_vectors

    folder, draw, paths = arguments.folder / "index", np.random.default_rng(0), []
    for number, start in enumerate(range(0, arguments.samples, VECTOR_PART_SAMPLES)):
        ids = np.arange(start, min(start + VECTOR_PART_SAMPLES, arguments.samples))
        vectors = draw.standard_normal((len(ids), VECTOR_WIDTH), dtype=np.float32)
        paths.append(part(folder / "vectors", number))
        write_vectors(paths[-1], Block(ids, vectors), key="vectors", started=time.monotonic())
    kind = choose_kind(arguments.samples, VECTOR_WIDTH, memory=arguments.samples * VECTOR_WIDTH).kind
    built = IndexParts(folder / "parts", "key", kind, VECTOR_WIDTH, paths).whole(lambda _: None)
    assert built.ntotal == arguments.samples
    write_index(built, folder / "whole.faiss")


PHASES: dict[str, Any] = {"lay-out": lay_out, "labels": labels, "index": index}


if __name__ == "__main__":
    main()
