"""Facts about an index, a head, a snapshot, a run or a sample."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import duckdb
import pyarrow.compute as pc

from storage_schemas import tables
from storage_schemas.commit import MANIFEST, read_manifest
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, matching, read_whole
from storage_schemas.heads.records import HEAD_FILE, INDEX_FILE, INDEX_LISTS
from storage_schemas.runs.attempts import ShardState
from storage_schemas.runs.ledger import ledger_as_written, read_labelling, read_run
from storage_schemas.runs.liveness import Assignment, read_assignment
from storage_schemas.runs.records import RunRecord
from storage_schemas.snapshots.published import published_or_none
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.tombstones import read_tombstones, removed_ids, samples_of_images
from storage_schemas.workspace import Workspace

Found = TypeVar("Found")
Facts = dict[str, str]

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # of a folder that the store makes
GONE = "missing"


class UnknownName(StoreError):
    """The workspace has nothing of this name."""


@dataclass(frozen=True)
class Node:
    """One thing of the workspace, its facts, and the things that it was made from."""

    kind: str
    name: str
    facts: Facts
    made_from: list[Node] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def known(facts: Mapping[str, object]) -> Facts:
    """Return facts as text, without those that are None or empty."""
    texts = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in facts.items()}
    return {name: str(value) for name, value in texts.items() if value is not None and value != ""}


def tried(what: str, read: Callable[[], Found], facts: Facts) -> Found | None:
    """Return what `read` returns; None, and a fact that says why, where its file is missing or damaged."""
    try:
        return read()
    except FileNotFoundError:
        facts[what] = GONE
    except (OSError, ValueError, TypeError, duckdb.Error) as error:  # a damaged table too
        facts[what] = f"cannot be read: {' '.join(str(error).split())[:200]}"
    except StoreError:
        facts[what] = GONE
    return None


def needed(what: str, read: Callable[[], Found]) -> Found:
    """Return what `read` returns.

    Raises:
        StoreError: its file is missing or damaged.
    """
    facts: Facts = {}
    found = tried(what, read, facts)
    if found is None:
        raise StoreError(f"{what}: {facts[what]}; no pair can be found without it")
    return found


def committed_facts(path: AnyPath, rows: str = "rows") -> Facts:
    """Return what a file's manifest says, and whether the file has that size; `rows` is the name for its row count."""
    manifest = read_manifest(path)
    size = path.stat().st_size if path.exists() else None
    if manifest is None:
        return known({"file": GONE if size is None else None, "manifest": "missing or damaged"})
    wrong = f"damaged: it has {size} bytes" if size != manifest.size else None
    return known(
        {
            "file": GONE if size is None else wrong,
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
    return dict(json.loads(read_whole(path)))


def checked_name(value: object) -> str:
    """Return a name that a file gives, empty where it can be none: no file sends a reader out of the workspace."""
    return value if isinstance(value, str) and NAME.fullmatch(value) else ""


def sample_node(workspace: Workspace, samples: str, train_id: int) -> Node:
    """Describe a training sample of a table of samples; of one that is taken down, the take-down alone."""
    facts: Facts = {}
    tombstones = read_tombstones(workspace)
    down = tried(samples, lambda: removed_ids(workspace, samples, tombstones), facts)
    if down is None:  # then nobody knows whether it may be shown
        return Node("training sample", str(train_id), facts)
    if train_id in down:
        path = workspace.file(samples)
        known_images = tried(samples, lambda: samples_of_images(path, tombstones.images), facts) or ()
        images = {image for number, _, image in known_images if number == train_id} | {
            each.image_sha256
            for record in tombstones.active
            for each in record.removed
            if (each.samples, each.train_id) == (samples, train_id)
        }
        for record in tombstones.active:
            if not images.isdisjoint(each.image_sha256 for each in record.removed):
                facts[f"taken_down_{record.number}"] = f"{record.at.isoformat()} by {record.by}: {record.reason}"
        return Node("training sample", str(train_id), facts)
    chosen = pc.field("train_id") == train_id
    rows = tried(samples, lambda: tables.read(workspace.file(samples), tables.SAMPLES, chosen).to_pylist(), facts)
    for row in rows or []:
        size = f"{row['width']} x {row['height']}"
        place = {"key": row["key"], "tar": row["shard"], "offset": row["offset"], "bytes": row["size"], "pixels": size}
        captions = {f"caption_{number}": caption for number, caption in enumerate(row["captions"], start=1)}
        facts |= known({**place, **captions, "image_sha256": row["image_sha256"]})
    return Node("training sample", str(train_id), facts)


def index_node(workspace: Workspace, version: str) -> Node:
    """Describe an index and the head that made its vectors."""
    folder = workspace.index(version)
    facts = committed_facts(folder / "index.faiss", "vectors")
    about = tried("index.json", lambda: _json(folder / INDEX_FILE), facts) or {}
    facts |= known({"code_version": about.get("code_version"), "flow_run": about.get("origin")})
    if about.get("on_disk"):
        lists = committed_facts(folder / INDEX_LISTS)
        facts["inverted_lists"] = lists.get("file") or lists.get("manifest") or f"{lists['size']} bytes, on disk"
    head = checked_name(about.get("head"))
    published = published_or_none(workspace)
    if published is not None and published.index == workspace.relative(folder):
        facts["served"] = "yes"
        head = head or checked_name(published.head_version)  # indexes of earlier releases do not say
    return Node("index", version, facts, [head_node(workspace, head)] if head else [])


def head_node(workspace: Workspace, version: str) -> Node:
    """Describe a head, and the snapshot or run that it learned from."""
    folder = workspace.head(version)
    facts = committed_facts(folder / "head.safetensors", "training_pairs")
    about = tried("head.json", lambda: _json(folder / HEAD_FILE), facts) or {}
    names = ("feature_space", "best_epoch", "snapshot", "run", "imported_from", "sha256", "code_version")
    facts |= known({name: about.get(name) for name in names} | {"flow_run": about.get("origin")})
    with suppress(KeyError, IndexError, TypeError):  # another release may have described it otherwise
        facts["validation_map"] = str(about["history"][about["best_epoch"]]["validation_map"])
    snapshot, run = checked_name(about.get("snapshot")), checked_name(about.get("run"))
    behind = [snapshot_node(workspace, snapshot)] if snapshot else []
    if run and not any(node.made_from for node in behind):
        behind.append(run_node(workspace, run))
    return Node("head", version, facts, behind)


def snapshot_node(workspace: Workspace, name: str) -> Node:
    """Describe a snapshot and its runs."""
    facts: Facts = {}
    found = tried("file", lambda: read_snapshot(workspace, name), facts)
    if found is None:
        return Node("snapshot", name, facts)
    facts |= known({"rows": found.rows, "queries": found.queries, "runs": ", ".join(found.runs)})
    facts |= known({"negatives": ", ".join(sorted({part.negatives for part in found.parts}))})
    for part in found.parts:
        gone = "" if workspace.file(part.path).exists() else f", {GONE}"
        facts[part.path] = f"{part.rows} rows, sha256 {part.sha256}{gone}"
    return Node("snapshot", name, facts, [run_node(workspace, run) for run in found.runs if checked_name(run)])


def is_run(workspace: Workspace, name: str) -> bool:
    return bool(checked_name(name)) and workspace.run(name).parent.exists()


def run_node(workspace: Workspace, name: str) -> Node:
    """Describe a run and the files that it was made from."""
    facts: Facts = {}
    record = tried("run.json", lambda: read_run(workspace, name), facts)
    assignment = tried("assignment", lambda: read_assignment(workspace, name), facts)
    if facts.get("assignment") == GONE:
        facts["assignment"] = "none: imported, or of an earlier release"
    if record is not None:
        # A record without the field would show the version of the code that reads it.
        code_version = record.code_version if "code_version" in record.model_fields_set else None
        facts |= known({"configuration": record.name, "created_at": record.created_at, "code_version": code_version})
        facts |= known({"flow_run": record.origin})
    if assignment is not None:
        data = assignment.stages.get("samples")
        facts |= known({"last_flow_run": assignment.origin, "model_hash": assignment.model_hash})
        facts |= known({"data_hash": data.key if data else None})
    if record is not None:
        facts |= known({"pairs": record.pairs}) | _progress(workspace, name) | _settings(record)
        # The run may have been labelled otherwise since it was planned.
        facts.pop("teacher.negatives", None)
        labelling = tried("labelling", lambda: read_labelling(workspace, name), facts)
        facts |= known({"negatives": labelling.negatives if labelling else None})
    return Node("run", name, facts, list(_stages(workspace, record, assignment)))


def _settings(record: RunRecord) -> Facts:
    """Return the parts of a configuration that say where scores come from, by their dotted names."""
    config, facts = record.config, known({"teacher": record.teacher})
    wanted = {"teacher": None, "candidates": None, "model": ("folder",), "data": ("shards",), "features": ("space",)}
    for section, names in wanted.items():
        values = config.get(section)
        if isinstance(values, dict):
            facts |= known({f"{section}.{name}": values[name] for name in names or values if name in values})
    imported = {name: config.get(name) for name in ("imported_from", "sha256", "split")}
    return facts | known(imported)


def _progress(workspace: Workspace, run: str) -> Facts:
    """Return how far the run is, by its ledger as last written: a snapshot may hold hundreds of runs."""
    facts: Facts = {}
    found = tried("shards", lambda: ledger_as_written(workspace, run), facts)
    if found is not None:
        states = found["state"].to_pylist()
        facts["shards"] = f"{states.count(ShardState.done)} of {len(states)} done"
    left_out = workspace.quarantined_samples(run)
    if left_out.exists():
        rows = tried("samples_left_out", lambda: tables.read(left_out, tables.QUARANTINED_SAMPLES), facts)
        facts |= known({"samples_left_out": None if rows is None else rows.num_rows})
    return facts


def _stages(workspace: Workspace, record: RunRecord | None, assignment: Assignment | None) -> Iterable[Node]:
    if assignment is not None:
        for kind, stage in assignment.stages.items():
            if kind != "scores":  # the run itself
                facts = known({"path": stage.path, "rows": stage.rows})
                yield Node(kind, stage.key, facts | _stage_file(workspace.file(stage.path)))
    elif record is not None:
        for kind in ("samples", "queries", "candidates", "base_losses"):
            path: str | None = getattr(record, kind)
            if path is not None:
                yield Node(kind.replace("_", " "), path, _stage_file(workspace.file(path)))


def _stage_file(path: AnyPath) -> Facts:
    if path.suffix:
        return committed_facts(path)
    # Parts may be thousands, made by as many flow runs: `RUN/SHARD` and the manifests beside them tell of each.
    return known({"files": len(matching(path, f"part-*{MANIFEST}"))})
