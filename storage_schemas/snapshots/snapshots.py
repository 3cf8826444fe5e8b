"""A snapshot of rank labels: a list of immutable files, named after them.

By its name a training run says exactly which rows it saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from storage_schemas import tables
from storage_schemas.commit import input_key
from storage_schemas.files import read_whole, write_changed
from storage_schemas.runs.ledger import derive, put_ledger, read_run
from storage_schemas.runs.records import Part, RunRecord
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.published import CannotPublish, NotPublished
from storage_schemas.workspace import Workspace


class Snapshot(BaseModel):
    """`snapshots/<snapshot>.json`: the runs whose rows it holds, and the files of these rows. It never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    snapshot: str
    runs: list[str] = Field(description="a query of several runs has the rows of the last of them")
    rows: int
    queries: int
    parts: list[Part]


def read_snapshot(workspace: Workspace, snapshot: str) -> Snapshot:
    """Read a snapshot.

    Raises:
        NotPublished: there is no such snapshot.
    """
    try:
        return Snapshot.model_validate_json(read_whole(workspace.snapshot(snapshot)))
    except FileNotFoundError:
        raise NotPublished(f"{workspace.root} has no snapshot {snapshot}") from None


def make_snapshot(
    workspace: Workspace,
    runs: list[str],
    *,
    incomplete: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
    known: dict[tuple[str, frozenset[str]], list[Part]] | None = None,
) -> Snapshot:
    """Make a snapshot of some finished runs: where several scored a query, the rows of the last one stand.

    The runs' ledgers are brought up to date beside them.

    Args:
        incomplete: take what there is of a run that is not finished.
        known: parts of runs, by run and the queries left out, from an earlier call; what is made is added.

    Raises:
        CannotPublish: the runs' training samples differ, or one query_id means different images.
        RunUnfinished: a run has shards that are not done.
    """
    records = [read_run(workspace, run) for run in runs]
    _check_agreement(workspace, records)
    queries = [_query_ids(workspace, run) for run in runs]
    known = {} if known is None else known
    parts: list[Part] = []
    for place, run in enumerate(runs):
        replaced = queries[place] & frozenset[str]().union(*queries[place + 1 :])
        # The whole run first: only the parts that hold replaced queries are made once more.
        missing = [without for without in dict.fromkeys((frozenset[str](), replaced)) if (run, without) not in known]
        if missing:
            derived = derive(workspace, run)
            put_ledger(workspace, run, derived)
            for without in missing:
                known[run, without] = compact(
                    workspace, run, without=without, incomplete=incomplete, advance=advance, derived=derived
                )
        parts += known[run, replaced]
    # Two labellings of a run are two snapshots even where all scores are positive.
    labellings = [[part.negatives for part in parts]] if any(part.negatives != "keep" for part in parts) else []
    name = f"{runs[-1]}-{input_key([part.sha256 for part in parts], *labellings)[:8]}"
    snapshot = Snapshot(
        snapshot=name,
        runs=runs,
        rows=sum(part.rows for part in parts),
        queries=sum(part.queries for part in parts),
        parts=parts,
    )
    write_changed(workspace.snapshot(name), snapshot.model_dump_json(indent=2).encode() + b"\n")
    return snapshot


def _query_ids(workspace: Workspace, run: str) -> frozenset[str]:
    return frozenset(tables.read(workspace.plan_queries(run), tables.PLAN_QUERIES)["query_id"].to_pylist())


def _check_agreement(workspace: Workspace, records: list[RunRecord]) -> None:
    first = records[0]
    for record in records[1:]:
        if record.samples != first.samples:
            raise CannotPublish(
                f"runs {first.run} and {record.run} scored different training samples "
                f"({first.samples}, {record.samples}): a train_id would mean two images; publish them apart"
            )
    images: dict[str, str] = {}
    for record in records:
        if record.queries is None:
            continue
        rows = tables.read(workspace.file(record.queries), tables.QUERIES, columns=["query_id", "image_sha256"])
        for query_id, digest in zip(rows["query_id"].to_pylist(), rows["image_sha256"].to_pylist(), strict=True):
            if images.setdefault(query_id, digest) != digest:
                raise CannotPublish(
                    f"query {query_id!r} of run {record.run} has another image than in an earlier run: "
                    "give the new query another query_id"
                )


def read_ranks(workspace: Workspace, snapshot: str, query_ids: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of a snapshot, or those of some of its queries, by query_id and rank within each part."""
    parts = [rows for _, rows in _read(workspace, snapshot, query_ids)]
    return pa.concat_tables([tables.RANKS.schema.empty_table(), *parts])


def read_influence(workspace: Workspace, snapshot: str, query_ids: Sequence[str]) -> pa.Table:
    """Read what `read_ranks` does, with a score of 0 in place of negative ones where the snapshot's labels tie them."""
    read = _read(workspace, snapshot, query_ids)
    parts = [_positive(rows) if part.negatives == "tie" else rows for part, rows in read]
    return pa.concat_tables([tables.RANKS.schema.empty_table(), *parts])


def _positive(rows: pa.Table) -> pa.Table:
    column = rows.schema.get_field_index("score")
    return rows.set_column(column, rows.schema.field(column), pc.max_element_wise(rows["score"], 0.0))


def _read(workspace: Workspace, snapshot: str, query_ids: Sequence[str] | None) -> Iterator[tuple[Part, pa.Table]]:
    """Yield the rows of each part of a snapshot, all or those of some queries."""
    wanted = None if query_ids is None else sorted(query_ids)
    for part in read_snapshot(workspace, snapshot).parts:
        if wanted is None:
            yield part, tables.read(workspace.file(part.path), tables.RANKS)
        elif mine := [name for name in wanted if part.first_query <= name <= part.last_query]:
            yield part, tables.read(workspace.file(part.path), tables.RANKS, pc.field("query_id").isin(mine))
