"""The demo's data and model, laid out for the ordinary pipeline, with a ready config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastgda_core.diffusion.training import DenoiserTraining
from storage_schemas.commit import write_atomically
from tasks.config.files import load_config
from tasks.demo.openmoji import CONFIG, PUBLISHED_CONFIG, write_model_folder, write_shards


def prepare(folder: Path, source: Path = CONFIG) -> Path:
    """Lay out `shards/`, `model/` and a ready config; return the config's path."""
    write_shards(folder / "shards")
    write_model_folder(folder / "model")
    config = folder / source.name
    if not config.is_file():
        write_atomically(config, source.read_bytes())
    return config


def prepare_judge(folder: Path) -> Path:
    """Lay out the judge's world: its shards, its model, which is trained here, and configs; return the first's path."""
    from tasks.demo import judge_world
    from tasks.demo.invented import invented_pictures

    write_shards(folder / "shards", judge_world.choose, invented_pictures())
    config = folder / judge_world.CONFIG.name
    for source in (judge_world.CONFIG, judge_world.TIERS_CONFIG, judge_world.RIVALS_CONFIG):
        if not (folder / source.name).is_file():
            write_atomically(folder / source.name, source.read_bytes())
    judge = load_config(judge_world.CONFIG).judge
    assert judge is not None
    judge_world.write_model(folder / "model", folder / "shards", judge)
    return config


def train_model(
    folder: Path, out: Path, training: DenoiserTraining, initial: Path | None, shares: Sequence[float] = ()
) -> Path:
    """Train the demo's denoiser on the demo's own shards into `out`; return the picture of a sample grid."""
    from tasks.demo.model import train_denoiser_on, write_sample_grid

    write_shards(folder / "shards")
    train_denoiser_on(folder / "shards", out, training, initial, shares)
    return write_sample_grid(out, load_config(PUBLISHED_CONFIG).queries)
