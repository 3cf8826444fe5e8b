from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.loss import take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import query_gradient
from tests.fastgda_core.blocks import random_updates


@dataclass
class SmallDevice:
    """Has memory for `rows` at a time; refuses more before the denoiser starts."""

    rows: int
    refused: int = 0
    error: Exception | None = None

    def attach(self, denoiser: nn.Module) -> None:
        denoiser.register_forward_pre_hook(self._before)

    def _before(self, _module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if len(arguments[0]) > self.rows:
            self.refused += 1
            raise self.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


Work = Callable[[DiffusionModel, MicroBatch], dict[str, Tensor]]


@pytest.fixture(params=["losses", "exact", "first order", "first order, all layers", "query gradient"])
def work(request: pytest.FixtureRequest, block: SampleBlock) -> Work:
    """Each thing that runs in micro-batches, by the numbers that it gives."""
    plan = NoisePlan(seed=5, timesteps=3, draws=1)

    def losses(model: DiffusionModel, size: MicroBatch) -> dict[str, Tensor]:
        return {"losses": training_losses(model, plan, block, size)}

    def exact(model: DiffusionModel, size: MicroBatch) -> dict[str, Tensor]:
        layers = select_layers(model.denoiser, "cross-attn-kv")
        update = {name: change[0] for name, change in random_updates(layers).items()}
        base = torch.zeros(len(block.train_ids), 1, dtype=torch.float64)
        return {"scores": exact_scores(model, layers, plan, block, base, update, size)}

    def first_order(selection: str) -> Work:
        def scores(model: DiffusionModel, size: MicroBatch) -> dict[str, Tensor]:
            layers = select_layers(model.denoiser, selection)
            return {"scores": first_order_scores(model, layers, plan, block, [random_updates(layers)], size)}

        return scores

    def gradient(model: DiffusionModel, size: MicroBatch) -> dict[str, Tensor]:
        layers = select_layers(model.denoiser, "cross-attn-kv")
        text = take(block.condition, slice(0, 1))
        return query_gradient(model, layers, block.latents[0, 0], text, owner=1, seed=0, pairs=29, micro_batch=size)

    return {
        "losses": losses,
        "exact": exact,
        "first order": first_order("cross-attn-kv"),
        "first order, all layers": first_order("all"),
        "query gradient": gradient,
    }[request.param]


@pytest.mark.integration
@pytest.mark.parametrize(("rows", "settled"), [(5, 3), (1, 1)])
def test_a_small_device_gives_the_same_numbers_at_half_the_rows(
    tiny_model: DiffusionModel, work: Work, rows: int, settled: int
) -> None:
    expected = work(tiny_model, MicroBatch(24))
    device, size = SmallDevice(rows), MicroBatch(24)
    device.attach(tiny_model.denoiser)
    found = work(tiny_model, size)
    assert device.refused > 0
    # 24, 12, 6, 3, 1
    assert size.size == settled
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5 * tensor.abs().max().item())

    device.refused = 0
    again = work(tiny_model, size)
    assert device.refused == 0
    assert size.size == settled
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_a_device_without_room_for_one_forward_is_a_matter_for_the_person(
    tiny_model: DiffusionModel, work: Work
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.denoiser.state_dict().items()}
    SmallDevice(rows=0).attach(tiny_model.denoiser)
    with pytest.raises(UsageError, match="too little memory for one forward"):
        work(tiny_model, MicroBatch(24))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.denoiser.state_dict().items())


def test_other_errors_are_not_taken_for_want_of_memory(tiny_model: DiffusionModel, work: Work) -> None:
    device = SmallDevice(rows=0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    device.attach(tiny_model.denoiser)
    size = MicroBatch(24)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        work(tiny_model, size)
    assert device.refused == 1
    assert size.size == 24


def test_stretches_cover_all_rows_once_and_in_order() -> None:
    """Memory runs short in the middle of a run, then again."""
    size, seen = MicroBatch(8), []

    def compute(stretch: slice) -> int:
        room = 8 if stretch.start < 8 else 3
        if stretch.stop - stretch.start > room:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return stretch.stop - stretch.start

    for stretch, count in size.run(21, compute):
        assert count == stretch.stop - stretch.start
        seen += range(stretch.start, stretch.stop)
    assert seen == list(range(21))
    assert size.size == 2


def test_errors_of_whoever_takes_the_results_are_their_own() -> None:
    size = MicroBatch(8)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in size.run(8, lambda stretch: stretch):
            raise torch.OutOfMemoryError("not while computing")
    assert size.size == 8
