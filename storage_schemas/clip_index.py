"""The folder of a similarity index that others made, as clip-retrieval and autofaiss lay it out.

`image.index` is the FAISS index, `metadata/` holds its rows in order: Parquet files (`metadata_0000.parquet`, by name),
or the Arrow files that clip-retrieval makes of these. `img_emb/*.npy` are the embeddings, which the folder of the
index need not have. Columns are those that img2dataset and clip-retrieval give: `image_path` (the key of a sample in
its tar), `caption`, `url` and others.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from storage_schemas.commit import input_key
from storage_schemas.errors import StoreError
from storage_schemas.files import Stamps, replace_through, stamps

ROW = "index_row"  # in a list to fetch, and so in the .json of what was fetched
KEY = "key"
_KEYS = ("key", "image_path")  # columns that hold a sample's key in its tar, the first that is there
_FETCHED = (("url", "url"), ("caption", "caption"), ("text", "caption"), *((name, name) for name in _KEYS))
_BATCH_ROWS = 65_536
_WINDOW, _WINDOWS = 2**16, 64  # bytes, and how many such pieces of a file tell it from others


@dataclass(frozen=True)
class ClipIndex:
    """An index with its metadata: `file` in `folder`, rows of `metadata/` beside it."""

    folder: Path
    file: str = "image.index"

    @property
    def path(self) -> Path:
        return self.folder / self.file

    @property
    def metadata(self) -> list[Path]:
        """The files of the metadata, in the order of the rows.

        Raises:
            StoreError: there are none, or not of one kind.
        """
        found = {kind: sorted((self.folder / "metadata").glob(f"*.{kind}")) for kind in ("parquet", "arrow")}
        several = [files for files in found.values() if files]
        if len(several) != 1:
            what = "both Parquet and Arrow files" if several else "neither Parquet nor Arrow files"
            raise StoreError(
                f"{self.folder / 'metadata'} holds {what}: it has to hold the rows of the index, in its order, in "
                "files of one kind"
            )
        return several[0]

    def check(self) -> None:
        """Check that the folder has an index and metadata.

        Raises:
            StoreError: it has not.
        """
        if not self.path.exists():
            raise StoreError(f"candidates.index: there is no {self.path}: name the folder that clip-retrieval made")
        self.metadata  # noqa: B018  # which looks

    @property
    def rows(self) -> int:
        """The rows of the metadata."""
        return sum(map(_rows_of, self.metadata))

    @property
    def stamps(self) -> Stamps:
        """Path, size and time of every file.

        Raises:
            StoreError: see `check`.
        """
        self.check()
        index = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return stamps([*index, *self.metadata])

    @property
    def key(self) -> str:
        """What tells the index and its metadata from others: sizes and pieces of each file, wherever they lie.

        Four megabytes of a file are read, evenly from all over it: to hash all of an index of 400,000,000 rows would
        take minutes.
        """
        return _key_of(self.stamps)

    def columns(self) -> dict[str, str]:
        """The columns of the metadata, by their name in small letters."""
        return {name.lower(): name for name in _schema(self.metadata[0]).names}

    def column(self, name: str) -> str:
        """Return a column that holds what is asked for, whatever its case; `key` may be `image_path`.

        Raises:
            StoreError: there is none.
        """
        there = self.columns()
        for each in _KEYS if name == KEY else (name.lower(),):
            if each in there:
                return there[each]
        raise StoreError(f"{self.folder / 'metadata'} has no column {name}; it has {', '.join(there.values())}")

    def batches(self, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield number of the first row and rows of some columns, 65,536 or fewer at a time."""
        first = 0
        for path in self.metadata:
            for batch in _batches(path, names):
                yield first, batch
                first += batch.num_rows

    def write_list(self, path: Path, wanted: NDArray[np.bool_]) -> int:
        """Write the rows that are wanted, (rows,), as img2dataset takes them; return how many they are.

        Columns are `url`, `caption`, the key where there is one, and `index_row`. A file that is there is replaced.

        Raises:
            StoreError: the metadata has no column url.
        """
        there = self.columns()
        self.column("url")
        chosen: dict[str, str] = {}
        for name, named in _FETCHED:
            if name in there and named not in chosen.values():
                chosen[there[name]] = named
        written = 0

        def write(temporary: Path) -> None:
            nonlocal written
            schema = pa.schema([*((named, pa.string()) for named in chosen.values()), (ROW, pa.int64())])
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for first, batch in self.batches(list(chosen)):
                    mask = wanted[first : first + batch.num_rows]
                    if mask.any():
                        texts = [batch[name].filter(pa.array(mask)).cast(pa.string()) for name in chosen]
                        writer.write_batch(pa.record_batch([*texts, first + np.flatnonzero(mask)], schema=schema))
                written = int(wanted.sum())

        replace_through(path, write, lambda temporary: None)
        return written


def embedding_blocks(folder: Path) -> Iterator[NDArray[np.float32]]:
    """Yield the embeddings of `*.npy` files in the order of their rows, mapped, 65,536 or fewer at a time.

    Raises:
        StoreError: there are none.
    """
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise StoreError(f"{folder} holds no .npy file: name the folder of the embeddings, as img_emb")
    for path in files:
        mapped = np.load(path, mmap_mode="r")
        for start in range(0, len(mapped), _BATCH_ROWS):
            yield mapped[start : start + _BATCH_ROWS]


def _rows_of(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        return sum(file.get_batch(number).num_rows for number in range(file.num_record_batches))


def _schema(path: Path) -> pa.Schema:
    if path.suffix == ".parquet":
        return pq.read_schema(path)
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).schema


def _batches(path: Path, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=_BATCH_ROWS, columns=list(names))
        return
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        for number in range(file.num_record_batches):
            batch = file.get_batch(number).select(list(names))
            yield from (batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS))


@functools.lru_cache(maxsize=16)
def _key_of(files: Stamps) -> str:
    return input_key("index of one's own", [(Path(path).name, size, _pieces(path, size)) for path, size, _ in files])


def _pieces(path: str, size: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        for place in np.linspace(0, max(0, size - _WINDOW), _WINDOWS).astype(int).tolist():
            file.seek(place)
            digest.update(file.read(_WINDOW))
    return digest.hexdigest()
