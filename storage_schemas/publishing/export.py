"""Export a finished run for other programs: one Parquet file, or a folder that Hugging Face `datasets` loads."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.files import replace_through, sync_folders, temporary_name
from storage_schemas.runs.ledger import read_run
from storage_schemas.runs.records import Part, RunRecord
from storage_schemas.snapshots.compaction import compact
from storage_schemas.tables import QUERIES, RANKS
from storage_schemas.tombstones import removed_ids, without
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace


class DestinationTaken(StoreError):
    """Something is already where the export should go."""


class UnknownQueries(StoreError):
    """A run scored queries that its queries file does not hold."""


def export_parquet(workspace: Workspace, run: str, destination: Path) -> None:
    """Write all rows of a finished run as one Parquet file of `tables.RANKS`, by query_id and rank.

    Rows of samples that are taken down are left out; the other ranks stay. The file appears whole or not at all. Memory
    holds one part of the compacted run at a time.

    Args:
        destination: a file that is not there yet; its folder is made.

    Raises:
        DestinationTaken: the file is there.
        UnknownRun, RunUnfinished: there is no such run, or it has shards that are not done.
        ValueError: a file of the run is damaged.
    """
    check_absent(destination)
    parts = compact(workspace, run)
    removed = removed_ids(workspace, read_run(workspace, run).samples)

    def write(temporary: Path) -> None:
        with _writer(temporary, RANKS.schema) as writer:
            for part in parts:
                rows = without(tables.read(workspace.file(part.path), RANKS), removed)
                writer.write_table(rows, row_group_size=RANKS.row_group_rows)

    replace_through(destination, write, lambda temporary: None)
    sync_folders([destination])


def export_datasets(workspace: Workspace, run: str, destination: Path) -> None:
    """Write a finished run as a folder for `datasets.load_dataset(folder)`: Parquet files and a dataset card.

    Rows are those of `export_parquet`, each with its query's caption where the run has a queries file. The folder
    appears whole or not at all.

    Args:
        destination: a folder that is not there yet, or an empty one.

    Raises:
        DestinationTaken: something is in the folder.
        UnknownQueries: the queries file lacks a query of the run.
        UnknownRun, RunUnfinished: there is no such run, or it has shards that are not done.
        ValueError: a file of the run is damaged.
    """
    destination = destination.resolve()
    check_empty(destination)
    record = read_run(workspace, run)
    parts = compact(workspace, run)
    captions = _captions(workspace, record)
    removed = removed_ids(workspace, record.samples)
    schema = RANKS.schema if captions is None else RANKS.schema.insert(1, QUERIES.schema.field("caption"))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=temporary_name("dataset-")) as temporary:
        folder = Path(temporary) / "dataset"
        (folder / "data").mkdir(parents=True)
        written = 0
        for number, part in enumerate(parts):
            path = folder / "data" / f"train-{number:05d}-of-{len(parts):05d}.parquet"
            written += _write_part(workspace, part, path, schema, captions, removed)
        (folder / "README.md").write_text(_card(record, parts, written, schema), encoding="utf-8")
        folder.replace(destination)


def check_absent(destination: Path) -> None:
    """Raise DestinationTaken where there is such a file or folder."""
    if destination.exists():
        raise DestinationTaken(f"{destination} exists: name another file, or delete this one")


def check_empty(destination: Path) -> None:
    """Raise DestinationTaken unless the folder is absent or empty."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise DestinationTaken(f"{destination} is not an empty folder: name another, or delete what is there")


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema.with_metadata(RANKS.metadata),
        compression="zstd",
        use_dictionary=[name for name in (*RANKS.dictionary, "caption") if name in schema.names],
        column_encoding=dict.fromkeys(RANKS.delta, "DELTA_BINARY_PACKED"),
        sorting_columns=[pq.SortingColumn(schema.names.index(name)) for name in RANKS.sorted_by],
    )


def _captions(workspace: Workspace, record: RunRecord) -> pa.Table | None:
    """Return the query_id and caption of each query; None where the run has no queries file."""
    if record.queries is None:
        return None
    found = tables.read(workspace.file(record.queries), tables.QUERIES, columns=["query_id", "caption"])
    planned = tables.read(workspace.plan_queries(record.run), tables.PLAN_QUERIES)["query_id"]
    unknown = planned.filter(pc.invert(pc.is_in(planned, value_set=found["query_id"])))
    if len(unknown):
        raise UnknownQueries(
            f"{record.queries} lacks {len(unknown)} queries of run {record.run} (first: {unknown[0].as_py()!r}): "
            f"run {command(workspace, 'verify')} and the stage that wrote it"
        )
    return found


def _write_part(
    workspace: Workspace,
    part: Part,
    path: Path,
    schema: pa.Schema,
    captions: pa.Table | None,
    removed: NDArray[np.int64],
) -> int:
    """Write the rows of a part, and return how many there are."""
    rows = without(tables.read(workspace.file(part.path), RANKS), removed)
    with _writer(path, schema) as writer:
        # A row group at a time: the captions of millions of rows would not fit one Arrow column.
        for start in range(0, rows.num_rows, RANKS.row_group_rows):
            block = rows.slice(start, RANKS.row_group_rows)
            if captions is not None:
                places = pc.index_in(block["query_id"], value_set=captions["query_id"])
                block = block.add_column(1, schema.field("caption"), captions["caption"].take(places))
            writer.write_table(block.cast(schema))
    return int(rows.num_rows)


_HUB_TYPES = {pa.float64(): "float64", pa.float32(): "float32"}  # the other types have the same name in both


def _card(record: RunRecord, parts: list[Part], rows: int, schema: pa.Schema) -> str:
    """Return README.md of the folder: a YAML head that `datasets` reads, and a text for people."""
    head = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
        "dataset_info": {
            "features": [
                {"name": field.name, "dtype": _HUB_TYPES.get(field.type, str(field.type))} for field in schema
            ],
            "splits": [{"name": "train", "num_examples": rows}],
        },
    }
    meanings = "\n".join(f"| `{field.name}` | {field.metadata[b'comment'].decode()} |" for field in schema)
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# Training data attribution: {record.run}

Each row is {RANKS.comment}: how much a training image influenced a generated image, by the teacher
`{record.teacher}`. {rows:,} rows of {sum(part.queries for part in parts):,} queries.

| | |
| --- | --- |
| run | `{record.run}` |
| teacher | `{record.teacher}` |
| created | {record.created_at:%Y-%m-%d %H:%M} UTC |
| code version | {record.code_version} |
| schema version | {RANKS.version} |

| column | meaning |
| --- | --- |
{meanings}
"""
