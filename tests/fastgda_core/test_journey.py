"""The steps by which an image is generated: where they are on the model's schedule, and what they say it will be."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fastgda_core.diffusion.model import load_model
from fastgda_core.diffusion.sampling import generate, journey
from fastgda_core.diffusion.schedule import FlowMatchingSchedule
from tests.model_folders import SAVE

STEPS = {"seed": 0, "steps": 5, "guidance_scale": 2.0}


@pytest.mark.parametrize("name", ["sd", "sd3"])  # DDIM, and Euler steps of a flow
def test_a_journey_tells_the_clean_images_and_the_timesteps_of_training(tmp_path: Path, name: str) -> None:
    model = load_model(SAVE[name](tmp_path / "model"), torch.device("cpu"))
    captions, schedule = ["red circle", "goldfish"], model.schedule
    steps = list(journey(model, captions, [0, 1], **STEPS))  # type: ignore[arg-type]
    timesteps = [step.timestep for step in steps]
    assert len(steps) == 5 and timesteps == sorted(timesteps, reverse=True)
    assert timesteps[-1] >= 0 and timesteps[0] < schedule.train_timesteps
    assert torch.equal(steps[-1].latents, generate(model, captions, [0, 1], **STEPS))  # type: ignore[arg-type]
    torch.testing.assert_close(steps[-1].latents, steps[-1].clean)
    if isinstance(schedule, FlowMatchingSchedule):
        scheduler = copy.deepcopy(schedule.scheduler)
        scheduler.set_timesteps(5)
        nearest = schedule.sigmas[torch.tensor(timesteps)] * schedule.train_timesteps
        grid = schedule.sigmas.diff().max() * schedule.train_timesteps
        assert (nearest - scheduler.timesteps).abs().max() <= grid
