"""Join what was read from the tars, part by part, into the tables of samples and of what was rejected.

Train_ids follow from the order of the tars alone, however they were cut into parts and whoever read these. No more than
one part is in memory at a time, and 9 bytes a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage_schemas import tables
from tasks.inputs.tars import taken_key

Part = Callable[[Sequence[str]], pa.Table]  # returns these columns of `tables.SCANNED`
_KEPT = [name for name in tables.SAMPLES.schema.names if name != "train_id"]


class Joined:
    """Parts of scanned tars, joined.

    rows: number of samples; rejected: rows of `tables.REJECTED_SAMPLES`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        hashes = [_hashes(part) for part in parts]
        repeated = _repeated(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
        self._chosen: list[NDArray[np.bool_]] = []
        rejected = [tables.REJECTED_SAMPLES.schema.empty_table()]
        seen: dict[str, str] = {}
        for part, of_part in zip(parts, hashes, strict=True):
            chosen, rejections = _parted(part, np.isin(of_part, repeated), seen)
            self._chosen.append(chosen)
            rejected.append(rejections)
        self.rows = sum(int(chosen.sum()) for chosen in self._chosen)
        self.rejected = pa.concat_tables(rejected)

    def samples(self) -> Iterator[pa.Table]:
        """Yield the samples part by part, rows of `tables.SAMPLES`."""
        first = 0
        for part, chosen in zip(self._parts, self._chosen, strict=True):
            rows = part(_KEPT).filter(pa.array(chosen))
            train_ids = pa.array(np.arange(first, first + rows.num_rows))
            yield tables.SAMPLES.filled(rows.append_column("train_id", train_ids), tables.SAMPLES.schema.names)
            first += rows.num_rows

    def several_pictures(self) -> Iterator[str]:
        """Yield the tar of each sample whose image's file holds several pictures."""
        for part, chosen in zip(self._parts, self._chosen, strict=True):
            rows = part(["shard", "pictures"]).filter(pa.array(chosen))
            yield from rows.filter(pc.greater(rows["pictures"], 1))["shard"].to_pylist()


def _hashes(part: Part) -> NDArray[np.uint64]:
    """Return 64 bits of a hash of each row's key; those of rows without a sample are 0."""
    rows = part(["key", "reason"])
    keys, usable = rows["key"].to_pylist(), pc.equal(rows["reason"], "").to_pylist()
    found = (
        hashlib.blake2b(key.encode(), digest_size=8).digest() if is_sample else bytes(8)
        for key, is_sample in zip(keys, usable, strict=True)
    )
    return np.frombuffer(b"".join(found), np.uint64)


def _repeated(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the hashes that occur more than once, each once, but for 0."""
    ordered = np.sort(hashes)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return again[again != 0]


def _parted(part: Part, suspected: NDArray[np.bool_], seen: dict[str, str]) -> tuple[NDArray[np.bool_], pa.Table]:
    """Return which rows of a part are samples, and what is rejected, in order.

    Args:
        part: to be read.
        suspected: rows whose key may be one that another row has.
        seen: the tar of the first sample of each such key up to here; grows.
    """
    rows = part(tables.REJECTED_SAMPLES.schema.names)
    reasons, chosen = rows["reason"].to_pylist(), pc.equal(rows["reason"], "").to_numpy().astype(bool)
    for row in np.flatnonzero(suspected).tolist():
        key, shard = rows["key"][row].as_py(), rows["shard"][row].as_py()
        if key in seen:
            reasons[row], chosen[row] = taken_key(seen[key]), False
        else:
            seen[key] = shard
    schema = tables.REJECTED_SAMPLES.schema
    told = rows.set_column(rows.schema.names.index("reason"), "reason", pa.array(reasons, pa.string()))
    return chosen, told.filter(pa.array(~chosen)).select(schema.names).cast(schema)
