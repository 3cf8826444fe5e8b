"""Lineage: from a name that the store uses down to everything that the named thing was made from.

served -> index -> head -> snapshot -> runs -> stages; a scored pair -> its score shard -> run -> stages. All of it
stands in small files that were written when the work was done. Nothing is guessed: what no file says is left out, and a
file that is missing or damaged is a fact of its own.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

import pyarrow.compute as pc

from storage_schemas import tables
from storage_schemas.audit.facts import (
    GONE,
    NAME,
    Facts,
    Node,
    UnknownName,
    checked_name,
    committed_facts,
    head_node,
    index_node,
    is_run,
    known,
    needed,
    run_node,
    sample_node,
    snapshot_node,
    tried,
)
from storage_schemas.audit.pairs import planned_shard, ranked_pair, shard_of_pair
from storage_schemas.files import matching
from storage_schemas.runs.attempts import Attempt, ShardState, read_attempts
from storage_schemas.runs.ledger import read_ledger, read_run, run_names
from storage_schemas.snapshots.published import published_or_none, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.table import Table
from storage_schemas.workspace import Workspace

_NUMBER = re.compile(r"[0-9]{1,18}")  # fits 64 bits


def lineage(workspace: Workspace, identifier: str) -> Node:
    """Return the thing that `identifier` names, with everything that it was made from.

    Args:
        identifier: `served`, `train:TRAIN_ID`, the version of an index or a head, a snapshot, a run, RUN/SHARD,
            QUERY_ID:TRAIN_ID (as published) or RUN/QUERY_ID:TRAIN_ID. Where it fits several, the first of these counts.

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
    if NAME.fullmatch(identifier):
        for folder, describe in (
            (workspace.index(identifier), index_node),
            (workspace.head(identifier), head_node),
            (workspace.snapshot(identifier), snapshot_node),
            (workspace.run(identifier).parent, run_node),
        ):
            if folder.exists():
                return describe(workspace, identifier)
    run, _, shard = identifier.partition("/")
    if _NUMBER.fullmatch(shard) and is_run(workspace, run):
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


def _served(workspace: Workspace) -> Node:
    published = read_published(workspace)
    facts = {"published_at": published.created_at, "snapshot": published.snapshot, "metrics": published.metrics}
    trained: list[Node] = []
    if index := checked_name(published.index_version):
        trained = [index_node(workspace, index)]
    else:
        facts["index"] = "none: no index of this data is promoted, `attribute` does not answer"
    # After a publication the head of the snapshot before goes on answering, until another one is promoted.
    behind = {node.name for index in trained for head in index.made_from for node in head.made_from}
    newer = [] if published.snapshot in behind else [snapshot_node(workspace, published.snapshot)]
    return Node("served", "current.json", known(facts), trained + newer)


def _answer(workspace: Workspace, train_id: int) -> Node:
    published = read_published(workspace)
    samples = published.index_samples or published.samples
    if samples is None:
        raise UnknownName(f"run {published.run} was imported without its samples: no train_id is known here")
    sample = sample_node(workspace, samples, train_id)
    if not sample.facts:
        raise UnknownName(f"{samples} has no training sample {train_id}; train_ids are dense from 0")
    if published.index is not None:
        ids = workspace.file(published.index) / "ids.parquet"
        held = tried("in_the_index", lambda: tables.read(ids, tables.INDEX_IDS)["train_id"], sample.facts)
        if held is not None:
            sample.facts["in_the_index"] = "yes" if pc.is_in(train_id, value_set=held).as_py() else "no"
    return Node(sample.kind, sample.name, sample.facts, [_served(workspace)])


def _asked_shard(workspace: Workspace, run: str, shard: int) -> Node:
    facts: Facts = {}
    plan = workspace.plan_shards(run)
    planned = tried("plan", lambda: tables.read(plan, tables.PLAN_SHARDS), facts)
    if planned is not None and shard not in planned["shard"].to_pylist():
        raise UnknownName(f"run {run} has no shard {shard}: it has {planned.num_rows}, from 0")
    return _shard(workspace, run, shard)


def _shard(workspace: Workspace, run: str, shard: int) -> Node:
    path = workspace.score_shard(run, shard)
    facts = known({"path": workspace.relative(path)})
    chosen = pc.field("shard") == shard
    rows = tried("ledger", lambda: read_ledger(workspace, run).filter(chosen).to_pylist(), facts)
    for row in rows or []:
        facts |= known({name: row[name] for name in ("state", "attempts", "error_class", "error", "pairs")})
    facts |= committed_facts(path)
    if facts.get("file") == GONE and facts.get("state") == ShardState.done:
        facts["file"] = "vacuumed: its rows lie in the run's large files"
    tries = tried("attempt_records", lambda: read_attempts(workspace, run).get(shard, []), facts)
    for number, attempt in enumerate(tries or [], start=1):
        facts[f"record_{number}"] = _told(attempt)
    return Node("score shard", f"{run}/{shard}", facts, [run_node(workspace, run)])


