"""The judge's parts, joined, on a denoiser whose training has a closed form: leave-one-out and LDS are known exactly.

The denoiser is linear in the noisy latent and the caption, and is fitted by ridge regression to a fixed set of
(timestep, noise) rows of each sample, in float64. Without a sample its weights follow by Woodbury's identity from those
of all samples, which never trains again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from fastgda_core.diffusion.loss import Condition
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import gaussian_noise, stream_key
from fastgda_core.diffusion.precision import Precision
from fastgda_core.evaluation.counterfactual import loss_changes
from fastgda_core.evaluation.lds import linear_datamodelling
from fastgda_core.evaluation.retraining import query_losses, random_subset
from fastgda_core.teachers.micro_batch import MicroBatch

SAMPLES, QUERIES, ROWS, DRAWS, POOL, RIDGE = 24, 6, 6, 16, 40, 0.5
SHAPE = (1, 2, 2)


class LinearDenoiser(torch.nn.Module):
    """Paints W [noisy latent; mean of the caption's tokens; 1]."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights  # (features, numbers of a latent)

    def forward(
        self, noisy: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **others: object
    ) -> tuple[Tensor]:
        return ((seen(noisy, encoder_hidden_states) @ self.weights).view_as(noisy),)


def seen(noisy: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([noisy.flatten(1), tokens.mean(1), torch.ones(len(noisy), 1, dtype=noisy.dtype)], dim=1)


@dataclass
class LinearDiffusion:
    """Samples and queries, the rows that a denoiser is fitted to, and denoisers that are."""

    model: DiffusionModel
    latents: Tensor
    tokens: Tensor
    inputs: Tensor  # (samples, rows, features)
    targets: Tensor  # (samples, rows, numbers of a latent)
    queries: Tensor
    query_conditions: list[Condition]

    @classmethod
    def of(cls, tiny: DiffusionModel) -> LinearDiffusion:
        draw = torch.Generator().manual_seed(2)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw, dtype=torch.float64)

        latents, words = normal(SAMPLES, *SHAPE), [f"{chr(97 + number)} b" for number in range(SAMPLES)]
        tokens = tiny.encode_captions(words)["encoder_hidden_states"].double()
        timesteps = torch.randint(tiny.schedule.train_timesteps, (SAMPLES * ROWS,), generator=draw)
        noise, repeated = normal(SAMPLES * ROWS, *SHAPE), latents.repeat_interleave(ROWS, 0)
        noisy = mixed(tiny, repeated, noise, timesteps)
        inputs = seen(noisy, tokens.repeat_interleave(ROWS, 0)).view(SAMPLES, ROWS, -1)
        model = replace(tiny, precision=Precision.float64)
        near = latents[:QUERIES] + 0.3 * normal(QUERIES, *SHAPE)  # queries like training samples
        conditions = [tiny.encode_captions([caption]) for caption in words[:QUERIES]]
        return cls(model, latents, tokens, inputs, noise.view(SAMPLES, ROWS, -1), near, conditions)

    @property
    def hessian(self) -> Tensor:
        x = self.inputs.flatten(0, 1)
        return x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)

    def trained(self, kept: Tensor) -> Tensor:
        """The weights that minimise the squared error on some samples, plus the ridge."""
        x, y = self.inputs[kept].flatten(0, 1), self.targets[kept].flatten(0, 1)
        return torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)

    def without(self, sample: int) -> Tensor:
        """The same weights without one sample, by Woodbury's identity from those of all."""
        theta, inverse = self.trained(torch.ones(SAMPLES, dtype=torch.bool)), torch.linalg.inv(self.hessian)
        x, y = self.inputs[sample], self.targets[sample]
        leverage = torch.eye(ROWS, dtype=x.dtype) - x @ inverse @ x.T
        return theta - inverse @ x.T @ torch.linalg.solve(leverage, y - x @ theta)

    def judged(self, weights: Tensor) -> Tensor:
        """Losses as the judge takes them, (draws, queries)."""
        denoiser = LinearDenoiser(weights)
        found = [
            query_losses(
                self.model, denoiser, latent, condition, owner=number, seed=3, pairs=DRAWS, micro_batch=MicroBatch(5)
            )[0]
            for number, (latent, condition) in enumerate(zip(self.queries, self.query_conditions, strict=True))
        ]
        return torch.stack(found, dim=1)

    def exact(self, weights: Tensor) -> Tensor:
        """The same losses from the formula of the forward process, (draws, queries)."""
        columns = []
        for number, latent in enumerate(self.queries):
            _, timesteps = query_losses(
                self.model, LinearDenoiser(weights), latent, self.query_conditions[number],
                owner=number, seed=3, pairs=DRAWS, micro_batch=MicroBatch(DRAWS),
            )  # fmt: skip
            draws, owners = torch.arange(DRAWS), torch.full((DRAWS,), number)
            noise = gaussian_noise(stream_key(3, "judge noise"), owners, timesteps, draws, SHAPE).double()
            noisy = mixed(self.model, latent.expand(DRAWS, *SHAPE), noise, timesteps)
            tokens = self.query_conditions[number]["encoder_hidden_states"].double().expand(DRAWS, -1, -1)
            columns.append((seen(noisy, tokens) @ weights - noise.flatten(1)).square().mean(1))
        return torch.stack(columns, dim=1)


