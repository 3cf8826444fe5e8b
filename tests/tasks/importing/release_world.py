"""A release of FastGDA in miniature: files of the same names, layouts, dtypes and traps, made without its code."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, ViTConfig, ViTModel

from tests import tiny

SAMPLES, TRAIN, TEST, CANDIDATES = 60, 12, 4, 30
DINO, TEXT, WIDTH = 32, 16, 24
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class World:
    """The folder `data/coco`, with `encoders` and `stable-diffusion-2-1-base` beside `data`, and what its files hold.

    phi: raw dino+clip_text features of samples, training and test queries; test: scores of test queries, (Q, N).
    train: candidates (nearest first) and scores of the training queries, (Q, K) each.
    """

    root: Path
    phi: dict[str, Floats]
    head: dict[str, torch.Tensor]
    test: Floats
    candidates: NDArray[np.int64]
    train: Floats
    lambdas: dict[str, torch.Tensor]
    counts: int


def head_weights(seed: int) -> dict[str, torch.Tensor]:
    """A state_dict as the release's trainer saves it."""
    draw = torch.Generator().manual_seed(seed)
    widths = [DINO + TEXT, WIDTH, WIDTH, WIDTH]
    named = {}
    for number, (d_in, d_out) in enumerate(zip(widths, [*widths[1:], WIDTH], strict=True)):
        layer = f"mlp.layers.{number}" if number < 3 else "mlp.output_layer"
        named[f"{layer}.weight"] = torch.randn(d_out, d_in, generator=draw) / d_in**0.5
        named[f"{layer}.bias"] = 0.1 * torch.randn(d_out, generator=draw)
    return {**named, "scale": torch.tensor([-4.5]), "bias": torch.tensor([0.25])}


def forward(head: dict[str, torch.Tensor], phi: Floats) -> NDArray[np.float64]:
    """The head by NumPy: three layers with ReLU, one without, at length one."""
    hidden = phi.astype(np.float64)
    for number in range(3):
        weight, bias = (head[f"mlp.layers.{number}.{each}"].double().numpy() for each in ("weight", "bias"))
        hidden = np.maximum(hidden @ weight.T + bias, 0)
    out = hidden @ head["mlp.output_layer.weight"].double().numpy().T + head["mlp.output_layer.bias"].double().numpy()
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def unit(values: Floats) -> Floats:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def write_images(root: Path) -> None:
    """The caption file, whose order is neither that of ids nor of file names, with pictures and six captions."""
    draw = np.random.default_rng(1)
    ids = draw.permutation(1000)[:SAMPLES] + 1
    folder = root / "trainset" / "train2017"
    folder.mkdir(parents=True)
    images, notes = [], []
    for place, number in enumerate(ids.tolist()):
        content, caption = tiny.draw(place, side=32)
        (folder / f"{number:012d}.jpg").write_bytes(content)
        images.append({"file_name": f"{number:012d}.jpg", "width": 32, "height": 32, "id": number, "license": 3})
        notes += [
            {"image_id": number, "id": 10 * place + each, "caption": f"{caption}, seen {each} times. \n"}
            for each in range(6 if place == 3 else 5)
        ]
    order = draw.permutation(len(notes))
    annotations = root / "trainset" / "annotations" / "captions_train2017.json"
    annotations.parent.mkdir()
    document = {"info": {}, "licenses": [], "images": images, "annotations": [notes[each] for each in order]}
    annotations.write_text(json.dumps(document))


def write_queries(root: Path, split: str, count: int) -> None:
    """Numbered pictures, 10.png before 2.png by name, and captions with what Python takes for ends of lines."""
    folder = root / f"query_{split}"
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng([number, count]).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    captions = [f"a {split} query\u2028number {number}" for number in range(count)]
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")


def write_features(root: Path, draw: np.random.Generator) -> dict[str, Floats]:
    """Raw outputs of the encoders, alone and laid end to end."""
    phi = {}
    for name, rows in (("data_feats", SAMPLES), ("train_query_feats", TRAIN), ("test_query_feats", TEST)):
        dino, text = ((draw.normal(size=(rows, width)) * 3 + 0.5).astype(np.float32) for width in (DINO, TEXT))
        phi[name] = np.concatenate([dino, text], axis=1)
        for space, values in (("dino", dino), ("clip_text", text), ("dino+clip_text", phi[name])):
            (root / "feats" / space).mkdir(parents=True, exist_ok=True)
            np.save(root / "feats" / space / f"{name}.npy", values)
    return phi


