"""Runs whose gradients are taken at checkpoints of the training."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from fastgda_core.curvature.fisher import EkfacFisher, load_fisher
from fastgda_core.errors import UsageError
from flows.curation import curate
from flows.evaluation import judge_run
from storage_schemas import tables
from storage_schemas.workspace import part
from tasks.artifact import Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import open_context
from tasks.execution.estimate import estimate
from tasks.judging.teacher import check_precision
from tasks.teaching.run import Run, read_run_anew
from tests import tiny
from tests.tasks.configs import document
from tests.tasks.whole_runs import SAMPLES, configuration
from tests.tasks.without_prefect import without_prefect

TEACHER = {"alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4, "shard_samples": 16, "draws": 2}
FIRST_ORDER, EXACT = "abu_plus_first_order", "abu_plus"


@dataclass(frozen=True)
class Training:
    """A model and two checkpoints of its training, and a workspace for all runs."""

    folder: Path
    model: Path
    early: Path
    late: Path
    base: PipelineConfig

    def config(
        self, *checkpoints: Path, model: Path | None = None, name: str = FIRST_ORDER, twins: int = 0, **changes: object
    ) -> PipelineConfig:
        """A run at these checkpoints; its queries are files and, without twins, none is generated."""
        whole = self.base.model_dump(mode="json")
        whole["teacher"] = {"name": name, **TEACHER, "checkpoints": [str(each) for each in checkpoints]}
        whole["queries"]["twins"] = twins
        whole["model"]["folder"] = str(model or self.model)
        return PipelineConfig.model_validate({**whole, "self_consistency": None, **changes})

    def run(self, *checkpoints: Path, model: Path | None = None, name: str = FIRST_ORDER, **changes: object) -> Run:
        with without_prefect():
            return curate(self.config(*checkpoints, model=model, name=name, **changes)).run


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Training:
    folder = tmp_path_factory.mktemp("training")
    early, late = (tiny.save_checkpoint(model_folder, folder / name, seed=n) for n, name in ((1, "early"), (2, "late")))
    base = configuration(folder, model_folder, teacher={"name": FIRST_ORDER, **TEACHER}, curvature={"samples": 16})
    return Training(folder, model_folder, early, late, base)


def scores(run: Run) -> np.ndarray:
    """Scores of a run, (queries, samples)."""
    table = tables.read_parts(run.artifacts["scores"].path, tables.SCORES).sort_by(
        [("query_id", "ascending"), ("train_id", "ascending")]
    )
    return table["score"].to_numpy().reshape(-1, SAMPLES)


@pytest.mark.parametrize("name", [FIRST_ORDER, EXACT])
def test_a_checkpoint_teaches_as_a_model_with_its_weights_does(training: Training, name: str) -> None:
    whole = Path(shutil.copytree(training.model, training.folder / f"whole {name}"))
    shutil.rmtree(whole / "unet")
    shutil.copytree(training.early / "unet", whole / "unet")
    sketches = {"sketches": {}} if name == FIRST_ORDER else {}
    ours = training.run(training.early, name=name, **sketches)
    theirs = training.run(model=whole, name=name, **sketches)
    own = training.run(name=name, **sketches)
    assert np.array_equal(scores(ours), scores(theirs)) and not np.allclose(scores(ours), scores(own))
    assert len({ours.name, theirs.name, own.name}) == 3
    if sketches:
        for number in range(ours.parts["sketches"].count):
            files = [load_file(each.parts["sketches"].path(number)) for each in (ours, theirs)]
            assert all(torch.equal(files[0][key], files[1][key]) for key in ("train_ids", "values", "scales"))


def test_a_checkpoint_with_the_models_weights_teaches_as_the_model(training: Training) -> None:
    copied = Path(shutil.copytree(training.model / "unet", training.folder / "last" / "unet")).parent
    assert np.array_equal(scores(training.run(copied)), scores(training.run()))


def spreads(run: Run) -> np.ndarray:
    """sqrt(x^T F x) of every query's step x in float64, from the files of a run at one checkpoint."""
    fisher, steps = load_fisher(run.artifacts["curvature"].path), run.artifacts["unlearning steps"]
    assert isinstance(fisher, EkfacFisher)
    found = []
    for number in range(steps.rows):
        update, total = load_file(part(steps.path, number, "safetensors")), 0.0
        for name, factors in fisher.layers.items():
            left, right = factors.output_basis.double(), factors.input_basis.double()
            turned = left.T @ update[name].double() @ right
            total += float((factors.eigenvalues.double() * turned * turned).sum())
        found.append(total**0.5)
    return np.array(found)