def mixed(model: DiffusionModel, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    share = model.schedule.scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    return share.sqrt() * clean + (1 - share).sqrt() * noise


@pytest.fixture
def world(tiny_model: DiffusionModel) -> LinearDiffusion:
    return LinearDiffusion.of(tiny_model)


def leave_one_out(world: LinearDiffusion) -> Tensor:
    """How much each query's loss rises without each sample, in the judge's shares, (queries, samples), exactly."""
    before = world.exact(world.trained(torch.ones(SAMPLES, dtype=torch.bool))).mean(0)
    after = torch.stack([world.exact(world.without(sample)).mean(0) for sample in range(SAMPLES)], dim=1)
    return (after - before[:, None]) / before[:, None]


def test_leave_one_out_as_judged_is_the_exact_one(world: LinearDiffusion) -> None:
    every = torch.ones(SAMPLES, dtype=torch.bool)
    before, exact = world.judged(world.trained(every)), leave_one_out(world)
    for sample in range(SAMPLES):
        kept = every.clone()
        kept[sample] = False
        found = loss_changes(world.judged(world.trained(kept)), before)
        torch.testing.assert_close(found, exact[:, sample], rtol=1e-6, atol=1e-9)
    assert (exact[torch.arange(QUERIES), torch.arange(QUERIES)] > 0).all(), "each query is like one sample"


def test_lds_as_judged_is_the_exact_one_the_truth_reaches_it_and_a_shuffled_method_does_not(
    world: LinearDiffusion,
) -> None:
    kept = torch.stack([random_subset(SAMPLES, number, seed=1) for number in range(POOL)])
    weights = [world.trained(mask) for mask in kept]
    losses = torch.stack([world.judged(each).mean(0) for each in weights])
    exact = torch.stack([world.exact(each).mean(0) for each in weights]).numpy()
    truth = leave_one_out(world)
    found = linear_datamodelling(kept, truth, losses)
    sums = kept.double().numpy() @ truth.numpy().T
    expected = [stats.spearmanr(sums[:, query], -exact[:, query]).statistic for query in range(QUERIES)]
    assert found.by_query.tolist() == pytest.approx(expected, abs=1e-9)

    # Nothing is random in this training, so that losses come again as they were: a score could reach 1. Leave-one-out
    # is short of that by what is not a sum; the losses themselves, fitted by a sum over samples, are not.
    datamodel = torch.linalg.lstsq(kept.double(), -losses.double()).solution.T
    fitted = linear_datamodelling(kept, datamodel, losses)
    assert found.mean > 0.7 and fitted.mean > found.mean
    shuffled = truth[:, torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(4))]
    low, high = linear_datamodelling(kept, shuffled, losses).interval
    assert low < 0 < high
