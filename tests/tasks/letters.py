"""A run whose parts are files of a few bytes, taught by a family of teachers of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastgda_core.diffusion.precision import Precision
from fastgda_core.teachers.registry import TEACHERS
from storage_schemas.commit import Manifest, commit
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.parts import Parts
from tasks.teaching.cost import KindCost, Size
from tasks.teaching.families import Artifacts, BlockScores
from tasks.teaching.run import Run
from tests.storage_schemas.workspaces import plan_run
from tests.tasks.configs import document

RUN, LETTERS, SAMPLES = "run-1", 5, 4


@dataclass(frozen=True)
class LetterTeacher:
    family: ClassVar[str] = "letters"
    settings: ClassVar[frozenset[str]] = frozenset()
    redrawn: ClassVar[bool] = False

    def check_precision(self, precision: Precision) -> None:
        """Any will do."""


class LetterParts(Parts):
    """One letter a part."""

    kind, title, suffix = "letters", "all letters", "txt"

    def __init__(self, family: Letters, artifact: Artifact) -> None:
        self.family, self.artifact = family, artifact

    @property
    def count(self) -> int:
        return self.artifact.rows

    def rows(self, number: int) -> int:
        return 1

    def make(self, number: int) -> Manifest:
        self.family.begin("letters", number)
        letter = chr(ord("a") + number).encode()
        started, key = time.monotonic() - self.family.seconds, self.family.written_key or self.key(number)
        return commit(self.path(number), lambda path: path.write_bytes(letter), key=key, rows=1, started=started)


@dataclass
class Letters:
    """See `tasks.teaching.families.Family`. Query n scores sample i with 10 n + i.

    faults: what goes wrong the next times when a part is begun, by kind and number: an error, or something to do.
    begun: the parts that were begun.
    """

    faults: dict[tuple[str, int], list[BaseException | Callable[[], object]]] = field(default_factory=dict)
    begun: list[tuple[str, int]] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    written_key: str = ""
    seconds: float = 0.0

    def begin(self, kind: str, number: int) -> None:
        self.begun.append((kind, number))
        for fault in self.faults.get((kind, number), [])[:1]:
            self.faults[kind, number].remove(fault)
            if isinstance(fault, BaseException):
                raise fault
            fault()

    def check(self, context: Context) -> None:
        """All is well."""

    def artifacts(self, context: Context, samples: Artifact, queries: Artifact) -> list[Artifact]:
        return [Artifact("letters", "letters", context.workspace.root / "updates" / "letters", LETTERS)]

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        return [LetterParts(self, artifacts["letters"])]

    def key(self, context: Context, artifacts: Artifacts) -> str:
        return "letters"

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        return 1, None

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        (number,) = query_numbers
        self.begin("scores", number)
        good = train_ids[~np.isin(train_ids, list(self.left_out))]
        scores = torch.from_numpy(10.0 * number + good)[None]
        return BlockScores(good, scores, torch.full_like(scores, torch.nan), self.left_out)

    def costs(self, config: PipelineConfig, size: Size) -> list[KindCost]:
        return [KindCost("letters", LETTERS, LETTERS, 10.0 * LETTERS), KindCost("scores", 3, 12, 60.0)]


def taught_by_letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    """The family, which a configuration with the teacher `letters` finds."""
    family = Letters()
    module = ModuleType("tasks.teaching.letters")
    module.__dict__["FAMILY"] = family
    monkeypatch.setitem(TEACHERS, "letters", LetterTeacher())
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return family


def run_of(root: Path, **changes: object) -> Run:
    """Three queries against four samples: five letters, then three score shards."""
    config = PipelineConfig.model_validate(document(workspace=str(root), teacher={"name": "letters"}, **changes))
    context = Context(config, "model")
    record, workspace = plan_run(root, RUN, samples=SAMPLES), context.workspace
    workspace.run(RUN).unlink()  # to be planned by whoever begins the run
    places = {
        "samples": (workspace.file(record.samples or ""), SAMPLES),
        "queries": (workspace.file(record.queries or ""), 3),
        "letters": (workspace.root / "updates" / "letters", LETTERS),
        "candidates": (workspace.candidates(RUN), 12),
        "scores": (workspace.scores(RUN), 12),
    }
    keys = {"candidates": RUN, "scores": RUN}
    return Run(context, {name: Artifact(name, keys.get(name, "letters"), *at) for name, at in places.items()})
