from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import storage_schemas
from storage_schemas import tables
from storage_schemas.commit import TableCommit, commit_table, commit_tables, input_key
from storage_schemas.publishing.export import DestinationTaken
from storage_schemas.publishing.plain_pickle import BadRelease
from storage_schemas.publishing.release import export_release, import_release
from storage_schemas.runs.ledger import done_shards, read_run, run_names, write_labelling, write_plan
from storage_schemas.runs.records import Labelling, Negatives, RunRecord
from storage_schemas.snapshots.compaction import RunUnfinished, compact
from storage_schemas.workspace import Workspace

RUN = "shapes-1"
Scores = dict[str, dict[int, float]]  # by query_id and train_id
Arrays = dict[str, NDArray[Any]]


def scored_run(
    root: Path, scores: Scores, *, neighbors: dict[str, Sequence[int]] | None = None, leave_out: int = 0
) -> Workspace:
    """A run with these scores, a shard a query, except the last `leave_out`.

    `neighbors` are the candidates, nearest first.
    """
    workspace = Workspace(root)
    numbers, query_ids = range(len(scores)), list(scores)
    candidates = None
    if neighbors is not None:
        rows = [
            {"query_id": query_id, "train_id": train, "neighbor_rank": 3 * place + 1, "similarity": 0.5}
            for query_id, train_ids in neighbors.items()
            for place, train in enumerate(train_ids)
        ]
        table = tables.pa.Table.from_pylist(rows, schema=tables.CANDIDATES.schema)
        commit_table(workspace.candidates(RUN), table, tables.CANDIDATES, key=RUN, started=time.monotonic())
        candidates = workspace.relative(workspace.candidates(RUN))
    pairs = [len(mine) for mine in scores.values()]
    record = RunRecord(
        run=RUN,
        name="shapes",
        teacher="abu_plus",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        shards=len(scores),
        pairs=sum(pairs),
        candidates=candidates,
        config={},
    )
    keys = [input_key(RUN, number) for number in numbers]
    write_plan(
        workspace,
        record,
        tables.PLAN_SHARDS.rows(shard=numbers, input_key=keys, query_block=numbers, pairs=pairs),
        tables.PLAN_QUERIES.rows(query_id=query_ids, query_block=numbers, pairs=pairs),
    )
    shards = [
        TableCommit(
            workspace.score_shard(RUN, number),
            tables.SCORES.rows(query_id=[query_id] * len(mine), train_id=list(mine), score=list(mine.values())),
            tables.SCORES,
            keys[number],
            time.monotonic(),
        )
        for number, (query_id, mine) in enumerate(scores.items())
    ]
    commit_tables(shards[: len(shards) - leave_out])
    return workspace


def drawn_scores(query_ids: Sequence[str], candidates: int, seed: int = 3) -> Scores:
    """Scores with ties, of other candidates for each query."""
    draw = np.random.default_rng(seed)
    return {
        query_id: {
            int(train): float(draw.integers(-4, 4)) / 7 for train in draw.permutation(3 * candidates)[:candidates]
        }
        for query_id in query_ids
    }


def rows_of(workspace: Workspace, run: str) -> list[tuple[str, int, float]]:
    with storage_schemas.connect(workspace.root) as connection:
        return connection.execute(
            "SELECT query_id, train_id, score FROM run_scores WHERE run = ? ORDER BY ALL", [run]
        ).fetchall()


def release_arrays(scores: NDArray[Any], candidates: NDArray[Any]) -> Arrays:
    """As process_sample.py and merge_train.py of the release make them."""
    order = np.argsort(-scores, axis=1)
    return {
        "influence_subset": scores,
        "rank_influence_subset": order,
        "rank": np.take_along_axis(candidates, order, axis=1),
    }


def some_arrays(queries: int = 3, candidates: int = 6) -> Arrays:
    draw = np.random.default_rng(5)
    scores = draw.normal(size=(queries, candidates)).astype(np.float32)
    return release_arrays(scores, np.stack([draw.permutation(50)[:candidates] for _ in range(queries)]))


