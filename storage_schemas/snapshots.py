"""What readers see: a snapshot of rank labels, and the head and index that answer from it.

A snapshot is a list of immutable files, named after them, so that a training run can say exactly which rows it saw.
What is published changes in one step: `published/<number>.json` is created, which fails where the number is taken. So a
writer that another one came before looks again and changes what is there now, and none undoes what another did. The
highest number is what readers see; `current.json` is a copy of it, and one that lags behind does no harm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas import tables
from storage_schemas.commit import input_key
from storage_schemas.compaction import compact
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, create, read_if_there, remove, sync_folders, write_atomically
from storage_schemas.ledger import Part, RunRecord, published_versions, read_run, write_ledger
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
    """`published/<number>.json`: what SQL, `attribute` and the report answer from; paths are those of the workspace."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout_version: str
    version: int = Field(default=0, description="its number; 0 where an earlier release wrote it, as `current.json`")
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
    index_samples: str | None = Field(default=None, description="table that the index's train_ids number")
    config: dict[str, object] = Field(description="the pipeline's configuration")


class NotPublished(StoreError):
    """The workspace holds no published run, or one that this release cannot read."""


class OtherRelease(NotPublished):
    """What is published cannot be read by this release."""


class CannotPublish(StoreError):
    """These runs cannot stand in one snapshot."""


def read_published(workspace: Workspace) -> Published:
    """Raises NotPublished when no run of this workspace is published."""
    _, content = _newest(workspace)
    if content is None:
        raise NotPublished(
            f"{workspace.root} has no published run: run `fastgda demo` or `fastgda run CONFIG` first, "
            "or name another folder with --workspace"
        )
    return _parsed(workspace, content)


