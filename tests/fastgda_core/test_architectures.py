"""Every supported denoiser: conditions as its pipeline makes them, losses and scores against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import DiagonalFisher, EkfacFisher, LayerFactors, fit_fisher
from fastgda_core.curvature.layers import Layer, matrix_shape, select_layers
from fastgda_core.diffusion.architectures.pixart import PIXART_TOKENS
from fastgda_core.diffusion.loss import denoise, per_sample_loss, take
from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.diffusion.sampling import generate
from fastgda_core.errors import UsageError
from fastgda_core.sketches.eigen import EigenSketch, sample_moments
from fastgda_core.sketches.factored import CaptionInputs, FactoredSketch, caption_inputs
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.gradients import output_gradients, steady_layers
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import sample_gradients
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock, training_losses
from fastgda_core.teachers.unlearning import moved, unlearning_update
from tests.model_folders import LABELS, SAVE, change_json, save_sd3, save_sdxl

CAPTIONS = ["red circle", "goldfish", "goldfish"]
Load = Callable[[str], DiffusionModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A model by the name of its architecture, loaded once."""
    loaded: dict[str, DiffusionModel] = {}

    def once(name: str) -> DiffusionModel:
        if name not in loaded:
            folder = SAVE[name](tmp_path_factory.mktemp(name) / "model")
            loaded[name] = load_model(folder, torch.device("cpu"), resolution=16 if name == "flux" else None)
        return loaded[name]

    return once


def encoders(captions: Any) -> dict[str, Any]:
    """The text encoders and tokenizers of a caption encoder, under a pipeline's names."""
    several = getattr(captions, "encoders", None) or getattr(captions, "clips", None) or [captions.text]
    if getattr(captions, "t5", None) is not None:
        several = [*several, captions.t5]
    named: dict[str, Any] = {}
    for number, text in enumerate(several, start=1):
        suffix = "" if number == 1 else f"_{number}"
        named |= {f"text_encoder{suffix}": text.encoder, f"tokenizer{suffix}": text.tokenizer}
    return named


def without_guidance(pipeline: Any, captions: list[str], **options: Any) -> tuple[Tensor, ...]:
    return pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False, **options)


def test_stable_diffusion_captions(load: Load) -> None:
    model = load("sd")
    pipeline = StableDiffusionPipeline(
        vae=None,
        unet=model.denoiser,
        scheduler=model.schedule.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **encoders(model.captions),
    )
    expected = without_guidance(pipeline, CAPTIONS, num_images_per_prompt=1)[0]
    condition = model.encode_captions(CAPTIONS)
    assert condition.keys() == {"encoder_hidden_states"}
    torch.testing.assert_close(condition["encoder_hidden_states"], expected, rtol=0, atol=0)


def test_sdxl_captions(load: Load) -> None:
    model = load("sdxl")
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        unet=model.denoiser,
        scheduler=model.schedule.scheduler,
        add_watermarker=False,
        **encoders(model.captions),
    )
    text, nothing, pooled, no_pooled = pipeline.encode_prompt(
        CAPTIONS, device="cpu", do_classifier_free_guidance=True, num_images_per_prompt=1
    )
    condition = model.encode_captions([*CAPTIONS, ""])
    torch.testing.assert_close(condition["encoder_hidden_states"][:3], text, rtol=0, atol=1e-6)
    torch.testing.assert_close(condition["added_cond_kwargs.text_embeds"][:3], pooled, rtol=0, atol=1e-6)
    # The folder asks for zeros where nothing is said.
    torch.testing.assert_close(condition["encoder_hidden_states"][3], nothing[0], rtol=0, atol=0)
    torch.testing.assert_close(condition["added_cond_kwargs.text_embeds"][3], no_pooled[0], rtol=0, atol=0)
    ids = pipeline._get_add_time_ids(
        (16, 16), (0, 0), (16, 16), torch.float32, model.denoiser.config.cross_attention_dim // 2
    )
    torch.testing.assert_close(condition["added_cond_kwargs.time_ids"], ids.expand(4, 6), rtol=0, atol=0)