def write_pickle(path: Path, content: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def test_a_run_survives_export_and_import(tmp_path: Path) -> None:
    scores = drawn_scores(["q2", "q0", "ü 'quoted'"], 7)
    workspace = scored_run(tmp_path / "w", scores)
    export_release(workspace, RUN, tmp_path / "out" / "influence_train.pkl")
    run = import_release(
        workspace, tmp_path / "out" / "influence_train.pkl", name="back", teacher="abu_plus", query_ids=list(scores)
    )
    assert run.startswith("back-")
    expected = sorted((query_id, train, score) for query_id, mine in scores.items() for train, score in mine.items())
    assert rows_of(workspace, run) == rows_of(workspace, RUN) == expected
    record = read_run(workspace, run)
    assert (record.teacher, record.shards, record.pairs, record.queries) == ("abu_plus", 3, 21, None)
    assert record.config["imported_from"] == "influence_train.pkl"
    assert sum(part.rows for part in compact(workspace, run)) == 21


@pytest.mark.parametrize("negatives", ["keep", "tie"])
@pytest.mark.parametrize("with_candidates", [False, True])
def test_layout_is_that_of_the_release(tmp_path: Path, with_candidates: bool, negatives: Negatives) -> None:
    scores = drawn_scores([f"q{9 - number}" for number in range(4)], 11)
    draw = np.random.default_rng(1)
    neighbors = {query_id: [int(train) for train in draw.permutation(list(mine))] for query_id, mine in scores.items()}
    workspace = scored_run(tmp_path / "w", scores, neighbors=neighbors if with_candidates else None)
    write_labelling(workspace, RUN, Labelling(negatives=negatives))
    export_release(workspace, RUN, tmp_path / "influence_train.pkl")
    content = pickle.loads((tmp_path / "influence_train.pkl").read_bytes())
    assert list(content) == ["random"]
    arrays = content["random"]
    assert {name: values.dtype.kind for name, values in arrays.items()} == {
        "influence_subset": "f",
        "rank_influence_subset": "i",
        "rank": "i",
    }
    for row, (query_id, mine) in enumerate(scores.items()):
        candidates = neighbors[query_id] if with_candidates else sorted(mine)
        influence = np.array([mine[train] for train in candidates])
        np.testing.assert_array_equal(arrays["influence_subset"][row], influence)
        order = arrays["rank_influence_subset"][row]
        np.testing.assert_array_equal(influence[order], -np.sort(-influence))
        np.testing.assert_array_equal(arrays["rank"][row], np.array(candidates)[order])
        assert list(arrays["rank"][row]) == sorted(mine, key=lambda train: (-mine[train], train))


@pytest.mark.heavy
def test_file_of_the_release_is_read_with_any_dtype_and_protocol(tmp_path: Path) -> None:
    arrays = some_arrays(4, 9)
    expected = sorted(
        (f"q{row:05d}", int(train), float(arrays["influence_subset"][row][place]))
        for row in range(4)
        for train, place in zip(arrays["rank"][row], arrays["rank_influence_subset"][row], strict=True)
    )
    variants = [write_pickle(tmp_path / f"p{protocol}.pkl", {"random": arrays}, protocol) for protocol in (3, 4, 5)]
    casts = {"influence_subset": ">f8", "rank_influence_subset": "u2", "rank": "<i4"}
    cast = {name: np.asfortranarray(values.astype(casts[name])) for name, values in arrays.items()}
    variants += [write_pickle(tmp_path / f"cast{protocol}.pkl", {"nearest": cast}, protocol) for protocol in (3, 4, 5)]
    # numpy 1.x names its modules otherwise
    old = pickle.dumps({"random": arrays}, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    variants.append(tmp_path / "old.pkl")
    variants[-1].write_bytes(old)
    workspace = Workspace(tmp_path / "w")
    for path in variants:
        run = import_release(workspace, path, name=path.stem, teacher="abu_plus")
        assert rows_of(workspace, run) == expected, path.name


def test_second_import_finds_the_first(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "i.pkl", {"random": some_arrays()})
    workspace = Workspace(tmp_path / "w")
    run = import_release(workspace, path, name="a", teacher="abu_plus")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "w" / "scores").rglob("part-*")}
    rows = rows_of(workspace, run)
    (tmp_path / "w" / "scores" / run / "part-00001.parquet").unlink()
    assert import_release(workspace, path, name="a", teacher="abu_plus") == run
    assert rows_of(workspace, run) == rows
    changed = {file.name for file, at in files.items() if file.stat().st_mtime_ns != at}
    assert changed == {"part-00001.parquet", "part-00001.parquet.manifest.json"}
    other = import_release(workspace, path, name="a", teacher="abu_plus", query_ids=["x", "y", "z"])
    assert other != run
    assert len(run_names(workspace)) == 2


