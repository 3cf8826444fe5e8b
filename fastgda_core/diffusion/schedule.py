"""Forward process and training target of a model, read from its scheduler's config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fastgda_core.errors import UsageError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Schedule(Protocol):
    """The forward process and target of training, at integer timesteps in [0, train_timesteps), 0 the least noisy."""

    @property
    def scheduler(self) -> Any:
        """The scheduler of diffusers, for sampling."""

    @property
    def train_timesteps(self) -> int: ...

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t, (n, c, h, w), for each row's own timestep (n,)."""

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser was trained to output, (n, c, h, w)."""

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        """Return the timesteps as the denoiser takes them, (n,)."""


@dataclass(frozen=True)
class DiffusionSchedule:
    """Diffusion: x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps (Ho et al., 2020); target by `prediction_type`."""

    scheduler: Any

    @property
    def train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        match self.scheduler.config.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return self.scheduler.get_velocity(clean, noise, timesteps)
            case _:
                return clean

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps


@dataclass(frozen=True)
class FlowMatchingSchedule:
    """Flow matching: x_t = (1 - sigma_t) x + sigma_t eps, target eps - x (Lipman et al., 2023; Esser et al., 2024).

    Timestep t stands for the t-th smallest sigma of the scheduler's training grid, its `shift` included.
    """

    scheduler: Any
    sigmas: Tensor  # (train_timesteps,) ascending, float32

    @property
    def train_timesteps(self) -> int:
        return len(self.sigmas)

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self._sigma(timesteps).to(clean.dtype)[:, None, None, None]
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise - clean

    def model_timesteps(self, timesteps: Tensor) -> Tensor:
        return self._sigma(timesteps) * self.train_timesteps

    def _sigma(self, timesteps: Tensor) -> Tensor:
        return self.sigmas.to(timesteps.device)[timesteps]


def load_schedule(folder: Path) -> Schedule:
    """Read `scheduler/` of a model folder.

    Raises:
        UsageError: the config is missing or unreadable, or its target is not known.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    config = _read_config(folder)
    prediction = config.get("prediction_type", "epsilon")
    if str(config.get("_class_name", "")).startswith("FlowMatch") or prediction == "flow_prediction":
        shift = {"shift": config["flow_shift"]} if "flow_shift" in config else {}  # as other solvers call it
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True, **shift)
        # Its own grid before `set_timesteps`: descending, `shift` applied unless that depends on the resolution.
        return FlowMatchingSchedule(scheduler, scheduler.timesteps.flip(0) / scheduler.config.num_train_timesteps)
    if prediction not in PREDICTION_TYPES:
        raise UsageError(
            f"{folder}: prediction_type {prediction!r} of scheduler_config.json is not known: use "
            f"{', '.join(PREDICTION_TYPES)} or flow_prediction"
        )
    # Any other diffusers scheduler config reads as DDIM's: the noise schedule and the target are what counts.
    # DDIM's own default is to clip the clean image: solvers that never do have no such entry, and latents need none.
    clip = {} if "clip_sample" in config else {"clip_sample": False}
    return DiffusionSchedule(DDIMScheduler.from_pretrained(folder, local_files_only=True, **clip))


def train_timesteps(folder: Path) -> int:
    """Return T_train of `scheduler/`, without loading anything.

    Raises:
        UsageError: the config is missing or unreadable.
    """
    try:
        return int(_read_config(folder).get("num_train_timesteps", 1000))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{folder}: num_train_timesteps is no number: save the model again ({error})") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no scheduler config: save the model again ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is no scheduler config: save the model again")
    return config
