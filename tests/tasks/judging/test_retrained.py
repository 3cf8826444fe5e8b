"""Models trained again on random halves, and the teacher held against them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from fastgda_core.diffusion.training import DenoiserTrainer
from fastgda_core.errors import Stopped, UsageError
from storage_schemas import tables
from storage_schemas.commit import committed
from storage_schemas.snapshots.snapshots import read_influence
from storage_schemas.sql.views import query
from storage_schemas.tables import PSEUDO
from tasks.context import Loaded
from tasks.inputs.queries import Query, load_queries
from tasks.inputs.twins import load_twins
from tasks.judging import left_out
from tasks.judging.kept_checks import read_checks
from tasks.judging.left_out import CHANGE, OF_CONTROLS, SEPARATION
from tasks.judging.methods import RANDOM, UNTUNED, every_method
from tasks.judging.retrained import BESIDE_TEACHER, OVER_MODELS, TWIN_EFFECT, check_by_retraining
from tasks.judging.tiers import Tiers
from tasks.teaching import retrainings
from tasks.teaching.pool import Retraining
from tasks.teaching.retrainings import RemovalParts, RetrainingParts, judged_by
from tasks.watching.trust import LDS, RETRAINED_AGAIN, TEACHER, TWIN_SHARE, WORST_TWIN, trust_in
from tests.tasks.whole_runs import SAMPLES, WholeRun


@pytest.fixture
def parts(unlearned: WholeRun) -> RetrainingParts:
    found = unlearned.run.parts[RetrainingParts.kind]
    assert isinstance(found, RetrainingParts)
    return found


def check_rows(run: WholeRun) -> list[dict]:
    (check,) = (each for each in read_checks(run.workspace, run.run.name) if each.name == "retraining check")
    return tables.read(check.path, tables.METRICS).to_pylist()


def of_test_split(run: WholeRun) -> list[Query]:
    return [query for query in load_queries(run.run.artifacts["queries"]) if query.split == "test"]


def elsewhere(parts: RetrainingParts, folder: Path) -> RetrainingParts:
    """The same parts, none of them made, in another folder."""
    artifact = replace(parts.artifact, path=folder)
    return RetrainingParts(parts.context, parts.samples, parts.latents, parts.queries, artifact)


def test_a_pool_is_halves_some_of_them_twice_and_a_model_of_all(parts: RetrainingParts) -> None:
    assert parts.count == 1 + 4 + 3 == len(set(parts.ids))
    assert parts.missing() == []
    whole, *subsets = parts.pool
    assert whole.kept(parts.config, SAMPLES).all()
    kept = [each.kept(parts.config, SAMPLES) for each in subsets]
    assert {int(mask.sum()) for mask in kept} == {SAMPLES // 2}
    assert all(torch.equal(*pair) for pair in zip(kept[:3], kept[4:], strict=True))
    assert len({tuple(mask.tolist()) for mask in kept}) == 4


def test_a_larger_pool_trains_only_what_it_lacks(parts: RetrainingParts) -> None:
    larger = parts.config.model_copy(update={"subsets": 6, "again": 4})
    context = replace(parts.context, config=parts.context.config.model_copy(update={"judge": larger}))
    pool = judged_by(context, larger, parts.latents, parts.queries, "run")[RetrainingParts.kind]
    more = RetrainingParts(context, parts.samples, parts.latents, parts.queries, pool)
    assert pool.path == parts.artifact.path
    wanted = [more.pool[number] for number in more.missing()]
    assert wanted == [Retraining(0, 4), Retraining(0, 5), Retraining(1, 3)]


def test_a_model_is_trained_again_bit_for_bit(parts: RetrainingParts, tmp_path: Path) -> None:
    again = elsewhere(parts, tmp_path)
    again.make(2)
    assert torch.equal(again.losses(2), parts.losses(2))
    assert not torch.equal(parts.losses(2), parts.losses(3))
    assert not torch.equal(parts.losses(1), parts.losses(5)), "the same half from another seed"


def test_a_training_that_is_stopped_goes_on_from_its_last_state(
    parts: RetrainingParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = elsewhere(parts, tmp_path)
    monkeypatch.setattr(retrainings, "STATE_SECONDS", 0)
    looked = []

    def stop() -> None:
        looked.append(1)
        if len(looked) == 3:
            raise Stopped

    monkeypatch.setattr(retrainings, "checkpoint", stop)
    with pytest.raises(Stopped):
        again.make(1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".state"]
    begun = []
    run = DenoiserTrainer.run
    monkeypatch.setattr(DenoiserTrainer, "run", lambda self, **how: begun.append(self.step) or run(self, **how))
    again.make(1)
    assert begun == [2]
    assert torch.equal(again.losses(1), parts.losses(1))
    assert not list(tmp_path.glob("*.state"))


def test_the_figures_are_those_of_scipy(unlearned: WholeRun, parts: RetrainingParts) -> None:
    (check,) = (
        each for each in read_checks(unlearned.workspace, unlearned.run.name) if each.name == "retraining check"
    )
    rows = tables.read(check.path, tables.METRICS).to_pylist()
    found = {(row["metric"], row["space"], row["split"], row["query_id"]): row for row in rows}
    kept = torch.stack([each.kept(parts.config, SAMPLES) for each in parts.pool[1:5]])
    losses = torch.stack([parts.losses(number).mean(0) for number in range(1, 5)])
    queries = load_queries(unlearned.run.artifacts["queries"])
    scored = read_influence(unlearned.workspace, unlearned.curation.ranks.key, [query.query_id for query in queries])
    for split in ("test", PSEUDO):
        expected = []
        for number, asked in enumerate(queries):
            if asked.split != split:
                continue
            mine = {row["train_id"]: row["score"] for row in scored.to_pylist() if row["query_id"] == asked.query_id}
            sums = [sum(mine[sample] for sample in mask.nonzero().flatten().tolist()) for mask in kept]
            expected.append(stats.spearmanr(sums, (-losses[:, number]).tolist()).statistic)
            assert found[LDS, TEACHER, split, asked.query_id]["value"] == pytest.approx(expected[-1])
        assert found[LDS, TEACHER, split, ""]["value"] == pytest.approx(sum(expected) / len(expected))
        assert found[LDS, TEACHER, split, ""]["queries"] == len(expected)
        for method in (TEACHER, UNTUNED, RANDOM):
            assert found[OVER_MODELS, method, split, ""]["value"] >= 0
        assert 0 <= found[LDS, RETRAINED_AGAIN, split, ""]["value"] <= 1
    facts = dict(trust_in(unlearned.workspace, unlearned.run.name).facts)
    mean, ceiling = (found[LDS, method, "test", ""]["value"] for method in (TEACHER, RETRAINED_AGAIN))
    assert facts["models trained again"].startswith(f"LDS {mean:.2f} ± ")
    assert facts["models trained again"].endswith(f"of at most {ceiling:.2f}")
    assert check_by_retraining.fn(unlearned.run, unlearned.curation.ranks).reused


def test_every_method_is_judged_as_the_teacher_is(unlearned: WholeRun, parts: RetrainingParts) -> None:
    run, queries = unlearned.run, load_queries(unlearned.run.artifacts["queries"])
    scores = every_method(run, unlearned.curation.ranks, Tiers.of(run))
    assert list(scores)[3:] == ["pixel", "symmetric head", "sketch", "two stages, first 4"]
    kept = torch.stack([each.kept(parts.config, SAMPLES) for each in parts.pool[1:5]]).double()
    losses = torch.stack([parts.losses(number).mean(0) for number in range(1, 5)])
    test = [number for number, query in enumerate(queries) if query.split == "test"]
    of_twins = {number: query for number, query in enumerate(queries) if query.split == PSEUDO}
    twins = load_twins(run.artifacts["queries"].path)
    rows = {(row["metric"], row["space"], row["split"]): row for row in check_rows(unlearned) if not row["query_id"]}
    for name, each in scores.items():
        expected = [
            stats.spearmanr((kept @ each[number]).tolist(), (-losses[:, number]).tolist()).statistic for number in test
        ]
        assert rows[LDS, name, "test"]["value"] == pytest.approx(sum(expected) / len(expected)), name
        if name != TEACHER:  # which has a twin test of its own
            behind = rows[LDS, name, "test"]["value"] - rows[LDS, TEACHER, "test"]["value"]
            assert rows[BESIDE_TEACHER, name, "test"]["value"] == pytest.approx(behind)
            ranks = [int((each[row] >= each[row, twins[query.query_id]]).sum()) for row, query in of_twins.items()]
            assert rows[WORST_TWIN, name, PSEUDO]["value"] == max(ranks)
            assert rows[TWIN_SHARE, name, PSEUDO]["value"] == sum(rank == 1 for rank in ranks) / len(ranks)


def test_what_training_on_a_twin_did_is_told_by_the_models_with_it_and_without(
    unlearned: WholeRun, parts: RetrainingParts
) -> None:
    queries = load_queries(unlearned.run.artifacts["queries"])
    twins = load_twins(unlearned.run.artifacts["queries"].path)
    kept = torch.stack([each.kept(parts.config, SAMPLES) for each in parts.pool[1:5]])
    losses = torch.stack([parts.losses(number).mean(0) for number in range(1, 5)])
    told = {row["query_id"]: row for row in check_rows(unlearned) if row["metric"] == TWIN_EFFECT}
    assert told
    for number, each in enumerate(queries):
        if each.query_id not in twins:
            continue
        mine, its = kept[:, twins[each.query_id]], losses[:, number] / losses[:, number].mean()
        if mine.sum() == 2:  # of four models
            assert told[each.query_id]["value"] == pytest.approx(float(its[mine].mean() - its[~mine].mean()))
            squares = its[mine].var() / 2 + its[~mine].var() / 2
            assert told[each.query_id]["standard_error"] == pytest.approx(float(squares.sqrt()))
        else:
            assert each.query_id not in told


def test_what_the_teacher_names_is_removed_and_its_queries_losses_are_compared(unlearned: WholeRun) -> None:
    parts = unlearned.run.parts[RemovalParts.kind]
    assert isinstance(parts, RemovalParts) and not parts.missing()
    plan = {row["method"]: row for row in tables.read(parts.plan.path, tables.REMOVALS).to_pylist()}
    (target,) = plan[TEACHER]["targets"]
    scored = read_influence(unlearned.workspace, unlearned.curation.ranks.key, [target]).to_pylist()
    best = sorted(scored, key=lambda row: -row["score"])[:3]
    assert plan[TEACHER]["removed"] == sorted(row["train_id"] for row in best)
    assert len(plan[RANDOM]["removed"]) == 3
    names = [query.query_id for query in load_queries(unlearned.run.artifacts["queries"])]
    before, after = (
        parts.losses_of(Retraining(0, removed=removed)).mean(0) for removed in ((), tuple(plan[TEACHER]["removed"]))
    )
    changes = dict(zip(names, ((after - before) / before).tolist(), strict=True))
    (control,) = (
        name for name in names if name != target and name in {query.query_id for query in of_test_split(unlearned)}
    )
    rows = {(row["metric"], row["space"]): row for row in check_rows(unlearned) if row["cutoff"] == 3}
    assert rows[CHANGE, TEACHER]["value"] == pytest.approx(changes[target])
    assert rows[OF_CONTROLS, TEACHER]["value"] == pytest.approx(changes[control])
    assert rows[SEPARATION, TEACHER]["value"] == float(changes[target] > changes[control])


def test_a_removal_of_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="removes all 5 samples with k 3: lower k or targets"):
        left_out._named({TEACHER: torch.tensor([[1.0, 2, 3, 4, 5], [5.0, 4, 3, 2, 1]])}, 3, seed=0)


def test_samples_that_cannot_be_read_are_no_lesson(parts: RetrainingParts, monkeypatch: pytest.MonkeyPatch) -> None:
    context = replace(parts.context, loaded=Loaded())
    monkeypatch.setattr(retrainings, "unreadable_samples", lambda *_: {4: "the tar is cut"})
    again = RetrainingParts(context, parts.samples, parts.latents, parts.queries, parts.artifact)
    with pytest.raises(UsageError, match=r"1 samples cannot be trained on, first 4 \(the tar is cut\): mend them"):
        again.data()


def test_models_and_their_losses_are_in_sql(unlearned: WholeRun, parts: RetrainingParts) -> None:
    rows = query(
        unlearned.workspace.root,
        "SELECT retraining, method, seed, samples_left, count(*) AS losses, avg(loss) AS loss "
        "FROM retrainings JOIN retrained_losses USING (retraining) WHERE method IN ('', 'subset') GROUP BY ALL",
    ).to_pylist()
    found = {row["retraining"]: row for row in rows}
    assert found.keys() == set(parts.ids)
    for number, name in enumerate(parts.ids):
        kept = parts.pool[number].kept(parts.config, SAMPLES)
        assert found[name]["samples_left"] == int(kept.sum())
        assert found[name]["loss"] == pytest.approx(parts.losses(number).mean().item())
    named = query(unlearned.workspace.root, "SELECT method, k FROM retrainings WHERE k > 0 ORDER BY method").to_pylist()
    assert named == [{"method": method, "k": 3} for method in sorted((RANDOM, TEACHER, UNTUNED))]


def test_retraining_is_no_part_of_curating(unlearned: WholeRun) -> None:
    names = [made.artifact.name for made in unlearned.curation.made]
    assert RetrainingParts.title not in names
    assert RetrainingParts.title in [made.artifact.name for made in unlearned.checks]


def test_weights_of_another_training_are_not_taken_for_these(parts: RetrainingParts) -> None:
    longer = parts.config.model_copy(update={"retrain": parts.config.retrain.model_copy(update={"steps": 4})})
    key = judged_by(parts.context, longer, parts.latents, parts.queries, "run")[RetrainingParts.kind].key
    assert key != parts.artifact.key
    assert committed(parts.path(0), key) is None
