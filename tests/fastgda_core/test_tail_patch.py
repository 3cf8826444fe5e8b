"""Steps on samples, against gradients that are added up pair by pair in float64."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor

from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stratified_timesteps, stream_key
from fastgda_core.diffusion.precision import Precision
from fastgda_core.evaluation.retraining import query_gradient, query_losses
from fastgda_core.evaluation.tail_patch import TailPatch
from fastgda_core.teachers.micro_batch import MicroBatch

PAIRS, SEED = 3, 7


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([each.detach().flatten() for each in tensors])


def test_a_step_goes_against_the_mean_gradient_and_changes_a_query_by_their_product(tiny_model: DiffusionModel) -> None:
    model = tiny_model.in_precision(Precision.float64)
    train_ids = torch.tensor([4, 9])
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = tiny_model.encode_captions(["a b", "c"])
    patch = TailPatch(model, seed=SEED, pairs=PAIRS, micro_batch=MicroBatch(4))
    step = patch.step(train_ids, latents, condition)

    free, key = copy.deepcopy(model.denoiser).requires_grad_(True), stream_key(SEED, "tail-patch")
    for row, train_id in enumerate(train_ids.tolist()):
        timesteps = stratified_timesteps(key, train_id, PAIRS, model.schedule.train_timesteps)
        for draw in range(PAIRS):
            at = timesteps[draw : draw + 1]
            noise = gaussian_noise(key, train_ids[row : row + 1], at, torch.tensor([draw]), model.latent_shape)
            words = {name: each[row : row + 1] for name, each in condition.items()}
            model.losses(latents[row : row + 1], words, at, noise, free).sum().backward()
    gradient = flat([each.grad for each in free.parameters()])
    weights = flat(list(model.denoiser.parameters()))
    torch.testing.assert_close(flat(step), -gradient * weights.norm() / gradient.norm())

    latent, words = latents[0] + 0.1, tiny_model.encode_captions(["c"])
    how = {"owner": 1, "seed": 0, "pairs": 5, "micro_batch": MicroBatch(2)}

    def loss(denoiser: torch.nn.Module) -> Tensor:
        return query_losses(model, denoiser, latent, words, **how)[0].mean()

    expected = flat(step) @ query_gradient(model, model.denoiser, latent, words, **how)
    up, down = (patch.after(step, share, loss) for share in (1e-6, -1e-6))
    torch.testing.assert_close((up - down) / 2e-6, expected, rtol=1e-5, atol=1e-9)
    assert all(torch.equal(*pair) for pair in zip(patch.model.denoiser.parameters(), free.parameters(), strict=True))


def test_weights_are_as_before_when_a_measure_fails(tiny_model: DiffusionModel) -> None:
    patch = TailPatch(tiny_model, seed=SEED, pairs=PAIRS, micro_batch=MicroBatch(4))
    before = flat(list(patch.model.denoiser.parameters()))

    def fail(denoiser: torch.nn.Module) -> Tensor:
        raise MemoryError

    with contextlib.suppress(MemoryError):
        patch.after([torch.ones_like(each) for each in patch.model.denoiser.parameters()], 0.1, fail)
    assert torch.equal(flat(list(patch.model.denoiser.parameters())), before)
