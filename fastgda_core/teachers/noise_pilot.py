"""How many timesteps and draws do scores need? A pilot's scores, draw by draw, tell how well plans would agree.

At an even grid of the schedule some samples are scored under two antithetic pairs of draws each. Any plan of the ladder
can be put together from these twice over, independently, at its timesteps. More draws than that are extrapolated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.evaluation.ranking_metrics import spearman
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import Update, scores_by_draw
from fastgda_core.teachers.training_loss import SampleBlock

PILOT_GRID = 20  # timesteps
PILOT_DRAWS = 4  # at each: two antithetic pairs
LADDER_TIMESTEPS = (1, 2, 5, 10, 20)
LADDER_DRAWS = (1, 2, 4, 8, 16)  # one, or antithetic pairs


@dataclass(frozen=True)
class Rung:
    """A plan of the ladder, and what the pilot expects of it.

    timesteps: those of its even grid.
    draws: at each; antithetic pairs where there is more than one.
    agreement: expected rank correlation of two such plans with other noise, mean over queries.
    of_schedule: the same where the plan's timesteps, too, were drawn anew: `agreement` times the squared correlation of
        the mean over these timesteps with that over the pilot's grid. A plan of one timestep can agree with itself and
        not with the schedule.
    """

    timesteps: tuple[int, ...]
    draws: int
    agreement: float
    of_schedule: float

    @property
    def forwards(self) -> int:
        """Forwards of one caption and image."""
        return len(self.timesteps) * self.draws


def pilot_timesteps(train_timesteps: int) -> list[int]:
    """Return the pilot's grid: even, from the middle of its first stretch."""
    count = min(PILOT_GRID, train_timesteps)
    return [int((number + 0.5) * train_timesteps / count) for number in range(count)]


def pilot_scores(
    model: DiffusionModel,
    layers: Mapping[str, Layer],
    plan: NoisePlan,
    block: SampleBlock,
    updates: Iterable[Update],
    micro_batch: MicroBatch,
) -> Tensor:
    """Return first-order scores at each timestep and draw of the pilot by itself.

    Args:
        model: the frozen model at theta_0.
        layers: those that the updates move.
        plan: the pilot's, of `pilot_timesteps` and `PILOT_DRAWS` antithetic draws.
        block: the pilot's samples.
        updates: Delta theta of some queries at a time.
        micro_batch: forwards at a time.

    Returns:
        (samples, timesteps, draws, flips, queries) float64.
    """
    found = []
    for timestep in plan.timestep_values(model.schedule.train_timesteps).tolist():
        at = replace(plan, timesteps=(timestep,))
        found.append(scores_by_draw(model, layers, at, block, updates, micro_batch))
    return torch.stack(found).permute(2, 0, 4, 3, 1)


def ladder(scores: Tensor, train_timesteps: int, *, tied: bool, common: bool = False) -> list[Rung]:
    """Return every plan of the ladder with what the pilot expects of it, the cheapest first.

    The agreement of plans with one draw or one pair at a timestep is measured between independent copies; that of k
    pairs follows from one pair's, r, as k r / (1 + (k - 1) r) (Spearman, 1910; Brown, 1910).

    Args:
        scores: of `pilot_scores`.
        train_timesteps: of the model.
        tied: scores that are not above 0 are ties.
        common: all samples see one noise, so that the pilot has seen four noises a timestep, and not four a sample:
            too few to know what a single draw is worth, whose odd part nothing cancels. Plans of one draw are left out.
    """
    grid = pilot_timesteps(train_timesteps)
    whole = range(len(grid))
    pairs = scores.unflatten(2, (-1, 2)).mean(3)  # (samples, timesteps, 2, flips, queries)

    def plan(values: Tensor, places: Iterable[int], copy: int) -> Tensor:
        mean = values[:, list(places), copy].mean(1).amax(1).T
        return mean.clamp_min(0) if tied else mean

    reliable = spearman(*(plan(pairs, whole, copy) for copy in (0, 1)))
    rungs = []
    for count in (each for each in LADDER_TIMESTEPS if each <= len(grid)):
        places = [int((number + 0.5) * len(grid) / count) for number in range(count)]
        pair = spearman(*(plan(pairs, places, copy) for copy in (0, 1)))
        single = torch.stack(
            [
                spearman(plan(scores, places, first), plan(scores, places, second))
                for first in (0, 1)
                for second in (2, 3)
            ]
        ).mean(0)
        across = torch.stack(
            [spearman(plan(pairs, places, copy), plan(pairs, whole, 1 - copy)) for copy in (0, 1)]
        ).mean(0)
        noiseless = (pair.clamp_min(0) * reliable.clamp_min(0)).sqrt().mean().clamp_min(1e-12)
        represents = (across.mean() / noiseless).clamp(0, 1).square()
        for draws in LADDER_DRAWS[common:]:
            agreement = (single if draws == 1 else _of_more(pair, draws // 2)).mean()
            timesteps = tuple(grid[place] for place in places)
            rungs.append(Rung(timesteps, draws, agreement.item(), (agreement * represents).item()))
    return sorted(rungs, key=lambda rung: (rung.forwards, -rung.of_schedule))


def cheapest(rungs: Iterable[Rung], agreement: float) -> Rung | None:
    """Return the first rung, of those that are ascending in cost, that is expected to reach an agreement."""
    return next((rung for rung in rungs if rung.of_schedule >= agreement), None)


def _of_more(reliability: Tensor, times: int) -> Tensor:
    """Return the agreement of means of `times` as many draws."""
    positive = reliability.clamp_min(0)
    return times * positive / (1 + (times - 1) * positive)
