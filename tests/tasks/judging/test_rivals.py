"""Rivals of a run's teacher: runs of their own, judged as every method is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from scipy import stats

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.ensembles import BEST
from flows.curation import curate, plan_run
from flows.evaluation import judge_run
from flows.rivals import score_rivals
from storage_schemas import tables
from storage_schemas.runs.liveness import read_assignment
from storage_schemas.runs.rivals import read_rivals
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_influence
from tasks.config.execution import ExecutionConfig
from tasks.config.pipeline import PipelineConfig
from tasks.config.stored import config_of
from tasks.execution.estimate import estimate
from tasks.inputs.features import feature_folders
from tasks.inputs.queries import load_queries
from tasks.inputs.twins import load_twins
from tasks.judging.costs import COSTS, LATENCY, PREPARED, STORED, WHOLE_PASS
from tasks.judging.judge_table import judge_table
from tasks.judging.kept_checks import read_checks
from tasks.judging.retrained import BESIDE_TEACHER
from tasks.judging.retrained_pool import RetrainedPool
from tasks.judging.rivals import Rivals
from tasks.teaching import similarity
from tasks.teaching.retrainings import REMOVAL_PLAN
from tasks.teaching.run import read_run_anew
from tasks.watching.run_status import latest_run, run_status
from tasks.watching.trust import LDS, TEACHER, TWIN_SHARE
from tests.tasks.configs import document
from tests.tasks.whole_runs import SAMPLES, WholeRun, configuration
from tests.tasks.without_prefect import without_prefect

EXACT, TIED, NEAR = "AbU, exact", "first order, negatives 0", "pixels, nearest 5"
UNLEARNING = {"alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4}
RIVALS = {
    EXACT: {"name": "abu", "timesteps": 1, "gradient_pairs": 2},
    TIED: {"name": "abu_plus_first_order", "timesteps": 2, "gradient_pairs": 4, "negatives": "tie"},
    NEAR: {"name": "similarity", "nearest": 5},
}
JUDGE = {
    "retrain": {"steps": 3, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-2},
    **{"subsets": 4, "again": 3, "draws": 4},
}


def with_rivals(folder: Path, model: Path, rivals: dict[str, dict[str, object]], **judge: object) -> PipelineConfig:
    return configuration(
        folder,
        model,
        teacher={"name": "abu_plus_first_order", **UNLEARNING},
        curvature={"samples": 16},
        self_consistency=None,
        judge={**JUDGE, "rivals": rivals, **judge},
    )


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    removed = {"k": [3], "targets": 1, "methods": ["untuned", EXACT]}
    config = with_rivals(tmp_path_factory.mktemp("rivals"), model_folder, RIVALS, leave_out=removed)
    with without_prefect():
        curation = curate(config)
        return WholeRun(config, curation, judge_run(curation.run), *[None] * 3)  # type: ignore[arg-type]


def rows_of(run: WholeRun, name: str) -> list[dict]:
    (check,) = (each for each in read_checks(run.workspace, run.run.name) if each.name == name)
    return tables.read(check.path, tables.METRICS).to_pylist()


def figures(run: WholeRun, name: str = "retraining check") -> dict[tuple[str, str, str], dict]:
    return {(row["metric"], row["space"], row["split"]): row for row in rows_of(run, name) if not row["query_id"]}


@pytest.mark.heavy
def test_a_rivals_scores_are_those_that_a_run_with_that_teacher_publishes(
    judged: WholeRun, tmp_path: Path, model_folder: Path
) -> None:
    rivals = Rivals.of(judged.run)
    assert list(rivals.scored) == list(RIVALS) and not rivals.failed
    scores = rivals.scores(left_out=0.0)
    twins = load_twins(judged.run.artifacts["queries"].path)  # whose names differ between workspaces
    names = [each.query_id for each in load_queries(judged.run.artifacts["queries"]) if each.query_id not in twins]
    for name, candidates in (
        (EXACT, {"policy": "all"}),
        (TIED, {"policy": "all"}),
        (NEAR, {"policy": "top_k", "k": 5}),
    ):
        section = {key: value for key, value in RIVALS[name].items() if key != "nearest"}
        step = {} if name == NEAR else {"alpha": 1e-4}
        config = configuration(
            tmp_path / name, model_folder, teacher=section | step, candidates=candidates, curvature={"samples": 16}
        )
        with without_prefect():
            alone = curate(config)
        expected = torch.zeros(len(names), SAMPLES, dtype=torch.float64)
        for row in read_influence(alone.run.workspace, alone.ranks.key, names).to_pylist():
            expected[names.index(row["query_id"]), row["train_id"]] = row["score"]
        assert torch.equal(scores[name][: len(names)], expected), name


def test_rivals_are_judged_as_every_method_is(judged: WholeRun) -> None:
    found, pool, queries = figures(judged), RetrainedPool.of(judged.run), load_queries(judged.run.artifacts["queries"])
    test = [number for number, query in enumerate(queries) if query.split == "test"]
    for name, scores in Rivals.of(judged.run).scores(left_out=0.0).items():
        sums, losses = pool.kept.double() @ scores[test].T, -pool.losses[:, test]
        expected = [
            stats.spearmanr(sums[:, row].tolist(), losses[:, row].tolist()).statistic for row in range(len(test))
        ]
        if not any(map(math.isnan, expected)):
            assert found[LDS, name, "test"]["value"] == pytest.approx(sum(expected) / len(expected))
        assert (BESIDE_TEACHER, name, "test") in found and (TWIN_SHARE, name, "pseudo") in found
    table = judge_table(judged.workspace, judged.run.name)
    assert table is not None and set(RIVALS) <= set(table.methods)


def test_a_sample_that_a_rival_was_not_asked_for_comes_last(judged: WholeRun) -> None:
    scores = Rivals.of(judged.run).scores(left_out=-torch.inf)[NEAR]
    assert ((scores > -torch.inf).sum(1) == 5).all()
    assert (Rivals.of(judged.run).scores(left_out=0.0)[TIED] >= 0).all()


def test_models_are_trained_without_what_a_rival_names(judged: WholeRun) -> None:
    plan = {
        row["method"]: row for row in tables.read(judged.run.artifacts[REMOVAL_PLAN].path, tables.REMOVALS).to_pylist()
    }
    assert list(plan) == [TEACHER, "untuned", EXACT, "random"]
    names = [query.query_id for query in load_queries(judged.run.artifacts["queries"])]
    (target,) = plan[EXACT]["targets"]
    scores = Rivals.of(judged.run).scores(left_out=-torch.inf)[EXACT][names.index(target)]
    assert plan[EXACT]["removed"] == sorted(scores.topk(3).indices.tolist())


def test_what_the_run_published_is_what_it_was(judged: WholeRun) -> None:
    published = read_published(judged.workspace)
    assert published.run == judged.run.name and published.snapshot == judged.curation.ranks.key
    for record in read_rivals(judged.workspace, judged.run.name).values():
        assert record.run.startswith("rival-") and config_of(str(judged.workspace.root), record.run).publish == "never"


@pytest.mark.heavy
def test_a_rival_makes_nothing_of_the_run_again(judged: WholeRun) -> None:
    """Neither its parts nor the pool nor another rival: what is judged, and what it costs, are taken again."""
    config = judged.config
    assert config.judge is not None
    more = config.judge.rivals | {"pixels": config.judge.rivals[NEAR].model_copy(update={"nearest": None})}
    wider = config.model_copy(update={"judge": config.judge.model_copy(update={"rivals": more})})
    with without_prefect():
        again = curate(wider)
        assert again.run.name == judged.run.name and all(made.reused for made in again.made)
        made = {each.artifact.name: each.reused for each in judge_run(again.run)}
    new = {name for name, reused in made.items() if not reused}
    assert new == {"rival pixels", "retraining check", "planted truth", "costs", "judge table"}
    with without_prefect():  # as it was, for the other tests
        judge_run(plan_run(config))


@pytest.mark.heavy
def test_a_rival_that_fails_does_not_stop_the_rest(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rivals = {"bad": RIVALS[NEAR], "good": RIVALS[TIED]}
    config = with_rivals(tmp_path, model_folder, rivals)

    def fail(*_: object) -> None:
        raise FloatingPointError("no cosine")

    with without_prefect(), monkeypatch.context() as patch:
        patch.setattr(similarity.Similarity, "scores", fail)
        run = curate(config).run
        assert [made.artifact.name for made in score_rivals(run)] == ["rival good"]
    assert "rival bad has no scores" in capsys.readouterr().err
    found = Rivals.of(run)
    assert list(found.scored) == ["good"] and "FloatingPointError: no cosine" in found.failed["bad"]
    bad = read_rivals(run.workspace, run.name)["bad"].run
    assert read_assignment(run.workspace, bad).run == bad
    with without_prefect():  # it fails no more, and what is there is not made again
        again = {made.artifact.name: made.reused for made in score_rivals(run)}
    assert again == {"rival bad": False, "rival good": True}
    assert list(Rivals.of(run).scored) == ["bad", "good"]


@pytest.mark.heavy
def test_a_rival_that_was_killed_is_resumed(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_rivals(tmp_path, model_folder, {"cosines": {"name": "similarity", "shard_samples": 8}})
    whole, asked = similarity.Similarity.scores, []

    def die(self: similarity.Similarity, *arguments: object) -> object:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(self, *arguments)  # type: ignore[arg-type]

    with without_prefect():
        run = curate(config).run
        with monkeypatch.context() as patch:
            patch.setattr(similarity.Similarity, "scores", die)
            with pytest.raises(KeyboardInterrupt):
                score_rivals(run)
        monkeypatch.setattr(similarity.Similarity, "scores", lambda self, *a: asked.append(1) or whole(self, *a))
        score_rivals(run)
    assert len(asked) == 2 + SAMPLES // 8 - 1, "the shard that was made is not made again"
    assert Rivals.of(run).scores(left_out=-torch.inf)["cosines"].isfinite().all()


def test_ensembles_are_chosen_on_the_validation_queries_and_judged_like_the_rest(judged: WholeRun) -> None:
    found = figures(judged)
    names = sorted({name for _, name, _ in found if name.startswith(BEST)})
    assert [name[: len(BEST) + 1] for name in names] == [f"{BEST}2", f"{BEST}3"]
    for name in names:
        members = name.split(": ")[1].split("; ")
        assert len(members) == int(name[len(BEST)])
        assert {(LDS, name, "test"), (BESIDE_TEACHER, name, "test"), (TWIN_SHARE, name, "pseudo")} <= found.keys()


def test_what_a_method_costs_stands_beside_what_it_is_worth(judged: WholeRun) -> None:
    found = {key[:2]: row["value"] for key, row in figures(judged, COSTS).items()}
    methods = {TEACHER, "untuned", "pixel", *RIVALS}
    assert methods <= {name for _, name in found} and (LATENCY, "random") not in found
    whole = {name for (metric, name), value in found.items() if metric == WHOLE_PASS and value and name in methods}
    assert whole == {TEACHER, EXACT, TIED}
    assert all(found[LATENCY, name] > 0 and found[PREPARED, name] >= 0 for name in methods)
    folder, _ = feature_folders(judged.run.context, judged.run.artifacts["samples"])["pixel"]
    assert found[STORED, "pixel"] == sum(path.stat().st_size for path in folder.glob("*.parquet")) / SAMPLES
    table = judge_table(judged.workspace, judged.run.name)
    assert table is not None
    (section,) = (each for each in table.sections if each.title == "What it costs")
    assert section.heads == ["to prepare", "kept, a sample", "a new query"]
    assert section.columns[2].text(TEACHER).endswith("whole pass")


@pytest.mark.heavy
def test_an_estimate_counts_what_rivals_take_beyond_the_run(judged: WholeRun) -> None:
    config = judged.config.model_copy(update={"execution": ExecutionConfig(forwards_per_second=100.0)})
    found = {kind.kind: kind for kind in estimate(config).kinds}
    expected = {"curvature", "unlearning steps", "base losses", "scores"}  # by another Fisher, and an exact teacher
    assert {name.removeprefix(f"{EXACT}: ") for name in found if name.startswith(EXACT)} == expected
    assert f"{TIED}: scores" in found and f"{TIED}: unlearning steps" not in found, "the run's own"
    for name, record in read_rivals(judged.workspace, judged.run.name).items():
        parts = read_run_anew(str(judged.workspace.root), record.run).parts
        for kind in ("curvature", "unlearning steps", "base losses", "scores"):
            if (cost := found.get(f"{name}: {kind}")) is not None:
                assert cost.parts == parts[kind].count


def test_the_status_of_a_run_tells_its_rivals_and_the_latest_run_is_none_of_them(judged: WholeRun) -> None:
    told = run_status(judged.workspace, judged.run.name).rivals
    assert list(told) == list(RIVALS) and all(run.startswith("rival-") for run in told.values())
    assert latest_run(judged.workspace) == judged.run.name


@pytest.mark.parametrize(
    ("rivals", "said"),
    [
        ({"": {"name": "abu"}}, "judge.rivals"),
        ({"a | b": {"name": "abu"}}, "judge.rivals"),
        ({"teacher": {"name": "abu"}}, "rivals has a 'teacher', which is another row of the table"),
        ({"pixel, centred": {"name": "abu"}}, "rivals has a 'pixel, centred', which is another row of the table"),
        ({"two stages, mine": {"name": "abu"}}, "rivals has a 'two stages, mine', which is another row"),
        ({"x": {"name": "no_such"}}, "there is no teacher 'no_such'"),
        ({"x": {"name": "similarity", "damping": 2.0}}, "damping is no setting of teacher similarity"),
        ({"x": {"name": "abu", "space": "no_such"}}, "names the encoder 'no_such'"),
        ({"x": {"name": "abu", "nearest": 1}}, "greater than or equal to 2"),
        ({"x": {"name": "abu", "precision": "bf16"}}, "teacher.precision is bf16"),
    ],
)
def test_a_rival_that_cannot_be_is_refused_with_the_configuration(rivals: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        PipelineConfig.model_validate(document(judge={"retrain": {"steps": 2}, "rivals": rivals}))
    assert said in str(refused.value)


def test_a_step_size_that_is_left_out_is_the_runs() -> None:
    judge = {"retrain": {"steps": 2}, "rivals": {"x": {"name": "abu"}, "y": {"name": "abu", "alpha": 0.5}}}
    config = PipelineConfig.model_validate(document(judge=judge))
    assert config.of_rival("x").teacher.alpha == config.teacher.alpha and config.of_rival("y").teacher.alpha == 0.5
    with pytest.raises(ValidationError, match=r"judge\.rivals: x: teacher\.alpha: is missing"):
        PipelineConfig.model_validate(document(judge=judge, teacher={"name": "similarity"}))


def test_a_rival_that_does_not_fit_is_refused_by_name_before_any_work(tmp_path: Path, model_folder: Path) -> None:
    config = with_rivals(tmp_path, model_folder, {"too near": {"name": "similarity", "nearest": 1000}})
    with without_prefect(), pytest.raises(UsageError, match=r"judge\.rivals: too near: candidates\.k is 1000"):
        plan_run(config)
    assert not list((tmp_path / "workspace").glob("queries/*"))
