"""Predictions beside the hits of tier fast: the teacher's normalised rank and score, where the head is calibrated."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from fastgda_core.search.searcher import Searcher
from storage_schemas.heads.records import Calibration
from tasks.distilling.calibration import LEAST_EXPLAINED, drawn_samples, interpolated

KEPT = 100_000  # questions whose spread is kept
_NONE = "the teacher's {} is not predicted: {}"


class Predictions:
    """What a head's calibration says of similarities; concurrent calls may share it.

    Args:
        calibration: None: there is none.
        searcher: the index, whose similarities of drawn samples tell how near a sample is for its query.
        samples: how many there are.
    """

    def __init__(self, calibration: Calibration | None, searcher: Searcher, samples: int) -> None:
        self._calibration, self._searcher = calibration, searcher
        drawn = np.zeros(samples, np.bool_)
        drawn[drawn_samples(samples)] = True
        self._drawn, self._count = searcher.selection(drawn), int(drawn.sum())
        self._spreads: dict[bytes, tuple[float, float]] = {}

    @property
    def ranks(self) -> bool:
        """Whether ranks are predicted: the curve explains enough of what test queries' ranks are."""
        return self._calibration is not None and self._calibration.rank_explained >= LEAST_EXPLAINED

    @property
    def scores(self) -> bool:
        """Whether scores are predicted."""
        return self._calibration is not None and self._calibration.score_explained >= LEAST_EXPLAINED

    @property
    def notes(self) -> list[str]:
        """What is not predicted and why, a line each."""
        if self._calibration is None:
            return [_NONE.format("rank and score", "this head was never calibrated: `fastgda evaluate CONFIG` does it")]
        explained = {"rank": self._calibration.rank_explained, "score": self._calibration.score_explained}
        queries = self._calibration.test_queries
        return [
            _NONE.format(name, f"on {queries} test queries similarity explains {max(share, 0):.0%} of it")
            for name, share in explained.items()
            if share < LEAST_EXPLAINED
        ]

    def of(self, vector: NDArray[np.float32], similarity: NDArray[np.float32]) -> dict[str, NDArray[np.floating]]:
        """Return the predictions for some samples of one question, by field of a hit, (n,) each.

        Args:
            vector: of the question, (1, width).
            similarity: of the samples, (n,).
        """
        found: dict[str, NDArray[np.floating]] = {}
        if self._calibration is None:
            return found
        near = similarity.astype(np.float64)
        if self.ranks:
            mean, deviation = self._spread(vector)
            log_rank, _ = interpolated(self._calibration.rank, (near - mean) / (deviation or 1.0))
            found["predicted_rank"] = np.exp(log_rank)
        if self.scores:
            found["score"], found["standard_error"] = interpolated(self._calibration.score, near)
        return found

    def _spread(self, vector: NDArray[np.float32]) -> tuple[float, float]:
        """Return mean and deviation of the similarities of the drawn samples to a question."""
        key = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
        known = self._spreads.get(key)
        if known is None:
            similarity = self._searcher.search(vector, self._count, allowed=self._drawn)[0][0]
            there = similarity[np.isfinite(similarity)].astype(np.float64)
            known = float(there.mean()), float(there.std())
            if len(self._spreads) < KEPT:
                self._spreads[key] = known
        return known
