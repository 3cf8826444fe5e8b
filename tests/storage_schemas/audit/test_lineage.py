"""`lineage` on small workspaces that were written with the real commit protocol."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from storage_schemas import tables
from storage_schemas.audit.facts import Node, UnknownName
from storage_schemas.audit.lineage import lineage
from storage_schemas.commit import commit, file_sha256, made_in, manifest_path, read_manifest
from storage_schemas.errors import StoreError
from storage_schemas.publishing.publish import publish_runs
from storage_schemas.runs.attempts import AttemptLog, ShardState
from storage_schemas.runs.ledger import read_run, write_plan
from storage_schemas.runs.liveness import Assignment, PartsRecord, write_assignment
from storage_schemas.runs.records import RunRecord
from storage_schemas.snapshots.compaction import compact
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.workspace import Workspace
from tests.storage_schemas.workspaces import (
    commit_shard,
    finish_run,
    plan_run,
    publish_run,
    shard_key,
    show,
    write_table,
)

HEAD, INDEX = "aaaa000011112222", "bbbb000011112222"
CONFIG: dict[str, object] = {
    "teacher": {"name": "abu_plus", "alpha": 0.002, "update_rank": None},
    "candidates": {"policy": "top_k", "k": 4},
    "model": {"folder": "models/tiny", "flips": False},
    "data": {"shards": "data/*.tar"},
}


def nodes(node: Node) -> Iterator[Node]:
    yield node
    for behind in node.made_from:
        yield from nodes(behind)


def kinds(node: Node) -> list[str]:
    return [each.kind for each in nodes(node)]


def one(node: Node, kind: str) -> Node:
    found = [each for each in nodes(node) if each.kind == kind]
    assert len(found) == 1, (kind, kinds(node))
    return found[0]


def put(path: Path, content: str, key: str, rows: int = 1) -> None:
    commit(path, lambda temporary: temporary.write_text(content), key=key, rows=rows, started=time.monotonic())


def train_head(workspace: Workspace, snapshot: str, run: str, version: str = HEAD) -> None:
    about = {
        "feature_space": "pixel",
        "run": run,
        "snapshot": snapshot,
        "origin": "flow-of-head",
        "code_version": "0.1.0+head",
        "best_epoch": 1,
        "history": [{"loss": 1.0, "validation_map": 0.25}, {"loss": 0.5, "validation_map": 0.75}],
    }
    put(Path(workspace.head(version)) / "head.json", json.dumps(about), version)
    put(Path(workspace.head(version)) / "head.safetensors", "weights", version, rows=12)


def build_index(workspace: Workspace, version: str = INDEX, head: str = HEAD) -> None:
    folder = Path(workspace.index(version))
    about = {"head": head, "origin": "flow-of-index", "code_version": "0.1.0+index"}
    write_table(folder / "ids.parquet", tables.INDEX_IDS, [{"train_id": train} for train in range(3)], version)
    put(folder / "index.json", json.dumps(about), version)
    put(folder / "index.faiss", "vectors", version, rows=3)


def assign(workspace: Workspace, record: RunRecord) -> None:
    stages = {
        "samples": PartsRecord(key="5a5a", path=record.samples or "", rows=4),
        "queries": PartsRecord(key="9e9e", path=record.queries or "", rows=3),
        "latents": PartsRecord(key="1a1a", path="latents/1a1a", rows=4),
        "unlearning steps": PartsRecord(key="0e0e", path="updates/0e0e", rows=3),
        "scores": PartsRecord(key=record.run, path=f"scores/{record.run}", rows=12),
    }
    assignment = Assignment(
        run=record.run, config=CONFIG, model_hash="f" * 64, stages=stages, origin="flow-of-coordinator"
    )
    write_assignment(workspace, assignment)


def serve(root: Path) -> Workspace:
    """One published run with an assignment, and the head and index that answer from it."""
    workspace = Workspace(root)
    plan_run(root, "run-1", config=CONFIG)
    path = workspace.run("run-1")
    path.write_text(read_run(workspace, "run-1").model_copy(update={"origin": "flow-of-plan"}).model_dump_json())
    with made_in("flow-of-shards"):
        for number in range(3):
            commit_shard(root, "run-1", number, f"q{number}")
    assign(workspace, read_run(workspace, "run-1"))
    published = publish_runs(workspace, ["run-1"])
    train_head(workspace, published.snapshot, "run-1")
    build_index(workspace)
    show(workspace, head=f"heads/{HEAD}", index=f"indexes/{INDEX}")
    return workspace


@pytest.fixture
def served(tmp_path: Path) -> Workspace:
    return serve(tmp_path)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """As `served`, for tests that only read."""
    return serve(tmp_path_factory.mktemp("untouched"))


def plan_blocks(root: Path, run: str = "blocks") -> Workspace:
    """Two queries in one block, three shards of samples: q0 has the candidates 0, 2, 4 and 5, q1 has 1, 2 and 5."""
    workspace = Workspace(root)
    plan_run(root, "other", samples=6)
    candidates = {"q0": [0, 2, 4, 5], "q1": [1, 2, 5]}
    rows: list[dict[str, object]] = [
        {"query_id": query, "train_id": train, "neighbor_rank": 1, "similarity": 0.5}
        for query, mine in candidates.items()
        for train in mine
    ]
    path = write_table(Path(workspace.candidates(run)), tables.CANDIDATES, rows)
    update = {"run": run, "shards": 3, "pairs": 7, "candidates": workspace.relative(path)}
    keys = [shard_key(run, number) for number in range(3)]
    write_plan(
        workspace,
        read_run(workspace, "other").model_copy(update=update),
        tables.PLAN_SHARDS.rows(shard=range(3), input_key=keys, query_block=[0, 0, 0], pairs=[2, 3, 2]),
        tables.PLAN_QUERIES.rows(query_id=["q0", "q1"], query_block=[0, 0], pairs=[4, 3]),
    )
    pairs = [[("q0", 0), ("q1", 1)], [("q0", 2), ("q1", 2), ("q0", 4)], [("q0", 5), ("q1", 5)]]
    for shard, mine_ in enumerate(pairs):
        scored: list[dict[str, object]] = [
            {"query_id": query, "train_id": train, "score": float(10 * train)} for query, train in mine_
        ]
        write_table(Path(workspace.score_shard(run, shard)), tables.SCORES, scored, keys[shard])
    return workspace


def test_served_leads_down_to_the_stages(untouched: Workspace) -> None:
    found = lineage(untouched, "served")
    chain = ["served", "index", "head", "snapshot", "run", "samples", "queries", "latents", "unlearning steps"]
    assert kinds(found) == chain
    index, head, snapshot, run = (one(found, kind) for kind in chain[1:5])
    assert index.name == INDEX and index.facts["vectors"] == "3" and index.facts["served"] == "yes"
    assert index.facts["sha256"] == file_sha256(untouched.index(INDEX) / "index.faiss")
    assert (index.facts["flow_run"], index.facts["code_version"]) == ("flow-of-index", "0.1.0+index")
    assert head.facts["validation_map"] == "0.75" and head.facts["best_epoch"] == "1"
    assert head.facts["sha256"] == file_sha256(untouched.head(HEAD) / "head.safetensors")
    assert (head.facts["flow_run"], head.facts["code_version"]) == ("flow-of-head", "0.1.0+head")
    part = next(name for name in snapshot.facts if name.startswith("ranks/run-1/"))
    assert snapshot.facts[part] == f"12 rows, sha256 {file_sha256(untouched.file(part))}"
    assert run.facts["shards"] == "3 of 3 done"
    assert (run.facts["flow_run"], run.facts["last_flow_run"]) == ("flow-of-plan", "flow-of-coordinator")
    assert (run.facts["model_hash"], run.facts["data_hash"]) == ("f" * 64, "5a5a")
    assert (run.facts["teacher.alpha"], run.facts["candidates.policy"]) == ("0.002", "top_k")
    assert run.facts["model.folder"] == "models/tiny" and "teacher.update_rank" not in run.facts
    assert [node.name for node in run.made_from] == ["5a5a", "9e9e", "1a1a", "0e0e"]


def test_each_name_starts_its_own_tree(untouched: Workspace) -> None:
    whole = lineage(untouched, "served")
    for name, kind in (
        (INDEX, "index"),
        (HEAD, "head"),
        (read_published(untouched).snapshot, "snapshot"),
        ("run-1", "run"),
    ):
        assert lineage(untouched, name) == one(whole, kind)
    assert json.loads(json.dumps(whole.as_json()))["made_from"][0]["name"] == INDEX


def test_a_name_of_two_things_means_the_first_kind(served: Workspace) -> None:
    finish_run(Path(served.root), HEAD, queries=("q7",))
    assert lineage(served, HEAD).kind == "head"
    build_index(served, "run-1")
    assert lineage(served, "run-1").kind == "index"
    assert lineage(served, "run-1/0").kind == "score shard"


def test_a_shard_tells_who_made_it_and_how_often_it_was_tried(served: Workspace) -> None:
    log = AttemptLog(served, "run-1", worker="host-a:1")
    log.record(1, ShardState.running, device="cuda:0")
    log.record(1, ShardState.failed, device="cuda:0", error=RuntimeError("lost the device"))
    log.record(1, ShardState.running, device="cuda:1")
    found = lineage(served, "run-1/1")
    manifest = read_manifest(served.score_shard("run-1", 1))
    assert manifest is not None and (found.kind, found.name) == ("score shard", "run-1/1")
    assert found.facts["sha256"] == manifest.sha256 and found.facts["rows"] == "4"
    assert found.facts["flow_run"] == "flow-of-shards" and found.facts["worker"] == manifest.worker
    assert found.facts["attempts"] == "2" and found.facts["state"] == "done"
    assert found.facts["record_2"].endswith("failed by host-a:1 on cuda:0: RuntimeError: lost the device")
    assert [node.name for node in found.made_from] == ["run-1"]


def test_a_shard_that_is_not_scored_yet_is_pending(tmp_path: Path) -> None:
    plan_run(tmp_path)
    commit_shard(tmp_path, "run-1", 0, "q0")
    found = lineage(Workspace(tmp_path), "run-1/1")
    assert (found.facts["state"], found.facts["file"]) == ("pending", "missing")
    assert one(found, "run").facts["shards"] == "1 of 3 done"
    pair = lineage(Workspace(tmp_path), "run-1/q1:2")
    assert one(pair, "score shard").name == "run-1/1" and pair.facts["score"].startswith("none")


def test_an_answer_leads_to_its_sample_and_to_what_is_served(untouched: Workspace) -> None:
    found = lineage(untouched, "train:2")
    assert (found.kind, found.name, found.facts["key"], found.facts["tar"]) == ("training sample", "2", "s2", "a.tar")
    assert (found.facts["caption_1"], found.facts["caption_2"]) == ("a cat", "a dog")
    assert found.facts["image_sha256"] == f"{2:064x}" and found.facts["in_the_index"] == "yes"
    assert found.made_from == [lineage(untouched, "served")]
    assert lineage(untouched, "train:3").facts["in_the_index"] == "no"
    with pytest.raises(UnknownName, match="no training sample 4"):
        lineage(untouched, "train:4")


@pytest.mark.heavy
def test_a_pair_is_found_before_and_after_its_shards_are_vacuumed(tmp_path: Path) -> None:
    workspace = plan_blocks(tmp_path)
    shards = {("q0", 0): 0, ("q1", 1): 0, ("q0", 2): 1, ("q1", 2): 1, ("q0", 4): 1, ("q0", 5): 2, ("q1", 5): 2}

    def found(bare: bool = False) -> dict[tuple[str, int], Node]:
        prefix = "" if bare else "blocks/"
        return {pair: lineage(workspace, f"{prefix}{pair[0]}:{pair[1]}") for pair in shards}

    def places(several: dict[tuple[str, int], Node]) -> dict[tuple[str, int], int]:
        return {pair: int(one(node, "score shard").name.split("/")[1]) for pair, node in several.items()}

    before = found()
    assert places(before) == shards and all("rank" not in node.facts for node in before.values())
    publish_runs(workspace, ["blocks"])
    after = found(bare=True)
    assert places(after) == shards
    assert {pair: node.facts["rank"] for pair, node in after.items() if pair[0] == "q0"} == {
        ("q0", 5): "1",
        ("q0", 4): "2",
        ("q0", 2): "3",
        ("q0", 0): "4",
    }
    vacuum(workspace, older_than=timedelta(0))
    assert not list(Path(workspace.scores("blocks")).glob("*.parquet"))
    late = found(bare=True)
    assert places(late) == shards
    for pair, node in late.items():
        assert node.facts["score"] == before[pair].facts["score"] == str(float(10 * pair[1]))
        assert node.facts["candidates"] == ("4" if pair[0] == "q0" else "3")
        assert node.facts["shard_found_by"].startswith("the plan")
        assert one(node, "score shard").facts["file"].startswith("vacuumed")
        assert one(node, "query").facts["caption"] == "a cat"
        assert one(node, "training sample").facts["key"] == f"s{pair[1]}"
    for pair in ("q0:1", "blocks/q1:4"):  # neither is a candidate
        with pytest.raises(UnknownName, match="has no pair of query"):
            lineage(workspace, pair)


def test_without_the_planned_candidates_no_shard_is_guessed(tmp_path: Path) -> None:
    workspace = plan_blocks(tmp_path)
    publish_runs(workspace, ["blocks"])
    vacuum(workspace, older_than=timedelta(0))
    Path(workspace.candidates("blocks")).unlink()
    found = lineage(workspace, "q1:2")
    assert found.facts["score"] == "20.0" and found.facts["candidates"] == "3"
    assert found.facts["candidates_file"].startswith("cannot be read")
    assert found.facts["shard_found_by"].startswith("nothing")
    assert "score shard" not in kinds(found) and one(found, "run").name == "blocks"
    fewer: list[dict[str, object]] = [{"query_id": "q1", "train_id": 2, "neighbor_rank": 1, "similarity": 0.5}]
    write_table(Path(workspace.candidates("blocks")), tables.CANDIDATES, fewer)  # not those that were planned
    assert "score shard" not in kinds(lineage(workspace, "q1:2"))


@pytest.mark.heavy
def test_a_bare_pair_is_that_of_the_run_whose_rows_are_published(served: Workspace) -> None:
    root = Path(served.root)
    finish_run(root, "later", queries=("q1", "q9"), shift=100.0)
    publish_runs(served, ["run-1", "later"])
    new, old = lineage(served, "q1:2"), lineage(served, "run-1/q1:2")
    assert (new.name, new.facts["score"]) == ("later/q1:2", "102.0")
    assert new.facts["ranked_in"] == read_published(served).snapshot
    assert (old.facts["score"], old.facts["ranked_in"]) == ("2.0", "run run-1 alone")
    assert lineage(served, "q0:2").name == "run-1/q0:2"


@pytest.mark.heavy
def test_a_newer_snapshot_stands_beside_the_index_that_never_saw_it(served: Workspace) -> None:
    finish_run(Path(served.root), "later", queries=("q9",))
    published = publish_runs(served, ["run-1", "later"])
    trained = lineage(served, HEAD).made_from[0].name
    show(served, head=f"heads/{HEAD}", index=f"indexes/{INDEX}")
    found = lineage(served, "served")
    assert [node.kind for node in found.made_from] == ["index", "snapshot"]
    assert found.made_from[1].name == published.snapshot != trained
    assert [run.name for run in found.made_from[1].made_from] == ["run-1", "later"]


@pytest.mark.heavy
@pytest.mark.parametrize("query_id", ["a:b", "a/b", "run-1/q:7", 'it\'s "so"', "train", "../../x", "ä 猫", "{files}"])
def test_a_query_id_may_hold_anything(tmp_path: Path, query_id: str) -> None:
    workspace = Workspace(tmp_path)
    publish_run(tmp_path, queries=("q0", query_id))
    assert lineage(workspace, f"run-1/{query_id}:3").name == f"run-1/{query_id}:3"
    assert one(lineage(workspace, f"run-1/{query_id}:3"), "score shard").name == "run-1/1"
    if query_id != "train":  # the word stands before a query of that name
        assert lineage(workspace, f"{query_id}:3").facts["score"] == "0.0"


def test_an_imported_run_gives_what_is_known(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    record = finish_run(tmp_path, "source")
    imported = {"imported_from": "influence_train.pkl", "sha256": "e" * 64, "split": "train"}
    bare = {"samples": None, "queries": None, "candidates": None, "rejected_samples": None, "origin": ""}
    write_plan(
        workspace,
        record.model_copy(update={"run": "coco-1", "config": imported, **bare}),
        tables.read(workspace.plan_shards("source"), tables.PLAN_SHARDS),
        tables.read(workspace.plan_queries("source"), tables.PLAN_QUERIES),
    )
    for number in range(3):
        commit_shard(tmp_path, "source", number, f"q{number}")
        (tmp_path / "scores" / "coco-1").mkdir(parents=True, exist_ok=True)
        for suffix in (".parquet", ".parquet.manifest.json"):
            name = f"part-{number:05d}{suffix}"
            (tmp_path / "scores" / "coco-1" / name).write_bytes((tmp_path / "scores" / "source" / name).read_bytes())
    found = lineage(workspace, "coco-1")
    assert found.facts["assignment"].startswith("none: imported")
    assert (found.facts["imported_from"], found.facts["sha256"]) == ("influence_train.pkl", "e" * 64)
    assert found.facts["shards"] == "3 of 3 done" and found.made_from == [] and "model_hash" not in found.facts
    compact(workspace, "coco-1")
    vacuum(workspace, older_than=timedelta(0))
    pair = lineage(workspace, "coco-1/q2:2")
    assert pair.facts["score"] == "2.0" and one(pair, "score shard").name == "coco-1/2"
    publish_runs(workspace, ["coco-1"])
    with pytest.raises(UnknownName, match="imported without its samples"):
        lineage(workspace, "train:0")
    assert lineage(workspace, "served").facts["index"].startswith("none")


def test_files_of_an_earlier_release_give_what_they_say(served: Workspace) -> None:
    (served.index(INDEX) / "index.json").unlink()
    (served.head(HEAD) / "head.json").write_text(json.dumps({"feature_space": "pixel", "run": "run-1"}))
    record = json.loads(served.run("run-1").read_bytes())
    for name in ("code_version", "origin"):
        del record[name]
    served.run("run-1").write_text(json.dumps(record))
    served.assignment("run-1").unlink()
    found = lineage(served, "served")
    assert [node.kind for node in found.made_from[0].made_from] == ["head"]  # current.json names it
    assert one(found, "index").facts["index.json"] == "missing"
    run = one(found.made_from[0], "run")
    assert "code_version" not in run.facts and "flow_run" not in run.facts
    assert [node.kind for node in run.made_from] == ["samples", "queries", "candidates"]
    assert "validation_map" not in one(found, "head").facts


def test_damaged_and_missing_files_are_facts(served: Workspace) -> None:
    (served.head(HEAD) / "head.json").write_text("[1")
    with (served.index(INDEX) / "index.faiss").open("a") as file:
        file.write("!")
    found = lineage(served, INDEX)
    assert found.facts["file"].startswith("damaged")
    assert one(found, "head").facts["head.json"].startswith("cannot be read")
    manifest_path(served.head(HEAD) / "head.safetensors").write_text("{}")
    (served.head(HEAD) / "head.safetensors").unlink()
    head = lineage(served, HEAD)
    assert (head.facts["file"], head.facts["manifest"]) == ("missing", "missing or damaged")
    snapshot = read_published(served).snapshot
    for part in Path(served.ranks("run-1")).glob("*.parquet"):
        part.write_bytes(part.read_bytes()[:100])
    pair = lineage(served, "q0:1")
    assert pair.facts["rank"].startswith("cannot be read") and pair.facts["score"] == "1.0"
    for part in Path(served.ranks("run-1")).glob("*.parquet"):
        part.unlink()
    assert any(fact.endswith("missing") for fact in lineage(served, snapshot).facts.values())
    served.run("run-1").write_text("{}")
    served.ledger("run-1").write_bytes(b"PAR1")
    served.assignment("run-1").write_bytes(b"\xff")
    run = lineage(served, "run-1")
    assert run.facts["run.json"].startswith("cannot be read") and run.facts["assignment"].startswith("cannot be read")
    served.plan_queries("run-1").write_bytes(b"torn")
    with pytest.raises(StoreError, match="plan of run run-1: cannot be read") as raised:
        lineage(served, "q0:1")
    assert "\n" not in str(raised.value)
    served.snapshot(snapshot).write_text("{")
    assert lineage(served, snapshot).facts["file"].startswith("cannot be read")
    with pytest.raises(StoreError, match="snapshot: cannot be read"):
        lineage(served, "q0:1")


@pytest.mark.heavy
def test_no_file_sends_a_reader_out_of_the_workspace(served: Workspace, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "head.json").write_text('{"feature_space": "stolen"}')
    (served.index(INDEX) / "index.json").write_text(json.dumps({"head": f"../../{outside.name}"}))
    show(served, head=f"../{outside.name}/..")
    assert "stolen" not in json.dumps(lineage(served, "served").as_json())


HOSTILE = [
    "",
    " ",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "../runs/run-1",
    "run-1/../run-1",
    "run-1/",
    "run-1/-1",
    "run-1/1e3",
    "run-1/³",
    f"run-1/{'9' * 5000}",
    "../x/0",
    "..:1",
    ":1",
    "run-1/:1",
    "q0:",
    "q0:-1",
    f"q0:{'9' * 5000}",
    "train:",
    "train:x",
    "'; DROP TABLE scores; --",
    'q0"; --:1',
    "runs*",
    "x" * 5000,
    "ä" * 200,
    "nul\0byte",
    "two\nlines",
    "\udcff",
    "\udcff:1",
    "[red]markup[/]",
]


@pytest.mark.parametrize("identifier", HOSTILE, ids=[ascii(name)[:24] for name in HOSTILE])
def test_what_is_no_name_gets_one_line_that_says_what_is(untouched: Workspace, identifier: str) -> None:
    before = sorted(os.walk(untouched.root))
    with pytest.raises(UnknownName) as raised:
        lineage(untouched, identifier)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 1000 and message.isprintable()
    assert "RUN/QUERY_ID:TRAIN_ID" in message and "run-1" in message
    assert sorted(os.walk(untouched.root)) == before


@pytest.mark.heavy
def test_unknown_names_come_with_those_that_are_near(served: Workspace) -> None:
    with pytest.raises(UnknownName, match="near: run-1"):
        lineage(served, "run-l")
    with pytest.raises(UnknownName, match=f"near: {HEAD}"):
        lineage(served, HEAD[:-1])
    with pytest.raises(UnknownName, match="run run-1 has no shard 3: it has 3"):
        lineage(served, "run-1/3")
    with pytest.raises(UnknownName, match="has no pair of query 'q0' and training sample 9"):
        lineage(served, "run-1/q0:9")
    root = Path(served.root)
    for place, run in enumerate(("zz", "yy", "xx")):
        plan_run(root, run)
        os.utime(served.run(run), (2e9 + place, 2e9 + place))
    with pytest.raises(UnknownName, match=r"newest runs: zz, yy, xx$"):
        lineage(served, "qqqqqqqq")


def test_an_empty_workspace_has_no_names(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for word in ("served", "train:0"):
        with pytest.raises(NotPublished, match="no published run"):
            lineage(workspace, word)
    for name in ("run-1", "run-1/0", "q0:0"):
        with pytest.raises(UnknownName, match="newest runs: none"):
            lineage(workspace, name)