@pytest.mark.heavy
def test_sdxl_says_nothing_with_zeros_unless_its_index_forbids_it(tmp_path: Path) -> None:
    """As the pipeline: where the index is silent its default holds."""
    folder = save_sdxl(tmp_path / "model")
    for value, zeros in ((None, True), (False, False)):
        change_json(folder / "model_index.json", force_zeros_for_empty_prompt=value)
        condition = load_model(folder, torch.device("cpu")).encode_captions([""])
        assert (condition["encoder_hidden_states"] == 0).all() == zeros
        assert (condition["added_cond_kwargs.text_embeds"] == 0).all() == zeros


@pytest.mark.parametrize("t5", [True, False], ids=["with T5", "without T5"])
def test_sd3_captions(tmp_path: Path, t5: bool) -> None:
    model = load_model(save_sd3(tmp_path / "model", t5=t5), torch.device("cpu"))
    parts = {"text_encoder_3": None, "tokenizer_3": None, **encoders(model.captions)}
    pipeline = StableDiffusion3Pipeline(
        vae=None, transformer=model.denoiser, scheduler=model.schedule.scheduler, **parts
    )
    pipeline.tokenizer_max_length = 12
    text, _, pooled, _ = without_guidance(pipeline, CAPTIONS, prompt_2=None, prompt_3=None)
    condition = model.encode_captions(CAPTIONS)
    torch.testing.assert_close(condition["encoder_hidden_states"], text, rtol=0, atol=1e-6)
    torch.testing.assert_close(condition["pooled_projections"], pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["pixart", "pixart-sized"])
def test_pixart_captions(load: Load, name: str) -> None:
    model = load(name)
    pipeline = PixArtAlphaPipeline(
        vae=None, transformer=model.denoiser, scheduler=model.schedule.scheduler, **encoders(model.captions)
    )
    said = ["Red Circle ", "goldfish"]
    text, mask, _, _ = without_guidance(pipeline, said)
    assert text.shape[1] == PIXART_TOKENS["PixArtAlphaPipeline"]
    condition = model.encode_captions(said)
    torch.testing.assert_close(condition["encoder_hidden_states"], text, rtol=0, atol=1e-6)
    torch.testing.assert_close(condition["encoder_attention_mask"], mask, rtol=0, atol=0)
    sizes = {name: tensor.tolist() for name, tensor in condition.items() if name.startswith("added_cond_kwargs")}
    told = {"added_cond_kwargs.resolution": [[16, 16]] * 2, "added_cond_kwargs.aspect_ratio": [[1]] * 2}
    assert sizes == (told if name == "pixart-sized" else {})


