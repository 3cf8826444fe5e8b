from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastgda_core.diffusion.codec import PixelUnshuffle, load_codec
from fastgda_core.diffusion.model import DiffusionModel, load_model, model_hash, train_timesteps
from fastgda_core.diffusion.sampling import generate
from fastgda_core.errors import UsageError
from fastgda_core.images import square
from tests.tiny import WEIGHTS

CPU = torch.device("cpu")
PARTS = ("unet", "scheduler", "text_encoder", "tokenizer", "vae")


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model folder to break."""
    return shutil.copytree(model_folder, tmp_path / "model")


def stripes(widths: list[int], height: int) -> Image.Image:
    """Vertical stripes of red, green, blue of these widths."""
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)
    row = np.repeat(colors[: len(widths)], widths, axis=0)
    return Image.fromarray(np.broadcast_to(row, (height, *row.shape)).copy())


def test_loads_a_model_folder_frozen_in_float32(tiny_model: DiffusionModel) -> None:
    assert tiny_model.latent_shape == (4, 8, 8)
    assert tiny_model.resolution == (16, 16)
    for part in (tiny_model.denoiser, tiny_model.captions.text.encoder):  # type: ignore[attr-defined]
        assert not part.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in part.parameters())
    assert tiny_model.encode_captions(["a red circle", ""])["encoder_hidden_states"].shape == (2, 12, 16)
    images = [stripes([12, 12], 24), stripes([5, 6, 7], 40)]
    latents = tiny_model.encode_images(images)
    assert latents.shape == (2, 4, 8, 8)
    assert [image.size for image in tiny_model.decode_images(latents)] == [(16, 16), (16, 16)]


def test_caption_embedding_does_not_depend_on_its_batch(tiny_model: DiffusionModel) -> None:
    captions = ["a red circle", "", "one two three four five six seven eight nine ten eleven twelve"]
    together = tiny_model.encode_captions(captions)["encoder_hidden_states"]
    for number, caption in enumerate(captions):
        alone = tiny_model.encode_captions([caption])["encoder_hidden_states"]
        torch.testing.assert_close(alone[0], together[number], rtol=1e-5, atol=1e-6)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=str(tmp_path / "nowhere")):
        load_model(tmp_path / "nowhere", CPU)


@pytest.mark.parametrize("part", ["model_index.json", *PARTS])
def test_missing_part_is_named(folder: Path, part: str) -> None:
    path = folder / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(UsageError, match=f"{folder} lacks {part}:"):
        load_model(folder, CPU)


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_part_without_its_config_is_a_usage_error(folder: Path, part: str) -> None:
    (folder / part / "config.json").unlink()
    with pytest.raises(UsageError, match=str(folder)):
        load_model(folder, CPU)


def test_schedule_length_is_read_without_loading_the_model(folder: Path, tiny_model: DiffusionModel) -> None:
    assert train_timesteps(folder) == tiny_model.schedule.train_timesteps == 100


@pytest.mark.parametrize("content", ["", "[]", '{"num_train_timesteps": null}'])
def test_scheduler_config_that_is_none_is_a_usage_error(folder: Path, content: str) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(content)
    with pytest.raises(UsageError, match=str(folder)):
        train_timesteps(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"unet": 3}', '{"unet": ["diffusers"]}', "{}"])
def test_model_index_that_is_none_is_a_usage_error(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_text(content)
    with pytest.raises(UsageError, match=f"{folder}/model_index.json"):
        load_model(folder, CPU)


def test_unknown_codec_class_is_named(folder: Path) -> None:
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(UsageError, match=f"{config} names the codec 'VQModel'"):
        load_model(folder, CPU)


def test_denoiser_of_another_class_is_refused(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"][1] = "UNet3DConditionModel"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=f"{folder}/model_index.json"):
        load_model(folder, CPU)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_pickled_weights_are_refused(folder: Path, weights: str) -> None:
    safe = folder / weights
    pickled = "pytorch_model.bin" if safe.stem == "model" else f"{safe.stem}.bin"
    torch.save(load_file(safe), safe.with_name(pickled))
    safe.unlink()
    with pytest.raises(UsageError, match=str(folder)):
        load_model(folder, CPU)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_cut_off_weights_file_is_a_usage_error(folder: Path, weights: str) -> None:
    path = folder / weights
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=str(folder)):
        load_model(folder, CPU)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_weight_that_is_not_in_the_file_is_a_usage_error(folder: Path, weights: str) -> None:
    """It must never be made up at random."""
    tensors = load_file(folder / weights)
    del tensors[next(name for name in reversed(tensors) if name.endswith("weight"))]
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=str(folder)):
        load_model(folder, CPU)


def test_square_crops_the_centre_and_keeps_the_aspect() -> None:
    # 60 x 20 becomes 30 x 10; its centre is the middle stripe, but for the blur of the resize at the edges.
    wide = np.asarray(square(stripes([20, 20, 20], 20), 10))
    assert wide.shape == (10, 10, 3)
    assert (wide[:, 2:-2] == [0, 255, 0]).all()
    tall = np.asarray(square(stripes([20, 20, 20], 20).transpose(Image.Transpose.ROTATE_90), 10))
    assert (tall[2:-2] == [0, 255, 0]).all()
    # Enlarging keeps the aspect too: 6 x 4 becomes 18 x 12, its centre 12 columns wide and half red.
    enlarged = np.asarray(square(stripes([3, 3], 4), 12)).astype(int)
    assert enlarged.shape == (12, 12, 3)
    assert (enlarged[:, :3, 0] > 240).all()
    assert (enlarged[:, -3:, 1] > 240).all()


@pytest.mark.parametrize("size", [(17, 33), (33, 17), (1, 50), (16, 16), (15, 16), (640, 427)])
def test_square_has_the_side_asked_for(size: tuple[int, int]) -> None:
    assert square(Image.new("RGB", size), 16).size == (16, 16)


def test_square_leaves_an_image_of_the_right_size_alone() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(square(Image.fromarray(pixels), 16)), pixels)


def test_pixel_codec_is_lossless(tmp_path: Path) -> None:
    PixelUnshuffle(4).save(tmp_path)
    codec = load_codec(tmp_path, CPU)
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (2, 48, 2, 3)
    assert torch.equal(codec.decode(latents), images)


def test_pixel_codec_returns_the_pictures_it_was_given(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    PixelUnshuffle(2).save(folder / "vae")
    model = load_model(folder, CPU)
    pixels = np.random.default_rng(0).integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
    decoded = model.decode_images(model.encode_images([Image.fromarray(image) for image in pixels]))
    assert np.array_equal(np.stack([np.asarray(image) for image in decoded]), pixels)


def test_model_hash_is_of_the_contents_only(model_folder: Path, folder: Path) -> None:
    original = model_hash(model_folder)
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    assert model_hash(folder) == original


@pytest.mark.parametrize("weights", WEIGHTS)
def test_model_hash_changes_with_one_weight(folder: Path, weights: str) -> None:
    original = model_hash(folder)
    bytes_before = (folder / weights).read_bytes()
    tensors = load_file(folder / weights)
    first = next(iter(tensors))
    tensors[first].view(-1)[0] += 1e-3
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    assert model_hash(folder) != original
    (folder / weights).write_bytes(bytes_before)
    assert model_hash(folder) == original


@pytest.mark.heavy
def test_image_does_not_depend_on_which_others_are_generated_with_it(tiny_model: DiffusionModel) -> None:
    captions, numbers = ["a red circle", "blue square", "", "green cross"], [7, 2, 9, 2**33]
    options = {"seed": 3, "steps": 4, "guidance_scale": 5.0}
    together = generate(tiny_model, captions, numbers, **options)
    assert together.shape == (4, *tiny_model.latent_shape)
    backwards = generate(tiny_model, captions[::-1], numbers[::-1], **options).flip(0)
    torch.testing.assert_close(backwards, together, rtol=1e-4, atol=1e-4)
    for place in range(4):
        alone = generate(tiny_model, captions[place : place + 1], numbers[place : place + 1], **options)
        torch.testing.assert_close(alone[0], together[place], rtol=1e-4, atol=1e-4)


def test_image_changes_with_its_number_and_with_the_seed(tiny_model: DiffusionModel) -> None:
    base, number, seed = (
        generate(tiny_model, ["a red circle"], [i], seed=s, steps=2, guidance_scale=2.0)
        for i, s in ((0, 0), (1, 0), (0, 1))
    )
    assert (base - number).abs().mean() > 0.1
    assert (base - seed).abs().mean() > 0.1
