from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastgda_core.curvature.layers import add_to_weights, input_rows, matrix_shape, output_rows, select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.errors import UsageError

ATTENTION = (
    "down_blocks.1.attentions.0",
    "mid_block.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
)
BLOCK = "transformer_blocks.0"

CASES = {
    "linear, one row each": (nn.Linear(4, 3), (5, 4)),
    "linear without bias": (nn.Linear(4, 3, bias=False), (5, 4)),
    "linear over tokens": (nn.Linear(4, 3), (5, 7, 4)),
    "linear over tokens without bias": (nn.Linear(4, 3, bias=False), (5, 7, 4)),
    "linear over a grid": (nn.Linear(4, 3), (5, 2, 3, 4)),
    "convolution": (nn.Conv2d(2, 3, 3), (5, 2, 6, 7)),
    "convolution without bias": (nn.Conv2d(2, 3, 3, bias=False), (5, 2, 6, 7)),
    "convolution of one pixel": (nn.Conv2d(2, 3, 1), (5, 2, 6, 7)),
    "padded, strided, dilated": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (5, 2, 8, 7)),
}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    layer, shape = CASES[request.param]
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return copy.deepcopy(layer).double(), value


def autograd_matrix(layer: nn.Module, loss: Tensor) -> Tensor:
    """(d_out, d_in) of the layer's gradient, the bias last."""
    gradients = torch.autograd.grad(loss, list(layer.parameters()))
    return torch.cat([gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None] for gradient in gradients], dim=1)


def test_rows_multiply_to_the_gradient_of_each_sample(case: tuple[nn.Module, Tensor]) -> None:
    layer, value = case
    output = layer(value)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output_gradient = torch.autograd.grad((output * target).sin().sum(), output)[0]
    found = output_rows(layer, output_gradient).transpose(1, 2) @ input_rows(layer, [value])
    assert found.shape[1:] == matrix_shape(layer)
    for sample, one in enumerate(found):
        alone = slice(sample, sample + 1)
        torch.testing.assert_close(one, autograd_matrix(layer, (layer(value[alone]) * target[alone]).sin().sum()))


def test_adding_a_matrix_moves_the_output_by_its_product_with_the_input(case: tuple[nn.Module, Tensor]) -> None:
    layer, value = case
    before = layer(value).detach()
    weights = copy.deepcopy(layer)
    change = torch.randn(matrix_shape(layer), generator=torch.Generator().manual_seed(3))
    add_to_weights(layer, change)
    columns = change.shape[1] - (layer.bias is not None)
    torch.testing.assert_close(layer.weight, weights.weight + change[:, :columns].double().view(layer.weight.shape))
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias, weights.bias + change[:, -1].double())
    moved = output_rows(layer, layer(value).detach() - before)
    torch.testing.assert_close(moved, input_rows(layer, [value]) @ change.double().T)


def names(kinds: list[str]) -> set[str]:
    return {f"{place}.{BLOCK}.{kind}" for place in ATTENTION for kind in kinds}


def test_selections_name_the_layers_of_a_unet(tiny_model: DiffusionModel) -> None:
    """The tiny UNet has four transformer blocks: one going down, one in the middle, two going up."""
    unet = tiny_model.denoiser
    cross_kv = names(["attn2.to_k", "attn2.to_v"])
    cross = cross_kv | names(["attn2.to_q", "attn2.to_out.0"])
    self_attention = names(["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])
    assert select_layers(unet, "cross-attn-kv").keys() == cross_kv
    assert select_layers(unet, "cross-attn").keys() == cross
    assert select_layers(unet, "attn").keys() == cross | self_attention
    feedforward = names(["ff.net.0.proj", "ff.net.2"])
    convolutions = {name for name, _ in unet.named_modules() if name.endswith((".conv1", ".conv2"))}
    assert select_layers(unet, "mlp").keys() == feedforward | convolutions and len(convolutions) > 4
    # Every matrix of the state dict belongs to a linear or convolutional layer: there is no embedding in a UNet.
    matrices = {name.removesuffix(".weight") for name, tensor in unet.state_dict().items() if tensor.ndim > 1}
    assert select_layers(unet, "all").keys() == matrices


def test_joint_attention_stands_in_its_projections_of_the_text() -> None:
    kinds = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    attention = nn.ModuleDict({kind: nn.Linear(2, 2) for kind in kinds} | {"to_out": nn.ModuleList([nn.Linear(2, 2)])})
    model = nn.ModuleDict({"attn": attention, "norm": nn.LayerNorm(2)})
    text = {f"attn.{kind}" for kind in kinds if "add" in kind}
    assert select_layers(model, "cross-attn-kv").keys() == {"attn.add_k_proj", "attn.add_v_proj"}
    assert select_layers(model, "cross-attn").keys() == text
    assert select_layers(model, "attn").keys() == text | {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}


@pytest.mark.parametrize(
    "convolution", [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")]
)
def test_a_convolution_that_is_no_matrix_is_refused_by_name(convolution: nn.Module) -> None:
    model = nn.ModuleDict({"first": nn.Conv2d(4, 4, 3), "odd": convolution})
    with pytest.raises(UsageError, match=r"odd is a grouped or non-zero padded convolution.*teacher\.layers"):
        select_layers(model, "all")


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no cross-attn-kv layer: set teacher\.layers to another of .*all"):
        select_layers(nn.Sequential(nn.Linear(2, 2)), "cross-attn-kv")
