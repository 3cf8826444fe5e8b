"""FLOPs, weights and input sizes of one forward of well-known denoisers, counted without their weights; Markdown.

The configurations are those of the published folders, written out here: nothing is fetched, nothing is computed (the
tensors are on the meta device), and attention's products are counted like all others.

Run: PYTHONPATH=. python benchmarks/forward_flops.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fastgda_core.curvature.layers import select_layers
from tasks.execution.known import ModelShape

LAYERS = "cross-attn-kv"  # the published selection


@dataclass(frozen=True)
class Architecture:
    """A denoiser: diffusers' class and configuration, and the shapes of one sample's inputs.

    latent: channels, height, width; a transformer of packed latents: patches, numbers of a patch.
    condition: of one caption, by argument.
    encoders: of text, from `ENCODERS`, each with the tokens that it sees.
    others: further arguments of a forward.
    """

    title: str
    kind: str
    config: Mapping[str, Any]
    latent: tuple[int, ...]
    condition: Mapping[str, Any]
    encoders: Mapping[str, int]
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def _clip(width: int, layers: int, heads: int) -> tuple[type[nn.Module], Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return CLIPTextModel, CLIPTextConfig(**sizes, num_attention_heads=heads)


# As the folders text_encoder, text_encoder_2 and text_encoder_3 have them; the MSCOCO model's is that of SD 2.1-base.
ENCODERS: Mapping[str, tuple[type[nn.Module], Any]] = {
    "clip_l": _clip(768, 12, 12),
    "openclip_h": _clip(1024, 23, 16),
    "openclip_g": _clip(1280, 32, 20),
    "t5_xxl": (
        T5EncoderModel,
        T5Config(d_model=4096, d_ff=10240, d_kv=64, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
    ),
}

SDXL_ADDED = {"text_embeds": (1, 1280), "time_ids": (1, 6)}

ARCHITECTURES = {
    # PeterWang512/FastGDA, coco: as the shapes of model.bin have it.
    "fastgda_coco": Architecture(
        "FastGDA's MSCOCO model",
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "cross_attention_dim": 1024,
            "attention_head_dim": 8,
        },
        (4, 16, 16),
        {"encoder_hidden_states": (1, 77, 1024)},
        {"openclip_h": 77},
    ),
    # CompVis/stable-diffusion-v1-4, unet/config.json.
    "sd14": Architecture(
        "Stable Diffusion 1.4",
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        (4, 64, 64),
        {"encoder_hidden_states": (1, 77, 768)},
        {"clip_l": 77},
    ),
    # stabilityai/stable-diffusion-xl-base-1.0, unet/config.json.
    "sdxl": Architecture(
        "SDXL base 1.0",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (4, 128, 128),
        {"encoder_hidden_states": (1, 77, 2048), "added_cond_kwargs": SDXL_ADDED},
        {"clip_l": 77, "openclip_g": 77},
    ),
    # stabilityai/stable-diffusion-3-medium, transformer/config.json; 77 tokens of the CLIPs and 256 of T5.
    "sd3": Architecture(
        "Stable Diffusion 3 medium",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
        },
        (16, 128, 128),
        {"encoder_hidden_states": (1, 333, 4096), "pooled_projections": (1, 2048)},
        {"clip_l": 77, "openclip_g": 77, "t5_xxl": 256},
    ),
    # black-forest-labs/FLUX.1-dev, transformer/config.json; 1,024 x 1,024 pixels are 4,096 patches, T5 has 512 tokens.
    "flux": Architecture(
        "FLUX.1 dev",
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        (4096, 64),
        {"encoder_hidden_states": (1, 512, 4096), "pooled_projections": (1, 768)},
        {"clip_l": 77, "t5_xxl": 512},
        {"txt_ids": (512, 3), "img_ids": (4096, 3), "guidance": (1,)},
    ),
}


def _on_meta(shapes: Any) -> Any:
    if isinstance(shapes, Mapping):
        return {name: _on_meta(shape) for name, shape in shapes.items()}
    return torch.empty(shapes)


def _numbers(shapes: Any) -> int:
    return sum(map(_numbers, shapes.values())) if isinstance(shapes, Mapping) else math.prod(shapes)


def counted(architecture: Architecture) -> tuple[ModelShape, int]:
    """Count one forward of one sample, and all weights; no kernel hides the products of attention."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser: nn.Module = getattr(diffusers, architecture.kind)(**architecture.config)
        given = _on_meta({**architecture.condition, **architecture.others})
        denoiser(torch.empty(1, *architecture.latent), timestep=torch.empty(1), **given)
    layers, latent = select_layers(denoiser, LAYERS).values(), math.prod(architecture.latent)
    caption = sum(_of_caption(*ENCODERS[name], tokens) for name, tokens in architecture.encoders.items())
    shape = ModelShape.of(counter.get_total_flops(), caption, latent, _numbers(architecture.condition), layers)
    return shape, sum(weight.numel() for weight in denoiser.parameters())


def _of_caption(kind: type[nn.Module], config: Any, tokens: int) -> int:
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
        kind(config)(torch.zeros(1, tokens, dtype=torch.long))
    return counter.get_total_flops()


def main() -> None:
    print(f"| | weights, M | of {LAYERS}, M | GFLOP a forward | a caption | numbers of a latent | of a caption |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    counts = {name: counted(each) for name, each in ARCHITECTURES.items()}
    for name, (shape, weights) in counts.items():
        weights_cells = f"{weights / 1e6:,.0f} | {shape.layer_weights / 1e6:,.1f}"
        cells = f"{weights_cells} | {shape.flops / 1e9:,.1f} | {shape.caption_flops / 1e9:,.1f}"
        print(f"| {ARCHITECTURES[name].title} | {cells} | {shape.latent:,} | {shape.condition:,} |")
    print("\nAs tasks/execution/known.py keeps them:\n")
    for name, (shape, _) in counts.items():
        print(f'    "{name}": {shape}')


if __name__ == "__main__":
    main()
