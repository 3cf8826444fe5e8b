"""Models without what methods named for one query alone, the pictures that they make, and the weights that are kept."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn import functional as F

from fastgda_core.features.encoders import PIXEL
from fastgda_core.images import decode_image
from flows.curation import Curation, curate
from flows.evaluation import judge_run
from storage_schemas import tables
from storage_schemas.snapshots.snapshots import read_influence
from storage_schemas.sql.views import query
from storage_schemas.workspace import regenerated, retrained_weights
from tasks.config.judging import JudgeConfig, TrainerConfig
from tasks.config.pipeline import PipelineConfig
from tasks.execution.cost import run_costs
from tasks.inputs.queries import draw_again, load_queries
from tasks.judging.kept_checks import read_checks
from tasks.judging.leave_k_out import BRITTLENESS, BROKEN, OWN, OWN_CHANGE
from tasks.judging.methods import RANDOM, UNTUNED
from tasks.judging.removals import NOTHING, ahead_rows
from tasks.teaching import kept_models, retrainings, trainer
from tasks.teaching.cost import Size
from tasks.teaching.pool import Retraining
from tasks.teaching.retraining_costs import TRAINING_FORWARDS
from tasks.teaching.retrainings import RemovalParts, RetrainingParts
from tasks.watching.trust import TEACHER
from tests.tasks.teaching import a_trainer
from tests.tasks.whole_runs import SAMPLES, configuration
from tests.tasks.without_prefect import without_prefect

EACH, KS, STEPS = 3, [2, 5], 3
METHODS = (TEACHER, UNTUNED, RANDOM)
JUDGE = {
    "retrain": {"steps": STEPS, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-2},
    "subsets": 3,
    "again": 0,
    "draws": 4,
    "leave_out": {"k": [3], "targets": 2, "each": EACH, "each_k": [5, 2]},
    "regenerate": True,
    "keep_weights": True,
}
QUERIES = {
    "captions": [f"a {color} circle" for color in ("red", "green", "blue", "orange", "purple", "black", "teal")],
    "split": {"train": 1, "validation": 1, "test": 5},
    "twins": 1,
    "steps": 2,
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Curation:
    config = configuration(tmp_path_factory.mktemp("each"), model_folder, teacher={"name": "similarity"})
    changed = config.model_dump(mode="json") | {"queries": QUERIES}
    with without_prefect():
        # What was asked of the same run before: nothing of it may be taken for what is asked now.
        for leave_out in ({"k": [1], "targets": 1}, JUDGE["leave_out"]):
            curation = curate(PipelineConfig.model_validate(changed | {"judge": JUDGE | {"leave_out": leave_out}}))
            judge_run(curation.run)
    return curation


@pytest.fixture
def parts(judged: Curation) -> RemovalParts:
    found = judged.run.parts[RemovalParts.kind]
    assert isinstance(found, RemovalParts)
    return found


@pytest.fixture
def rows(judged: Curation) -> dict[tuple[str, str, int, str], dict]:
    checks = read_checks(judged.run.workspace, judged.run.name)
    (check,) = (each for each in checks if each.name == "retraining check")
    found = tables.read(check.path, tables.METRICS).to_pylist()
    return {(row["metric"], row["space"], row["cutoff"], row["query_id"]): row for row in found}


def own(parts: RemovalParts) -> list[dict]:
    return [row for row in parts.removals() if not row["pooled"]]


@pytest.mark.heavy
def test_for_each_query_and_method_the_first_k_are_removed(judged: Curation, parts: RemovalParts) -> None:
    test = [asked.query_id for asked in load_queries(parts.queries) if asked.split == "test"]
    plan = {(row["method"], row["k"], row["targets"][0]): row["removed"] for row in own(parts)}
    chosen = [test[0], test[1], test[3]]  # evenly along five
    assert set(plan) == {(method, k, name) for method in METHODS for k in KS for name in chosen}
    scored = read_influence(judged.run.workspace, judged.ranks.key, chosen).to_pylist()
    for name in chosen:
        best = sorted((row for row in scored if row["query_id"] == name), key=lambda row: -row["score"])
        for k in KS:
            assert plan[TEACHER, k, name] == sorted(row["train_id"] for row in best[:k])
            assert len(set(plan[RANDOM, k, name])) == k
        assert set(plan[RANDOM, 2, name]) < set(plan[RANDOM, 5, name])
    named = query(
        judged.run.workspace.root,
        "SELECT method, k, query_id, count(*) AS n, any_value(removed) AS removed FROM retrainings "
        "WHERE query_id <> '' GROUP BY ALL",
    ).to_pylist()
    assert {(row["method"], row["k"], row["query_id"]): row["removed"] for row in named} == plan
    assert not parts.missing()


def test_no_method_is_ahead_of_a_cheap_one_that_was_not_asked() -> None:
    changes = {(TEACHER, 5): torch.tensor([0.5]), (RANDOM, 5): torch.tensor([0.1])}
    assert list(ahead_rows(OWN, changes)) == []
    named = {(row["metric"], row["space"]) for row in ahead_rows(OWN, changes | {(UNTUNED, 5): torch.tensor([0.2])})}
    assert named == {(f"{OWN} ahead of {UNTUNED}", method) for method in (TEACHER, RANDOM)}


@pytest.mark.heavy
def test_models_that_methods_name_alike_are_made_once(parts: RemovalParts) -> None:
    removed = {tuple(row["removed"]) for row in parts.removals()} | {()}
    assert parts.count == len(removed) == len(set(parts.ids))
    assert len(removed) < 1 + len(METHODS) * (1 + EACH * len(KS)), "both methods here are cosines of pixels"


@pytest.mark.heavy
def test_changes_of_the_loss_and_brittleness_are_those_of_the_losses(
    parts: RemovalParts, rows: dict[tuple[str, str, int, str], dict]
) -> None:
    place = {asked.query_id: number for number, asked in enumerate(load_queries(parts.queries))}
    before = parts.losses_of(Retraining(0)).mean(0)
    changes = {
        (row["method"], row["k"], row["targets"][0]): (
            (parts.losses_of(Retraining(0, removed=tuple(row["removed"]))).mean(0) - before) / before
        ).tolist()
        for row in own(parts)
    }
    names = list(dict.fromkeys(name for _, _, name in changes))
    broken = {}
    for method in METHODS:
        for k in KS:
            mine = [changes[method, k, name][place[name]] for name in names]
            found = rows[OWN_CHANGE, method, k, ""]
            assert found["value"] == pytest.approx(statistics.mean(mine)) and found["queries"] == EACH
            assert found["standard_error"] == pytest.approx(statistics.stdev(mine) / EACH**0.5)
            for name, value in zip(names, mine, strict=True):
                assert rows[OWN_CHANGE, method, k, name]["value"] == pytest.approx(value)
                chance = [changes[RANDOM, k, other][place[name]] for other in names]
                broken[method, k, name] = value > statistics.mean(chance) + 2 * statistics.stdev(chance)
    for method, k in itertools.product((TEACHER, RANDOM), KS):
        pairs = [(changes[method, k, name][place[name]], changes[UNTUNED, k, name][place[name]]) for name in names]
        leads = [math.log((1 + mine) / (1 + other)) for mine, other in pairs]
        ahead = rows[f"{OWN} ahead of {UNTUNED}", method, k, ""]
        assert ahead["value"] == pytest.approx(statistics.mean(leads), abs=1e-12)
        assert ahead["standard_error"] == pytest.approx(statistics.stdev(leads) / EACH**0.5, abs=1e-12)
    for method in (TEACHER, UNTUNED):
        for k in KS:
            assert rows[BROKEN, method, k, ""]["value"] == pytest.approx(
                statistics.mean(broken[method, k, name] for name in names)
            )
        smallest = {name: min([k for k in KS if broken[method, k, name]], default=np.inf) for name in names}
        for name in names:
            there = rows.get((BRITTLENESS, method, 0, name))
            assert (there["value"] if there else np.inf) == smallest[name]
        median = sorted(smallest.values())[1]
        overall = rows.get((BRITTLENESS, method, 0, ""))
        assert (overall["value"] if overall else np.inf) == median


@pytest.mark.heavy
def test_pictures_are_those_of_the_model_from_the_querys_noise_and_their_distances_are_numpys(
    judged: Curation, parts: RemovalParts, rows: dict[tuple[str, str, int, str], dict], model_folder: Path
) -> None:
    model, config = judged.run.context.model(), judged.run.config.queries
    test = [asked for asked in load_queries(parts.queries) if asked.split == "test"]
    again = draw_again(model, config, test)
    for asked, png in zip(test, again, strict=True):
        assert np.abs(np.asarray(asked.image, int) - np.asarray(decode_image(png), int)).max() <= 1
    row = own(parts)[0]
    name = Retraining(0, removed=tuple(row["removed"])).id(parts.config, SAMPLES)
    weights = retrained_weights(parts.artifact.path, name, "unet").parent
    denoiser = UNet2DConditionModel.from_pretrained(weights).eval()
    pictures = draw_again(replace(model, denoiser=denoiser), config, test)
    drawn = {asked.query_id: picture for asked, picture in zip(test, pictures, strict=True)}
    kept = tables.read(regenerated(parts.artifact.path, name), tables.REGENERATIONS).to_pylist()
    assert {each["query_id"]: each["image"] for each in kept} == drawn
    (asked,) = (each for each in test if each.query_id == row["targets"][0])
    pair = [asked.image, decode_image(drawn[asked.query_id])]
    mse = ((np.asarray(pair[0], float) / 255 - np.asarray(pair[1], float) / 255) ** 2).mean()
    similarity = F.cosine_similarity(*(PIXEL.scaled([PIXEL.crop(each)]).flatten(1) for each in pair)).item()
    assert rows[f"{OWN} mse", row["method"], row["k"], asked.query_id]["value"] == pytest.approx(mse)
    assert rows[f"{OWN} similarity", row["method"], row["k"], asked.query_id]["value"] == pytest.approx(similarity)
    told = query(
        judged.run.workspace.root,
        f"SELECT mse, space, similarity FROM regenerations JOIN regeneration_distances USING (retraining, query_id) "
        f"WHERE retraining = '{name}' AND query_id = '{asked.query_id}'",
    ).to_pylist()
    assert told == [{"mse": pytest.approx(mse), "space": "pixel", "similarity": pytest.approx(similarity)}]
    assert rows[f"{OWN} mse", NOTHING, 0, ""]["queries"] == EACH
    assert rows["regeneration mse", TEACHER, 3, ""]["queries"] == 2
    assert rows["regeneration mse of controls", NOTHING, 0, ""]["queries"] == 3
    assert rows["regeneration similarity of controls", TEACHER, 3, ""]["queries"] == 3


@pytest.mark.heavy
def test_distances_are_averaged_by_the_statement_of_the_documents(
    judged: Curation, rows: dict[tuple[str, str, int, str], dict]
) -> None:
    page = (Path(__file__).parents[3] / "docs" / "judges.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r'fastgda sql "([^"]* AS mse[^"]*)"', page)
    found = query(judged.run.workspace.root, statement).to_pylist()
    assert [(row["method"], row["k"]) for row in found] == [(method, k) for k in KS for method in sorted(METHODS)]
    for row in found:
        assert row["mse"] == pytest.approx(rows[f"{OWN} mse", row["method"], row["k"], ""]["value"])


@pytest.mark.heavy
def test_what_is_asked_for_later_is_made_from_kept_weights_or_by_training_again_and_nothing_twice(
    parts: RemovalParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder = parts.ids[1], parts.artifact.path
    losses, pictures = parts.path(1), regenerated(folder, name)
    before = [path.read_bytes() for path in (losses, pictures)]
    monkeypatch.setattr(RemovalParts, "_train", lambda *_: pytest.fail("weights are there"))
    pictures.unlink()
    assert parts.missing() == [1] and parts.made(1) is None
    parts.make(1)
    assert parts.missing() == [] and pictures.read_bytes() == before[1]
    monkeypatch.undo()
    weights = retrained_weights(folder, name, "unet")
    for gone in (weights, pictures, losses):
        gone.unlink()
        assert parts.missing() == [1]
        parts.make(1)
        assert parts.missing() == []
    weights.unlink()
    pictures.unlink()
    assert losses.read_bytes() == before[0]
    parts.make(1)
    assert [path.read_bytes() for path in (losses, pictures)] == before


@pytest.mark.heavy
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_write_leaves_what_the_next_start_completes(
    parts: RemovalParts, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    script = [sys.executable, a_trainer.__file__, str(model_folder), "{removed}", "{seed}", "{output}"]
    judge = parts.config.model_copy(update={"retrain": TrainerConfig(command=script, folder=tmp_path)})
    context = replace(parts.context, config=parts.context.config.model_copy(update={"judge": judge}))

    def of(folder: Path) -> RemovalParts:
        artifact = replace(parts.artifact, path=tmp_path / folder)
        return RemovalParts(context, parts.samples, parts.latents, parts.queries, artifact, parts.plan)

    straight, crashing = of(Path("straight")), of(Path("crashing"))
    straight.make(1)
    written: list[Path] = []

    class Crash(BaseException):
        pass

    def dying(write: Callable[..., object]) -> Callable[..., object]:
        """Die over each file at its first write, before it or after it."""

        def act(path: Path, *arguments: object, **how: object) -> object:
            dies = path not in written
            written.extend([path] if dies else [])
            if dies and not after:
                raise Crash
            made = write(path, *arguments, **how)
            if dies:
                raise Crash
            return made

        return act

    for module in (retrainings, kept_models, trainer):
        for name in ("write_atomically", "write_changed", "commit", "commit_table"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, dying(getattr(module, name)))
    while crashing.made(1) is None:
        with contextlib.suppress(Crash):
            crashing.make(1)
    name = parts.ids[1]
    weights = ["config.json", "diffusion_pytorch_model.safetensors"]
    pictures_and_losses = [f"{name}.parquet"] * 2
    order = ["removed.csv", "finished", "recipe.json", *weights, *pictures_and_losses]
    assert [path.name for path in written] == order
    crashing.check()
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*") if path.suffix != ".json")
             for each in (straight.artifact.path, crashing.artifact.path)]  # fmt: skip
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith((".parquet", ".safetensors")):
            assert (straight.artifact.path / name).read_bytes() == (crashing.artifact.path / name).read_bytes()


@pytest.mark.heavy
def test_random_subsets_draw_nothing_and_a_plan_prices_what_is_drawn(judged: Curation, parts: RemovalParts) -> None:
    subsets = judged.run.parts[RetrainingParts.kind]
    assert isinstance(subsets, RetrainingParts) and not subsets.missing()
    drawn = {path.stem for path in regenerated(parts.artifact.path, "").parent.glob("*.parquet")}
    assert set(parts.ids) < drawn and not drawn & set(subsets.ids[1:])
    asked = len(load_queries(parts.queries))
    costs = {cost.kind: cost for cost in run_costs(judged.run.context, Size(SAMPLES, 1.0, asked, SAMPLES))}
    each, pictures = STEPS * 4 * TRAINING_FORWARDS + asked * 4, 5 * 2 * 2
    assert costs["retrainings"].forwards == 4 * each + pictures
    most = 1 + 4 * 1 + 4 * EACH * len(KS)
    assert costs["removals"].parts == most and costs["removals"].forwards == most * (each + pictures)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": {"targets": 0}}, "targets and each are both 0"),
        ({"leave_out": {"each_k": [3]}}, "each is 0"),
        ({"regenerate": True}, "add leave_out"),
    ],
    ids=str,
)
def test_settings_that_ask_for_nothing_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeConfig.model_validate({"retrain": {"steps": 1}, **changes})


def test_pictures_that_were_not_generated_have_no_noise_to_begin_with(tmp_path: Path, model_folder: Path) -> None:
    leave_out = {"targets": 0, "each": 2}
    with pytest.raises(ValueError, match=r"judge\.regenerate begins with the queries' own noise"):
        configuration(tmp_path, model_folder, judge=JUDGE | {"leave_out": leave_out})
    judge = JUDGE | {"regenerate": False, "leave_out": leave_out | {"each": 3}}
    with pytest.raises(ValueError, match=r"judge\.leave_out\.each is 3 but the split has 2 test queries: lower it"):
        configuration(tmp_path, model_folder, judge=judge)
