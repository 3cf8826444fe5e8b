"""From a name that the store uses, down to everything that it was made from.

served -> index -> head -> snapshot -> runs -> stages; a scored pair -> its score shard -> run -> stages. All of it
stands in small files that were written when the work was done. Nothing is guessed: what no file says is left out, and a
file that is missing or damaged is a fact of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from difflib import get_close_matches
from typing import Any, TypeVar

import duckdb
import pyarrow.compute as pc

from storage_schemas import tables
from storage_schemas.attempts import Attempt, ShardState, read_attempts
from storage_schemas.commit import read_manifest
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, matching
from storage_schemas.ledger import RunRecord, read_labelling, read_ledger, read_run, run_names
from storage_schemas.liveness import Assignment, read_assignment
from storage_schemas.pairs import planned_shard, ranked_pair, shard_of_pair
from storage_schemas.snapshots import NotPublished, Published, read_published, read_snapshot
from storage_schemas.workspace import Workspace

Found = TypeVar("Found")
Facts = dict[str, str]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # of a folder that the store makes
_NUMBER = re.compile(r"[0-9]{1,18}")  # fits 64 bits
_GONE = "missing"


class UnknownName(StoreError):
    """The workspace has nothing of this name."""


@dataclass(frozen=True)
class Node:
    """One thing, what is known of it, and what it was made from."""

    kind: str
    name: str
    facts: Facts
    made_from: list[Node] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def lineage(workspace: Workspace, identifier: str) -> Node:
    """What `identifier` is and everything behind it.

    Args:
        identifier: `served`, `train:TRAIN_ID`, the version of an index or a head, a snapshot, a run, RUN/SHARD,
            QUERY_ID:TRAIN_ID (as published) or RUN/QUERY_ID:TRAIN_ID. Where it could be several, the first of these.

    Raises:
        UnknownName: there is nothing of this name; the message says what names there are.
        NotPublished: `served` or a sample is asked for, and nothing is published.
    """
    if identifier == "served":
        return _served(workspace)
    if identifier != identifier.encode(errors="replace").decode():  # bytes that are no text: nothing is called so
        raise _unknown(workspace, identifier)
    if identifier.startswith("train:") and _NUMBER.fullmatch(identifier.removeprefix("train:")):
        return _answer(workspace, int(identifier.removeprefix("train:")))
    if _NAME.fullmatch(identifier):
        for folder, describe in (
            (workspace.index(identifier), _index),
            (workspace.head(identifier), _head),
            (workspace.snapshot(identifier), _snapshot),
            (workspace.run(identifier).parent, _run),
        ):
            if folder.exists():
                return describe(workspace, identifier)
    run, _, shard = identifier.partition("/")
    if _NUMBER.fullmatch(shard) and _is_run(workspace, run):
        return _asked_shard(workspace, run, int(shard))
    # A query_id may hold anything, colons and slashes too: the last colon and the first slash are ours.
    name, _, train_id = identifier.rpartition(":")
    if name and _NUMBER.fullmatch(train_id):
        return _asked_pair(workspace, name, int(train_id))
    raise _unknown(workspace, identifier)


def _unknown(workspace: Workspace, identifier: str) -> UnknownName:
    runs = run_names(workspace)
    versions = [path.parent.name for kind in ("indexes", "heads") for path in matching(workspace.root, f"{kind}/*/*")]
    snapshots = [path.name.removesuffix(".json") for path in matching(workspace.root, "snapshots/*.json")]
    near = get_close_matches(identifier[:200], [*runs, *snapshots, *dict.fromkeys(versions)])
    return UnknownName(
        f"{workspace.root} has nothing called {identifier!r:.100}: name `served`, an index, head or snapshot version, "
        "a run, RUN/SHARD, QUERY_ID:TRAIN_ID, RUN/QUERY_ID:TRAIN_ID or train:TRAIN_ID; "
        + (f"near: {', '.join(near)}" if near else _newest(workspace))
    )


def _newest(workspace: Workspace) -> str:
    runs = sorted(run_names(workspace), key=lambda run: workspace.run(run).stat().st_mtime)
    return f"newest runs: {', '.join(runs[-3:]) or 'none'}"


def _known(facts: Mapping[str, object]) -> Facts:
    """As text, without those that nothing says."""
    texts = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in facts.items()}
    return {name: str(value) for name, value in texts.items() if value is not None and value != ""}


def _tried(what: str, read: Callable[[], Found], facts: Facts) -> Found | None:
    """What `read` gives; None, and a fact that says why, where its file is missing or damaged."""
    try:
        return read()
    except FileNotFoundError:
        facts[what] = _GONE
    except (OSError, ValueError, TypeError, duckdb.Error) as error:  # a damaged table too
        facts[what] = f"cannot be read: {' '.join(str(error).split())[:200]}"
    except StoreError:
        facts[what] = _GONE
    return None


def _needed(what: str, read: Callable[[], Found]) -> Found:
    facts: Facts = {}
    found = _tried(what, read, facts)
    if found is None:
        raise StoreError(f"{what}: {facts[what]}; no pair can be found without it")
    return found


def _committed(path: AnyPath, rows: str = "rows") -> Facts:
    """What the manifest of a file says, and whether the file is as large as it says; `rows` is what they are called."""
    manifest = read_manifest(path)
    size = path.stat().st_size if path.exists() else None
    if manifest is None:
        return _known({"file": _GONE if size is None else None, "manifest": "missing or damaged"})
    wrong = f"damaged: it has {size} bytes" if size != manifest.size else None
    return _known(
        {
            "file": _GONE if size is None else wrong,
            "sha256": manifest.sha256,
            rows: manifest.rows,
            "size": manifest.size,
            "committed_at": manifest.committed_at,
            "seconds": f"{manifest.seconds:.2f}",
            "device": manifest.device,
            "worker": manifest.worker,
            "code_version": manifest.code_version,
            "flow_run": manifest.origin,
        }
    )


def _json(path: AnyPath) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))


def _name(value: object) -> str:
    """A name that a file gives, where it can be one: no file sends a reader out of the workspace."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


