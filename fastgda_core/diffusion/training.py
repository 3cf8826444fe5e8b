"""Train a small text-conditioned denoiser: the demo's model, and models without some of their training samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import Condition, concatenate, per_sample_loss, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.schedule import Schedule

AT_ONCE = 128  # captions that are encoded together
BETAS = (0.9, 0.99)  # of AdamW
LARGEST_NORM = 1.0  # of a gradient; a longer one is clipped
OnStep = Callable[[int, float, torch.nn.Module], None]


@dataclass(frozen=True, kw_only=True)
class DenoiserTraining:
    """Hyperparameters of a `DenoiserTrainer`."""

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    caption_dropout: float = 0.1  # trains the unconditional branch of classifier-free guidance
    ema_decay: float = 0.999
    seed: int = 0

    def share_of_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a share of the highest."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def averaged(self, step: int) -> float:
        """Return the share of the averaged weights that a step, counted from 0, keeps.

        The horizon is short at the start, so that the average does not remember the random initialisation.
        """
        return min(self.ema_decay, (step + 1) / (step + 10))


@dataclass(frozen=True)
class CaptionedLatents:
    """What a denoiser is trained on.

    latents: (images, c, h, w).
    condition: of every caption, a row each, image by image.
    owner: for each caption the row of its image, (captions,), ascending.
    empty: condition of the empty caption, one row.
    """

    latents: Tensor
    condition: Condition
    owner: Tensor
    empty: Condition

    @classmethod
    @torch.no_grad()
    def of(cls, model: DiffusionModel, latents: Tensor, captions: Sequence[Sequence[str]]) -> Self:
        """Return images, given as latents, (images, c, h, w), with the captions of each; all of it on the CPU."""
        flat = [caption for several in captions for caption in several]
        rows = [model.encode_captions(flat[start : start + AT_ONCE]) for start in range(0, len(flat), AT_ONCE)]
        owner = torch.tensor([row for row, several in enumerate(captions) for _ in several])
        return cls.on_cpu(latents, concatenate(rows), owner, model.encode_captions([""]))

    @classmethod
    def on_cpu(cls, latents: Tensor, condition: Condition, owner: Tensor, empty: Condition) -> Self:
        """Return what is given, moved to the CPU."""
        moved = [{name: tensor.cpu() for name, tensor in rows.items()} for rows in (condition, empty)]
        return cls(latents.cpu(), moved[0], owner.cpu(), moved[1])

    def without(self, removed: Tensor) -> CaptionedLatents:
        """Return the same without some images, given by row, (r,)."""
        kept = torch.ones(len(self.latents), dtype=torch.bool)
        kept[removed] = False
        captions = kept[self.owner]
        row = kept.cumsum(0) - 1
        return CaptionedLatents(
            self.latents[kept], take(self.condition, captions), row[self.owner[captions]], self.empty
        )


@dataclass(frozen=True)
class Batch:
    """What a step is taken on, on the denoiser's device.

    image: the row of each one's image in the data, (n,), on the CPU; others: as `per_sample_loss` takes them.
    """

    image: Tensor
    clean: Tensor
    condition: Condition
    timesteps: Tensor
    noise: Tensor


class DenoiserTrainer:
    """Minimises the diffusion loss over uniformly drawn (image, caption, timestep, noise); `ema` is the result.

    All that is random comes from the training's seed. On a CPU, with the same number of threads, the same seed gives
    the same weights bit for bit, also of a training that went on from a `state`.
    """

    def __init__(
        self, denoiser: torch.nn.Module, schedule: Schedule, data: CaptionedLatents, training: DenoiserTraining
    ) -> None:
        """Begin a training.

        Args:
            denoiser: with the weights to begin with, on its device; it is trained in place.
            schedule: forward process and target.
            data: images and captions.
            training: hyperparameters.
        """
        self.denoiser, self.schedule, self.data, self.training = denoiser, schedule, data, training
        self.step = 0
        self._draw = torch.Generator().manual_seed(training.seed)
        self._captions_of = torch.bincount(data.owner, minlength=len(data.latents))
        self._first_caption = torch.cumsum(self._captions_of, 0) - self._captions_of
        self._optimizer = torch.optim.AdamW(
            denoiser.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, betas=BETAS
        )
        self._warmup_cosine = torch.optim.lr_scheduler.LambdaLR(self._optimizer, training.share_of_rate)
        self.ema = copy.deepcopy(denoiser).eval().requires_grad_(False)

    def run(self, until: int | None = None, on_step: OnStep = lambda step, loss, ema: None) -> torch.nn.Module:
        """Train on to the end, or until so many steps are done; return the averaged model.

        Args:
            until: steps from the beginning.
            on_step: called with (step, loss, averaged model) after each step.
        """
        self.denoiser.train()
        last = self.training.steps if until is None else min(until, self.training.steps)
        while self.step < last:
            loss = self._loss()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), LARGEST_NORM)
            self._optimizer.step()
            self._warmup_cosine.step()
            with torch.no_grad():
                moved = 1 - self.training.averaged(self.step)
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.denoiser.parameters()), moved)
            self.step += 1
            on_step(self.step - 1, loss.item(), self.ema)
        return self.ema

    def _loss(self) -> Tensor:
        batch = self.batch(self._draw)
        return per_sample_loss(
            self.denoiser, self.schedule, batch.clean, batch.condition, batch.timesteps, batch.noise
        ).mean()

    def batch(self, draw: torch.Generator) -> Batch:
        """Draw a batch; the training's own are drawn from one generator, whose state is in `state`."""
        data, size = self.data, self.training.batch_size
        image = torch.randint(len(data.latents), (size,), generator=draw)
        pick = torch.rand(size, generator=draw)
        caption = self._first_caption[image] + (pick * self._captions_of[image]).long()
        dropped = torch.rand(size, generator=draw) < self.training.caption_dropout
        timesteps = torch.randint(self.schedule.train_timesteps, (size,), generator=draw)
        clean = data.latents[image]
        noise = torch.randn(clean.shape, generator=draw)
        device = next(self.denoiser.parameters()).device
        condition = {
            name: _where(dropped, data.empty[name], rows).to(device)
            for name, rows in take(data.condition, caption).items()
        }
        return Batch(image, clean.to(device), condition, timesteps.to(device), noise.to(device))

    def state(self) -> dict[str, Any]:
        """Return what `restore` goes on from: tensors, numbers, and dictionaries and lists of them."""
        return {
            "step": self.step,
            "draw": self._draw.get_state(),
            "denoiser": self.denoiser.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rate": self._warmup_cosine.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where the training was that gave this state, with the same data and hyperparameters."""
        self.step = state["step"]
        self._draw.set_state(state["draw"])
        self.denoiser.load_state_dict(state["denoiser"])
        self.ema.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._warmup_cosine.load_state_dict(state["rate"])


def _where(dropped: Tensor, empty: Tensor, rows: Tensor) -> Tensor:
    """Return the rows, (n, ...), those that are dropped replaced by the one of the empty caption; in float32."""
    rows = rows.float() if rows.is_floating_point() else rows
    return torch.where(dropped.view(-1, *[1] * (rows.ndim - 1)), empty.to(rows.dtype), rows)
