"""Blocks of training samples, and their losses by a plain loop in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.loss import per_sample_loss, take
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import query_gradient

TRAIN_TIMESTEPS = 100  # of the tiny model
CAPTIONS = (
    "a red circle",
    "one round red thing",
    "blue square",
    "green cross on white",
    "two crossed green lines",
    "orange",
    "a purple square number six",
    "teal circle",
    "black cross",
    "dark crossed lines",
)
OWNER = (0, 0, 1, 2, 2, 3, 4, 5, 6, 6)
CAPTION_NUMBER = (0, 1, 0, 0, 1, 0, 0, 0, 0, 1)
TRAIN_IDS = (3, 11, 4, 70_000, 2**33 + 3, 5, 8)

Denoiser = Callable[..., tuple[Tensor, ...]]


def make_block(model: DiffusionModel, *, flips: bool = False) -> SampleBlock:
    """Seven samples of random latents; three of them have two captions."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(TRAIN_IDS), 1, *model.latent_shape, generator=generator)
    return SampleBlock(
        train_ids=torch.tensor(TRAIN_IDS),
        latents=torch.cat([latents, latents.flip(-1)], dim=1) if flips else latents,
        condition=model.encode_captions(list(CAPTIONS)),
        owner=torch.tensor(OWNER),
        caption_number=torch.tensor(CAPTION_NUMBER),
    )


def many_samples(model: DiffusionModel, count: int) -> SampleBlock:
    """Samples of random latents, one caption each."""
    generator = torch.Generator().manual_seed(7)
    words = [f"{CAPTIONS[number % len(CAPTIONS)]} {'abcdefghij'[number // 10 % 10]}" for number in range(count)]
    return SampleBlock(
        train_ids=torch.arange(count) * 17,
        latents=torch.randn(count, 1, *model.latent_shape, generator=generator),
        condition=model.encode_captions(words),
        owner=torch.arange(count),
        caption_number=torch.zeros(count, dtype=torch.long),
    )


def pick(block: SampleBlock, samples: list[int]) -> SampleBlock:
    """A block of some samples of another, in this order; they may repeat."""
    captions = [(c, row) for row, s in enumerate(samples) for c in (block.owner == s).nonzero().flatten().tolist()]
    rows = [caption for caption, _ in captions]
    owner = torch.tensor([row for _, row in captions])
    condition = {name: tensor[rows] for name, tensor in block.condition.items()}
    return SampleBlock(block.train_ids[samples], block.latents[samples], condition, owner, block.caption_number[rows])


def random_updates(layers: Mapping[str, nn.Module], queries: int = 3) -> dict[str, Tensor]:
    """Random weight changes by layer, each as large as the layer's weights; a last column for a bias."""
    generator = torch.Generator().manual_seed(2)
    updates = {}
    for name, layer in layers.items():
        rows, columns = len(layer.weight), layer.weight[0].numel() + (layer.bias is not None)
        updates[name] = torch.randn(queries, rows, columns, generator=generator) * layer.weight.std()
    return updates


