"""Tail-patch: a training step on the samples that a method names has to lower the query's loss. It trains nothing anew.

Source: Chang et al., "Scalable influence and fact tracing for large language model pretraining" (arXiv 2410.17413), who
take a step on each of a query's first samples from the finished model. Here the step is on all of the first k, and of a
given length, as a finished model comes without its optimiser; and a step back is taken, too, which has to raise the
loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import Condition, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stratified_timesteps, stream_key
from fastgda_core.diffusion.objective import Objective
from fastgda_core.teachers.micro_batch import MicroBatch


class TailPatch:
    """A copy of a model's denoiser, which takes a step and goes back.

    Of weights, gradients and steps there is one tensor for each of the denoiser's parameters, in order.
    """

    def __init__(self, model: DiffusionModel, *, seed: int, pairs: int, micro_batch: MicroBatch) -> None:
        """Copy the denoiser.

        Args:
            model: the finished one.
            seed: of the (timestep, noise) pairs of the samples.
            pairs: of each sample, at stratified timesteps.
            micro_batch: forwards and backwards at a time.
        """
        free = copy.deepcopy(model.denoiser).requires_grad_(True)
        self.model = replace(model, denoiser=free, objective=Objective.loss, compiled_denoisers=None)
        self.seed, self.pairs, self.micro_batch = seed, pairs, micro_batch
        self._weights = [parameter.detach().clone() for parameter in free.parameters()]

    def step(self, train_ids: Tensor, latents: Tensor, condition: Condition) -> list[Tensor]:
        """Return the direction that lowers the samples' mean loss fastest, as long as all weights together.

        Args:
            train_ids: (k,), which the noise is drawn by.
            latents: (k, c, h, w).
            condition: of a caption of each, k rows.
        """
        k, device, key = len(train_ids), self.model.device, stream_key(self.seed, "tail-patch")
        steps = self.model.schedule.train_timesteps
        timesteps = torch.cat([stratified_timesteps(key, one, self.pairs, steps) for one in train_ids.tolist()])
        row, draw = torch.arange(k * self.pairs) // self.pairs, torch.arange(k * self.pairs) % self.pairs
        parameters = list(self.model.denoiser.parameters())

        def gradients_of(stretch: slice) -> list[Tensor]:
            at, mine = timesteps[stretch].to(device), row[stretch]
            noise = gaussian_noise(key, train_ids[mine].to(device), at, draw[stretch].to(device), latents.shape[1:])
            loss = self.model.losses(latents[mine], take(condition, mine), at, noise).sum()
            return list(torch.autograd.grad(loss, parameters))

        gradient = [torch.zeros_like(each) for each in self._weights]
        for _, some in self.micro_batch.run(k * self.pairs, gradients_of):
            torch._foreach_add_(gradient, some)
        scale = _length(self._weights) / _length(gradient)
        return [-scale * each for each in gradient]

    def after(self, step: list[Tensor], share: float, measure: Callable[[Any], Tensor]) -> Tensor:
        """Return what `measure` finds of the denoiser after a share of a step; it is as before when this returns.

        Args:
            share: of the weights' length; negative goes back.
            measure: from a denoiser to a tensor.
        """
        weights = list(self.model.denoiser.parameters())
        with torch.no_grad():
            torch._foreach_add_(weights, step, alpha=share)
            try:
                return measure(self.model.denoiser)
            finally:
                torch._foreach_copy_(weights, self._weights)


def _length(tensors: list[Tensor]) -> Tensor:
    return torch.stack([each.double().square().sum() for each in tensors]).sum().sqrt().to(tensors[0].dtype)