@pytest.mark.integration
def test_killed_import_goes_on(tmp_path: Path) -> None:
    arrays = some_arrays(600, 40)
    path = write_pickle(tmp_path / "i.pkl", {"random": arrays})
    workspace = Workspace(tmp_path / "w")
    program = (
        "import sys, pathlib; from storage_schemas.publishing.release import import_release; "
        "from storage_schemas.workspace import Workspace; "
        "import_release(Workspace(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), name='a', teacher='t')"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(workspace.root), str(path)])
    while process.poll() is None and len(list((tmp_path / "w").glob("scores/*/part-*.manifest.json"))) < 20:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = run_names(workspace)
    before = len(done_shards(workspace, run))
    assert 20 <= before < 600
    assert import_release(workspace, path, name="a", teacher="t") == run
    assert len(done_shards(workspace, run)) == 600
    rows = rows_of(workspace, run)
    assert len(rows) == len({row[:2] for row in rows}) == 600 * 40


class Calls:
    """Pickled as a call of anything with anything."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


class Outer:
    class Inner:
        pass


def with_persistent_id(content: object) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> str | None:
            return "somewhere" if obj == "away" else None

    sink = io.BytesIO()
    Pickler(sink, protocol=4).dump(content)
    return sink.getvalue()


def by_hand(*lines: str) -> bytes:
    """A pickle of protocol 0, opcode by opcode."""
    return "\n".join(lines).encode()


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would touch `marker`, or hold what no array is, each with what the error must name."""
    touch = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    arrays: dict[str, object] = dict(some_arrays())
    objects = np.array([[1, None]], dtype=object)
    structured = np.zeros((2, 2), dtype=[("a", "f8"), ("b", "O")])
    named = {
        "system": (Calls(os.system, f"touch {marker}"), "system"),
        "eval": (Calls(eval, touch), "builtins.eval"),
        "exec in an array's place": ({"random": arrays | {"rank": Calls(exec, touch)}}, "builtins.exec"),
        "getattr": (Calls(getattr, "text", "upper"), "builtins.getattr"),
        "numpy's own functions": (Calls(np.load, str(marker)), "numpy.load"),
        "bound method": (marker.touch, "builtins.getattr"),
        "path": (marker, "pathlib"),
        "nested class": (Outer.Inner(), "Outer.Inner"),
        "objects": ({"random": arrays | {"rank": objects}}, "'O8'"),
        "structure": ({"random": arrays | {"rank": structured}}, "'V16'"),
        "text": ({"random": arrays | {"rank": np.array([["a"]])}}, "'U1'"),
        "complex": ({"random": arrays | {"rank": np.array([[1j]])}}, "'c16'"),
    }
    found = {name: (pickle.dumps(content, protocol=4), word) for name, (content, word) in named.items()}
    found["persistent id"] = (with_persistent_id({"random": "away"}), "somewhere")
    found["instance opcode"] = (by_hand(f"(S'touch {marker}'", "ios", "system", "."), "os.system")
    found["dotted"] = (b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__class__.x\x93.", "ndarray.__class__")
    found["stand-ins rewritten"] = (
        by_hand("cnumpy", "ndarray", "(N(dS'_fill'", "S'x'", "stb."),
        "no whole pickle",
    )
    found["memory"] = (b"\x80\x04Nr\xff\xff\xff\xfa.", "4211081215")
    found["no such shape"] = (
        pickle.dumps({"random": arrays}, 4).replace(b"K\x03K\x06\x86", b"K\x03K\x07\x86"),
        "no whole pickle",
    )
    return found


@pytest.mark.parametrize("name", sorted(hostile(Path("x"))))
def test_hostile_file_is_refused_by_name_and_runs_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    content, word = hostile(marker)[name]
    path = tmp_path / "i.pkl"
    path.write_bytes(content)
    with pytest.raises(BadRelease) as raised:
        import_release(Workspace(tmp_path / "w"), path, name="a", teacher="t")
    message = str(raised.value)
    assert word in message
    assert message.startswith(f"{path} ")
    assert len(message.splitlines()) == 1
    assert not marker.exists()
    assert not (tmp_path / "w").exists()
    # the next, good file is read as ever
    good = write_pickle(tmp_path / "good.pkl", {"random": some_arrays()})
    assert import_release(Workspace(tmp_path / "w"), good, name="a", teacher="t")


def changed(name: str, change: Callable[[NDArray[Any]], object]) -> object:
    arrays: dict[str, Any] = dict(some_arrays())
    arrays[name] = change(arrays[name].copy())
    return {"random": arrays}


def put(values: NDArray[Any], row: int, column: int, value: float) -> NDArray[Any]:
    values[row, column] = value
    return values


CONTRADICTIONS: dict[str, tuple[object, str]] = {
    "a list": ([1, 2], "holds list"),
    "one query's file": (some_arrays(), "merge_train.py"),
    "two splits": ({"random": some_arrays(), "other": some_arrays()}, "'random', 'other'"),
    "a split that is no text": ({"a\nb": some_arrays()}, "merge_train.py"),
    "scores of all samples, one of them ranked twice": (
        {"random": {"influence": np.zeros((2, 3)), "rank": np.zeros((2, 3), int)}},
        "row 0 of rank is no permutation",
    ),
    "lists for arrays": (changed("rank", lambda values: values.tolist()), "rank is no array"),
    "ids as floats": (changed("rank", lambda values: values.astype(float)), "rank is of float64"),
    "scores as integers": (changed("influence_subset", lambda values: values.astype(int)), "of int64"),
    "other shapes": (changed("rank", lambda values: values[:, :-1]), r"\(3, 5\)"),
    "one dimension": ({"random": {name: values[0] for name, values in some_arrays().items()}}, "shapes"),
    "nothing": ({"random": {name: values[:0] for name, values in some_arrays().items()}}, "shapes"),
    "not finite": (changed("influence_subset", lambda values: put(values, 1, 2, np.nan)), "row 1 .*finite"),
    "no permutation": (changed("rank_influence_subset", lambda values: put(values, 2, 0, values[2, 1])), "row 2 "),
    "places out of range": (changed("rank_influence_subset", lambda values: values + 1), "row 0 .*permutation"),
    "not sorted": (changed("rank_influence_subset", lambda values: values[:, ::-1]), "row 0 .*sort"),
    "negative": (changed("rank", lambda values: put(values, 1, 1, -4)), "row 1 .*negative"),
    "beyond int64": (changed("rank", lambda values: values.astype("u8") + np.uint64(2**63)), "too large"),
    "one twice": (changed("rank", lambda values: put(values, 2, 3, values[2, 0])), "row 2 .*twice"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_is_not_the_layout_is_refused(tmp_path: Path, name: str) -> None:
    content, pattern = CONTRADICTIONS[name]
    path = write_pickle(tmp_path / "i.pkl", content)
    with pytest.raises(BadRelease, match=pattern) as raised:
        import_release(Workspace(tmp_path / "w"), path, name="a", teacher="t")
    assert str(path) in str(raised.value)
    assert not (tmp_path / "w").exists()


def test_ties_may_stand_in_any_order(tmp_path: Path) -> None:
    arrays = release_arrays(np.zeros((1, 4)), np.array([[5, 3, 9, 1]]))
    arrays["rank_influence_subset"] = np.array([[2, 0, 3, 1]])
    path = write_pickle(tmp_path / "i.pkl", {"random": arrays})
    workspace = Workspace(tmp_path / "w")
    run = import_release(workspace, path, name="a", teacher="t")
    assert [row[1] for row in rows_of(workspace, run)] == [1, 3, 5, 9]


def test_other_files_give_one_clear_line(tmp_path: Path) -> None:
    texts = {"text.csv": b"query_id,train_id\nq0,1\n", "empty.pkl": b"", "page.html": b"<html>"}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "torch.pt", "w") as archive:
        archive.writestr("data.pkl", b"x")
    (tmp_path / "folder").mkdir()
    reasons = dict.fromkeys(texts, "no whole pickle|refused")
    reasons |= {"torch.pt": "zip", "folder": "cannot be read", "absent": "No"}
    for name, reason in reasons.items():
        with pytest.raises(BadRelease, match=reason) as raised:
            import_release(Workspace(tmp_path / "w"), tmp_path / name, name="a", teacher="t")
        assert len(str(raised.value).splitlines()) == 1
        assert name in str(raised.value)


GOOD = pickle.dumps({"random": some_arrays()}, protocol=4)


def outcome(folder: Path, content: bytes) -> list[tuple[str, int, float]] | None:
    """The rows that the content is imported as, or None where it is refused; any other exception passes."""
    path = folder / f"{hash(content)}.pkl"
    path.write_bytes(content)
    workspace = Workspace(folder / f"{hash(content)}")
    try:
        run = import_release(workspace, path, name="a", teacher="t")
    except BadRelease as error:
        assert len(str(error).splitlines()) == 1
        return None
    return rows_of(workspace, run)


@settings(max_examples=60)
@given(length=st.integers(0, len(GOOD) - 1))
def test_cut_file_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    assert outcome(tmp_path_factory.mktemp("cut"), GOOD[:length]) is None


@pytest.mark.integration
@settings(max_examples=250)
@given(flips=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_are_refused_or_leave_a_whole_release(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]
) -> None:
    content = bytearray(GOOD)
    for place, bits in flips:
        content[place] ^= bits
    rows = outcome(tmp_path_factory.mktemp("flip"), bytes(content))
    if rows is not None:  # a pickle has no checksum: another number that contradicts nothing is not seen
        assert len({row[:2] for row in rows}) == len(rows) == 18
        assert all(np.isfinite(score) and train >= 0 for _, train, score in rows)


@settings(max_examples=200)
@given(content=st.binary(max_size=60))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    assert outcome(tmp_path_factory.mktemp("any"), b"\x80\x04" + content) is None


def test_queries_with_different_numbers_of_candidates_are_named(tmp_path: Path) -> None:
    scores = {"q0": {1: 0.5, 2: 0.25}, "q1": {4: 1.0, 7: 0.0}, "q2": {3: 1.0}}
    workspace = scored_run(tmp_path / "w", scores)
    with pytest.raises(BadRelease, match=r"'q0' has 2 candidates and 'q2' has 1"):
        export_release(workspace, RUN, tmp_path / "i.pkl")
    assert not (tmp_path / "i.pkl").exists()


@pytest.mark.parametrize("neighbors", [{"q0": [1], "q1": [4, 7]}, {"q0": [1, 1, 2], "q1": [7]}])
def test_candidates_that_are_not_the_scored_pairs_are_refused(
    tmp_path: Path, neighbors: dict[str, Sequence[int]]
) -> None:
    scores = {"q0": {1: 0.5, 2: 0.25}, "q1": {4: 1.0, 7: 0.0}}
    workspace = scored_run(tmp_path / "w", scores, neighbors=neighbors)
    with pytest.raises(BadRelease, match="each of its 4 scored pairs once"):
        export_release(workspace, RUN, tmp_path / "i.pkl")


def test_scores_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    workspace = scored_run(tmp_path / "w", {"q0": {1: 0.5, 2: float("nan")}})
    with pytest.raises(BadRelease, match="finite"):
        export_release(workspace, RUN, tmp_path / "i.pkl")


def test_unfinished_and_empty_runs_and_taken_names_are_refused(tmp_path: Path) -> None:
    unfinished = scored_run(tmp_path / "w", {"q0": {1: 0.5}, "q1": {1: 0.5}}, leave_out=1)
    with pytest.raises(RunUnfinished):
        export_release(unfinished, RUN, tmp_path / "i.pkl")
    with pytest.raises(BadRelease, match="no scored pairs"):
        export_release(scored_run(tmp_path / "v", {}), RUN, tmp_path / "i.pkl")
    (tmp_path / "i.pkl").write_text("mine")
    with pytest.raises(DestinationTaken):
        export_release(unfinished, RUN, tmp_path / "i.pkl")
    assert (tmp_path / "i.pkl").read_text() == "mine"


def test_arguments_that_do_not_fit_the_file_are_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "i.pkl", {"random": some_arrays()})
    workspace = Workspace(tmp_path / "w")
    samples = workspace.samples("k")
    rows = tables.SAMPLES.schema.empty_table()
    commit_table(samples, rows, tables.SAMPLES, key="k", started=time.monotonic())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "../../up"}, "'../../up' must be"),
        ({"query_ids": ["a"]}, "1 names, the file has 3 queries"),
        ({"query_ids": ["a", "b", "a"]}, "'a' 2 times"),
        ({"samples": "samples/none.parquet"}, "no samples table"),
        ({"samples": workspace.relative(samples)}, "0 training samples"),
    ]
    for arguments, pattern in wrong:
        with pytest.raises(BadRelease, match=pattern):
            import_release(workspace, path, **({"name": "a", "teacher": "t"} | arguments))
    assert run_names(workspace) == []