def by_parameter(denoiser: nn.Module, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An update of layers as changes of the denoiser's parameters, float64."""
    changes = {}
    for name, change in update.items():
        layer = denoiser.get_submodule(name)
        weight = change.double()
        if layer.bias is not None:
            changes[f"{name}.bias"] = weight[:, -1]
            weight = weight[:, :-1]
        changes[f"{name}.weight"] = weight.reshape(layer.weight.shape)
    return changes


def double_denoiser(model: DiffusionModel) -> nn.Module:
    """The denoiser in float64 with plain attention, which forward-mode differentiation understands."""
    denoiser = copy.deepcopy(model.denoiser).double().to(memory_format=torch.contiguous_format)
    denoiser.set_attn_processor(AttnProcessor())
    return denoiser


def squared_residual(
    model: DiffusionModel, denoiser: Denoiser, clean: Tensor, text: Tensor, timesteps: Tensor, noise: Tensor
) -> Tensor:
    """Mean squared epsilon error of each row, in float64; the tiny model predicts epsilon."""
    alpha_bar = model.schedule.scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * clean.double() + (1 - alpha_bar).sqrt() * noise.double()
    predicted = denoiser(noisy, timesteps, encoder_hidden_states=text.double(), return_dict=False)[0]
    return (noise.double() - predicted).square().mean((1, 2, 3))


def plain_noise(model: DiffusionModel, plan: NoisePlan, owner: Tensor, *place: int) -> Tensor:
    """Noise of one (timestep, draw, caption, flip) of a sample; an odd antithetic draw is minus the one before."""
    timestep, draw, caption, flip = place
    mirrored = plan.antithetic and draw % 2 == 1
    noise = gaussian_noise(
        stream_key(plan.seed, "training samples"),
        owner,
        torch.tensor([timestep]),
        torch.tensor([draw // 2 if plan.antithetic else draw]),
        model.latent_shape,
        captions=caption,
        flips=flip,
    )[0]
    return -noise if mirrored else noise


def plain_loss(
    model: DiffusionModel,
    denoiser: Denoiser,
    plan: NoisePlan,
    block: SampleBlock,
    sample: int,
    flip: int = 0,
    draws: Sequence[int] | None = None,
) -> Tensor:
    """L of one sample in float64: its captions, timesteps and draws one after another, then their weighted mean."""
    text, timesteps, noise, weights = [], [], [], []
    grid = plan.timesteps
    if isinstance(grid, int):
        grid = tuple(range(plan.first_timestep, TRAIN_TIMESTEPS, TRAIN_TIMESTEPS // grid))
    for caption in (block.owner == sample).nonzero().flatten().tolist():
        for timestep, weight in zip(grid, plan.weights or [1.0] * len(grid), strict=True):
            for draw in range(plan.draws) if draws is None else draws:
                text.append(block.condition["encoder_hidden_states"][caption])
                timesteps.append(timestep)
                weights.append(weight)
                number = int(block.caption_number[caption])
                owner = block.train_ids[sample : sample + 1]
                noise.append(plain_noise(model, plan, owner, timestep, draw, number, flip))
    clean = block.latents[sample, flip].expand(len(noise), *model.latent_shape)
    losses = squared_residual(model, denoiser, clean, torch.stack(text), torch.tensor(timesteps), torch.stack(noise))
    share = torch.tensor(weights, dtype=torch.float64)
    return (losses * share).sum() / share.sum()


def plain_losses(
    model: DiffusionModel,
    denoiser: Denoiser,
    plan: NoisePlan,
    block: SampleBlock,
    flip: int = 0,
    draws: Sequence[int] | None = None,
) -> Tensor:
    """L of every sample in one flip, (n,)."""
    samples = range(len(block.train_ids))
    return torch.stack([plain_loss(model, denoiser, plan, block, sample, flip, draws) for sample in samples])


def directional_derivative(
    model: DiffusionModel,
    plan: NoisePlan,
    block: SampleBlock,
    update: Mapping[str, Tensor],
    flip: int = 0,
    draws: Sequence[int] | None = None,
) -> Tensor:
    """The derivative of every sample's loss along an update, in float64 and forward mode, (n,)."""
    denoiser = double_denoiser(model)
    tangent = by_parameter(denoiser, update)
    weights = {name: denoiser.get_parameter(name).detach() for name in tangent}

    def losses(moving: dict[str, Tensor]) -> Tensor:
        def call(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
            return torch.func.functional_call(denoiser, moving, args, kwargs)

        return plain_losses(model, call, plan, block, flip, draws)

    return torch.func.jvp(losses, (weights,), (tangent,))[1]


@torch.no_grad()
def plain_rise(
    model: DiffusionModel, plan: NoisePlan, block: SampleBlock, update: Mapping[str, Tensor], flip: int = 0
) -> Tensor:
    """How much every sample's loss rises when the weights move by an update, in float64, (n,)."""
    denoiser = double_denoiser(model)
    before = plain_losses(model, denoiser, plan, block, flip)
    for name, change in by_parameter(denoiser, update).items():
        denoiser.get_parameter(name).add_(change)
    return plain_losses(model, denoiser, plan, block, flip) - before


def fisher_rows(model: DiffusionModel, block: SampleBlock, draws: int = 40) -> tuple[Tensor, ...]:
    """Latents, captions, timesteps and noise: each caption of a block at some random (eps, t)."""
    rows = torch.arange(len(block.owner)).repeat_interleave(draws)
    generator = torch.Generator().manual_seed(3)
    timesteps = torch.randint(TRAIN_TIMESTEPS, (len(rows),), generator=generator)
    noise = torch.randn(len(rows), *model.latent_shape, generator=generator)
    return block.latents[block.owner[rows], 0], block.condition["encoder_hidden_states"][rows], timesteps, noise


def summed_loss(model: DiffusionModel) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    """The loss of a batch of `fisher_rows` as `fit_fisher` wants it."""

    def loss(denoiser: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        latents, text, timesteps, noise = batch
        condition = {"encoder_hidden_states": text}
        return per_sample_loss(denoiser, model.schedule, latents, condition, timesteps, noise).sum()

    return loss


def gradients_of_samples(
    model: DiffusionModel, layers: Mapping[str, Layer], block: SampleBlock, pairs: int
) -> list[dict[str, Tensor]]:
    """The query gradient of each sample of a block, its first caption, taken as the query."""
    return [
        query_gradient(
            model,
            layers,
            block.latents[sample, 0],
            take(block.condition, (block.owner == sample).nonzero()[0]),
            owner=sample,
            seed=9,
            pairs=pairs,
            micro_batch=MicroBatch(100),
        )
        for sample in range(len(block.train_ids))
    ]


def stack(updates: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Updates of some queries as one, (queries, d_out, d_in) by layer."""
    return {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