@pytest.mark.parametrize(("width", "height"), [(16, 16), (32, 16)])
def test_flux_is_told_what_its_pipeline_tells_it(load: Load, tmp_path: Path, width: int, height: int) -> None:
    """In a call of the pipeline itself: captions, guidance, timestep, and latents packed with their places."""
    model = load("flux")
    if width != height:
        model = load_model(SAVE["flux"](tmp_path / "model"), torch.device("cpu"), resolution=(width, height))
    denoiser = FluxTransformer2DModel.from_config(model.denoiser.config)
    denoiser.load_state_dict(model.denoiser.state_dict())
    captions: Any = model.captions
    pipeline = FluxPipeline(
        vae=model.codec.vae,
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(model.schedule.scheduler.config),
        text_encoder=captions.clip.encoder,
        tokenizer=captions.clip.tokenizer,
        text_encoder_2=captions.t5.encoder,
        tokenizer_2=captions.t5.tokenizer,
    )
    pipeline.tokenizer_max_length = 12
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    told: list[dict[str, Any]] = []
    hooked = denoiser.register_forward_pre_hook(lambda _module, _args, named: told.append(named), with_kwargs=True)
    answers: list[Tensor] = []
    answered = denoiser.register_forward_hook(lambda _module, _args, output: answers.append(output[0]))
    packed = pipeline._pack_latents(latents, 3, 4, height // 2, width // 2)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(CAPTIONS, height=height, width=width, num_inference_steps=2, latents=packed, output_type="latent")
    hooked.remove()
    answered.remove()
    condition = model.encode_captions(CAPTIONS)
    for name in ("encoder_hidden_states", "pooled_projections", "guidance"):
        torch.testing.assert_close(condition[name], told[0][name], rtol=0, atol=1e-6)
    assert condition.keys() == {"encoder_hidden_states", "pooled_projections", "guidance"}
    found = denoise(model.denoiser, latents, told[0]["timestep"] * 1000, condition)
    expected = pipeline._unpack_latents(answers[0], height, width, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sana_is_told_what_its_pipeline_tells_it(load: Load) -> None:
    """Captions behind the instruction; with guidance the empty one without."""
    model = load("sana")
    captions: Any = model.captions
    pipeline = SanaPipeline(
        vae=model.codec.vae,
        transformer=model.denoiser,
        scheduler=DPMSolverMultistepScheduler(
            num_train_timesteps=100, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        text_encoder=captions.text.encoder,
        tokenizer=captions.text.tokenizer,
    )
    told: list[dict[str, Any]] = []
    latents = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    given: list[tuple[Any, ...]] = []
    answers: list[Tensor] = []

    def look(_module: nn.Module, positions: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        given.append(positions)
        told.append(named)
        answers.append(output[0])

    hook = model.denoiser.register_forward_hook(look, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    said = ["Red circle ", *CAPTIONS[1:]]
    options: dict[str, Any] = {"use_resolution_binning": False, "output_type": "latent", "latents": latents}
    pipeline(said, height=32, width=32, num_inference_steps=2, **options)  # the least that it lets through
    hook.remove()
    condition = model.encode_captions(["", "", "", *said])
    assert condition["encoder_hidden_states"].shape[1] == 300
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        torch.testing.assert_close(condition[name], told[0][name], rtol=0, atol=1e-6)
    timesteps = told[0]["timestep"]
    found = denoise(model.denoiser, torch.cat([latents, latents]), timesteps, condition)
    torch.testing.assert_close(found, answers[0], rtol=0, atol=1e-6)


def test_flow_matching_loss_of_flux_and_sana(load: Load) -> None:
    for name, shift in (("flux", 1.0), ("sana", 3.0)):
        model = load(name)
        clean, condition, timesteps, noise = rows(model)
        even = (timesteps + 1) / 100
        sigma = (shift * even / (1 + (shift - 1) * even))[:, None, None, None]
        predicted = model.denoiser(
            (1 - sigma) * clean + sigma * noise, timestep=sigma.flatten() * 100, **condition, return_dict=False
        )[0]
        assert_objectives(model, predicted, noise - clean)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart-sized", "sana"])
def test_images_may_be_wider_than_high(tmp_path: Path, name: str) -> None:
    """The sizes that SDXL and PixArt are told are those that their pipelines tell."""
    width, height = (64, 32) if name == "sana" else (32, 16)
    model = load_model(SAVE[name](tmp_path / "model"), torch.device("cpu"), resolution=(width, height))
    assert model.resolution == (height, width) and model.latent_shape[1] * 2 == model.latent_shape[2]
    tall = Image.new("RGB", (40, 80), "red")
    latents = model.encode_images([tall, tall])
    assert latents.shape == (2, *model.latent_shape) and model.decode_images(latents)[0].size == (width, height)
    clean, condition, timesteps, noise = rows(model)
    each = torch.cat(
        [
            model.losses(clean[n : n + 1], take(condition, torch.tensor([n])), timesteps[n : n + 1], noise[n : n + 1])
            for n in range(3)
        ]
    )
    torch.testing.assert_close(model.losses(clean, condition, timesteps, noise), each, rtol=1e-5, atol=0)
    if name == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            vae=None,
            unet=model.denoiser,
            scheduler=model.schedule.scheduler,
            add_watermarker=False,
            **encoders(model.captions),
        )
        size = (height, width)
        ids = pipeline._get_add_time_ids(
            size, (0, 0), size, torch.float32, model.denoiser.config.cross_attention_dim // 2
        )
        torch.testing.assert_close(condition["added_cond_kwargs.time_ids"], ids.expand(3, 6), rtol=0, atol=0)
    if name == "pixart-sized":
        # As `PixArtAlphaPipeline.__call__`: height and width, and the one over the other.
        assert condition["added_cond_kwargs.resolution"].tolist() == [[height, width]] * 3
        assert condition["added_cond_kwargs.aspect_ratio"].tolist() == [[height / width]] * 3


def test_a_class_that_makes_squares_alone_is_asked_for_nothing_else(tmp_path: Path) -> None:
    folder = SAVE["dit"](tmp_path / "model")
    with pytest.raises(UsageError, match=r"model.resolution is \(32, 16\): DiTTransformer2DModel makes squares alone"):
        load_model(folder, torch.device("cpu"), resolution=(32, 16))
    assert load_model(folder, torch.device("cpu"), resolution=32).resolution == (32, 32)


def test_dit_captions_are_names_of_classes(load: Load) -> None:
    model = load("dit")
    pipeline = DiTPipeline(
        transformer=model.denoiser,
        vae=None,
        scheduler=model.schedule.scheduler,
        id2label={int(number): names for number, names in LABELS.items()},
    )
    said = ["Tinca tinca", "goldfish", "red circle", "tench"]
    assert model.encode_captions(said)["class_labels"].tolist() == pipeline.get_label_ids(said)
    assert model.encode_captions([""])["class_labels"].tolist() == [len(LABELS)]
    with pytest.raises(UsageError, match="'unicorn' is no class"):
        model.encode_captions(["goldfish", "unicorn"])


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_transformers_published_under_their_old_class_name_load(tmp_path: Path, name: str) -> None:
    """`Transformer2DModel`, with the entries that only it had."""
    folder = SAVE[name](tmp_path / "model")
    model = load_model(folder, torch.device("cpu"))
    change_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    change_json(
        folder / "transformer" / "config.json",
        _class_name="Transformer2DModel",
        only_cross_attention=False,
        use_linear_projection=False,
    )
    old = load_model(folder, torch.device("cpu"))
    assert type(old.denoiser) is type(model.denoiser)
    torch.testing.assert_close(old.losses(*rows(old)), model.losses(*rows(model)), rtol=0, atol=0)
    change_json(folder / "transformer" / "config.json", norm_type="layer_norm")
    with pytest.raises(UsageError, match=rf"{folder}/model_index\.json: the denoiser is Transformer2DModel"):
        load_model(folder, torch.device("cpu"))


def rows(model: DiffusionModel) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """Latents, condition, timesteps and noise of three forwards."""
    generator = torch.Generator().manual_seed(4)
    clean, noise = (torch.randn(3, *model.latent_shape, generator=generator) for _ in range(2))
    return clean, model.encode_captions(CAPTIONS), torch.tensor([0, 37, 99]), noise


def mean_squares(difference: Tensor) -> Tensor:
    return difference.square().mean((1, 2, 3))


def assert_objectives(model: DiffusionModel, predicted: Tensor, target: Tensor) -> None:
    """The loss is of what the denoiser misses its target by, the output's norm of all that it gives."""
    for objective, expected in ((Objective.loss, predicted - target), (Objective.output_norm, predicted)):
        found = model.with_objective(objective).losses(*rows(model))
        torch.testing.assert_close(found, mean_squares(expected), rtol=1e-5, atol=0)


def test_flow_matching_loss_of_sd3(load: Load) -> None:
    model = load("sd3")
    clean, condition, timesteps, noise = rows(model)
    # shift 3 on an even grid of 100 (Esser et al., 2024, Eq. 23).
    even = (timesteps + 1) / 100
    sigma = (3 * even / (1 + 2 * even))[:, None, None, None]
    predicted = model.denoiser(
        (1 - sigma) * clean + sigma * noise,
        encoder_hidden_states=condition["encoder_hidden_states"],
        pooled_projections=condition["pooled_projections"],
        timestep=sigma.flatten() * 100,
    ).sample
    assert_objectives(model, predicted, noise - clean)


def test_flow_matching_timesteps_are_those_of_the_scheduler(load: Load) -> None:
    model = load("sd3")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.schedule.scheduler.config)
    told = model.schedule.model_timesteps(torch.arange(100))
    torch.testing.assert_close(told, scheduler.timesteps.flip(0), rtol=1e-6, atol=1e-4)
    noisy = model.schedule.add_noise(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([99]))
    assert noisy.abs().max() < 1e-6


def test_stable_diffusion_loss(load: Load) -> None:
    model = load("sd")
    clean, condition, timesteps, noise = rows(model)
    alpha = model.schedule.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    predicted = model.denoiser(noisy, timesteps, encoder_hidden_states=condition["encoder_hidden_states"]).sample
    assert_objectives(model, predicted, noise)


@pytest.mark.parametrize("name", ["pixart", "pixart-sized", "dit"])
def test_learned_variance_is_left_out_of_the_loss(load: Load, name: str) -> None:
    model = load(name)
    clean, condition, timesteps, noise = rows(model)
    alpha = model.schedule.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    arguments = {key: tensor for key, tensor in condition.items() if "." not in key}
    if name == "pixart-sized":
        arguments["added_cond_kwargs"] = {"resolution": torch.full((3, 2), 16.0), "aspect_ratio": torch.ones(3, 1)}
    predicted = model.denoiser(
        alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timestep=timesteps, **arguments
    ).sample
    assert predicted.shape[1] == 8
    assert_objectives(model, predicted[:, :4], noise)


def test_sdxl_loss(load: Load) -> None:
    model = load("sdxl")
    clean, condition, timesteps, noise = rows(model)
    alpha = model.schedule.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    added = {name.split(".")[1]: tensor for name, tensor in condition.items() if "." in name}
    predicted = model.denoiser(
        alpha.sqrt() * clean + (1 - alpha).sqrt() * noise,
        timesteps,
        encoder_hidden_states=condition["encoder_hidden_states"],
        added_cond_kwargs=added,
    ).sample
    assert_objectives(model, predicted, noise)


SELECTED = [
    *((name, layers) for name in ("sd", "sdxl", "pixart", "sd3") for layers in ("cross-attn-kv", "cross-attn")),
    *((name, layers) for name in ("sd", "sdxl", "pixart", "sd3", "dit") for layers in ("attn", "all")),
    *((name, layers) for name in ("flux", "sana") for layers in ("cross-attn-kv", "mlp")),
    ("flux", "all"),
    ("pixart-sized", "all"),
]


PLAN = NoisePlan(seed=2, timesteps=2, draws=1, first_timestep=20)


def two_samples(model: DiffusionModel) -> SampleBlock:
    """The first of them has two captions."""
    generator = torch.Generator().manual_seed(5)
    return SampleBlock(
        train_ids=torch.tensor([3, 8]),
        latents=torch.randn(2, 1, *model.latent_shape, generator=generator),
        condition=model.encode_captions(CAPTIONS),
        owner=torch.tensor([0, 0, 1]),
        caption_number=torch.tensor([0, 1, 0]),
    )


def random_update(layers: dict[str, Layer]) -> dict[str, Tensor]:
    """A weight change by layer, (d_out, d_in) float64."""
    generator = torch.Generator().manual_seed(6)
    return {
        name: 0.1 * torch.randn(matrix_shape(layer), dtype=torch.float64, generator=generator)
        for name, layer in layers.items()
    }


@pytest.mark.heavy
@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize(("name", "selection"), SELECTED)
def test_first_order_scores_equal_a_float64_finite_difference(
    load: Load, name: str, selection: str, objective: Objective
) -> None:
    model = load(name).in_precision(Precision.float64).with_objective(objective)
    layers, block = select_layers(model.denoiser, selection), two_samples(model)
    update = random_update(layers)
    stacked = {name: change[None] for name, change in update.items()}
    (scores,) = first_order_scores(model, layers, PLAN, block, [stacked], MicroBatch(4))

    # diffusers takes some of their norms in float32, whose rounding a short step would see.
    step, bound = (1e-2, 1e-3) if name in ("flux", "sana") else (1e-5, 1e-6)
    losses = []
    for sign in (1, -1):
        with moved(layers, {name: sign * step * change for name, change in update.items()}):
            losses.append(training_losses(model, PLAN, block, MicroBatch(4))[:, 0])
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope.abs().min() > 0
    assert (scores - slope).norm() / slope.norm() < bound


def any_fisher(layers: dict[str, Layer]) -> EkfacFisher:
    """Some orthogonal bases and positive eigenvalues."""
    generator = torch.Generator().manual_seed(7)

    def basis(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q.float()

    return EkfacFisher(
        {
            name: LayerFactors(basis(d_in), basis(d_out), torch.rand(d_out, d_in, generator=generator))
            for name, layer in layers.items()
            for d_out, d_in in [matrix_shape(layer)]
        }
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "selection"), [*((name, "cross-attn-kv") for name in ("sd", "sdxl", "pixart", "sd3")), ("dit", "attn")]
)
def test_sketches_give_the_first_order_scores(load: Load, name: str, selection: str) -> None:
    """Eigen sketches of all coordinates, all their directions, factored ones where layers see the caption alone."""
    model = load(name)
    layers, block = select_layers(model.denoiser, selection), two_samples(model)
    fisher = any_fisher(layers)
    query = {name: change.float() for name, change in random_update(layers).items()}
    update = {name: change[None] for name, change in unlearning_update(fisher, query, alpha=1, training_size=1).items()}
    (expected,) = first_order_scores(model, layers, PLAN, block, [update], MicroBatch(4))
    (gradients,) = sample_gradients(model, layers, PLAN, block, MicroBatch(4))
    moments = sample_moments(fisher, [gradients])
    sketch = EigenSketch.of_most_energy(fisher, moments, moments, 10**9)
    found = (sketch.of_samples(gradients)[:, 0].double() @ sketch.of_query(query).double()).float()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    principal = PrincipalSketch.of_samples_like(sketch, sketch.of_samples(gradients).flatten(0, 1), 10**9)
    found = (principal.of_samples(gradients)[:, 0].double() @ principal.of_query(query).double()).float()
    assert (found - expected).norm() < 1e-4 * expected.norm()
    if gradients.moving:
        assert name in ("sd3", "dit")
        with pytest.raises(UsageError, match="changes with the timestep"):
            FactoredSketch.of_samples(gradients)
    else:
        inputs = caption_inputs(model, layers, block.condition, MicroBatch(2))
        (exact,) = FactoredSketch.of_samples(gradients).scores(inputs, [update])
        assert (exact - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("name", "forwards"), [("sd", 0), ("sdxl", 0), ("pixart", 1)])
def test_where_layers_see_the_caption_as_it_is_the_denoiser_is_asked_once(load: Load, name: str, forwards: int) -> None:
    """PixArt projects captions before all its layers."""
    model = load(name)
    layers = select_layers(model.denoiser, "cross-attn-kv")
    inputs = CaptionInputs(model, layers, MicroBatch(4), "a red circle")
    condition = model.encode_captions(["teal", "two crossed green lines on white", ""])
    expected = caption_inputs(model, layers, condition, MicroBatch(4))
    calls = []
    handle = model.denoiser.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = inputs.of(condition)
    finally:
        handle.remove()
    assert len(calls) == forwards
    assert found.keys() == layers.keys()
    for layer, seen in expected.items():
        assert torch.equal(found[layer], seen), layer


@pytest.mark.integration
@pytest.mark.parametrize(("name", "selection"), SELECTED)
def test_output_norm_gradients_equal_float64_autograd(load: Load, name: str, selection: str) -> None:
    """Through the weights themselves, row by row, with nothing of ours but the noise."""
    model = load(name).in_precision(Precision.float64).with_objective(Objective.output_norm)
    layers, block = select_layers(model.denoiser, selection), two_samples(model)
    update = random_update(layers)
    stacked = {name: change[None] for name, change in update.items()}
    (scores,) = first_order_scores(model, layers, PLAN, block, [stacked], MicroBatch(4))
    expected = torch.zeros(2, dtype=torch.float64)
    model.denoiser.requires_grad_(True)
    try:
        for caption, owner in enumerate(block.owner.tolist()):
            for timestep in (20, 70):
                place = block.train_ids[[owner]], torch.tensor([0]), block.caption_number[[caption]]
                at = torch.tensor([timestep])
                noise = PLAN.noise(*place, at, torch.tensor([0]), model.latent_shape).double()
                noisy = model.schedule.add_noise(block.latents[owner].double(), noise, at)
                said = {key: value[[caption]] for key, value in block.condition.items()}
                said = {key: value.double() if value.is_floating_point() else value for key, value in said.items()}
                norm = denoise(model.denoiser, noisy, model.schedule.model_timesteps(at), said).square().mean()
                share = 1 / (2 * int((block.owner == owner).sum()))
                for layer, change in update.items():
                    weights = list(layers[layer].parameters(recurse=False))
                    several = torch.autograd.grad(norm, weights, retain_graph=True)
                    matrix = torch.cat([part.reshape(len(part), -1) for part in several], dim=1)
                    expected[owner] += share * (matrix * change).sum()
    finally:
        model.denoiser.requires_grad_(False)
    assert (scores - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.slow  # a smaller one: test_teacher_protocol.py, test_compiled_model_scores_as_the_plain_one
@pytest.mark.parametrize("name", ["sd", "pixart-sized", "dit", "sd3"])
def test_compiled_gradients_are_the_plain_ones(load: Load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of all layers, some called twice in a forward."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    model = load(name)
    layers = select_layers(model.denoiser, "all")
    compiled = model.compiled()
    for count in (3, 2):
        clean, condition, timesteps, noise = rows(model)
        some = (clean[:count], take(condition, slice(count)), timesteps[:count], noise[:count])
        losses, inputs, gradients = output_gradients(model, layers, *some)
        found = output_gradients(compiled, layers, *some)
        torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=0)
        for layer, expected in gradients.items():
            assert [seen.shape for seen in found[1][layer]] == [seen.shape for seen in inputs[layer]]
            assert (found[2][layer] - expected).norm() <= 1e-5 * expected.norm(), layer


@pytest.mark.integration
def test_code_compiled_for_one_precision_does_not_serve_another(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    model = load("dit")
    layers = select_layers(model.denoiser, "attn")
    compiled = model.compiled()
    output_gradients(compiled, layers, *rows(model))
    _, _, expected = output_gradients(model.in_precision(Precision.bf16), layers, *rows(model))
    _, _, found = output_gradients(compiled.in_precision(Precision.bf16), layers, *rows(model))
    for layer, gradient in expected.items():
        assert found[layer].dtype is gradient.dtype is torch.bfloat16, layer


@pytest.mark.parametrize("name", ["sd", "sd3", "pixart", "dit"])
def test_diagonal_fisher_of_all_layers_is_the_mean_squared_gradient(load: Load, name: str) -> None:
    """Convolutions, biases, layers that one forward goes through twice."""
    model = load(name)
    layers = select_layers(model.denoiser, "all")
    clean, condition, timesteps, noise = rows(model)
    dataset = TensorDataset(clean, timesteps, noise, *condition.values())

    def loss(denoiser: nn.Module, batch: list[Tensor]) -> Tensor:
        latents, steps, eps, *values = batch
        return per_sample_loss(
            denoiser, model.schedule, latents, dict(zip(condition, values, strict=True)), steps, eps
        ).sum()

    fisher = fit_fisher("diagonal", model.denoiser, list(layers), dataset, loss, 2, model.device)
    assert isinstance(fisher, DiagonalFisher)
    weights = {layer: list(module.parameters(recurse=False)) for layer, module in layers.items()}
    squares = {layer: torch.zeros(matrix_shape(module)) for layer, module in layers.items()}
    model.denoiser.requires_grad_(True)
    try:
        for row in range(len(clean)):
            single = model.losses(
                clean[row : row + 1],
                {key: value[row : row + 1] for key, value in condition.items()},
                timesteps[row : row + 1],
                noise[row : row + 1],
            )
            flat = iter(torch.autograd.grad(single.sum(), [w for several in weights.values() for w in several]))
            for layer, several in weights.items():
                matrix = torch.cat([next(flat).reshape(len(weight), -1) for weight in several], dim=1)
                squares[layer] += matrix.square() / len(clean)
    finally:
        model.denoiser.requires_grad_(False)
    for layer, expected in squares.items():
        found = fisher.layers[layer]
        assert (found - expected).norm() <= 1e-4 * expected.norm(), layer


def test_a_layer_that_runs_several_rows_of_a_sample_gets_no_fisher(load: Load) -> None:
    """kronfluence would count each of the two numbers of a size as a sample."""
    model = load("pixart-sized")
    clean, condition, timesteps, noise = rows(model)
    dataset = TensorDataset(clean, timesteps, noise, *condition.values())

    def loss(denoiser: nn.Module, batch: list[Tensor]) -> Tensor:
        latents, steps, eps, *values = batch
        told = dict(zip(condition, values, strict=True))
        return per_sample_loss(denoiser, model.schedule, latents, told, steps, eps).sum()

    names = list(select_layers(model.denoiser, "all"))
    with pytest.raises(UsageError, match=r"resolution_embedder\.linear_1 runs 2 rows of one sample"):
        fit_fisher("ekfac", model.denoiser, names, dataset, loss, 2, model.device)


@pytest.mark.parametrize(
    ("name", "selection", "steady"),
    [
        ("sd", "cross-attn-kv", ("attn2.to_k", "attn2.to_v")),
        ("sd", "all", ("attn2.to_k", "attn2.to_v")),
        ("sdxl", "cross-attn", ("attn2.to_k", "attn2.to_v")),
        ("sdxl", "all", ("attn2.to_k", "attn2.to_v", "add_embedding.linear_1", "add_embedding.linear_2")),
        ("pixart", "all", ("attn2.to_k", "attn2.to_v", "caption_projection.linear_1", "caption_projection.linear_2")),
        (
            "pixart-sized",
            "all",
            (
                *("attn2.to_k", "attn2.to_v", "caption_projection.linear_1", "caption_projection.linear_2"),
                *("resolution_embedder.linear_1", "resolution_embedder.linear_2"),
                *("aspect_ratio_embedder.linear_1", "aspect_ratio_embedder.linear_2"),
            ),
        ),
        ("sd3", "cross-attn-kv", ()),
        ("sd3", "all", ("context_embedder", "text_embedder.linear_1", "text_embedder.linear_2")),
        ("dit", "all", ()),
        (
            "flux",
            "all",
            (
                "context_embedder",
                "text_embedder.linear_1",
                "text_embedder.linear_2",
                "guidance_embedder.linear_1",
                "guidance_embedder.linear_2",
            ),
        ),
        ("sana", "attn", ("attn2.to_k", "attn2.to_v")),
    ],
)
def test_layers_that_see_only_the_caption_are_found(
    load: Load, name: str, selection: str, steady: tuple[str, ...]
) -> None:
    model = load(name)
    layers = select_layers(model.denoiser, selection)
    found = steady_layers(model, layers, model.encode_captions(CAPTIONS), MicroBatch(2))
    assert found.keys() == {layer for layer in layers if layer.endswith(steady or ("none",))}


@pytest.mark.parametrize("selection", ["cross-attn-kv", "cross-attn"])
def test_dit_has_no_layer_for_the_caption(load: Load, selection: str) -> None:
    with pytest.raises(UsageError, match=f"no {selection} layer"):
        select_layers(load("dit").denoiser, selection)


def test_a_shift_that_only_the_pipeline_knows_is_refused(tmp_path: Path) -> None:
    folder = save_sd3(tmp_path / "model", t5=False)
    change_json(folder / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True)
    model = load_model(folder, torch.device("cpu"))
    with pytest.raises(UsageError, match=r"use_dynamic_shifting.*queries\.shards"):
        generate(model, ["goldfish"], [0], seed=0, steps=2, guidance_scale=2.0)


@pytest.mark.parametrize("name", sorted(SAVE))
def test_images_are_generated(load: Load, name: str) -> None:
    model = load(name)
    latents = generate(model, CAPTIONS[:2], [0, 1], seed=0, steps=3, guidance_scale=2.0)
    assert latents.shape == (2, *model.latent_shape)
    assert latents.isfinite().all()
    assert [image.size for image in model.decode_images(latents)] == [(16, 16)] * 2
