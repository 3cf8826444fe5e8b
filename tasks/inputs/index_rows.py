"""Which training sample each row of an index of one's own is: a table made once, and mapped."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.clip_index import KEY, ROW, ClipIndex
from storage_schemas.commit import Manifest, commit, input_key
from storage_schemas.files import local_copy
from tasks.artifact import Artifact, Made, once
from tasks.config.inputs import CandidatesConfig
from tasks.context import Context
from tasks.progress import stage


def candidate_index(config: CandidatesConfig) -> ClipIndex | None:
    """Return the index of one's own that names candidates, where there is one."""
    return None if config.index is None else ClipIndex(config.index.folder, config.index.file)


@functools.lru_cache(maxsize=4)
def _checked(index: ClipIndex) -> ClipIndex:
    index.check()
    return index


def opened(config: CandidatesConfig) -> ClipIndex:
    """Return `candidate_index`, looked at once.

    Raises:
        StoreError: its folder has no index or no metadata.
    """
    index = candidate_index(config)
    assert index is not None
    return _checked(index)


def join_rows(context: Context, samples: Artifact) -> Made:
    """Make the table of the training sample of each row, of int64; -1 where data.shards has none.

    Rows and samples are compared by 64 bits of a hash of their values, sixteen bytes a sample in memory: among 400
    million rows and 91 million samples two that differ meet with a probability of 0.002. Of rows or samples of one
    value each row is the first of these samples.

    Raises:
        UsageError: no row is a sample.
    """
    index, config = opened(context.config.candidates), context.config.candidates.index
    assert config is not None
    key = input_key("rows of an index", index.key, config.match, samples.key, samples.path.parent.name)
    path = context.workspace.index_rows(key)

    def make(started: float) -> Manifest:
        rows, found = index.rows, 0

        def write(temporary: Path) -> None:
            nonlocal found
            table = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=(rows,))
            found = (_by_number if config.match == ROW else _by_value)(index, config.match, samples, table)
            table.flush()
            if not found:
                raise UsageError(_none_found(index, config.match))

        return commit(path, write, key=key, rows=lambda: found, started=started)

    return once(Artifact("rows of the index", key, path, 0), path, make, alone_in=context.workspace)


def map_rows(made: Made) -> NDArray[np.int64]:
    """Map the table, (rows,): only what is looked at is read."""
    table: NDArray[np.int64] = np.load(local_copy(made.artifact.path), mmap_mode="r")
    return table


def _none_found(index: ClipIndex, match: str) -> str:
    field = "key of its tar" if match == KEY else f"field {match} of its .json in the tar"
    return (
        f"candidates.index: no row of {index.folder} is a sample of data.shards by the {field}: set "
        "candidates.index.match to what tells them, or fetch the images that `fastgda candidates CONFIG --list` names"
    )


def _by_number(index: ClipIndex, match: str, samples: Artifact, table: NDArray[np.int64]) -> int:
    """Fill the table from the rows that samples name themselves; return how many samples are rows.

    Raises:
        UsageError: a sample names a row that there is not.
    """
    table[:] = -1
    found = 0
    for first, values in _values(samples, match):
        named = [(number, value) for number, value in enumerate(values, first) if value is not None]
        if not named:
            continue
        train_ids, rows = (np.array(each, np.int64) for each in zip(*_numbered(named), strict=True))
        if rows.min() < 0 or rows.max() >= len(table):
            raise UsageError(
                f"candidates.index: a sample's {match} is {int(rows.max()):,} and the index has {len(table):,} rows: "
                "data.shards are of another index"
            )
        table[rows[::-1]] = train_ids[::-1]
        found += len(rows)
    return found


def _numbered(named: Iterable[tuple[int, str]]) -> Iterator[tuple[int, int]]:
    for train_id, value in named:
        if not value.lstrip("-").isdigit():
            raise UsageError(f"candidates.index: sample {train_id} has an {ROW} that is no number: {value[:40]}")
        yield train_id, int(value)


def _by_value(index: ClipIndex, match: str, samples: Artifact, table: NDArray[np.int64]) -> int:
    """Fill the table by comparing a column of the metadata with the samples; return how many rows are samples."""
    hashes, train_ids = _hashed_samples(samples, match)
    column, found = index.column(match), 0
    with stage("rows of the index", len(table)) as advance:
        for first, batch in index.batches([column]):
            wanted = _hashes(batch[column].cast(pa.string()).to_pylist())
            place = np.minimum(np.searchsorted(hashes, wanted), max(0, len(hashes) - 1))
            same = hashes[place] == wanted if len(hashes) else np.zeros(len(wanted), bool)
            table[first : first + len(wanted)] = np.where(same, train_ids[place] if len(hashes) else -1, -1)
            found += int(same.sum())
            advance(len(wanted))
    return found


def _hashed_samples(samples: Artifact, match: str) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hash of each sample that has a value, ascending, and its train_id; of equal ones the first alone."""
    hashes, train_ids = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for first, values in _values(samples, match):
        there = [number for number, value in enumerate(values) if value is not None]
        hashes.append(_hashes([values[number] for number in there]))
        train_ids.append(first + np.array(there, np.int64))
    distinct, places = np.unique(np.concatenate(hashes), return_index=True)
    return distinct, np.concatenate(train_ids)[places]


def _values(samples: Artifact, match: str) -> Iterator[tuple[int, list[str | None]]]:
    """Yield number of the first sample, and what each sample has to compare, as text; None where it has nothing."""
    column = "key" if match == KEY else "metadata"
    first = 0
    for rows in tables.read_in_blocks(samples.path, tables.SAMPLES, [column]):
        texts = rows[column].to_pylist()
        yield first, texts if match == KEY else [_field(text, match) for text in texts]
        first += len(texts)


def _field(metadata: str, name: str) -> str | None:
    value = json.loads(metadata).get(name)
    return None if value in (None, "") else str(value)


def _hashes(values: Iterable[str | None]) -> NDArray[np.uint64]:
    """Return the first eight bytes of a BLAKE2b of each text; of no text that of an empty one, which no sample has."""
    joined = b"".join(hashlib.blake2b((value or "").encode(), digest_size=8).digest() for value in values)
    return np.frombuffer(joined, np.uint64)
