"""LoRA adapters: the model with one over it against merged weights, gradients and Fisher against plain autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import DiagonalFisher, fit_fisher
from fastgda_core.curvature.layers import matrix_shape, select_layers
from fastgda_core.diffusion.adapter import DIFFUSERS, METADATA, PEFT, PEFT_CONFIG, adapter_hash, check_adapter
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel, load_model, with_adapter
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import moved
from tests import tiny
from tests.adapters import RANK, lora_tensors, save_lora

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def base(folder: Path) -> DiffusionModel:
    return load_model(folder, CPU)


@pytest.fixture(scope="module")
def tensors(base: DiffusionModel) -> dict[str, Tensor]:
    return lora_tensors(base.denoiser)


def rows(model: DiffusionModel, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    clean, noise = (torch.randn(3, *model.latent_shape, generator=generator).to(dtype) for _ in range(2))
    condition = {name: value.to(dtype) for name, value in model.encode_captions(["red circle", "teal", ""]).items()}
    return clean, condition, torch.tensor([0, 37, 99]), noise


def merged_weights(base: DiffusionModel, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """W + scale B A by name, for layers that the adapter has; a convolution's B mixes the channels that A gives."""
    weights = dict(base.denoiser.named_parameters())
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{name}.weight": weights[f"{name}.weight"].to(tensors[f"{name}.lora_A.weight"])
        + scale
        * torch.einsum("or,ri...->oi...", tensors[f"{name}.lora_B.weight"].flatten(1), tensors[f"{name}.lora_A.weight"])
        for name in names
    }


def merged_losses(base: DiffusionModel, tensors: dict[str, Tensor], scale: float) -> Tensor:
    def denoiser(*arguments: object, **named: object) -> tuple[Tensor, ...]:
        return functional_call(base.denoiser, merged_weights(base, tensors, scale), arguments, named)

    return per_sample_loss(denoiser, base.schedule, *rows(base))


@pytest.mark.parametrize(
    "form", ["diffusers", "diffusers with settings", "old names and alphas", "peft", "rank-stable"]
)
def test_the_model_is_that_of_merged_weights(
    base: DiffusionModel, folder: Path, tensors: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    adapter, scale = tmp_path / "lora", 3 / RANK
    match form:
        case "diffusers":  # which takes alpha for the rank where nothing is told
            save_lora(adapter, tensors)
            scale = 1.0
        case "diffusers with settings":
            save_lora(adapter, tensors, alpha=3)
        case "old names and alphas":
            old = {n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for n, t in tensors.items()}
            alphas = {n.replace("lora_A.weight", "alpha"): torch.tensor(3.0) for n in tensors if "lora_A" in n}
            save_lora(adapter, {**old, **alphas})
        case _:
            adapter.mkdir()
            save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, adapter / PEFT)
            settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "use_rslora": form == "rank-stable"}
            (adapter / PEFT_CONFIG).write_text(json.dumps(settings))
            scale = 3 / math.sqrt(RANK) if form == "rank-stable" else scale
    check_adapter(adapter, folder)
    found = load_model(folder, CPU, adapter=adapter)
    expected = merged_losses(base, tensors, scale)
    torch.testing.assert_close(found.losses(*rows(found)), expected, rtol=1e-4, atol=1e-6)
    assert ((found.losses(*rows(found)) - base.losses(*rows(base))).abs() > 1e-4).all()
    again = with_adapter(base, folder, adapter)
    torch.testing.assert_close(again.losses(*rows(again)), found.losses(*rows(found)), rtol=0, atol=0)


