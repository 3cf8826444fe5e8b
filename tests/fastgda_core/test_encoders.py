"""Encoders with folders of tiny random weights of their real classes, and the two that come with packages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgda_core.errors import UsageError
from fastgda_core.features import ENCODERS, concatenate, cosines, encoder_names, load_encoder, mean_over
from fastgda_core.features.encoders import CLIP, DINO, Preprocessing, preprocessing_of
from tests import tiny

CPU = torch.device("cpu")
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_clip(folder: Path) -> None:
    words = tiny.save_tokenizer(folder)
    text = {**TINY, "vocab_size": words, "max_position_embeddings": 12, "eos_token_id": words - 1, "projection_dim": 24}
    vision = {**TINY, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)


def save_dino(folder: Path) -> None:
    ViTModel(ViTConfig(**TINY, image_size=32, patch_size=8)).save_pretrained(folder)


def save_dinov2(folder: Path) -> None:
    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14, num_register_tokens=4
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)


def save_abc(save: Callable[[Path], None], name: str, width: int) -> Callable[[Path], None]:
    """An encoder's weights with AbC's file beside them, laid out as the one that is published."""

    def saved(folder: Path) -> None:
        save(folder)
        maps = {side: torch.nn.Linear(width, width).state_dict() for side in ("real_mapper", "synth_mapper")}
        torch.save(maps, folder / f"{name}_tuned.pth")

    return saved


SAVE: dict[str, Callable[[Path], None]] = {
    "abc_clip": save_abc(save_clip, "clip", 24),
    "abc_dino": save_abc(save_dino, "dino", 16),
    "clip": save_clip,
    "clip_text": save_clip,
    "dino": save_dino,
    "dinov2": save_dinov2,
    "caption_tokens": tiny.save_model,
    "bottleneck": tiny.save_model,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for name, save in SAVE.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name) / "weights"
        save(folder)
        found[name] = str(folder)
    return found


def images() -> list[Image.Image]:
    """Of several shapes and modes, larger and smaller than any encoder's input."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    found = [image.resize(size) for image, size in zip(coarse, [(40, 40), (500, 300), (29, 61)], strict=True)]
    return [*found, found[0].convert("L")]


@pytest.mark.parametrize(
    ("preprocessing", "processor"),
    [
        (CLIP, CLIPImageProcessorPil()),
        (
            DINO,
            CLIPImageProcessorPil(
                size={"shortest_edge": 256},
                crop_size={"height": 224, "width": 224},
                image_mean=[0.485, 0.456, 0.406],
                image_std=[0.229, 0.224, 0.225],
            ),
        ),
    ],
    ids=["clip", "dino"],
)
def test_images_are_prepared_as_the_networks_own_processors_do(preprocessing, processor) -> None:
    for image in images()[:3]:
        expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        found = preprocessing.scaled([preprocessing.crop(image)])[0]
        assert found.shape == expected.shape == (3, 224, 224)
        # The longer side is rounded otherwise, so that the crop of a long image may lie half a pixel aside.
        assert (found - expected).abs().mean() < (1e-5 if image.width == image.height else 0.02)


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
WHOLE = {"size": {"height": 224, "width": 224}, **IMAGENET}
CROPPED = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, **IMAGENET}


