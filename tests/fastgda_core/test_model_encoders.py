"""Encoders that are parts of the model, on every architecture, beside loops and hooks of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from fastgda_core.diffusion.loss import denoise
from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.diffusion.noise import gaussian_noise, stream_key
from fastgda_core.errors import UsageError
from fastgda_core.features import load_encoder
from tests.model_folders import SAVE
from tests.tiny import draw

CPU = torch.device("cpu")
TEXTS = ["a red circle", "b", "a much longer caption of a shape that no one has ever drawn"]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A model folder by the name of its architecture, made once."""
    made: dict[str, Path] = {}

    def once(name: str) -> Path:
        if name not in made:
            made[name] = SAVE[name](tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return once


def images() -> list[Image.Image]:
    import io

    return [Image.open(io.BytesIO(draw(number)[0])) for number in range(3)]


def given_to(model: DiffusionModel, text: str) -> Tensor:
    """The tokens that a forward pass gives to the layers that see the caption, (tokens, d), unless they project."""
    seen: list[Tensor] = []
    name = next(name for name, _ in model.denoiser.named_modules() if name.endswith("attn2.to_k"))
    hook = model.denoiser.get_submodule(name).register_forward_hook(lambda *call: seen.append(call[1][0]))
    latent, condition = torch.zeros(1, *model.latent_shape), model.encode_captions([text])
    with torch.no_grad():
        denoise(model.denoiser, latent, torch.tensor([3]), condition)
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_caption_tokens_are_the_mean_of_those_that_cross_attention_sees(folder: Folder, name: str) -> None:
    model = load_model(folder(name), CPU)
    found = load_encoder("caption_tokens", CPU, str(folder(name))).encode(TEXTS)
    text: Any = getattr(model.captions, "text", None) or model.captions.encoders[0]  # type: ignore[attr-defined]
    for caption, row in zip(TEXTS, found, strict=True):
        letters = len(text.tokenizer(caption).input_ids)  # with start and end
        tokens = given_to(model, caption)
        said = [tokens[place] for place in range(min(letters, len(tokens)))]
        torch.testing.assert_close(row, sum(said) / len(said), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_caption_tokens_of_transformers_leave_padding_out(folder: Folder, name: str) -> None:
    model = load_model(folder(name), CPU)
    encoder = load_encoder("caption_tokens", CPU, str(folder(name)))
    captions: Any = model.captions
    several = [captions.clips[0], captions.t5] if name == "sd3" else [captions.text]
    for caption in TEXTS:
        tokens = model.encode_captions([caption])["encoder_hidden_states"][0]
        start, said = 0, []
        for text, width in zip(several, [12, len(tokens) - 12] if name == "sd3" else [len(tokens)], strict=True):
            count = min(width, len(text.tokenizer(caption).input_ids))
            said += list(tokens[start : start + count])
            start += width
        torch.testing.assert_close(encoder.encode([caption])[0], sum(said) / len(said), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "place"),
    [("sd", "mid_block"), ("sdxl", "mid_block"), ("sd3", 1), ("pixart", 1), ("pixart-sized", 1), ("dit", 1)],
)
def test_the_bottleneck_is_the_mean_of_the_middles_activations_under_noise_of_its_own(
    folder: Folder, name: str, place: str | int
) -> None:
    model, seen = load_model(folder(name), CPU), []
    middle = model.denoiser.mid_block if place == "mid_block" else model.denoiser.transformer_blocks[place]
    middle.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    encoder = load_encoder("bottleneck", CPU, str(folder(name)))
    for image, row in zip(images(), encoder.encode(images()), strict=True):
        clean, parts = model.encode_images([image.convert("RGB")]), []
        for timestep in (12, 37, 62, 87):  # the middles of the quarters of 100
            at = torch.tensor([timestep])
            noise = gaussian_noise(
                stream_key(0, "training samples"), torch.tensor([0]), at, torch.tensor([0]), model.latent_shape
            )
            noisy = model.schedule.add_noise(clean, noise, at)
            with torch.no_grad():
                denoise(model.denoiser, noisy, model.schedule.model_timesteps(at), model.encode_captions([""]))
            output = seen.pop()
            tokens = output[1] if isinstance(output, tuple) else output
            channels = tokens[0].flatten(1).T if tokens.ndim == 4 else tokens[0]  # (positions, d)
            parts.append(sum(channels) / len(channels))
        torch.testing.assert_close(row, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_what_a_model_has_not_is_told_in_one_line(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"caption_tokens: .*\(the model knows classes by number") as caught:
        load_encoder("caption_tokens", CPU, str(folder("dit")))
    assert "\n" not in str(caught.value)
    without = SAVE["sd"](tmp_path / "model")
    config = UNet2DConditionModel.load_config(without / "unet")
    UNet2DConditionModel.from_config(config, mid_block_type=None).save_pretrained(without / "unet")
    with pytest.raises(UsageError, match="has no middle block"):
        load_encoder("bottleneck", CPU, str(without))