def test_an_alpha_pattern_names_layers_by_their_ends(
    base: DiffusionModel, folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    adapter = save_lora(tmp_path / "lora", tensors, alpha=RANK, alpha_pattern={"attn2.to_q": 2 * RANK})
    model = load_model(folder, CPU, adapter=adapter)
    scales = {name: module.scale for name, module in model.denoiser.named_modules() if hasattr(module, "lora_A")}
    assert {name: scale for name, scale in scales.items() if scale != 1} == {
        name: 2 for name in scales if name.endswith("attn2.to_q")
    }


def test_layers_are_those_of_the_adapter_or_those_of_the_model(
    base: DiffusionModel, folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    model = load_model(folder, CPU, adapter=save_lora(tmp_path / "lora", tensors))
    assert {f"{name}.weight" for name in select_layers(model.denoiser, "lora")} == tensors.keys()
    for selection in ("cross-attn-kv", "attn", "all"):
        assert select_layers(model.denoiser, selection).keys() == select_layers(base.denoiser, selection).keys()
    with pytest.raises(UsageError, match=r"lora needs an adapter: name its folder in model\.adapter"):
        select_layers(base.denoiser, "lora")


def test_gradients_and_fisher_equal_float64_autograd_through_merged_weights(
    base: DiffusionModel, folder: Path, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """One sample at a time through W + scale B A, with nothing of the adapter's layers."""
    adapter = save_lora(tmp_path / "lora", tensors, alpha=3)
    exact = base.in_precision(Precision.float64)
    free = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}

    def gradients_of(clean: Tensor, condition: dict[str, Tensor], timesteps: Tensor, noise: Tensor) -> list[Tensor]:
        def denoiser(*arguments: object, **named: object) -> tuple[Tensor, ...]:
            return functional_call(exact.denoiser, merged_weights(exact, free, 3 / RANK), arguments, named)

        loss = per_sample_loss(denoiser, exact.schedule, clean, condition, timesteps, noise).sum()
        return list(torch.autograd.grad(loss, list(free.values())))

    model = load_model(folder, CPU, adapter=adapter)
    double, plan = model.in_precision(Precision.float64), NoisePlan(seed=2, timesteps=2, draws=1, first_timestep=20)
    clean, condition, timesteps, noise = rows(double, torch.float64)
    layers = select_layers(double.denoiser, "lora")
    assert [f"{name}.weight" for name in layers] == list(free)
    block = SampleBlock(
        train_ids=torch.tensor([3, 8, 9]),
        latents=clean.float()[:, None],
        condition=model.encode_captions(["red circle", "teal", ""]),
        owner=torch.arange(3),
        caption_number=torch.zeros(3, dtype=torch.long),
    )
    generator = torch.Generator().manual_seed(6)
    update = {
        name: torch.randn(matrix_shape(each), dtype=torch.float64, generator=generator) for name, each in layers.items()
    }
    (scores,) = first_order_scores(
        double, layers, plan, block, [{name: each[None] for name, each in update.items()}], MicroBatch(4)
    )
    expected = torch.zeros(3, dtype=torch.float64)
    for row in range(3):
        one, zero = slice(row, row + 1), torch.tensor([0])
        for timestep in (20, 70):
            at = torch.tensor([timestep])
            eps = plan.noise(block.train_ids[one], zero, zero, at, zero, model.latent_shape).double()
            said = {name: value[one] for name, value in condition.items()}
            found = gradients_of(block.latents[row].double(), said, at, eps)
            pairs = zip(found, update.values(), strict=True)
            expected[row] += sum((gradient.flatten(1) * change).sum() for gradient, change in pairs) / 2
    assert (scores - expected).norm() < 1e-9 * expected.norm()

    step, losses = 1e-6, []  # and the exact teacher's losses move by as much
    for sign in (1, -1):
        with moved(layers, {name: sign * step * change for name, change in update.items()}):
            losses.append(training_losses(double, plan, block, MicroBatch(4))[:, 0])
    slope = (losses[0] - losses[1]) / (2 * step)
    assert (slope - expected).norm() < 1e-6 * expected.norm()

    def loss(denoiser: nn.Module, batch: list[Tensor]) -> Tensor:
        latents, steps, eps, *values = batch
        said = dict(zip(condition, values, strict=True))
        return per_sample_loss(denoiser, model.schedule, latents, said, steps, eps).sum()

    plain, said, _, eps = rows(model)
    dataset = TensorDataset(plain, timesteps, eps, *said.values())
    fisher = fit_fisher("diagonal", model.denoiser, list(layers), dataset, loss, 2, CPU)
    assert isinstance(fisher, DiagonalFisher)
    each = []
    for row in range(3):
        one = slice(row, row + 1)
        told = {name: value[one] for name, value in condition.items()}
        each.append(gradients_of(clean[one], told, timesteps[one], noise[one]))
    for place, name in enumerate(layers):
        squares = torch.stack([gradients[place].flatten(1).square() for gradients in each]).mean(0)
        assert (fisher.layers[name] - squares).norm() < 1e-4 * squares.norm(), name


def test_a_pair_that_was_never_trained_is_left_out(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """Its A has no gradient, and its Fisher would be nought."""
    first = next(name for name in tensors if name.endswith("lora_B.weight"))
    model = load_model(
        folder, CPU, adapter=save_lora(tmp_path / "lora", {**tensors, first: torch.zeros_like(tensors[first])})
    )
    assert len(select_layers(model.denoiser, "lora")) == len(tensors) - 2
    nothing = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    with pytest.raises(UsageError, match="was never trained"):
        load_model(folder, CPU, adapter=save_lora(tmp_path / "zero", nothing))


def one_name(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("lora_A.weight")).removesuffix(".lora_A.weight")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"unet.x.lora_A.weight": (2, 8), "unet.x.lora_B.weight": (8, 2)}, "adapts x, which the model's unet does not"),
        ({"transformer.x.lora_A.weight": (2, 8)}, "is of a transformer, and the model has a unet"),
        ({"text_encoder.x.lora_A.weight": (2, 8)}, "adapts text_encoder too"),
        ({"lora_unet_x.lora_down.weight": (2, 8)}, "as kohya's scripts give them"),
        ({"unet.ONE.lora_magnitude_vector": (8,)}, "is no part of a LoRA that is known here"),
        ({"unet.ONE.lora_A.weight": (2, 3)}, r"does not fit .*: lora_A \[2, 3\]"),
        ({"unet.ONE.lora_B.weight": None}, "lacks lora_B of"),
        ({"unet.other.alpha": ()}, "has an alpha of other and no weights of it"),
    ],
)
def test_what_is_no_lora_of_the_model_is_refused_unread(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, change: dict[str, tuple[int, ...] | None], told: str
) -> None:
    adapter = save_lora(tmp_path / "lora", tensors)
    held = load_file(adapter / DIFFUSERS)
    for template, shape in change.items():
        name = template.replace("ONE", one_name(tensors))
        held.pop(name, None)
        if shape is not None:
            held[name] = torch.ones(shape)
    save_file(held, adapter / DIFFUSERS)
    with pytest.raises(UsageError, match=f"model.adapter {adapter} .*{told}.*: give a LoRA of model.folder") as error:
        check_adapter(adapter, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"peft_type": "LOHA"}, "is of peft's kind LOHA"),
        ({"use_dora": True}, "has use_dora"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4, which changes the model's own weights"),
        ({"lora_alpha": "much"}, "has the lora_alpha 'much', which is no number"),
        ({"lora_alpha": 0}, "has the scale 0.0"),
        ({"alpha_pattern": {"(a+)+": 2}}, "other than plain names"),
    ],
)
def test_settings_that_make_something_else_of_it_are_refused(
    folder: Path, tensors: dict[str, Tensor], tmp_path: Path, settings: dict[str, object], told: str
) -> None:
    adapter = tmp_path / "lora"
    adapter.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, adapter / PEFT)
    with pytest.raises(UsageError, match=PEFT_CONFIG):
        check_adapter(adapter, folder)
    (adapter / PEFT_CONFIG).write_text(json.dumps({"r": RANK, "lora_alpha": 3, **settings}))
    with pytest.raises(UsageError, match=told):
        check_adapter(adapter, folder)


