"""Layout of a workspace: one folder that holds everything a pipeline knows.

What depends on inputs lies in a folder named after its input key, so changed settings never
overwrite the results of others, and a repeated run finds what it made before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    root: Path

    def samples(self, key: str) -> Path:
        return self.root / "samples" / key / "samples.parquet"

    def rejected_samples(self, key: str) -> Path:
        return self.root / "samples" / key / "rejected.parquet"

    def latents(self, key: str) -> Path:
        return self.root / "latents" / key

    def features(self, encoder: str, key: str) -> Path:
        return self.root / "features" / encoder / key

    def queries(self, key: str) -> Path:
        return self.root / "queries" / key / "queries.parquet"

    def curvature(self, key: str) -> Path:
        return self.root / "curvature" / key / "fisher.safetensors"

    def updates(self, key: str) -> Path:
        return self.root / "updates" / key

    def base_losses(self, key: str) -> Path:
        return self.root / "base_losses" / key

    def candidates(self, run: str) -> Path:
        return self.root / "candidates" / run / "part-00000.parquet"

    def scores(self, run: str) -> Path:
        return self.root / "scores" / run

    def exact_check(self, run: str) -> Path:
        return self.root / "exact_checks" / run

    def teacher_check(self, key: str) -> Path:
        return self.root / "teacher_checks" / f"{key}.parquet"

    def ranks(self, run: str) -> Path:
        return self.root / "ranks" / run / "part-00000.parquet"

    def run(self, run: str) -> Path:
        return self.root / "runs" / f"{run}.json"

    def head(self, version: str) -> Path:
        return self.root / "heads" / version

    def index(self, version: str) -> Path:
        return self.root / "indexes" / version

    def metrics(self, key: str) -> Path:
        return self.root / "metrics" / f"{key}.parquet"

    def report(self, run: str) -> Path:
        return self.root / "reports" / run / "report.html"

    @property
    def current(self) -> Path:
        """JSON that names the published run, head, index and metrics; SQL and `attribute` answer from it."""
        return self.root / "current.json"

    @property
    def catalog(self) -> Path:
        return self.root / "catalog.duckdb"


def part(folder: Path, number: int, suffix: str = "parquet") -> Path:
    """Path of one part of a sharded table or tensor."""
    return folder / f"part-{number:05d}.{suffix}"