def _published(workspace: Workspace) -> Published | None:
    try:
        return read_published(workspace)
    except NotPublished:
        return None


def _last(path: str | None) -> str:
    return (path or "").rsplit("/", 1)[-1]


def _served(workspace: Workspace) -> Node:
    published = read_published(workspace)
    facts = {"published_at": published.created_at, "snapshot": published.snapshot, "metrics": published.metrics}
    trained: list[Node] = []
    if index := _name(_last(published.index)):
        trained = [_index(workspace, index)]
    else:
        facts["index"] = "none: no index of this data is promoted, `attribute` does not answer"
    # After a publication the head of the snapshot before goes on answering, until another one is promoted.
    behind = {node.name for index in trained for head in index.made_from for node in head.made_from}
    newer = [] if published.snapshot in behind else [_snapshot(workspace, published.snapshot)]
    return Node("served", "current.json", _known(facts), trained + newer)


def _answer(workspace: Workspace, train_id: int) -> Node:
    published = read_published(workspace)
    samples = published.index_samples or published.samples
    if samples is None:
        raise UnknownName(f"run {published.run} was imported without its samples: no train_id is known here")
    sample = _sample(workspace, samples, train_id)
    if not sample.facts:
        raise UnknownName(f"{samples} has no training sample {train_id}; train_ids are dense from 0")
    if published.index is not None:
        ids = workspace.file(published.index) / "ids.parquet"
        held = _tried("in_the_index", lambda: tables.read(ids, tables.INDEX_IDS)["train_id"], sample.facts)
        if held is not None:
            sample.facts["in_the_index"] = "yes" if pc.is_in(train_id, value_set=held).as_py() else "no"
    return Node(sample.kind, sample.name, sample.facts, [_served(workspace)])