def test_rows_are_ordered_as_the_releases_training_cuts_them_and_named_beside(tmp_path: Path) -> None:
    splits = {"q0": "test", "q1": "train", "q2": "validation", "q3": "train", "ü": "test"}
    scores = drawn_scores(list(splits), 4)
    workspace = scored_run(tmp_path / "w", scores)
    rows = [
        {"query_id": name, "split": split, "caption": "", "image": b"", "image_sha256": ""}
        for name, split in reversed(splits.items())
    ]
    path = workspace.queries("k")
    table = tables.pa.Table.from_pylist(rows, schema=tables.QUERIES.schema)
    commit_table(path, table, tables.QUERIES, key="k", started=time.monotonic())
    record = read_run(workspace, RUN).model_copy(update={"queries": workspace.relative(path)})
    workspace.run(RUN).write_text(record.model_dump_json())
    export_release(workspace, RUN, tmp_path / "influence_train.pkl")
    beside = json.loads((tmp_path / "influence_train.rows.json").read_text(encoding="utf-8"))
    assert beside["query_ids"] == ["q1", "q3", "q2", "q0", "ü"]
    assert beside["splits"] == ["train", "train", "validation", "test", "test"]
    assert (beside["run"], beside["train_size"], beside["val_start"], beside["val_end"]) == (RUN, 2, 2, 3)
    arrays = pickle.loads((tmp_path / "influence_train.pkl").read_bytes())["random"]
    for row, name in enumerate(beside["query_ids"]):
        ranked = sorted(scores[name], key=lambda train, mine=scores[name]: (-mine[train], train))
        assert arrays["rank"][row].tolist() == ranked
    (tmp_path / "influence_train.pkl").unlink()
    with pytest.raises(DestinationTaken, match=r"influence_train\.rows\.json exists"):
        export_release(workspace, RUN, tmp_path / "influence_train.pkl")
