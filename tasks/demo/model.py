"""The making of the demo's denoiser: architecture, training on the demo's shards, a grid of its samples."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image

from fastgda_core.diffusion.model import DiffusionModel, load_model
from fastgda_core.diffusion.sampling import generate
from fastgda_core.diffusion.training import CaptionedLatents, DenoiserTrainer, DenoiserTraining, OnStep
from storage_schemas.commit import write_atomically
from tasks.config.inputs import QueriesConfig
from tasks.demo.openmoji import MODEL_INDEX, write_model_folder
from tasks.inputs.tars import find_shards, read_image, scan
from tasks.progress import stage

Keep = Callable[[float, Any], None]

GRID_COLUMNS = 12
GRID_CELL = 96


def new_unet() -> UNet2DConditionModel:
    """Build the demo's denoiser, untrained: 4.6 M parameters on 12 x 16 x 16 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Build a cosine noise schedule with a v-prediction target."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def save_assets(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write what the repository ships: config and float16 weights of the denoiser, scheduler, index of the folder."""
    save_unet(copy.deepcopy(unet).half(), folder)
    new_scheduler().save_pretrained(folder / "scheduler")
    write_atomically(folder / "model_index.json", json.dumps(MODEL_INDEX, indent=2).encode() + b"\n")


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write a denoiser as `unet/` of a folder."""
    unet.save_pretrained(folder / "unet")
    config_path = folder / "unet" / "config.json"
    config = json.loads(config_path.read_text())
    config.pop("_name_or_path", None)  # where the weights lay on the machine that trained them
    write_atomically(config_path, json.dumps(config, indent=2).encode() + b"\n")


def checkpoint_folder(folder: Path, share: float) -> Path:
    """Return where a model's folder has its averaged weights at a share of the training's steps."""
    return folder / "checkpoints" / f"{share:g}"


def train_keeping(trainer: DenoiserTrainer, shares: Sequence[float], keep: Keep, on_step: OnStep) -> Any:
    """Train to the end and return the averaged model; hand it to `keep` with each share of the steps on the way.

    The training is the same, bit for bit, whatever is kept of it.
    """
    for share in sorted(shares):
        keep(share, trainer.run(max(1, round(share * trainer.training.steps)), on_step))
    return trainer.run(on_step=on_step)


def train_denoiser_on(
    shards: Path, out: Path, training: DenoiserTraining, initial: Path | None, shares: Sequence[float] = ()
) -> None:
    """Train on the shards' images and captions, from scratch or on from the folder `initial`, and save into `out`.

    Averaged weights at the shares of the steps go into `checkpoint_folder`.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(training.seed)
    unet = UNet2DConditionModel.from_pretrained(initial / "unet") if initial else new_unet()
    save_assets(unet, out)
    model = _model_from_assets(out, device)
    samples, _ = scan(find_shards(str(shards / "*.tar"), "shards"), lambda: None)
    images = [read_image(sample.shard, sample.offset, sample.size) for sample in samples]
    data = CaptionedLatents.of(model, model.encode_images(images), [sample.captions for sample in samples])
    denoiser = model.denoiser.float().requires_grad_(True)
    trainer = DenoiserTrainer(denoiser, model.schedule, data, training)

    def keep(share: float, ema: Any) -> None:
        save_unet(copy.deepcopy(ema).half(), checkpoint_folder(out, share))

    with stage("denoiser training", training.steps) as advance:
        trained = train_keeping(trainer, shares, keep, lambda *_: advance(1))
    save_assets(trained, out)


def write_sample_grid(assets: Path, queries: QueriesConfig) -> Path:
    """Write one image per query caption, twelve a row, as `samples.png` beside the weights; return its path."""
    captions = queries.captions or []
    model = _model_from_assets(assets, torch.device("cpu"))
    latents = generate(
        model,
        captions,
        list(range(len(captions))),
        seed=queries.seed,
        steps=queries.steps,
        guidance_scale=queries.guidance_scale,
    )
    rows = -(-len(captions) // GRID_COLUMNS)
    grid = Image.new("RGB", (GRID_COLUMNS * GRID_CELL, rows * GRID_CELL), "white")
    for number, image in enumerate(model.decode_images(latents)):
        place = (number % GRID_COLUMNS * GRID_CELL, number // GRID_COLUMNS * GRID_CELL)
        grid.paste(image.resize((GRID_CELL, GRID_CELL), Image.Resampling.NEAREST), place)
    grid.save(assets / "samples.png")
    return assets / "samples.png"


def _model_from_assets(assets: Path, device: torch.device) -> DiffusionModel:
    with tempfile.TemporaryDirectory() as scratch:
        write_model_folder(Path(scratch) / "model", assets)
        return load_model(Path(scratch) / "model", device)
