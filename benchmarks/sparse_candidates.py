"""Labels and evaluation of 500 queries with 10,000 candidates each among 10 M samples: seconds and memory.

    python -m benchmarks.sparse_candidates

A snapshot of rank labels is written and read as the pipeline does, the head has random weights, and the features, which
are mapped from a file, are made up. A matrix of (queries x samples) scores, as dense code has it, would take 40 GB.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from fastgda_core.evaluation.ranking_metrics import agreement
from fastgda_core.ranking.head import RankHead
from storage_schemas import tables
from storage_schemas.commit import commit_table, write_atomically
from storage_schemas.runs.records import Part
from storage_schemas.snapshots.snapshots import Snapshot
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.distilling.ranks import candidate_scores, rank_pairs
from tasks.judging.head import tuned_cosines, untuned_cosines

AT_ONCE = 25  # queries of a part


def write_snapshot(workspace: Workspace, queries: int, candidates: int, samples: int) -> Artifact:
    draw = np.random.default_rng(0)
    parts = []
    for start in range(0, queries, AT_ONCE):
        names = [f"q{number:05d}" for number in range(start, min(start + AT_ONCE, queries))]
        score = np.sort(draw.standard_normal((len(names), candidates)), axis=1)[:, ::-1].ravel()
        rank = np.tile(np.arange(1, candidates + 1, dtype=np.int32), len(names))
        rows = tables.RANKS.rows(
            query_id=np.repeat(names, candidates),
            train_id=np.concatenate([draw.choice(samples, candidates, replace=False) for _ in names]),
            score=score,
            rank=rank,
            rank_label=(rank / candidates).astype(np.float32),
        )
        path = workspace.ranks("run") / f"part-{start:05d}.parquet"
        made = commit_table(path, rows, tables.RANKS, key="benchmark", started=time.monotonic())
        parts.append(
            Part(
                run="run",
                path=workspace.relative(path),
                rows=rows.num_rows,
                queries=len(names),
                first_query=names[0],
                last_query=names[-1],
                sha256=made.sha256,
            )
        )
    snapshot = Snapshot(snapshot="run-1", runs=["run"], rows=queries * candidates, queries=queries, parts=parts)
    write_atomically(workspace.snapshot("run-1"), snapshot.model_dump_json().encode())
    return Artifact("rank labels", "run-1", workspace.snapshot("run-1"), snapshot.rows)


def context_of(folder: Path) -> Context:
    config = {
        "name": "sparse",
        "workspace": str(folder),
        "device": "cpu",
        "data": {"shards": "none"},
        "model": {"folder": "none"},
        "queries": {"captions": ["a", "b", "c"], "split": {"train": 1, "validation": 1, "test": 1}},
        "candidates": {"policy": "all"},
        "teacher": {"name": "abu_plus", "alpha": 1e-5},
        "evaluation": {"cutoffs": [500], "validation_cutoff": 500},
    }
    return Context(PipelineConfig.model_validate(config), "none")


def mapped_features(folder: Path, samples: int, dims: int) -> torch.Tensor:
    path, draw = folder / "features.npy", np.random.default_rng(1)
    written = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(samples, dims))
    for start in range(0, samples, 100_000):
        written[start : start + 100_000] = draw.standard_normal((min(100_000, samples - start), dims), np.float32)
    written.flush()
    del written
    return torch.from_numpy(np.load(path, mmap_mode="r+"))


def anonymous_gigabytes() -> float:
    """What this process holds now that no file is behind, mapped features and code left out."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**20
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("queries", 500), ("candidates", 10_000), ("samples", 10_000_000), ("dims", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = context_of(folder)
        ranks = write_snapshot(context.workspace, given.queries, given.candidates, given.samples)
        features = mapped_features(folder, given.samples, given.dims)
        queries = torch.randn(given.queries, given.dims, generator=torch.Generator().manual_seed(2))
        names = [f"q{number:05d}" for number in range(given.queries)]
        packages = ", ".join(f"{each} {version(each)}" for each in ("torch", "numpy", "pyarrow"))
        print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}")
        print("| step | seconds | memory now, without mapped files |\n| --- | ---: | ---: |")

        def step(what: str, started: float) -> float:
            print(f"| {what} | {time.perf_counter() - started:.1f} | {anonymous_gigabytes():.2f} GB |", flush=True)
            return time.perf_counter()

        at = time.perf_counter()
        rows = torch.arange(given.queries)
        pairs = rank_pairs(context.workspace, ranks, names, rows, given.samples, standardised=False)
        at = step(f"{len(pairs):,} labelled pairs", at)
        scores = candidate_scores(context.workspace, ranks, names)
        at = step("scores of the candidates", at)
        head = RankHead(given.dims).eval().requires_grad_(False)
        rankings = untuned_cosines(scores, queries, features), tuned_cosines(scores, head, queries, features)
        at = step(f"cosines, of {len(scores.members):,} samples, untuned and by the head", at)
        for ranking in rankings:
            for teacher, mine, known in zip(scores.scores, ranking, scores.known, strict=True):
                agreement(teacher[known][None], mine[known][None], [500, 1000, 4000])
        step("all measures of both rankings", at)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"\nPeak {peak:.2f} GB, the mapped features included ({features.nbytes / 2**30:.2f} GB on disk).")


if __name__ == "__main__":
    main()