def _told(attempt: Attempt) -> str:
    why = f": {attempt.error_class}: {attempt.error}" if attempt.error_class else ""
    return f"{attempt.at.isoformat()} {attempt.state} by {attempt.worker} on {attempt.device or 'no device'}{why}"


def _asked_pair(workspace: Workspace, name: str, train_id: int) -> Node:
    run, slash, query_id = name.partition("/")
    if slash and is_run(workspace, run) and (block := _block(workspace, run, query_id)) is not None:
        return _pair(workspace, run, block, query_id, train_id)
    published = published_or_none(workspace)
    snapshot = needed("snapshot", lambda: read_snapshot(workspace, published.snapshot)) if published else None
    for run in filter(checked_name, reversed(snapshot.runs if snapshot else [])):
        if (block := _block(workspace, run, name)) is not None:  # where several scored it, the last one's rows stand
            return _pair(workspace, run, block, name, train_id)
    raise UnknownName(
        f"no published run has a query {name!r:.100}: RUN/QUERY_ID:TRAIN_ID names one of another run; "
        + _newest(workspace)
    )


def _plan(workspace: Workspace, run: str, table: Table, chosen: pc.Expression) -> list[dict[str, Any]]:
    path = workspace.plan_queries(run) if table is tables.PLAN_QUERIES else workspace.plan_shards(run)
    rows: list[dict[str, Any]] = needed(f"plan of run {run}", lambda: tables.read(path, table, chosen).to_pylist())
    return rows


def _block(workspace: Workspace, run: str, query_id: str) -> int | None:
    """Return the block of queries that a query is scored in; None where the run does not score it."""
    rows = _plan(workspace, run, tables.PLAN_QUERIES, pc.field("query_id") == query_id)
    return rows[0]["query_block"] if rows else None


def _pair(workspace: Workspace, run: str, block: int, query_id: str, train_id: int) -> Node:
    """Describe a scored pair: its rank from the large files, its shard from a shard's file or else from the plan."""
    facts: Facts = {}
    chosen, how = pc.field("query_block") == block, "its file"
    shards = {row["shard"]: row["pairs"] for row in _plan(workspace, run, tables.PLAN_SHARDS, chosen)}
    queries = [row["query_id"] for row in _plan(workspace, run, tables.PLAN_QUERIES, chosen)]
    record = tried("run.json", lambda: read_run(workspace, run), facts)
    facts |= tried("rank", lambda: known(ranked_pair(workspace, run, query_id, train_id)), facts) or {}
    shard = None
    if scored := tried("shard_files", lambda: shard_of_pair(workspace, run, shards, query_id, train_id), facts):
        shard, score = scored
        facts = {"score": str(score)} | facts
    elif record is not None and record.candidates is not None:
        candidates = workspace.file(record.candidates)
        shard = tried(
            "candidates_file", lambda: planned_shard(workspace, candidates, shards, queries, query_id, train_id), facts
        )
    if shard is None and not facts:
        raise UnknownName(f"run {run} has no pair of query {query_id!r:.100} and training sample {train_id}")
    if scored is None:
        how = "the plan, as no file of a shard holds it"
        shard = next(iter(shards)) if shard is None and len(shards) == 1 else shard
    facts.setdefault("score", "none: the shard's state and the run's samples_left_out say more")
    facts["shard_found_by"] = how if shard is not None else "nothing: its file and the candidates are gone"
    behind = [run_node(workspace, run) if shard is None else _shard(workspace, run, shard)]
    if record is not None and record.queries is not None:
        behind.append(_query(workspace, record.queries, query_id))
    if record is not None and record.samples is not None:
        behind.append(sample_node(workspace, record.samples, train_id))
    return Node("scored pair", f"{run}/{query_id}:{train_id}", facts, behind)


def _query(workspace: Workspace, queries: str, query_id: str) -> Node:
    facts: Facts = {"path": queries}
    path, chosen = workspace.file(queries), pc.field("query_id") == query_id
    names = ["caption", "split", "image_sha256"]
    found = tried("file", lambda: tables.read(path, tables.QUERIES, chosen, columns=names).to_pylist(), facts)
    for row in found or []:
        facts |= known(row)
    return Node("query", query_id, facts)