@pytest.mark.parametrize("name", [FIRST_ORDER, EXACT])
def test_scores_of_several_are_the_sum_of_each_ones_standardised_scores(training: Training, name: str) -> None:
    early, late, both = (
        training.run(*checkpoints, name=name)
        for checkpoints in ([training.early], [training.late], [training.early, training.late])
    )
    expected = scores(early) / spreads(early)[:, None] + scores(late) / spreads(late)[:, None]
    np.testing.assert_allclose(scores(both), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    kinds = [kind for kind in both.parts if kind.endswith("of checkpoint 2")]
    assert kinds == [f"{kind} of checkpoint 2" for kind in ("curvature", "unlearning steps")] + (
        ["base losses of checkpoint 2"] if name == EXACT else []
    )
    for kind in kinds:
        assert both.parts[kind].artifact.path == late.parts[kind.removesuffix(" of checkpoint 2")].artifact.path, (
            "shared"
        )


@pytest.fixture(scope="module")
def checked(training: Training) -> tuple[Run, list[Made]]:
    """A run at both checkpoints with every check that has a meaning there."""
    config = training.config(
        training.early,
        training.late,
        twins=2,
        exact_check={"queries": 2, "candidates": 12},
        self_consistency={"queries": 2, "samples": 12},
    )
    teacher = {**config.teacher.model_dump(mode="json"), "update_rank": 4}
    config = PipelineConfig.model_validate({**config.model_dump(mode="json"), "teacher": teacher})
    with without_prefect():
        curation = curate(config)
        early = [made for made in curation.made if made.artifact.name == "twin test"]
        return curation.run, [*early, check_precision(curation.run), *judge_run(curation.run)]


def test_every_check_of_a_teacher_looks_at_all_checkpoints(checked: tuple[Run, list[Made]]) -> None:
    run, checks = checked
    names = {check.artifact.name: check.artifact for check in checks}
    checks_of_all = {"precision check", "twin test", "low-rank error", "exact check", "self-consistency"}
    assert names.keys() == checks_of_all | {"planted truth"}
    exact = tables.read_parts(names["exact check"].path, tables.SCORES).to_pandas()
    first_order = tables.read_parts(run.artifacts["scores"].path, tables.SCORES).to_pandas()
    both = exact.merge(first_order, on=["query_id", "train_id"])
    for _, mine in both.groupby("query_id"):
        assert np.corrcoef(mine["score_x"], mine["score_y"])[0, 1] > 0.99, "first order and exact, of both checkpoints"
    rows = {
        (row["metric"], row["space"]): row["value"]
        for name in ("precision check", "self-consistency")
        for row in tables.read(names[name].path, tables.METRICS).to_pylist()
        if row["query_id"] == ""
    }
    assert rows["spearman", "float32 vs float64"] > 0.999
    assert rows["spearman", "teacher with other gradient"] < 1


def test_an_estimate_counts_the_parts_of_all_checkpoints(checked: tuple[Run, list[Made]]) -> None:
    run, _ = checked
    config = run.config.model_copy(
        update={"execution": run.config.execution.model_copy(update={"forwards_per_second": 1.0})}
    )
    kinds = {kind.kind: kind for kind in estimate(config).kinds}
    assert kinds.keys() == run.parts.keys() - {"latents"}
    for name, kind in kinds.items():
        assert kind.parts == run.parts[name].count
    one = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"checkpoints": config.teacher.checkpoints[:1]})}
    )
    alone = {kind.kind: kind for kind in estimate(one).kinds}
    assert kinds["scores"].forwards == 2 * alone["scores"].forwards
    assert kinds["curvature of checkpoint 2"].forwards == alone["curvature"].forwards


def test_workers_and_a_retry_find_the_run_as_it_was_planned(checked: tuple[Run, list[Made]]) -> None:
    run, _ = checked
    anew = read_run_anew(str(run.workspace.root), run.name)
    assert anew.context.checkpoint_hashes == run.context.checkpoint_hashes != ()
    assert {kind: parts.artifact for kind, parts in anew.parts.items()} == {
        kind: parts.artifact for kind, parts in run.parts.items()
    }
    lost, kept = anew.parts["unlearning steps of checkpoint 2"], anew.parts["unlearning steps of checkpoint 1"]
    before = lost.path(3).read_bytes(), kept.path(3).stat().st_mtime_ns
    lost.path(3).unlink()
    assert lost.missing() == [3] and not kept.missing()
    with without_prefect():
        again = curate(run.config).run
    assert again.name == run.name and not lost.missing()
    assert (lost.path(3).read_bytes(), kept.path(3).stat().st_mtime_ns) == before


def keys(config: PipelineConfig) -> tuple[str, ...]:
    return open_context(config).checkpoint_hashes


def test_the_weights_are_in_the_keys_and_the_folder_is_not(training: Training, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(training.early, tmp_path / "moved"))
    assert keys(training.config(moved)) == keys(training.config(training.early))
    assert training.run(moved).name == training.run(training.early).name
    shutil.copy(training.late / tiny.WEIGHTS[0], moved / tiny.WEIGHTS[0])
    assert keys(training.config(moved)) == keys(training.config(training.late))
    assert training.run(moved).name == training.run(training.late).name
    with pytest.raises(UsageError, match=r"teacher\.checkpoints: .*absent does not exist"):
        open_context(training.config(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"sketches": {}}, "teacher.checkpoints has 2: name one checkpoint, or remove sketches"),
        ({"head": {"kind": "gradient"}}, "head.kind gradient answers from sketches"),
        ({"teacher__checkpoints": ["a", "a"]}, "name a folder twice: remove one of the two"),
        ({"teacher__name": "similarity", "teacher__alpha": None}, "checkpoints is no setting of teacher similarity"),
    ],
)
def test_what_has_no_meaning_at_several_checkpoints_is_refused(changes: dict[str, object], fault: str) -> None:
    teacher = {"name": FIRST_ORDER, "alpha": 1e-4, "checkpoints": ["a", "b"]}
    with pytest.raises(ValidationError, match=fault):
        PipelineConfig.model_validate(document(teacher=teacher, **changes))
