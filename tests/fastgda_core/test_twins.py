"""The twin test on a world whose scores have a closed form, and its arithmetic."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import EkfacFisher, fit_fisher
from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.loss import per_sample_loss
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.schedule import DiffusionSchedule
from fastgda_core.evaluation.ranking_metrics import twin_ranks
from fastgda_core.evaluation.twins import TwinTest, first_places
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import query_gradient, unlearning_update

SAMPLES, WORDS, SHAPE = 120, 24, (2, 4, 4)
LAYER = "attn2.to_k"
CPU = torch.device("cpu")


class Painter(nn.Module):
    """Draws W a from a caption's embedding a, whatever the noise."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(sample_size=SHAPE[1], in_channels=SHAPE[0])
        self.attn2 = nn.Module()
        self.attn2.to_k = nn.Linear(WORDS, len(weight), bias=False)
        self.attn2.to_k.weight.data.copy_(weight)

    def forward(self, noisy: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, ...]:
        return (self.attn2.to_k(encoder_hidden_states)[:, 0].view(-1, *SHAPE),)


class World:
    """Pictures and captions at random, and the least-squares painter of the ones from the others."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.captions = torch.randn(SAMPLES, WORDS, generator=generator)
        pixels = torch.randn(SAMPLES, SHAPE[0] * SHAPE[1] * SHAPE[2], generator=generator)
        self.pictures = pixels.view(-1, *SHAPE)
        weight = torch.linalg.lstsq(self.captions.double(), pixels.double()).solution.T
        denoiser = Painter(weight.float()).eval().requires_grad_(False)
        schedule = DiffusionSchedule(DDIMScheduler(num_train_timesteps=100, prediction_type="sample"))
        nothing: Any = None
        self.model = DiffusionModel(denoiser, schedule, nothing, nothing, CPU)
        self.layers = select_layers(denoiser, "cross-attn-kv")
        self.fisher = self._fisher()

    def _fisher(self) -> EkfacFisher:
        def loss(denoiser: nn.Module, batch: list[Tensor]) -> Tensor:
            clean, text, noise = batch
            timesteps = torch.full((len(clean),), 50)
            condition = {"encoder_hidden_states": text}
            return per_sample_loss(denoiser, self.model.schedule, clean, condition, timesteps, noise).sum()

        rows = TensorDataset(self.pictures, self.captions[:, None], torch.zeros_like(self.pictures))
        fisher = fit_fisher("ekfac", self.model.denoiser, [LAYER], rows, loss, 32, CPU)
        assert isinstance(fisher, EkfacFisher)
        return fisher

    def drawn(self, captions: Tensor) -> Tensor:
        """What the model itself makes of some captions."""
        return self.model.denoiser(None, None, captions[:, None])[0]

    def scores(self, pictures: Tensor, captions: Tensor, objective: Objective) -> Tensor:
        """Of all samples against some queries, (queries, SAMPLES) float64."""
        model, micro_batch = self.model.with_objective(objective), MicroBatch(64)
        updates = [
            unlearning_update(
                self.fisher,
                query_gradient(
                    model,
                    self.layers,
                    picture,
                    {"encoder_hidden_states": caption[None, None]},
                    owner=number,
                    seed=0,
                    pairs=2,
                    micro_batch=micro_batch,
                ),
                alpha=1.0,
                training_size=1,
            )
            for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True))
        ]
        block = SampleBlock(
            torch.arange(SAMPLES),
            self.pictures[:, None],
            {"encoder_hidden_states": self.captions[:, None]},
            torch.arange(SAMPLES),
            torch.zeros(SAMPLES, dtype=torch.long),
        )
        stacked = {LAYER: torch.stack([update[LAYER] for update in updates])}
        plan = NoisePlan(seed=0, timesteps=2, draws=1)
        return first_order_scores(model, self.layers, plan, block, [stacked], micro_batch)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def twin_test(scores: Tensor, twins: Tensor) -> TwinTest:
    ranks = twin_ranks(scores, twins)
    return TwinTest(tuple(ranks.tolist()), (first_places(SAMPLES),) * len(ranks))


TWINS = torch.arange(0, SAMPLES, 5)


def test_scores_of_the_output_norm_have_their_closed_form(world: World) -> None:
    """G_i = 2 W a_i a_i^T / elements, and a score is <G_i, (F + damping)^-1 G_q>."""
    found = world.scores(world.drawn(world.captions[TWINS]), world.captions[TWINS], Objective.output_norm)
    a = world.captions.double()
    outputs = a @ world.model.denoiser.attn2.to_k.weight.double().T
    gradients = torch.einsum("no,ni->noi", outputs, a) * 2 / outputs.shape[1]
    factors = world.fisher.layers[LAYER]
    left, right, values = (part.double() for part in (factors.output_basis, factors.input_basis, factors.eigenvalues))
    rotated = left.T @ gradients @ right
    damped = values + world.fisher.damping * values.mean()
    expected = torch.einsum("qoi,noi->qn", rotated[TWINS] / damped, rotated)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_the_output_norm_finds_the_twins_of_its_own_pictures(world: World) -> None:
    own = world.scores(world.drawn(world.captions[TWINS]), world.captions[TWINS], Objective.output_norm)
    test = twin_test(own, TWINS)
    assert test.passed and test.share == 1.0 and test.worst <= 2
    pseudo = world.scores(world.pictures[TWINS], world.captions[TWINS], Objective.output_norm)
    assert twin_test(pseudo, TWINS).passed


def test_of_its_own_pictures_nothing_is_left_of_the_loss(world: World) -> None:
    """What the model draws is exactly what it would have drawn: the loss is 0, and so is its gradient."""
    own = world.scores(world.drawn(world.captions[TWINS]), world.captions[TWINS], Objective.loss)
    assert not twin_test(own, TWINS).passed
    pseudo = world.scores(world.pictures[TWINS], world.captions[TWINS], Objective.loss)
    assert twin_test(pseudo, TWINS).passed


def test_with_shuffled_captions_no_twin_is_found(world: World) -> None:
    shuffled = world.captions[TWINS.roll(1)]
    scores = world.scores(world.drawn(shuffled), shuffled, Objective.output_norm)
    test = twin_test(scores, TWINS)
    assert not test.passed and test.share < 0.2


def test_share_and_worst_rank_see_what_a_median_hides() -> None:
    test = TwinTest((1, 1, 2, 1, 1, 3953, 3900), (40,) * 7)
    assert (test.found, test.worst, test.passed) == (5, 3953, False)
    assert test.share == 5 / 7
    assert TwinTest((1,) * 9 + (41,), (40,) * 10).passed


@pytest.mark.parametrize(("candidates", "places"), [(1, 1), (99, 1), (100, 1), (101, 2), (3953, 40), (118_287, 1183)])
def test_the_first_places_are_one_percent_and_at_least_one(candidates: int, places: int) -> None:
    assert first_places(candidates) == places


def test_rank_of_a_twin_counts_equal_scores_against_it() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, -torch.inf], [1.0, 2.0, 3.0, 4.0]])
    assert twin_ranks(scores, torch.tensor([0, 1, 3])).tolist() == [2, 3, 1]
