from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from fastgda_core.curvature.layers import Layer, select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.precision import Precision, multiplying, running
from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.registry import TEACHERS
from fastgda_core.teachers.scores import exact_scores, first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from tests.fastgda_core.blocks import directional_derivative, many_samples, plain_rise, random_updates

CPU = torch.device("cpu")


def scores_in(
    precision: Precision, model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor]
) -> Tensor:
    run = model.in_precision(precision)
    layers = select_layers(run.denoiser, "cross-attn-kv")
    return first_order_scores(run, layers, plan, block, [updates], MicroBatch(64))


@pytest.mark.heavy
# Measured here: 0.9987 to 0.9996 in bf16, 1 in float32.
@pytest.mark.parametrize(("precision", "least"), [(Precision.bf16, 0.99), (Precision.float32, 0.9999)])
def test_first_order_scores_rank_as_in_float64(
    tiny_model: DiffusionModel, layers: dict[str, Layer], precision: Precision, least: float
) -> None:
    plan, block = NoisePlan(seed=5, timesteps=4, draws=1), many_samples(tiny_model, 48)
    updates = random_updates(layers, queries=6)
    fine = scores_in(Precision.float64, tiny_model, plan, block, updates)
    coarse = scores_in(precision, tiny_model, plan, block, updates)
    agreement = [spearmanr(*pair).statistic for pair in zip(coarse, fine, strict=True)]
    assert min(agreement) >= least
    assert not torch.equal(coarse, fine)


@pytest.mark.integration
def test_float64_scores_are_those_of_a_plain_loop_to_many_digits(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, updates: dict[str, Tensor]
) -> None:
    model = tiny_model.in_precision(Precision.float64)
    layers = select_layers(model.denoiser, "cross-attn-kv")
    first_order = first_order_scores(model, layers, plan, block, [updates], MicroBatch(24))[0]
    update = {name: change[0] for name, change in updates.items()}
    base = training_losses(model, plan, block, MicroBatch(24))
    exact = exact_scores(model, layers, plan, block, base, update, MicroBatch(24))
    derivative = directional_derivative(tiny_model, plan, block, update)
    rise = plain_rise(tiny_model, plan, block, update)
    torch.testing.assert_close(first_order, derivative, rtol=0, atol=1e-7 * derivative.norm().item())
    torch.testing.assert_close(exact, rise, rtol=0, atol=1e-7 * rise.norm().item())


def test_other_precision_leaves_the_model_as_it_was(tiny_model: DiffusionModel) -> None:
    fine, coarse = (tiny_model.in_precision(precision) for precision in (Precision.float64, Precision.bf16))
    assert fine.denoiser.dtype == torch.float64
    assert tiny_model.denoiser.dtype == torch.float32
    assert coarse.denoiser is tiny_model.denoiser
    assert fine.in_precision(Precision.float32).denoiser.dtype == torch.float32


@pytest.mark.parametrize("name", ["abu", "abu_plus"])
@pytest.mark.parametrize("precision", [Precision.tf32, Precision.bf16])
def test_exact_teacher_refuses_precisions_that_keep_too_few_digits(
    tiny_model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    layers: dict[str, Layer],
    updates: dict[str, Tensor],
    name: str,
    precision: Precision,
) -> None:
    message = rf"teacher\.precision is {precision}, but an exact score is the difference of two losses .* use float32"
    with pytest.raises(UsageError, match=message):
        TEACHERS[name].check_precision(precision)
    base = torch.zeros(len(block.train_ids), 1, dtype=torch.float64)
    with pytest.raises(UsageError, match=message):
        TEACHERS[name].scores(tiny_model.in_precision(precision), layers, plan, block, [updates], base, MicroBatch(24))


def test_other_teachers_and_precisions_pass() -> None:
    for name in ("abu", "abu_plus"):
        TEACHERS[name].check_precision(Precision.float32)
        TEACHERS[name].check_precision(Precision.float64)
    for precision in Precision:
        TEACHERS["abu_plus_first_order"].check_precision(precision)


def test_tf32_without_a_gpu_is_refused(tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock) -> None:
    with pytest.raises(UsageError, match="tf32, which only CUDA devices have"), running(Precision.tf32, CPU):
        pass
    with pytest.raises(UsageError, match="tf32, which only CUDA devices have"):
        training_losses(tiny_model.in_precision(Precision.tf32), plan, block, MicroBatch(24))


def tf32_flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(params=[(False, True), (True, False)], ids=["as torch starts", "the other way round"])
def ambient(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """The flags as somebody left them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = tf32_flags()
    matmul.allow_tf32, cudnn.allow_tf32 = request.param
    yield request.param
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("precision", list(Precision))
def test_products_round_to_tf32_in_that_precision_only(ambient: tuple[bool, bool], precision: Precision) -> None:
    with multiplying(precision):
        assert tf32_flags() == ((True, True) if precision is Precision.tf32 else (False, False))
    assert tf32_flags() == ambient
    with pytest.raises(KeyboardInterrupt), multiplying(precision):
        raise KeyboardInterrupt
    assert tf32_flags() == ambient


def test_tf32_is_off_in_forward_and_backward_while_float32_runs(
    tiny_model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    layers: dict[str, Layer],
    updates: dict[str, Tensor],
    ambient: tuple[bool, bool],
) -> None:
    forward, backward = set(), set()
    # The last convolution: its output's gradient is the first thing that a backward makes.
    last = tiny_model.denoiser.conv_out

    def look(_module: torch.nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        forward.add(tf32_flags())
        if output.requires_grad:
            output.register_hook(lambda _gradient: backward.add(tf32_flags()))

    handle = last.register_forward_hook(look)
    first_order_scores(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    handle.remove()
    assert forward == backward == {(False, False)}
    assert tf32_flags() == ambient


@pytest.mark.heavy
def test_bf16_runs_products_in_bf16_and_hands_out_float32(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock
) -> None:
    seen = set()
    handle = tiny_model.denoiser.conv_out.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    losses = training_losses(tiny_model.in_precision(Precision.bf16), plan, block, MicroBatch(24))
    handle.remove()
    assert seen == {torch.bfloat16}
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, training_losses(tiny_model, plan, block, MicroBatch(24)), rtol=1e-2, atol=0)
    assert not torch.is_autocast_enabled("cpu")
