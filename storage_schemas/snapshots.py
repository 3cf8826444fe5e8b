"""What readers see: a snapshot of rank labels, and the head and index that answer from it.

A snapshot is a list of immutable files, named after them, so that a training run can say exactly which rows it saw.
`current.json` names the published one; replacing it is the one step in which rows appear, change or go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas import tables
from storage_schemas.commit import input_key
from storage_schemas.compaction import compact
from storage_schemas.errors import StoreError
from storage_schemas.files import remove, write_atomically
from storage_schemas.ledger import Part, RunRecord, read_run, write_ledger
from storage_schemas.workspace import Workspace

LAYOUT_VERSION = "3"  # of current.json and of what it names


class Snapshot(BaseModel):
    """`snapshots/<snapshot>.json`: whose rows, in which files. It never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    snapshot: str
    runs: list[str] = Field(description="a query of several runs has the rows of the last of them")
    rows: int
    queries: int
    parts: list[Part]


class Published(BaseModel):
    """`current.json`: what SQL, `attribute` and the report answer from; paths are relative to the workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout_version: str
    snapshot: str
    run: str = Field(description="the run published last; samples, config and checks are its own")
    teacher: str
    created_at: datetime
    samples: str | None = None
    rejected_samples: str | None = None
    queries: list[str] = Field(default_factory=list)
    candidates: list[str] = Field(default_factory=list)
    base_losses: str | None = Field(default=None, description="folder")
    exact_check: str | None = Field(default=None, description="folder of pairs that the exact teacher scored too")
    metrics: str | None = None
    study: str | None = Field(default=None, description="metrics of a study of its rank labels")
    head: str | None = None
    index: str | None = None
    config: dict[str, object] = Field(description="the pipeline's configuration")


class NotPublished(StoreError):
    """The workspace holds no published run, or one that this release cannot read."""


class CannotPublish(StoreError):
    """These runs cannot stand in one snapshot."""


def read_published(workspace: Workspace) -> Published:
    """Raises NotPublished when no run of this workspace is published."""
    try:
        content = workspace.current.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise NotPublished(
            f"{workspace.root} has no published run: run `fastgda demo` or `fastgda run CONFIG` first, "
            "or name another folder with --workspace"
        ) from None
    try:
        published = Published.model_validate_json(content)
    except ValidationError:
        published = None
    if published is None or published.layout_version != LAYOUT_VERSION:
        raise NotPublished(
            f"{workspace.current} was written by another release: run `fastgda run CONFIG` again, "
            "which reuses the scores that are there and publishes them anew"
        )
    return published


def read_snapshot(workspace: Workspace, snapshot: str) -> Snapshot:
    """Raises NotPublished when there is no such snapshot."""
    try:
        return Snapshot.model_validate_json(workspace.snapshot(snapshot).read_bytes())
    except FileNotFoundError:
        raise NotPublished(f"{workspace.root} has no snapshot {snapshot}") from None


def make_snapshot(
    workspace: Workspace,
    runs: list[str],
    *,
    incomplete: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> Snapshot:
    """Rank labels of some finished runs together: where several scored a query, the rows of the last one stand.

    `incomplete` takes what there is of a run that is not finished.

    Raises:
        CannotPublish: the runs' training samples differ, or one query_id means different images.
        RunUnfinished: a run has shards that are not done.
    """
    records = [read_run(workspace, run) for run in runs]
    _check_agreement(workspace, records)
    queries = [_query_ids(workspace, run) for run in runs]
    parts: list[Part] = []
    for place, run in enumerate(runs):
        whole = compact(workspace, run, incomplete=incomplete, advance=advance)
        replaced = queries[place] & frozenset[str]().union(*queries[place + 1 :])
        # Only the parts that hold replaced queries are made once more.
        parts += (
            compact(workspace, run, without=replaced, incomplete=incomplete, advance=advance) if replaced else whole
        )
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
    write_atomically(workspace.snapshot(name), snapshot.model_dump_json(indent=2).encode() + b"\n")
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


def publish_runs(
    workspace: Workspace,
    runs: list[str],
    *,
    exact_check: str | None = None,
    incomplete: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> Published:
    """Make the rows of these runs what readers see, in one step.

    The head and index that are served stay, as long as a train_id means the same image, until others are promoted.
    Metrics and the exact check stay only where the snapshot stays the same.

    Raises:
        CannotPublish, RunUnfinished: see `make_snapshot`.
    """
    snapshot = make_snapshot(workspace, runs, incomplete=incomplete, advance=advance)
    records = [read_run(workspace, run) for run in runs]
    last = records[-1]
    try:
        before = read_published(workspace)
    except NotPublished:
        before = None
    kept = before if before is not None and before.snapshot == snapshot.snapshot else None
    served = before if before is not None and before.samples == last.samples else None
    published = Published(
        layout_version=LAYOUT_VERSION,
        snapshot=snapshot.snapshot,
        run=last.run,
        teacher=last.teacher,
        created_at=kept.created_at if kept else datetime.now(UTC),
        samples=last.samples,
        rejected_samples=last.rejected_samples,
        queries=list(dict.fromkeys(record.queries for record in records if record.queries)),
        candidates=list(dict.fromkeys(record.candidates for record in records if record.candidates)),
        base_losses=last.base_losses,
        exact_check=exact_check if exact_check or kept is None else kept.exact_check,
        metrics=kept.metrics if kept else None,
        study=kept.study if kept else None,
        head=served.head if served else None,
        index=served.index if served else None,
        config=last.config,
    )
    for run in runs:
        write_ledger(workspace, run)
    write_published(workspace, published)
    return published


def write_published(workspace: Workspace, published: Published) -> None:
    """Replace `current.json`, the step that readers see, then the catalog file."""
    from storage_schemas.views import write_catalog  # it reads what is written here

    write_atomically(workspace.current, published.model_dump_json(indent=2).encode() + b"\n")
    write_catalog(workspace)


def retract_run(workspace: Workspace, run: str) -> Published | None:
    """Take a run's rows out of what readers see, in one step; rows that it had replaced come back.

    None when nothing is left: then readers are told that nothing is published.

    Raises:
        NotPublished: the run is not in the published snapshot.
    """
    published = read_published(workspace)
    runs = read_snapshot(workspace, published.snapshot).runs
    if run not in runs:
        raise NotPublished(f"run {run} is not published; the published snapshot holds: {', '.join(runs)}")
    left = [name for name in runs if name != run]
    if left:
        return publish_runs(workspace, left)
    remove(workspace.current)
    remove(workspace.catalog)
    return None


def read_ranks(workspace: Workspace, snapshot: str, query_ids: Sequence[str] | None = None) -> pa.Table:
    """The rows of a snapshot, or those of some of its queries, by query_id and rank within each part."""
    parts = [rows for _, rows in _read(workspace, snapshot, query_ids)]
    return pa.concat_tables([tables.RANKS.schema.empty_table(), *parts])


def read_influence(workspace: Workspace, snapshot: str, query_ids: Sequence[str]) -> pa.Table:
    """The rows of `read_ranks`, with a score of 0 in place of negative ones where the snapshot's labels tie them."""
    read = _read(workspace, snapshot, query_ids)
    parts = [_positive(rows) if part.negatives == "tie" else rows for part, rows in read]
    return pa.concat_tables([tables.RANKS.schema.empty_table(), *parts])


def _positive(rows: pa.Table) -> pa.Table:
    column = rows.schema.get_field_index("score")
    return rows.set_column(column, rows.schema.field(column), pc.max_element_wise(rows["score"], 0.0))


def _read(workspace: Workspace, snapshot: str, query_ids: Sequence[str] | None) -> Iterator[tuple[Part, pa.Table]]:
    """The rows of each part of a snapshot, all or those of some queries."""
    wanted = None if query_ids is None else sorted(query_ids)
    for part in read_snapshot(workspace, snapshot).parts:
        if wanted is None:
            yield part, tables.read(workspace.file(part.path), tables.RANKS)
        elif mine := [name for name in wanted if part.first_query <= name <= part.last_query]:
            yield part, tables.read(workspace.file(part.path), tables.RANKS, pc.field("query_id").isin(mine))
