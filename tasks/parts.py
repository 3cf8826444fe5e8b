"""The parts of a run: files of one kind, each made, committed and tried again alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from storage_schemas.commit import Manifest, committed
from storage_schemas.files import AnyPath
from storage_schemas.listings import committed_parts
from storage_schemas.workspace import Workspace, part
from tasks.artifact import Artifact
from tasks.progress import stage


class RunRefused(RuntimeError):
    """The parts of a run are complete and cannot be right."""


@dataclass(frozen=True)
class Standing:
    """Numbers of the parts that are not committed, and the seconds of work behind those that are."""

    missing: list[int]
    seconds: float


class Parts(ABC):
    """The files of one kind that together are an artifact.

    kind: the name in the run's files, which tells checkpoints apart; title: what people read while parts are made.
    suffix: of a part's file name.
    after_scores: score shards make most of these parts as they go; what they leave is made when they are done.
    of_queries: their rows are queries, so that a new query needs one more: its seconds are a part of an answer's.
    when_judged: made when the run is judged, and not when it is curated.
    artifact: the folder of the parts, their key, their rows together.
    """

    kind: str
    title: str
    suffix: ClassVar[str] = "parquet"
    after_scores: ClassVar[bool] = False
    of_queries: ClassVar[bool] = False
    when_judged: ClassVar[bool] = False
    artifact: Artifact

    @classmethod
    def together(cls, workspace: Workspace, key: str, rows: int) -> Artifact:
        """The artifact that the parts are, whether or not they are there yet; it lies where the kind says."""
        return Artifact(cls.kind, key, workspace.parts(cls.kind, key), rows)

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of parts."""

    def path(self, number: int) -> AnyPath:
        """Return the path of a part, which need not be made yet."""
        return part(self.artifact.path, number, self.suffix)

    def key(self, number: int) -> str:
        """Return a hash of everything that the part depends on."""
        return self.artifact.key

    @abstractmethod
    def rows(self, number: int) -> int:
        """Return the rows planned in a part, for progress."""

    @abstractmethod
    def make(self, number: int) -> Manifest:
        """Compute and commit one part."""

    def made(self, number: int) -> Manifest | None:
        """Return the manifest of one part, None as long as it is not there."""
        return committed(self.path(number), self.key(number))

    def committed(self) -> dict[int, Manifest]:
        """Return the manifests of the parts that are there, by number, from one listing."""
        manifests = committed_parts(self.artifact.path, self.artifact.key)
        paths = {number: self.path(number).name for number in range(self.count)}
        return {number: manifests[name] for number, name in paths.items() if name in manifests}

    def standing(self) -> Standing:
        """Return how far the parts are, from one listing."""
        there = self.committed()
        missing = [number for number in range(self.count) if number not in there]
        return Standing(missing, sum(manifest.seconds for manifest in there.values()))

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not committed."""
        return self.standing().missing

    def make_missing(self) -> None:
        """Make what is missing here and now, one part after the other."""
        missing = self.missing()
        with stage(self.title, sum(map(self.rows, missing))) as advance:
            for number in missing:
                self.make(number)
                advance(self.rows(number))

    def check(self) -> None:  # noqa: B027  # most kinds have nothing to check
        """Raise `RunRefused` where the parts are complete and cannot be right."""
