"""What a run will take, from the configuration, from earlier runs, or from a trial."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from fastgda_core.teachers.needs import Needs
from tasks.config.execution import ExecutionConfig
from tasks.config.inputs import CandidatesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.execution import cost
from tasks.execution.cost import known_rate, mean_captions, rate
from tasks.execution.estimate import Estimate, _candidates, estimate
from tasks.execution.seen import shape_of
from tasks.teaching.cost import KindCost, Size
from tasks.watching.run_status import run_status
from tests.tasks.whole_runs import SAMPLES, TWINS, WholeRun

QUERIES = 8 + 2 * TWINS


def of(config: PipelineConfig, **execution: object) -> PipelineConfig:
    return config.model_copy(update={"execution": ExecutionConfig.model_validate(execution)})


@pytest.mark.heavy
def test_an_estimate_counts_what_the_run_then_made(unlearned: WholeRun) -> None:
    found = estimate(of(unlearned.config, forwards_per_second=100.0, price_per_device_hour=3.0, currency="EUR"))
    assert found.size == Size(SAMPLES, 1.0, QUERIES, SAMPLES)
    parts = unlearned.run.parts
    removals = found.kinds.pop()
    assert removals.kind == "removals" and removals.parts >= parts["removals"].count, "methods may name the same"
    for kind in found.kinds:
        assert kind.parts == parts[kind.kind].count
        assert kind.rows == sum(parts[kind.kind].rows(number) for number in range(kind.parts))
    scores, sketches, retrainings = found.kinds[-3:]
    assert scores.forwards == pytest.approx(SAMPLES * 2 * 2.1), "each sample once, at two timesteps, with its gradient"
    size = parts["sketches"].context.config.sketches.size
    assert (sketches.forwards, sketches.kept_bytes) == (0, SAMPLES * (size + size // 64 * 4)), "made beside the scores"
    steps, batch, draws = 3, 4, 4
    assert retrainings.forwards == 8 * (steps * batch * 3 + QUERIES * draws), "forward, backward, and losses of queries"
    forwards = sum(kind.forwards for kind in found.kinds)
    weights, flops = unlearned.context.at_checkpoints()[0], shape_of(unlearned.context).flops
    sizes = [layer.weight.numel() for layer in weights.layers(weights.teacher_model()).values()]
    products = SAMPLES * QUERIES * 2 * sum(sizes) / flops
    assert scores.contraction == pytest.approx(products), "two FLOPs for each weight, sample and query"
    assert found.device_hours == pytest.approx((forwards + products) / 100 / 3600)
    told = found.as_json()
    assert told["cost"] == pytest.approx(3 * found.device_hours) and told["currency"] == "EUR"
    console = Console(width=200)
    with console.capture() as captured:
        for line in found.shown():
            console.print(line)
    assert "24 training samples (1.0 captions each), 12 queries, 24 candidates each" in captured.get()
    assert "sketches take 26.1 kB, 1,088 bytes a sample" in captured.get()
    pairs = unlearned.config.teacher.gradient_pairs
    assert found.needs.query_forwards == pytest.approx((pairs + 2 * SAMPLES) * 2.1)
    assert "the teacher fits ekfac Fisher, keeps 0 bytes a sample for its scores" in captured.get()
    assert "EUR, at 100.0 forward passes a second (execution.forwards_per_second)" in captured.get()


@pytest.mark.heavy
def test_where_a_pilot_will_choose_the_plan_both_ends_of_its_ladder_are_told(unlearned: WholeRun) -> None:
    plan = {"agreement": 0.9, "timesteps": 10, "draws": 1}
    config = of(unlearned.config, forwards_per_second=100.0, price_per_device_hour=3.0, currency="EUR")
    asking = config.model_copy(update={"teacher": config.teacher.model_copy(update=plan)})
    fixed, found = estimate(config), estimate(asking)
    forwards, before = ({kind.kind: kind.forwards for kind in each.kinds} for each in (found, fixed))
    assert forwards["noise plan"] == pytest.approx(SAMPLES * 20 * 4 * 2.1)
    assert forwards["scores"] == pytest.approx(before["scores"] / 2 * 320), "twenty timesteps, sixteen draws"
    assert found.least is not None
    least = {kind.kind: kind.forwards for kind in found.least}
    assert least["scores"] == pytest.approx(before["scores"] / 2) and least["noise plan"] == forwards["noise plan"]
    hours = sum(kind.forwards + kind.contraction for kind in found.least) / 100 / 3600
    (told,) = (line for line in found.shown() if "teacher.agreement" in str(line))
    assert f"{hours:.2f} device-hours, {3 * hours:.2f} EUR with the cheapest" in str(told)
    assert fixed.least is None and not any("teacher.agreement" in str(line) for line in fixed.shown())


@pytest.mark.parametrize(
    ("policy", "candidates"),
    [
        ({"policy": "all"}, 100),
        ({"policy": "top_k", "k": 7}, 7),
        ({"policy": "top_k", "k": 7, "scored": 3}, 3),
        ({"policy": "pooled", "k": 7}, 28),
        ({"policy": "pooled", "k": 70}, 100),
    ],
    ids=str,
)
def test_candidates_of_a_query_are_counted_by_their_policy(policy: dict[str, object], candidates: int) -> None:
    assert _candidates(CandidatesConfig.model_validate(policy), samples=100, queries=4) == candidates


@pytest.mark.heavy
def test_the_speed_is_that_of_earlier_runs_of_the_model_here(unlearned: WholeRun, similar: WholeRun) -> None:
    found = known_rate(unlearned.context)
    assert found is not None and found.source == "earlier runs of this model here"
    hours = run_status(unlearned.workspace, unlearned.run.name).device_hours
    assert found.forwards_per_second == pytest.approx(SAMPLES * 2 * 2.1 / (3600 * hours))
    assert rate(unlearned.context) == found
    assert not any(kind.contraction for kind in estimate(of(unlearned.config)).kinds), "their seconds have the products"
    assert known_rate(replace(unlearned.context, model_hash="another")) is None
    assert known_rate(similar.context) is None, "that run never ran the model"


def test_where_nothing_is_known_the_model_is_tried(similar: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "TRIAL_SECONDS", 0.01)
    context = replace(similar.context, config=similar.config.model_copy(update={"model": similar.config.model}))
    found = rate(context)
    assert found.forwards_per_second > 0 and found.source.startswith("a trial of 0 s on cpu")


def test_captions_are_counted_over_all_samples(similar: WholeRun) -> None:
    assert mean_captions(similar.run.artifacts["samples"].path) == 1.0


@pytest.mark.parametrize(
    ("seconds", "parts", "advice"), [(1.0, 200, "larger"), (1.0, 50, ""), (4000.0, 2, "smaller"), (10.0, 200, "")]
)
def test_shards_that_are_short_or_long_are_told_of(seconds: float, parts: int, advice: str) -> None:
    kinds = [KindCost("scores", parts, parts, seconds * parts)]
    found = Estimate(Size(1, 1.0, 1, 1), kinds, cost.Rate(1.0, "x"), None, "USD", Needs("", 0.0, 0.0, 0.0, 0.0))
    said = " ".join(found.advice())
    assert (f"a {advice} teacher.shard_samples" in said) if advice else said == ""
    assert found.as_json()["cost"] is None
