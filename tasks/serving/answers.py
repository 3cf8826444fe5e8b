"""An answer to an attribution query: the training samples, and what tells how far to believe them.

Python, the command line and HTTP give the same answer; `as_json` is what the latter two write.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Tier = Literal["fast", "sketch", "exact"]
Way = Literal["fast", "sketch", "exact", "images", "captions"]
"""A tier, or the untuned features of one kind."""


@dataclass(frozen=True)
class Hit:
    """One training sample of an answer.

    similarity: inner product of the head's vectors, of tier fast; None of the others.
    score, standard_error: the teacher's, or of tier fast what it is predicted to be; None where that is not known.
    predicted_rank: normalised rank among the samples that the teacher would score, in (0, 1].
    metadata: further columns of its sample: what the tar's .json holds.
    duplicates: train_ids of samples whose images look the same, which are folded under this one.
    """

    rank: int
    train_id: int
    key: str
    captions: list[str]
    shard: str
    offset: int
    similarity: float | None = None
    score: float | None = None
    standard_error: float | None = None
    predicted_rank: float | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    duplicates: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Measure:
    """One figure of a tier, over test queries: its standard error is None where it is not known."""

    name: str
    value: float
    error: float | None
    queries: int


@dataclass(frozen=True)
class Agreement:
    """How far answers of a tier agree with the teacher's, as it was measured on queries that chose nothing.

    measure, value, error: the first figure; value is None where nothing was measured.
    error: the standard error of the value; None where it is not known. note: a warning of the judges, or empty.
    measures: all figures; of models that were trained again, `lds` is how well this tier predicts their losses.
    """

    measure: str
    value: float | None
    error: float | None
    teacher: str
    note: str = ""
    measures: list[Measure] = field(default_factory=list)


@dataclass(frozen=True)
class Versions:
    """What an answer was made of: number of the published state, its run and snapshot, head and index.

    index_kind: FAISS's name of it; recall_at_10, recall_at_100: against exact search, None where not measured.
    """

    published: int
    run: str
    snapshot: str
    head: str | None
    index: str | None
    index_kind: str = ""
    vectors: int = 0
    recall_at_10: float | None = None
    recall_at_100: float | None = None


@dataclass(frozen=True)
class Column:
    """The same question answered in another way, to be seen beside an answer.

    way: another tier; or images, captions: the nearest by the untuned features of this kind, which no teacher taught.
    space: the encoders of these features; empty of a tier.
    hits: as many as the answer has. agreement: of this way with the teacher.
    notes: what to know of this column, a line each.
    """

    way: Way
    space: str
    hits: list[Hit]
    agreement: Agreement
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Answer:
    """The training samples that influenced an image most, best first.

    lowering: those that lower its likelihood most. similar: those that look alike and are not among the hits.
    notes: what to know of this answer, a line each: why a list is empty, or a figure is missing.
    influence: of tiers that score all samples, what the hits hold of all influence: see `Influence`.
    beside: the same question in other ways, where that was asked for: see `Column`.
    lineage: names versions, question and settings: the same question to the same versions has the same one.
    """

    tier: Tier
    hits: list[Hit]
    lowering: list[Hit]
    similar: list[Hit]
    agreement: Agreement
    versions: Versions
    lineage: str
    seconds: float
    influence: Influence | None = None
    notes: list[str] = field(default_factory=list)
    beside: list[Column] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the answer as plain values, in order."""
        return asdict(self)


@dataclass(frozen=True)
class Influence:
    """Sums over all samples that were scored: of scores above and below 0, and the share of the former in the hits."""

    scored: int
    positive: float
    negative: float
    share: float