@pytest.mark.parametrize(
    ("name", "processor", "expected"),
    [
        ("clip", CLIPImageProcessorPil().to_dict(), CLIP),
        ("clip", {**CLIPImageProcessorPil().to_dict(), "size": 224, "crop_size": 224, "rescale_factor": None}, CLIP),
        ("dino", {**IMAGENET, "size": 224, "resample": 2}, DINO),
        ("dino", WHOLE, DINO),
        ("dinov2", {**CROPPED, "do_center_crop": True, "rescale_factor": 0.00392156862745098}, DINO),
        ("dinov2", {}, DINO),
        ("clip", {"size": 336, "crop_size": 336}, Preprocessing(336, 336, CLIP.mean, CLIP.std)),
        ("dino", {"size": 112}, Preprocessing(112, 128, DINO.mean, DINO.std)),
        ("clip", {**CROPPED, "do_center_crop": False}, Preprocessing(256, 256, DINO.mean, DINO.std)),
        ("clip", {**CROPPED, "do_normalize": False}, Preprocessing(224, 256, (0, 0, 0), (255, 255, 255))),
    ],
)
@pytest.mark.parametrize("together", [False, True])
def test_a_folders_image_processor_says_how_images_are_prepared(
    tmp_path: Path, name: str, processor: dict[str, object], expected: Preprocessing, together: bool
) -> None:
    if together:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 7}))  # as Transformers, not this one
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    else:
        (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert preprocessing_of(name, str(tmp_path)) == expected  # to the last bit


@pytest.mark.heavy
def test_a_clip_of_other_sizes_mean_and_std_sees_what_its_own_processor_makes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**TINY, "image_size": 256, "patch_size": 64, "projection_dim": 24}
    CLIPModel(CLIPConfig(vision_config=sizes, projection_dim=24)).save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 300},
        crop_size={"height": 256, "width": 256},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.3, 0.2, 0.1],
    )
    processor.save_pretrained(tmp_path)
    pictures = images()[:1]
    whole = CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        pixels = torch.as_tensor(np.asarray(processor(pictures)["pixel_values"]))
        expected = whole.visual_projection(whole.vision_model(pixels).pooler_output)
    torch.testing.assert_close(
        load_encoder("clip", CPU, str(tmp_path)).encode(pictures), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("processor", ["{", "[]", '{"size": "large"}', '{"image_mean": [0.5]}'])
def test_an_image_processor_that_cannot_be_used_is_told_in_one_line(tmp_path: Path, processor: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(processor)
    with pytest.raises(
        UsageError, match=r"encoder dino: the image processor's file .* mend it, or delete it"
    ) as caught:
        preprocessing_of("dino", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_clip_gives_the_embeddings_of_the_two_towers_together(folders: dict[str, str]) -> None:
    whole = CLIPModel.from_pretrained(folders["clip"]).eval()
    captions = ["a red circle", "teal"]
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folders["clip"])(captions, padding=True, return_tensors="pt")
    clip = CLIP.of_side(32)
    pixels = clip.scaled([clip.crop(image) for image in images()])
    with torch.no_grad():
        together = whole(pixel_values=pixels, **tokens)
    found = load_encoder("clip", CPU, folders["clip"]).encode(images())
    assert found.shape == (4, 24)
    torch.testing.assert_close(F.normalize(found, dim=1), together.image_embeds)
    text = load_encoder("clip_text", CPU, folders["clip_text"]).encode(captions)
    torch.testing.assert_close(F.normalize(text, dim=1), together.text_embeds)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_dino_gives_the_class_token(folders: dict[str, str], name: str) -> None:
    network = {"dino": ViTModel, "dinov2": Dinov2WithRegistersModel}[name].from_pretrained(folders[name]).eval()
    dino = DINO.of_side(network.config.image_size)
    pixels = dino.scaled([dino.crop(image) for image in images()])
    with torch.no_grad():
        expected = network(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(load_encoder(name, CPU, folders[name]).encode(images()), expected)


@pytest.mark.parametrize("name", ["clip", "dino"])
def test_abc_maps_samples_and_queries_by_two_linear_layers(folders: dict[str, str], name: str) -> None:
    folder = folders[f"abc_{name}"]
    layers, stored = {}, torch.load(Path(folder) / f"{name}_tuned.pth", weights_only=True)
    for side in ("real_mapper", "synth_mapper"):
        layers[side] = torch.nn.Linear(*stored[side]["weight"].shape)
        layers[side].load_state_dict(stored[side])
    encoder, base = load_encoder(f"abc_{name}", CPU, folder), load_encoder(name, CPU, folder).encode(images())
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(images()), layers["real_mapper"](base))
        torch.testing.assert_close(encoder.encode_queries(images()), layers["synth_mapper"](base))
    assert load_encoder(name, CPU, folder).encode_queries(images()).equal(base), "others know one map"


def test_abc_reads_the_same_maps_from_safetensors(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["abc_dino"], tmp_path / "safe")
    stored = torch.load(tmp_path / "safe" / "dino_tuned.pth", weights_only=True)
    flat = {f"{side}.{name}": tensor for side, state in stored.items() for name, tensor in state.items()}
    save_file(flat, tmp_path / "safe" / "mapper.safetensors")
    (tmp_path / "safe" / "dino_tuned.pth").unlink()
    found, expected = (load_encoder("abc_dino", CPU, str(each)) for each in (tmp_path / "safe", folders["abc_dino"]))
    assert found.encode(images()).equal(expected.encode(images()))
    assert found.encode_queries(images()).equal(expected.encode_queries(images()))


class Malicious:
    """Runs code where a pickle is loaded without care."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("ran"),)


SIDES = ("real_mapper", "synth_mapper")
LINEAR = torch.nn.Linear(16, 16).state_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither dino_tuned.pth nor mapper.safetensors"),
        ({"real_mapper": LINEAR}, "of synth_mapper"),
        ({"real_mapper": LINEAR, "synth_mapper": {**LINEAR, "more": torch.ones(1)}}, "of synth_mapper"),
        ({"real_mapper": LINEAR, "synth_mapper": {"weight": torch.ones(16), "bias": torch.ones(16)}}, "no linear map"),
        ({"real_mapper": LINEAR, "synth_mapper": torch.nn.Linear(16, 8).state_dict()}, "different shapes"),
        ({side: torch.nn.Linear(24, 8).state_dict() for side in SIDES}, "take 24 .* dino has 16"),
        ({side: {**LINEAR, "bias": torch.full((16,), torch.nan)} for side in SIDES}, "not finite"),
        ([1, 2], "of real_mapper"),
        (Malicious(), "of tensors alone"),
    ],
)
def test_a_wrong_file_of_abc_is_told_in_one_line_and_runs_nothing(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["dino"], tmp_path / "wrong")
    if content is not None:
        torch.save(content, tmp_path / "wrong" / "dino_tuned.pth")
    with pytest.raises(UsageError, match=rf"encoder abc_dino: .*{message}.*features.weights.abc_dino") as caught:
        load_encoder("abc_dino", CPU, str(tmp_path / "wrong"))
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_abc_without_weights_asks_for_them() -> None:
    with pytest.raises(UsageError, match=r"features.weights.abc_clip is missing: name a folder"):
        load_encoder("abc_clip", CPU)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_items_features_do_not_depend_on_its_batch(folders: dict[str, str], name: str) -> None:
    encoder = load_encoder(name, CPU, folders.get(name))
    items = images() if encoder.modality == "image" else ["a red circle", "b", "a much longer caption of a shape"]
    together = encoder.encode(items)
    assert together.dtype == torch.float32 and together.isfinite().all()
    alone = torch.cat([encoder.encode([item]) for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(torch.unique(together, dim=0)) == len(items)


def test_a_caption_of_any_length_is_cut_to_what_the_network_takes(folders: dict[str, str]) -> None:
    encoder = load_encoder("clip_text", CPU, folders["clip_text"])
    assert encoder.encode(["red " * 500]).shape == (1, 24)


@pytest.mark.parametrize("name", sorted(SAVE))
def test_weights_that_cannot_be_loaded_are_named_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"features.weights.{name}") as caught:
        load_encoder(name, CPU, str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("clip", "dino"),
        ("clip_text", "dinov2"),
        ("dino", "clip"),
        ("dino", "dinov2"),
        ("dinov2", "dino"),
        ("bottleneck", "dino"),
        ("caption_tokens", "clip"),
    ],
)
def test_the_folder_of_another_network_is_refused(folders: dict[str, str], name: str, folder: str) -> None:
    with pytest.raises(UsageError, match=f"features.weights.{name}") as caught:
        load_encoder(name, CPU, folders[folder])
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_one_layer_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["dino"], tmp_path / "short")
    weights = load_file(tmp_path / "short" / "model.safetensors")
    lost = next(name for name in weights if "layer.1" in name)
    save_file({key: value for key, value in weights.items() if key != lost}, tmp_path / "short" / "model.safetensors")
    with pytest.raises(UsageError, match="it lacks the weights"):
        load_encoder("dino", CPU, str(tmp_path / "short"))


def test_a_feature_space_lays_unit_vectors_end_to_end() -> None:
    first, second = torch.randn(5, 3), torch.randn(5, 4)
    joined = concatenate([first, second])
    torch.testing.assert_close(
        joined @ joined.T, F.normalize(first) @ F.normalize(first).T + (n := F.normalize(second)) @ n.T
    )
    assert torch.equal(concatenate([first, second], unit_length=False), torch.cat([first, second], dim=1))
    assert encoder_names("dino+clip_text") == ["dino", "clip_text"]


def test_features_less_their_mean_have_the_cosines_of_centred_vectors() -> None:
    torch.manual_seed(0)
    samples, queries = [3 + torch.randn(50, 3), torch.randn(50, 4)], [3 + torch.randn(6, 3), torch.randn(6, 4)]
    mean = mean_over(concatenate(samples).split(7))
    assert mean.dtype == torch.float32

    def laid_out(parts: list[torch.Tensor]) -> np.ndarray:
        floats = [part.double().numpy() for part in parts]
        return np.hstack([part / np.linalg.norm(part, axis=1, keepdims=True) for part in floats])

    expected = laid_out(samples).mean(0)
    np.testing.assert_allclose(mean.numpy(), expected, atol=1e-7)
    query, sample = laid_out(queries) - expected, laid_out(samples) - expected
    norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(sample, axis=1)
    found = cosines(concatenate(queries, mean=mean), concatenate(samples, mean=mean))
    np.testing.assert_allclose(found.numpy(), query @ sample.T / norms, atol=1e-5)
    assert not torch.allclose(found, cosines(concatenate(queries), concatenate(samples)), atol=0.1)


def test_a_mean_is_summed_in_double_precision() -> None:
    # In float32 a sum of 2^25 stands still when 1 is added to it.
    blocks = [torch.full((1, 2), 2.0**25), *[torch.ones(1, 2)] * 1023]
    assert mean_over(blocks).tolist() == pytest.approx([(2**25 + 1023) / 1024] * 2, abs=0.01)
    assert mean_over([torch.empty(0, 2)]).tolist() == [0, 0]


@pytest.mark.parametrize(("space", "message"), [("dino+nothing", "'nothing'"), ("clip+clip", "twice"), ("", "''")])
def test_a_wrong_feature_space_is_told(space: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        encoder_names(space)
