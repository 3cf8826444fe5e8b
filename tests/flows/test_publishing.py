"""What readers see is changed by many processes at once: publications, retractions, promotions, checks and studies."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from flows.commands.store import publish, retract
from storage_schemas import tables
from storage_schemas.commit import input_key
from storage_schemas.snapshots.published import Published, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.distilling.labels import Labels
from tasks.judging.kept_checks import publish_checks
from tasks.judging.study import _publish
from tasks.serving.promotion import promote
from tests.storage_schemas.workspaces import commit_index, finish_run, write_table
from tests.tasks.configs import document

# What they import is there already, so that forty begin in a second.
PROCESSES = multiprocessing.get_context("fork")
Change = tuple[Callable[..., None], str]
LOSS = {"question": "loss", "choice": "mse", "seed": 0}


def add(root: str, run: str) -> None:
    publish([run], add=True, workspace=root)


def take_out(root: str, run: str) -> None:
    retract(run, workspace=root)


def serve(root: str, name: str) -> None:
    context = _context(root)
    index = Artifact("index", name, context.workspace.index(name), 1)
    metrics = Artifact("evaluation", name, context.workspace.metrics(name), 1)
    floors = context.config.evaluation
    promote.fn(context.workspace, floors, index, Made(metrics, 0.0, True))


def study(root: str, name: str) -> None:
    context = _context(root)
    snapshot = read_published(context.workspace).snapshot
    ranks = Artifact("rank labels", snapshot, context.workspace.snapshot(snapshot), 1)
    _publish(context, Labels("first", ranks, (), ranks), input_key("study", name), [context.workspace.study("any")])


def check(root: str, run: str) -> None:
    context = _context(root)
    exact = Artifact("exact check", run, context.workspace.exact_check(run), 1)
    publish_checks(SimpleNamespace(workspace=context.workspace, name=run), [exact])  # type: ignore[arg-type]


def _context(root: str) -> Context:
    config = document(workspace=root, evaluation={"cutoffs": [2], "validation_cutoff": 2})
    return Context(PipelineConfig.model_validate(config), "model")


def at_once(root: Path, changes: Sequence[Change]) -> None:
    """Each change in a process of its own, all begun at the same instant."""
    barrier = PROCESSES.Barrier(len(changes))

    def work(change: Callable[..., None], name: str) -> None:
        barrier.wait(60)
        change(str(root), name)

    processes = [PROCESSES.Process(target=work, args=change) for change in changes]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0


def workspace_with(root: Path, *, published: Sequence[str], others: Sequence[str], promoted: Sequence[str]) -> None:
    for run in (*published, *others):
        finish_run(root, run, queries=(f"q-{run}",))
    publish(list(published), workspace=str(root))
    rows: list[dict[str, Any]] = [
        {"metric": "mAP", "space": space, "split": "test", "cutoff": 2, "query_id": "", "queries": 1}
        | {"value": 0.5, "standard_error": 0.1}
        for space in ("tuned", "untuned")
    ]
    samples = read_published(Workspace(root)).samples
    for name in promoted:
        commit_index(Workspace(root), name, samples or "", head=name)
    for name in promoted:
        write_table(root / "metrics" / f"{name}.parquet", tables.METRICS, rows)
    write_table(root / "studies" / "any", tables.STUDY, [row | LOSS for row in rows])


def assert_nothing_is_lost(root: Path, changes: Sequence[Change], published: Sequence[str]) -> Published:
    """Each run that was added is there, none that was retracted, and one promotion, whole."""
    workspace = Workspace(root)
    now = read_published(workspace)
    names = {change: {name for done, name in changes if done is change} for change in (add, take_out, serve)}
    runs = read_snapshot(workspace, now.snapshot).runs
    assert sorted(runs) == sorted({*published, *names[add]} - names[take_out])
    served = (now.head or "").removeprefix("heads/")
    assert served in names[serve] and now.index == f"indexes/{served}"
    assert now.metrics in (f"metrics/{served}.parquet", None)  # another snapshot has others
    assert json.loads(workspace.current.read_bytes()) == now.model_dump(mode="json")
    found = query(root, "SELECT DISTINCT query_id FROM ranks")["query_id"].to_pylist()
    assert sorted(found) == sorted(f"q-{run}" for run in runs)
    return now


@pytest.mark.parametrize(
    ("runs", "heads", "studies", "processes"), [(2, 5, 3, 16), pytest.param(4, 14, 10, 40, marks=pytest.mark.slow)]
)
def test_what_many_processes_change_at_once_is_all_there(
    tmp_path: Path, runs: int, heads: int, studies: int, processes: int
) -> None:
    published = [f"old-{number}" for number in range(runs + 1)]
    added = [f"new-{number}" for number in range(runs)]
    promoted = [f"h{number}" for number in range(heads)]
    workspace_with(tmp_path, published=published, others=added, promoted=promoted)
    changes: list[Change] = [
        *((add, run) for run in added),
        *((take_out, run) for run in published[:runs]),
        *((serve, name) for name in promoted),
        *((study, f"study {number}") for number in range(studies)),
        *((check, run) for run in (*added, *published[-runs:])),
    ]
    assert len(changes) == processes
    at_once(tmp_path, changes)
    now = assert_nothing_is_lost(tmp_path, changes, published)
    with duckdb.connect(str(tmp_path / "catalog.duckdb"), read_only=True) as catalog:
        assert len(catalog.execute("SELECT DISTINCT query_id FROM ranks").fetchall()) == runs + 1
    # While no run comes or goes, a study and a check stand beside a promotion.
    at_once(tmp_path, [(study, "last"), (check, now.run), (serve, "h0"), (study, "last")])
    now = read_published(Workspace(tmp_path))
    assert (now.exact_check, now.head) == (f"exact_checks/{now.run}", "heads/h0")
    folder, _, _ = (now.compared_heads or "").rpartition("/")
    assert folder == f"studies/{input_key('study', 'last')}"
