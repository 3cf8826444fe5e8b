"""The judge's world: some 400 pictures, and a denoiser so small that it is trained again in half a minute.

They are OpenMoji and, as planted truth, `invented` ones. The denoiser is trained by the very recipe by which the judge
trains models again, so that the judge's model of all samples is the one whose pictures are attributed.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, UNet2DConditionModel

from fastgda_core.diffusion.codec import PixelUnshuffle
from fastgda_core.diffusion.model import load_model
from fastgda_core.diffusion.training import CaptionedLatents, DenoiserTrainer, DenoiserTraining
from fastgda_core.evaluation.retraining import to_train
from storage_schemas.commit import input_key
from tasks.config.judging import JudgeConfig, RetrainConfig
from tasks.demo.model import checkpoint_folder, save_unet, train_keeping
from tasks.demo.openmoji import ASSETS, MODEL_INDEX, OpenMoji, write_text_encoder
from tasks.devices import pick_device
from tasks.inputs.tars import find_shards, read_image, scan
from tasks.progress import stage

CONFIG = ASSETS.parent / "openmoji_judge.yaml"
TIERS_CONFIG = ASSETS.parent / "openmoji_judge_tiers.yaml"
RIVALS_CONFIG = ASSETS.parent / "openmoji_rivals.yaml"
CAPTION_TOKENS = 12
KEPT = (0.125, 0.25, 0.5)  # of the steps: where the averaged weights are kept, for teacher.checkpoints
WIDTH = 32  # channels of the denoiser
# The picture itself as the target: of a model this small and this short in training the pictures are recognisable.
TARGET = "sample"
FACTOR = 4  # pixels of a latent's side: 16 x 16 pictures are latents of 48 x 4 x 4
_COUNTRY = re.compile(r"1F1[EF][0-9A-F]-1F1[EF][0-9A-F]")
# The first group with a word of the first caption has the picture, as long as it has room.
GROUPS = {
    "heart": (26, "heart hearts"),
    "clock": (24, "o’clock thirty"),
    "face": (90, "face"),
    "animal": (
        70,
        "cat dog monkey bird fish bear horse cow pig mouse rabbit frog lion tiger whale snail bug bee ant fox wolf "
        "elephant octopus crab dolphin turtle snake spider butterfly chicken duck eagle owl penguin goat sheep ram "
        "camel koala panda hamster dragon shark gorilla giraffe zebra deer bat beaver otter sloth lizard crocodile",
    ),
    "food": (
        70,
        "bread rice cake pie apple melon grapes cherries tomato egg meat soup noodles pizza wine beer banana lemon "
        "pear peach strawberry kiwi pineapple mango coconut avocado carrot corn pepper cucumber broccoli garlic onion "
        "mushroom peanuts chestnut croissant cheese hamburger fries sandwich taco burrito salad popcorn butter sushi "
        "shrimp cream doughnut cookie chocolate candy lollipop custard honey milk beverage tea",
    ),
    "vehicle": (
        30,
        "car bus train truck ship boat airplane bicycle motorcycle taxi tram rocket locomotive railway metro "
        "trolleybus minibus ambulance engine automobile tractor scooter helicopter ferry canoe sailboat satellite",
    ),
    "shape": (20, "square circle diamond star"),
}
FLAGS = 70


def choose(every: list[OpenMoji]) -> list[OpenMoji]:
    """Return the world's pictures with one caption each; none of them differ in skin tone alone."""
    found: dict[str, list[OpenMoji]] = {"flag": [], **{name: [] for name in GROUPS}}
    for image in every:
        if any("skin tone" in caption for caption in image.captions):
            continue
        if _COUNTRY.fullmatch(image.key):
            if len(found["flag"]) < FLAGS:
                found["flag"].append(OpenMoji(image.key, image.svg, [f"flag of {image.captions[0]}"]))
            continue
        words = set(image.captions[0].split())
        for name, (room, known) in GROUPS.items():
            if words & set(known.split()):
                if len(found[name]) < room:
                    found[name].append(OpenMoji(image.key, image.svg, image.captions[:1]))
                break
    return sorted((image for group in found.values() for image in group), key=lambda image: image.key)


def write_model(folder: Path, shards: Path, judge: JudgeConfig, *, width: int = WIDTH, target: str = TARGET) -> None:
    """Train the world's denoiser by the judge's recipe on all samples, and lay it out as a diffusers-style folder.

    The folder is complete once `ORIGIN.txt` is there and names the recipe, and what of the model is not the demo's.

    Args:
        folder: of the model.
        shards: folder of the samples.
        judge: recipe and seed.
        width: channels of the denoiser, a multiple of 16.
        target: `prediction_type` of the scheduler.
    """
    assert isinstance(judge.retrain, RetrainConfig)
    pictures = (shards / "ORIGIN.txt").read_text()
    changed = "" if (width, target) == (WIDTH, TARGET) else f", width {width}, target {target}"
    recipe = input_key("world", judge.retrain, judge.seed, KEPT, pictures)
    origin, note = folder / "ORIGIN.txt", f"recipe {recipe}{changed}\n"
    if origin.is_file() and origin.read_text() == note:
        return
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    _write_untrained(staging, width, target)
    model = load_model(staging, pick_device("auto"))
    samples, _ = scan(find_shards(str(shards / "*.tar"), "shards"), lambda: None)
    images = [read_image(sample.shard, sample.offset, sample.size) for sample in samples]
    data = CaptionedLatents.of(model, model.encode_images(images), [sample.captions for sample in samples])
    denoiser = to_train(model, seed=judge.seed, continued=False)
    training = DenoiserTraining(**judge.retrain.hyperparameters, seed=judge.seed)
    trainer = DenoiserTrainer(denoiser, model.schedule, data, training)

    def keep(share: float, ema: Any) -> None:
        save_unet(ema, checkpoint_folder(staging, share))

    with stage("denoiser training", judge.retrain.steps) as advance:
        trained = train_keeping(trainer, KEPT, keep, lambda *_: advance(1))
    trained.save_pretrained(staging / "unet")
    (staging / "ORIGIN.txt").write_text(note)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _write_untrained(folder: Path, width: int, target: str) -> None:
    write_text_encoder(folder, CAPTION_TOKENS)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=3 * FACTOR**2,
        out_channels=3 * FACTOR**2,
        layers_per_block=1,
        block_out_channels=(width,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=384,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    unet.save_pretrained(folder / "unet")
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=target,
        clip_sample=True,
        timestep_spacing="trailing",
    )
    scheduler.save_pretrained(folder / "scheduler")
    PixelUnshuffle(FACTOR).save(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