def _sample(workspace: Workspace, samples: str, train_id: int) -> Node:
    facts: Facts = {}
    chosen = pc.field("train_id") == train_id
    rows = _tried(samples, lambda: tables.read(workspace.file(samples), tables.SAMPLES, chosen).to_pylist(), facts)
    for row in rows or []:
        size = f"{row['width']} x {row['height']}"
        place = {"key": row["key"], "tar": row["shard"], "offset": row["offset"], "bytes": row["size"], "pixels": size}
        captions = {f"caption_{number}": caption for number, caption in enumerate(row["captions"], start=1)}
        facts |= _known({**place, **captions, "image_sha256": row["image_sha256"]})
    return Node("training sample", str(train_id), facts)


def _index(workspace: Workspace, version: str) -> Node:
    folder = workspace.index(version)
    facts = _committed(folder / "index.faiss", "vectors")
    about = _tried("index.json", lambda: _json(folder / "index.json"), facts) or {}
    facts |= _known({"code_version": about.get("code_version"), "flow_run": about.get("origin")})
    head = _name(about.get("head"))
    published = _published(workspace)
    if published is not None and published.index == workspace.relative(folder):
        facts["served"] = "yes"
        head = head or _name(_last(published.head))  # indexes of earlier releases do not say
    return Node("index", version, facts, [_head(workspace, head)] if head else [])


def _head(workspace: Workspace, version: str) -> Node:
    folder = workspace.head(version)
    facts = _committed(folder / "head.safetensors", "training_pairs")
    about = _tried("head.json", lambda: _json(folder / "head.json"), facts) or {}
    names = ("feature_space", "best_epoch", "snapshot", "run", "imported_from", "sha256", "code_version")
    facts |= _known({name: about.get(name) for name in names} | {"flow_run": about.get("origin")})
    with suppress(KeyError, IndexError, TypeError):  # another release may have described it otherwise
        facts["validation_map"] = str(about["history"][about["best_epoch"]]["validation_map"])
    snapshot, run = _name(about.get("snapshot")), _name(about.get("run"))
    behind = [_snapshot(workspace, snapshot)] if snapshot else []
    if run and not any(node.made_from for node in behind):
        behind.append(_run(workspace, run))
    return Node("head", version, facts, behind)


def _snapshot(workspace: Workspace, name: str) -> Node:
    facts: Facts = {}
    found = _tried("file", lambda: read_snapshot(workspace, name), facts)
    if found is None:
        return Node("snapshot", name, facts)
    facts |= _known({"rows": found.rows, "queries": found.queries, "runs": ", ".join(found.runs)})
    facts |= _known({"negatives": ", ".join(sorted({part.negatives for part in found.parts}))})
    for part in found.parts:
        gone = "" if workspace.file(part.path).exists() else f", {_GONE}"
        facts[part.path] = f"{part.rows} rows, sha256 {part.sha256}{gone}"
    return Node("snapshot", name, facts, [_run(workspace, run) for run in found.runs if _name(run)])


def _is_run(workspace: Workspace, name: str) -> bool:
    return bool(_name(name)) and workspace.run(name).parent.exists()


def _run(workspace: Workspace, name: str) -> Node:
    facts: Facts = {}
    record = _tried("run.json", lambda: read_run(workspace, name), facts)
    assignment = _tried("assignment", lambda: read_assignment(workspace, name), facts)
    if facts.get("assignment") == _GONE:
        facts["assignment"] = "none: imported, or of an earlier release"
    if record is not None:
        # A record without the field would show the version of who reads it.
        code_version = record.code_version if "code_version" in record.model_fields_set else None
        facts |= _known({"configuration": record.name, "created_at": record.created_at, "code_version": code_version})
        facts |= _known({"flow_run": record.origin})
    if assignment is not None:
        data = assignment.stages.get("samples")
        facts |= _known({"last_flow_run": assignment.origin, "model_hash": assignment.model_hash})
        facts |= _known({"data_hash": data.key if data else None})
    if record is not None:
        facts |= _known({"pairs": record.pairs}) | _progress(workspace, name) | _settings(record)
        # As it was planned it may have been labelled otherwise.
        facts.pop("teacher.negatives", None)
        labelling = _tried("labelling", lambda: read_labelling(workspace, name), facts)
        facts |= _known({"negatives": labelling.negatives if labelling else None})
    return Node("run", name, facts, list(_stages(workspace, record, assignment)))


