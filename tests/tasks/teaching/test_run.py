"""A run in the process that plans it, and in those that make its parts."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from storage_schemas.runs.liveness import read_assignment, write_assignment
from tasks.execution.coordinator import begin_run
from tasks.teaching.run import hold, load_run
from tests.tasks.letters import RUN, Letters, run_of, taught_by_letters


class Heavy:
    """Something that a device holds."""


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Letters:
    return taught_by_letters(monkeypatch)


def test_a_worker_reads_the_run_that_was_planned(tmp_path: Path, letters: Letters) -> None:
    run, key = run_of(tmp_path), begin_run.fn(run_of(tmp_path)).assignment
    hold("elsewhere", run, "another")  # as if this process had not planned it
    read = load_run(str(tmp_path), RUN, key)
    assert read is not run and read is load_run(str(tmp_path), RUN, key), "read once"
    assert (read.name, read.artifacts) == (run.name, run.artifacts)
    assert read.config == run.config and read.context.model_hash == run.context.model_hash
    assert list(read.parts) == list(run.parts) and [each.name for each in read.planned] == []


def test_a_part_made_by_the_process_that_planned_the_run_loads_nothing_again(tmp_path: Path, letters: Letters) -> None:
    run = run_of(tmp_path)
    assert load_run(str(tmp_path), RUN, begin_run.fn(run).assignment) is run


def test_what_a_run_has_loaded_goes_when_its_finished_parts_are_to_be_made_again(
    tmp_path: Path, letters: Letters
) -> None:
    begin_run.fn(run_of(tmp_path))
    workspace = run_of(tmp_path).workspace
    assignment = read_assignment(workspace, RUN)
    loaded = weakref.ref(load_run(str(tmp_path), RUN, assignment.key).context.loaded.once("base losses", 0, Heavy))
    again = assignment.model_copy(update={"generation": assignment.generation + 1})
    write_assignment(workspace, again)
    assert load_run(str(tmp_path), RUN, again.key).context.loaded.once("base losses", 0, Heavy) is not loaded()
    gc.collect()
    assert loaded() is None