def test_files_that_are_none_are_refused(folder: Path, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    adapter = tmp_path / "lora"
    with pytest.raises(UsageError, match="is no folder"):
        check_adapter(adapter, folder)
    adapter.mkdir()
    with pytest.raises(UsageError, match=f"lacks {DIFFUSERS} or {PEFT}"):
        check_adapter(adapter, folder)
    (adapter / "pytorch_lora_weights.bin").write_bytes(b"\x80")
    with pytest.raises(UsageError, match=r"in a pickle \(pytorch_lora_weights\.bin\), which is never opened here"):
        check_adapter(adapter, folder)
    save_file({"unet.x": torch.ones(1)}, adapter / DIFFUSERS, {METADATA: "{"})
    with pytest.raises(UsageError, match=f"has a {METADATA} that is no JSON"):
        check_adapter(adapter, folder)
    (adapter / DIFFUSERS).write_bytes((adapter / DIFFUSERS).read_bytes()[:-2])
    with pytest.raises(UsageError, match="is damaged"):
        check_adapter(adapter, folder)
    name = one_name(tensors)
    save_lora(
        adapter, {**tensors, f"{name}.lora_A.weight": torch.full_like(tensors[f"{name}.lora_A.weight"], math.nan)}
    )
    check_adapter(adapter, folder)
    with pytest.raises(UsageError, match="not finite"):
        load_model(folder, CPU, adapter=adapter)


def test_an_adapter_is_known_by_its_bytes(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    here, there, other = (tmp_path / name for name in ("here", "there", "other"))
    save_lora(here, tensors)
    save_lora(there, tensors)
    save_lora(other, tensors, alpha=3)
    assert adapter_hash(here) == adapter_hash(there) != adapter_hash(other)


@pytest.mark.parametrize("writer", ["peft", "diffusers"])
def test_what_peft_trains_and_saves_is_the_same_model(folder: Path, tmp_path: Path, writer: str) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["to_k", "to_out.0", "conv2"], alpha_pattern={"attn1.to_k": 7}
    )
    torch.manual_seed(0)
    if writer == "peft":
        theirs = peft.get_peft_model(theirs, config)
    else:
        theirs.add_adapter(config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    adapter = tmp_path / "lora"
    if writer == "peft":
        theirs.save_pretrained(adapter)
    else:
        StableDiffusionPipeline.save_lora_weights(
            adapter, peft.get_peft_model_state_dict(theirs), unet_lora_adapter_metadata=config.to_dict()
        )
    check_adapter(adapter, folder)
    model = load_model(folder, CPU, adapter=adapter)
    expected = per_sample_loss(theirs.eval(), model.schedule, *rows(model))
    torch.testing.assert_close(model.losses(*rows(model)), expected.detach(), rtol=1e-4, atol=1e-5)
