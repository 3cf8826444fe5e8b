"""Shares as Python, the command line and HTTP tell them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tasks.serving.answers import Tier

Beyond = Literal["more", "less", ""]
Source = Literal["pairs", "agreement", "groups", "calibration", "unknown"]


@dataclass(frozen=True)
class Share:
    """The share of one payee.

    share: of the positive influence, mean over the queries; all payees' add up to 1.
    standard_error: None where nothing is known of it. noise_error, query_error: its parts, by the noise of the scores
        and by the spread between queries.
    low, high: interval, of 95 % for all payees together. proven: whether it lies above 0.
    signal_to_noise: what of the share is not what noise pays to everybody, at least, by its standard error.
    samples: how many samples the payee has. queries: on how many queries they have any influence.
    uniform: what the payee would have if all samples were paid the same. lift: share by that.
    beyond_uniform: more or less where the interval lies above or below that, else empty.
    influence: sum of the positive influence over the queries, in units of scores.
    """

    payee: str
    share: float
    standard_error: float | None
    low: float | None
    high: float | None
    signal_to_noise: float | None
    proven: bool
    samples: int
    queries: int
    uniform: float
    lift: float
    beyond_uniform: Beyond
    noise_error: float | None
    query_error: float | None
    influence: float


@dataclass(frozen=True)
class SharesAnswer:
    """Shares of all payees, largest first, and what they were made of.

    by: the column of samples, or the key of their metadata, that names the payee.
    queries: how many they are the mean of. silent: how many more have no positive influence, and count for nothing.
    level: of all intervals together.
    noise: where the noise of scores is known from: each pair's standard error, the agreement with another teacher, or
        nowhere. Of a picture: groups of its own noise, or how far predictions were off on scored queries.
    snapshot: the published scores. tombstone: number of the newest take-down; what is taken down has no share.
    tier: exact for published scores, else that of the scores.
    judged: how well the teacher predicts the losses of models that were trained again; empty where it was never held
        against any. warnings: what its checks found wrong with it, and
        whether samples that were added to the index are left out.
    """

    by: str
    rows: list[Share]
    queries: int
    silent: int
    level: float
    noise: Source
    snapshot: str
    tombstone: int
    tier: Tier
    judged: str
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        """Return the answer as plain values, in order."""
        return asdict(self)
