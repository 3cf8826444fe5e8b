"""A large table of samples, mapped from an Arrow file: ten million rows are 4 GB, of which a process touches few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from storage_schemas import tables
from storage_schemas.commit import read_manifest
from storage_schemas.files import AnyPath, private_folder, replace_through

MAPPED_FROM = 1_000_000  # rows; fewer are read into memory
CHUNK_ROWS = 1_000_000  # a chunk's texts have to stay below 2 GiB


def map_samples(path: AnyPath) -> pa.Table | None:
    """Return the table of samples of a file, mapped; None where it has few rows.

    The Arrow file is made once, beside a table on disk, or of one in an object store in the folder for temporary files.
    It is named after the table's bytes.
    """
    manifest = read_manifest(path)
    if manifest is None or manifest.rows < MAPPED_FROM:
        return None
    folder = path.parent if isinstance(path, Path) else private_folder("samples")
    mapped = folder / f"samples-{manifest.sha256[:16]}.arrow"
    if not mapped.exists():
        replace_through(mapped, lambda temporary: _write(temporary, path), lambda _: None)
    with pa.memory_map(str(mapped)) as source:
        return pa.ipc.open_file(source).read_all()


def _write(temporary: Path, path: AnyPath) -> None:
    schema = tables.SAMPLES.schema
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for chunk in _chunks(tables.read_in_blocks(path, tables.SAMPLES, schema.names)):
            writer.write_table(chunk)


def _chunks(blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of consecutive blocks, at least `CHUNK_ROWS` together but for the last, in one piece."""
    held: list[pa.Table] = []
    for block in blocks:
        held.append(block)
        if sum(each.num_rows for each in held) >= CHUNK_ROWS:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()