def write_scores(
    root: Path, phi: dict[str, Floats], head: dict[str, torch.Tensor], draw: np.random.Generator
) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Scores that the head ranks well, of all samples for the test and of the nearest by DINO for training."""
    samples = forward(head, phi["data_feats"])

    def scores(name: str, noise: float) -> Floats:
        cosines = forward(head, phi[name]) @ samples.T
        return ((cosines + noise * draw.normal(size=cosines.shape)) * 1e-3).astype(np.float32)

    test = scores("test_query_feats", 0.02)
    rank = np.argsort(-test, axis=1)
    (root / "influence_test.pkl").write_bytes(pickle.dumps({"random": {"influence": test, "rank": rank}}))
    dino = {name: unit(values[:, :DINO]) for name, values in phi.items()}
    near = np.argsort(-(dino["train_query_feats"] @ dino["data_feats"].T), axis=1)
    (root / "query_train" / "nn_dino.pkl").write_bytes(pickle.dumps({"fixed": {"rank": near[:, : CANDIDATES + 10]}}))
    candidates = near[:, :CANDIDATES]
    train = np.take_along_axis(scores("train_query_feats", 0.02), candidates, axis=1)
    order = np.argsort(-train, axis=1)
    arrays = {
        "influence_subset": train,
        "rank_influence_subset": order,
        "rank": np.take_along_axis(candidates, order, axis=1),
    }
    (root / "influence_train.pkl").write_bytes(pickle.dumps({"random": arrays}))
    return test, candidates, train


def write_model(root: Path, pipeline: Path) -> dict[str, tuple[int, int]]:
    """`model.bin` in the shape of the release's network, and the shapes of its cross-attention keys and values."""
    torch.manual_seed(3)
    width = json.loads((pipeline / "text_encoder" / "config.json").read_text())["hidden_size"]
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    torch.save(unet.state_dict(), root / "model.bin")
    return {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    }


def write_fisher(root: Path, layers: dict[str, tuple[int, int]], count: int) -> dict[str, torch.Tensor]:
    """Eigenvectors, sums of squared gradients and counts, as kronfluence saves them."""
    folder, draw = root / "ekfac_fisher", torch.Generator().manual_seed(4)
    folder.mkdir()

    def basis(size: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(size, size, generator=draw))[0].contiguous()

    sums = {name: count * torch.rand(shape, generator=draw) * 1e-3 for name, shape in layers.items()}
    save_file({name: basis(shape[1]) for name, shape in layers.items()}, folder / "activation_eigenvectors.safetensors")
    save_file({name: basis(shape[0]) for name, shape in layers.items()}, folder / "gradient_eigenvectors.safetensors")
    save_file(sums, folder / "lambda_matrix.safetensors")
    save_file({name: torch.tensor([count]) for name in layers}, folder / "num_lambda_processed.safetensors")
    return sums


def write_encoders(folder: Path) -> None:
    """Weights of DINO and of CLIP's text tower in the widths of the features."""
    vit = ViTConfig(
        hidden_size=DINO, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8
    )
    ViTModel(vit).save_pretrained(folder / "dino")
    words = tiny.save_tokenizer(folder / "clip_text")
    text = CLIPTextConfig(
        vocab_size=words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, projection_dim=TEXT, bos_token_id=words - 2, eos_token_id=words - 1,
    )  # fmt: skip
    CLIPTextModelWithProjection(text).save_pretrained(folder / "clip_text")


def make_world(folder: Path, pipeline: Path, *, counts: int = 640) -> World:
    """Write the release, and what it is used with; `pipeline` stands for Stable Diffusion."""
    root, draw = folder / "data" / "coco", np.random.default_rng(2)
    write_images(root)
    write_queries(root, "train", TRAIN)
    write_queries(root, "test", TEST)
    phi, head = write_features(root, draw), head_weights(5)
    test, candidates, train = write_scores(root, phi, head, draw)
    (root / "weights").mkdir()
    torch.save(head, root / "weights" / "dino+clip_text.pth")
    layers = write_model(root, pipeline)
    lambdas = write_fisher(root, layers, counts)
    write_encoders(folder / "encoders")
    (folder / "stable-diffusion-2-1-base").symlink_to(pipeline)
    return World(root, phi, head, test, candidates, train, lambdas, counts)


def average_precision(relevant: NDArray[np.bool_], similarity: NDArray[np.float64]) -> float:
    """Average precision over a full ranking by similarity, by the definition."""
    hits = relevant[np.argsort(-similarity, kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def mean_average_precision(scores: Floats, similarity: NDArray[np.float64], cutoff: int) -> float:
    """mAP(L): the teacher's top L, averaged over queries, (Q, N) each."""
    values: list[Any] = []
    for teacher, mine in zip(scores, similarity, strict=True):
        relevant = np.zeros(len(teacher), bool)
        relevant[np.argsort(-teacher)[:cutoff]] = True
        values.append(average_precision(relevant, mine))
    return float(np.mean(values))