def _parsed(workspace: Workspace, content: bytes) -> Published:
    try:
        published = Published.model_validate_json(content)
    except ValidationError:
        published = None
    if published is None or published.layout_version != LAYOUT_VERSION:
        raise OtherRelease(
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
    known: dict[tuple[str, frozenset[str]], list[Part]] | None = None,
) -> Snapshot:
    """Rank labels of some finished runs together: where several scored a query, the rows of the last one stand.

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
        for without in dict.fromkeys((frozenset[str](), replaced)):
            if (run, without) not in known:
                made = compact(workspace, run, without=without, incomplete=incomplete, advance=advance)
                known[run, without] = made
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
    add: bool = False,
    exact_check: str | None = None,
    incomplete: bool = False,
    advance: Callable[[int], None] = lambda rows: None,
) -> Published:
    """Make the rows of these runs what readers see, in one step; where they are added, beside what is published then.

    The head and index that are served stay, as long as a train_id means the same image, until others are promoted.
    Metrics and the exact check stay only where the snapshot stays the same.

    Raises:
        CannotPublish, RunUnfinished: see `make_snapshot`.
    """

    known: dict[tuple[str, frozenset[str]], list[Part]] = {}

    def change(before: Published | None) -> Published:
        there = read_snapshot(workspace, before.snapshot).runs if add and before else []
        together = [*(run for run in there if run not in runs), *runs]
        snapshot = make_snapshot(workspace, together, incomplete=incomplete, advance=advance, known=known)
        return _showing(workspace, snapshot, before, exact_check)

    published = update_published(workspace, change)
    assert published is not None
    for run in runs:
        write_ledger(workspace, run)
    return published


def _showing(
    workspace: Workspace, snapshot: Snapshot, before: Published | None, exact_check: str | None = None
) -> Published:
    """What readers see once it is this snapshot, with what still stands of what they saw before."""
    records = [read_run(workspace, run) for run in snapshot.runs]
    last = records[-1]
    kept = before if before is not None and before.snapshot == snapshot.snapshot else None
    served = before if before is not None and before.samples == last.samples else None
    return Published(
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
        index_samples=served.index_samples if served else None,
        config=last.config,
    )


def retract_run(workspace: Workspace, run: str) -> Published | None:
    """Take a run's rows out of what readers see, in one step; rows that it had replaced come back.

    None when nothing is left: then readers are told that nothing is published.

    Raises:
        NotPublished: the run is not in the published snapshot.
    """

    known: dict[tuple[str, frozenset[str]], list[Part]] = {}

    def change(before: Published | None) -> Published | None:
        runs = read_snapshot(workspace, (before or read_published(workspace)).snapshot).runs
        if run not in runs:
            raise NotPublished(f"run {run} is not published; the published snapshot holds: {', '.join(runs)}")
        left = [name for name in runs if name != run]
        return _showing(workspace, make_snapshot(workspace, left, known=known), before) if left else None

    return update_published(workspace, change)


def update_published(workspace: Workspace, change: Callable[[Published | None], Published | None]) -> Published | None:
    """Replace what readers see, in one step, by what `change` makes of it.

    Args:
        change: takes what is published and gives what is to be, either None where that is nothing, or what another
            release wrote. It is asked again where another writer came first.

    Returns:
        What is published now.
    """
    while True:
        number, content = _newest(workspace)
        try:
            before = None if content is None else _parsed(workspace, content)
        except OtherRelease:
            before = None
        if before is not None and before.version == 0:
            # What an earlier release published takes its place among the versions before anything is made of it: as
            # long as `current.json` has no number, nobody sees newer ones.
            before = before.model_copy(update={"version": number + 1})
            if _created(workspace, number + 1, before):
                write_atomically(workspace.current, _written(before))
            continue
        after = change(before)
        if _same(before, after):
            if before is not None or content is None:  # what another release wrote is left as it is
                _settle(workspace, number)
            return before
        if after is not None:
            after = after.model_copy(update={"version": number + 1})
        if _created(workspace, number + 1, after):
            _settle(workspace, number + 1)
            return after


_NOTHING = b"null\n"  # what a version holds when the last run was retracted


def _written(published: Published | None) -> bytes:
    return _NOTHING if published is None else published.model_dump_json(indent=2).encode() + b"\n"


def _newest(workspace: Workspace) -> tuple[int, bytes | None]:
    """Number and content of what is published; no content where nothing is."""
    while True:
        number = max(published_versions(workspace), default=0)
        pointed = read_if_there(workspace.current)
        if pointed is not None:
            # One without a number is of an earlier release, which knows of no others and wrote last.
            told = _number(pointed)
            if told == 0 or told >= number:
                return max(number, told), pointed
        if number == 0:
            return 0, None
        content = read_if_there(workspace.published(number))
        if content is not None:  # else it is vacuumed, and there are newer ones
            return number, None if content == _NOTHING else content


def _number(content: bytes) -> int:
    try:
        return int(json.loads(content).get("version", 0))
    except (ValueError, TypeError, AttributeError):  # another release's, or damaged
        return 0


def _same(before: Published | None, after: Published | None) -> bool:
    if before is None or after is None:
        return before is after
    return before == after.model_copy(update={"version": before.version})


def _created(workspace: Workspace, number: int, published: Published | None) -> bool:
    """Whether this became the version of that number; False where another writer came first."""
    place = workspace.published(number)
    if not create(place, _written(published)):
        return False
    sync_folders([place])
    # A writer that slept while a hundred others wrote may have taken the number of an old one that is vacuumed.
    numbers = published_versions(workspace)
    if numbers[-1] > number and number + 1 not in numbers:
        remove(place)
        return False
    return True


def _settle(workspace: Workspace, number: int) -> None:
    """Make `current.json` and the catalog those of the version, unless a newer one is there, whose writer does so.

    A slow writer may put an older one in place of a newer. So each looks again after it wrote, and goes on until that
    was the newest: who writes last leaves it.
    """
    from storage_schemas.views import write_catalog  # it reads what is written here

    newest, content = _newest(workspace)
    if newest != number:
        return
    written = -1
    while written != newest:
        if content is None:
            remove(workspace.current)
            remove(workspace.catalog)
        else:
            if content != read_if_there(workspace.current):
                write_atomically(workspace.current, content)
            write_catalog(workspace)
        written = newest
        newest, content = _newest(workspace)


def index_samples(workspace: Workspace, head: AnyPath, index: AnyPath) -> str:
    """The table of samples that an index's train_ids number, relative to the workspace.

    Indexes of earlier releases do not say. They were built on the data of the snapshot that their head learned from.

    Raises:
        StoreError: such an index has a head that learned from no snapshot.
    """
    samples, learned = index_description(index).get("samples"), json.loads(read_if_there(head / "head.json") or b"{}")
    if samples is None and learned.get("snapshot"):
        samples = read_run(workspace, learned["run"]).samples
    if samples is None:
        raise StoreError(
            f"{index} does not say which training data it is of: `fastgda index CONFIG --head {head.name}` "
            "writes it down"
        )
    return str(samples)


def index_description(index: AnyPath) -> dict[str, Any]:
    """An index version's `index.json`; empty where there is none."""
    return dict(json.loads(read_if_there(index / "index.json") or b"{}"))


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
