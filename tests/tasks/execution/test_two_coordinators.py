"""Two runs of one configuration at once."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage_schemas.commit import worker_name
from storage_schemas.runs.liveness import Beat, write_beat
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.execution.coordinator import Coordinator, Watch, begin_run
from tasks.execution.outcomes import Outcome
from tasks.teaching.run import Run
from tasks.watching.run_status import others_at_work
from tests.tasks.teaching.test_score_plan import plan


def beat(worker: str, **changes: object) -> Beat:
    told = {"worker": worker, "beat": 3, "at": datetime.now(UTC), "kind": "latents", "number": 7}
    return Beat.model_validate(told | changes)


def test_who_else_is_at_work_is_known_by_signs_of_life(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_beat(workspace, "run", beat(worker_name()))
    write_beat(workspace, "run", beat("elsewhere:1", ended=True))
    write_beat(workspace, "run", beat("elsewhere:2", at=datetime(2026, 1, 1, tzinfo=UTC)))
    assert others_at_work(workspace, "run") == []
    write_beat(workspace, "run", beat("elsewhere:3"))
    assert [each.worker for each in others_at_work(workspace, "run")] == ["elsewhere:3"]


def run_of(root: Path) -> Run:
    """A planned run of 1,200 samples: three parts of latents, none of which is made."""
    context, run, queries = plan(root, "abu_plus_first_order", [{1}])
    workspace = context.workspace
    places = {
        "samples": (workspace.samples("k"), 1200),
        "queries": (workspace.queries("k"), len(queries)),
        "latents": (workspace.parts("latents", "k"), 1200),
        "curvature": (workspace.parts("curvature", "k") / "fisher.safetensors", 8),
        "unlearning steps": (workspace.parts("unlearning steps", "k"), len(queries)),
        "candidates": (workspace.candidates(run.run), 1),
        "scores": (workspace.scores(run.run), 1),
    }
    keys = {"scores": run.run}
    return Run(context, {name: Artifact(name, keys.get(name, "k"), *place) for name, place in places.items()})


def test_the_second_of_two_runs_says_who_is_at_it_and_begins_at_the_other_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches: list[list[int]] = []

    def made(self: Coordinator, kind: str, todo: list[int], watch: Watch) -> Outcome:
        batches.append(todo)
        raise KeyboardInterrupt

    monkeypatch.setattr(Coordinator, "_round", made)
    run = run_of(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            begin_run.fn(run).make("latents")
        write_beat(run.workspace, run.name, beat("elsewhere:3"))
    told = capsys.readouterr().err
    assert told.count("is under way elsewhere, too: elsewhere:3 at latents 00007, of 1 at work") == 1
    assert batches == [[0, 1, 2], [2, 1, 0]]
