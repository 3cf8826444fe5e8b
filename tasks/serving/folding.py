"""Near-duplicates in an answer: images that look the same are one hit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.inputs.looks import LOOK_BYTES, same_looks


@dataclass(frozen=True)
class Folded:
    """One place of an answer: the sample that is named, and those below it in the order that look the same.

    place: of the sample, in the order that was folded.
    """

    place: int
    duplicates: list[int] = field(default_factory=list)


ROWS_AT_ONCE = 100_000


class Looks:
    """What tells which samples of a table look the same: the same bytes, or hashes that are near.

    Samples that an earlier release indexed have no hash, and are compared by their bytes alone.
    """

    def __init__(self, samples: pa.Table) -> None:
        # Some rows at a time: as Python's own objects all of them would take ten times the room.
        batches = samples.select(["image_sha256", "image_look"]).to_batches(max_chunksize=ROWS_AT_ONCE)
        several = [_numbers(batch) for batch in batches] or [_numbers(samples.slice(0, 0))]
        self._bytes, self._hashed, self._looks = map(np.concatenate, zip(*several, strict=True))

    def fold(self, train_ids: NDArray[np.int64], k: int) -> list[Folded]:
        """Return the first k places of an order of samples, those that look like an earlier one put under it.

        Args:
            train_ids: best first.
            k: how many places.
        """
        above = self._alike(train_ids)
        if not above:
            return [Folded(place) for place in range(min(k, len(train_ids)))]
        found: dict[int, Folded] = {}
        for place, train_id in enumerate(train_ids.tolist()):
            head = next((other for other in above.get(place, []) if other in found), None)
            if head is not None:
                found[head].duplicates.append(train_id)
            elif len(found) < k:
                found[place] = Folded(place)
        return list(found.values())

    def _alike(self, train_ids: NDArray[np.int64]) -> dict[int, list[int]]:
        """Return the earlier places whose samples look the same, by place."""
        digests = self._bytes[train_ids]
        pairs = [np.empty((0, 2), np.int64)]
        if len(set(digests.tolist())) < len(digests):
            pairs = [np.argwhere(np.triu(digests[:, None] == digests[None], k=1))]
        hashed = np.flatnonzero(self._hashed[train_ids])
        if len(hashed):
            pairs.append(hashed[same_looks(self._looks[train_ids[hashed]])])
        above: dict[int, list[int]] = {}
        for first, later in np.concatenate(pairs).tolist():
            above.setdefault(later, []).append(first)
        return above


def _numbers(
    samples: pa.RecordBatch | pa.Table,
) -> tuple[NDArray[np.uint64], NDArray[np.bool_], NDArray[np.uint8]]:
    """Return the first 64 bits of each digest, which samples have a hash, and these, (n, LOOK_BYTES)."""
    digests = np.array([int(digest[:16], 16) for digest in samples["image_sha256"].to_pylist()], np.uint64)
    hashes = samples["image_look"].to_pylist()
    hashed = np.array([len(each) == LOOK_BYTES for each in hashes], np.bool_)
    whole = b"".join(each if len(each) == LOOK_BYTES else bytes(LOOK_BYTES) for each in hashes)
    return digests, hashed, np.frombuffer(whole, np.uint8).reshape(len(hashes), LOOK_BYTES)