def _settings(record: RunRecord) -> Facts:
    """The parts of a configuration that say where scores come from, by their dotted names."""
    config, facts = record.config, _known({"teacher": record.teacher})
    wanted = {"teacher": None, "candidates": None, "model": ("folder",), "data": ("shards",), "features": ("space",)}
    for section, names in wanted.items():
        values = config.get(section)
        if isinstance(values, dict):
            facts |= _known({f"{section}.{name}": values[name] for name in names or values if name in values})
    imported = {name: config.get(name) for name in ("imported_from", "sha256", "split")}
    return facts | _known(imported)


def _progress(workspace: Workspace, run: str) -> Facts:
    """How far the run is by its ledger as last written, as a snapshot may hold hundreds of runs."""
    facts: Facts = {}

    def ledger() -> Any:
        written = workspace.ledger(run)
        return tables.read(written, tables.SHARDS) if written.exists() else read_ledger(workspace, run)

    found = _tried("shards", ledger, facts)
    if found is not None:
        states = found["state"].to_pylist()
        facts["shards"] = f"{states.count(ShardState.done)} of {len(states)} done"
    left_out = workspace.quarantined_samples(run)
    if left_out.exists():
        rows = _tried("samples_left_out", lambda: tables.read(left_out, tables.QUARANTINED_SAMPLES), facts)
        facts |= _known({"samples_left_out": None if rows is None else rows.num_rows})
    return facts


def _stages(workspace: Workspace, record: RunRecord | None, assignment: Assignment | None) -> Iterable[Node]:
    if assignment is not None:
        for kind, stage in assignment.stages.items():
            if kind != "scores":  # the run itself
                facts = _known({"path": stage.path, "rows": stage.rows})
                yield Node(kind, stage.key, facts | _stage_file(workspace.file(stage.path)))
    elif record is not None:
        for kind in ("samples", "queries", "candidates", "base_losses"):
            path: str | None = getattr(record, kind)
            if path is not None:
                yield Node(kind.replace("_", " "), path, _stage_file(workspace.file(path)))


def _stage_file(path: AnyPath) -> Facts:
    if path.suffix:
        return _committed(path)
    # Parts may be thousands, made by as many flow runs: `RUN/SHARD` and the manifests beside them tell of each.
    return _known({"files": len(matching(path, "part-*.manifest.json"))})


def _asked_shard(workspace: Workspace, run: str, shard: int) -> Node:
    facts: Facts = {}
    plan = workspace.plan_shards(run)
    planned = _tried("plan", lambda: tables.read(plan, tables.PLAN_SHARDS), facts)
    if planned is not None and shard not in planned["shard"].to_pylist():
        raise UnknownName(f"run {run} has no shard {shard}: it has {planned.num_rows}, from 0")
    return _shard(workspace, run, shard)


def _shard(workspace: Workspace, run: str, shard: int) -> Node:
    path = workspace.score_shard(run, shard)
    facts = _known({"path": workspace.relative(path)})
    chosen = pc.field("shard") == shard
    rows = _tried("ledger", lambda: read_ledger(workspace, run).filter(chosen).to_pylist(), facts)
    for row in rows or []:
        facts |= _known({name: row[name] for name in ("state", "attempts", "error_class", "error", "pairs")})
    facts |= _committed(path)
    if facts.get("file") == _GONE and facts.get("state") == ShardState.done:
        facts["file"] = "vacuumed: its rows lie in the run's large files"
    tries = _tried("attempt_records", lambda: read_attempts(workspace, run).get(shard, []), facts)
    for number, attempt in enumerate(tries or [], start=1):
        facts[f"record_{number}"] = _told(attempt)
    return Node("score shard", f"{run}/{shard}", facts, [_run(workspace, run)])


def _told(attempt: Attempt) -> str:
    why = f": {attempt.error_class}: {attempt.error}" if attempt.error_class else ""
    return f"{attempt.at.isoformat()} {attempt.state} by {attempt.worker} on {attempt.device or 'no device'}{why}"


