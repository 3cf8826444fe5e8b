"""How often a plan says that captions are encoded."""

from __future__ import annotations

from tasks.config.pipeline import PipelineConfig
from tasks.execution.encodings import Encodings
from tasks.execution.known import ModelShape
from tasks.teaching.cost import KindCost, Size
from tests.tasks.configs import document

SHAPE = ModelShape(
    flops=10.0, caption_flops=20.0, latent=8, condition=1000, layers=1, layer_weights=9, fisher_numbers=9
)
SIZE = Size(samples=500, captions=2.0, queries=30, candidates=100)  # an embedded caption takes 4,000 bytes
COSTS = [KindCost("curvature", 1, 40, 40.0), KindCost("base losses", 1, 500, 900.0), KindCost("scores", 30, 3000, 1.0)]


def of(**changes: object) -> Encodings | None:
    config = document(candidates={"policy": "top_k", "k": 100}, **changes)
    return Encodings.of(PipelineConfig.model_validate(config), SIZE, SHAPE, COSTS)


def test_where_all_captions_fit_each_is_encoded_once() -> None:
    found = of(model__captions_gb=0.004)
    assert found == Encodings(captions=1000, kept=1000, encoded=1000.0, passes=2000.0)
    assert "each of the 1,000 once a process" in found.told()


def test_where_they_do_not_fit_every_pass_encodes_its_own() -> None:
    found = of(model__captions_gb=0.002)
    exact = 40 + 2 * (500 + 30 * 100)
    assert found == Encodings(captions=1000, kept=500, encoded=exact, passes=2.0 * exact)
    assert "7,040 times at most, as model.captions_gb keeps 500 of 1,000" in found.told()
    first = of(model__captions_gb=0.002, teacher__name="abu_plus_first_order", teacher__shard_queries=10)
    assert first is not None and first.encoded == 40 + 2 * (500 + 3 * 500), "all samples for each of three blocks"


def test_of_teachers_without_an_unlearning_step_nothing_is_said() -> None:
    assert of(teacher={"name": "similarity"}) is None