def _asked_pair(workspace: Workspace, name: str, train_id: int) -> Node:
    run, slash, query_id = name.partition("/")
    if slash and _is_run(workspace, run) and (block := _block(workspace, run, query_id)) is not None:
        return _pair(workspace, run, block, query_id, train_id)
    published = _published(workspace)
    snapshot = _needed("snapshot", lambda: read_snapshot(workspace, published.snapshot)) if published else None
    for run in filter(_name, reversed(snapshot.runs if snapshot else [])):
        if (block := _block(workspace, run, name)) is not None:  # where several scored it, the last one's rows stand
            return _pair(workspace, run, block, name, train_id)
    raise UnknownName(
        f"no published run has a query {name!r:.100}: RUN/QUERY_ID:TRAIN_ID names one of another run; "
        + _newest(workspace)
    )


def _plan(workspace: Workspace, run: str, table: tables.Table, chosen: pc.Expression) -> list[dict[str, Any]]:
    path = workspace.plan_queries(run) if table is tables.PLAN_QUERIES else workspace.plan_shards(run)
    rows: list[dict[str, Any]] = _needed(f"plan of run {run}", lambda: tables.read(path, table, chosen).to_pylist())
    return rows


def _block(workspace: Workspace, run: str, query_id: str) -> int | None:
    """The block of queries that a query is scored in; None where the run does not score it."""
    rows = _plan(workspace, run, tables.PLAN_QUERIES, pc.field("query_id") == query_id)
    return rows[0]["query_block"] if rows else None


def _pair(workspace: Workspace, run: str, block: int, query_id: str, train_id: int) -> Node:
    """One scored pair: rank from the large files, shard from its file, or from the plan where that is gone."""
    facts: Facts = {}
    chosen, how = pc.field("query_block") == block, "its file"
    shards = {row["shard"]: row["pairs"] for row in _plan(workspace, run, tables.PLAN_SHARDS, chosen)}
    queries = [row["query_id"] for row in _plan(workspace, run, tables.PLAN_QUERIES, chosen)]
    record = _tried("run.json", lambda: read_run(workspace, run), facts)
    facts |= _tried("rank", lambda: _known(ranked_pair(workspace, run, query_id, train_id)), facts) or {}
    shard = None
    if scored := _tried("shard_files", lambda: shard_of_pair(workspace, run, shards, query_id, train_id), facts):
        shard, score = scored
        facts = {"score": str(score)} | facts
    elif record is not None and record.candidates is not None:
        candidates = workspace.file(record.candidates)
        shard = _tried(
            "candidates_file", lambda: planned_shard(workspace, candidates, shards, queries, query_id, train_id), facts
        )
    if shard is None and not facts:
        raise UnknownName(f"run {run} has no pair of query {query_id!r:.100} and training sample {train_id}")
    if scored is None:
        how = "the plan, as no file of a shard holds it"
        shard = next(iter(shards)) if shard is None and len(shards) == 1 else shard
    facts.setdefault("score", "none: the shard's state and the run's samples_left_out say more")
    facts["shard_found_by"] = how if shard is not None else "nothing: its file and the candidates are gone"
    behind = [_run(workspace, run) if shard is None else _shard(workspace, run, shard)]
    if record is not None and record.queries is not None:
        behind.append(_query(workspace, record.queries, query_id))
    if record is not None and record.samples is not None:
        behind.append(_sample(workspace, record.samples, train_id))
    return Node("scored pair", f"{run}/{query_id}:{train_id}", facts, behind)


def _query(workspace: Workspace, queries: str, query_id: str) -> Node:
    facts: Facts = {"path": queries}
    path, chosen = workspace.file(queries), pc.field("query_id") == query_id
    names = ["caption", "split", "image_sha256"]
    found = _tried("file", lambda: tables.read(path, tables.QUERIES, chosen, columns=names).to_pylist(), facts)
    for row in found or []:
        facts |= _known(row)
    return Node("query", query_id, facts)
