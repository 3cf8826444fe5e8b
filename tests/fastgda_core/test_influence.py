"""First-order scores against the influence functions of kronfluence, which knows nothing of noise plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastgda_core.curvature.fisher import fit_fisher
from fastgda_core.curvature.layers import select_layers
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan, gaussian_noise, stream_key, uniform
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import unlearning_update
from tests.fastgda_core.blocks import (
    TRAIN_TIMESTEPS,
    double_denoiser,
    fisher_rows,
    gradients_of_samples,
    many_samples,
    plain_noise,
    stack,
    summed_loss,
)

QUERIES, PAIRS, SAMPLES = 4, 8, 24
ALPHA, TRAINING_SIZE = 0.01, 500


class Influence:
    """kronfluence's own pairwise scores; factors of the same rows that our Fisher is fitted to."""

    def __init__(self, model: DiffusionModel, layer_names: list[str], fitted_to: TensorDataset, folder: Path) -> None:
        loss = summed_loss(model)

        class Diffusion(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                return loss(model, batch)

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return loss(model, batch)

            def get_influence_tracked_modules(self) -> list[str]:
                return layer_names

        task = Diffusion()
        # Plain attention in float64: only the factors' eigenbases go through float32.
        denoiser = prepare_model(double_denoiser(model), task)
        self.analyzer = Analyzer(
            "influence", denoiser, task, cpu=True, output_dir=str(folder), disable_tqdm=True, disable_model_save=True
        )
        doubles = dict.fromkeys(
            (
                "activation_covariance_dtype",
                "gradient_covariance_dtype",
                "per_sample_gradient_dtype",
                "lambda_dtype",
                "eigendecomposition_dtype",
            ),
            torch.float64,
        )
        arguments = FactorArguments(strategy="ekfac", use_empirical_fisher=True, **doubles)
        self.analyzer.fit_all_factors("factors", fitted_to, per_device_batch_size=64, factor_args=arguments)

    def scores(self, queries: TensorDataset, samples: TensorDataset) -> Tensor:
        """(query rows, sample rows): g_q^T (F + 0.1 mean eigenvalue)^-1 g_i, the damping being its default."""
        dtypes = dict.fromkeys(("score_dtype", "per_sample_gradient_dtype", "precondition_dtype"), torch.float64)
        self.analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            queries,
            samples,
            per_device_query_batch_size=24,
            per_device_train_batch_size=60,
            score_args=ScoreArguments(damping_factor=None, **dtypes),
        )
        return self.analyzer.load_pairwise_scores("scores")["all_modules"]


def doubles(*tensors: Tensor) -> TensorDataset:
    return TensorDataset(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors))


def training_rows(model: DiffusionModel, plan: NoisePlan, block: SampleBlock) -> tuple[Tensor, ...]:
    """Each sample, which has one caption, at every timestep and draw of the plan."""
    assert not isinstance(plan.timesteps, int)
    places = [
        (sample, timestep, draw)
        for sample in range(len(block.train_ids))
        for timestep in plan.timesteps
        for draw in range(plan.draws)
    ]
    samples, timesteps, _ = torch.tensor(places).T
    noise = [plain_noise(model, plan, block.train_ids[[s]], timestep, draw, 0, 0) for s, timestep, draw in places]
    text = block.condition["encoder_hidden_states"]
    return block.latents[samples, 0], text[samples], timesteps, torch.stack(noise)


def query_rows(model: DiffusionModel, block: SampleBlock) -> tuple[Tensor, ...]:
    """The first samples as queries, each at its Monte-Carlo pairs: timesteps uniform in equal parts of [0, T)."""
    samples, timesteps, noise = [], [], []
    for query in range(QUERIES):
        offsets = uniform(stream_key(9, "query timesteps"), query, PAIRS).tolist()
        for pair, offset in enumerate(offsets):
            timestep = int((pair + offset) / PAIRS * TRAIN_TIMESTEPS)
            place = (torch.tensor([number]) for number in (query, timestep, pair))
            noise.append(gaussian_noise(stream_key(9, "query noise"), *place, model.latent_shape)[0])
            samples.append(query)
            timesteps.append(timestep)
    text = block.condition["encoder_hidden_states"]
    return block.latents[samples, 0], text[samples], torch.tensor(timesteps), torch.stack(noise)


@pytest.mark.integration
@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_first_order_scores_are_pairwise_influences(tiny_model: DiffusionModel, selection: str, tmp_path: Path) -> None:
    """The score is alpha / N times the influence: same sign, same order, same numbers."""
    block = many_samples(tiny_model, SAMPLES)
    plan = NoisePlan(seed=5, timesteps=(5, 50, 90), draws=2)
    layers = select_layers(tiny_model.denoiser, selection)
    rows = fisher_rows(tiny_model, block, draws=3)

    fisher = fit_fisher(
        "ekfac",
        tiny_model.denoiser,
        list(layers),
        TensorDataset(*rows),
        summed_loss(tiny_model),
        64,
        torch.device("cpu"),
    )
    queries = SampleBlock(
        block.train_ids[:QUERIES],
        block.latents[:QUERIES],
        {name: tensor[:QUERIES] for name, tensor in block.condition.items()},
        block.owner[:QUERIES],
        block.caption_number[:QUERIES],
    )
    gradients = gradients_of_samples(tiny_model, layers, queries, PAIRS)
    updates = [unlearning_update(fisher, gradient, alpha=ALPHA, training_size=TRAINING_SIZE) for gradient in gradients]
    found = first_order_scores(tiny_model, layers, plan, block, [stack(updates)], MicroBatch(60))

    influence = Influence(tiny_model, list(layers), doubles(*rows), tmp_path)
    pairwise = influence.scores(
        doubles(*query_rows(tiny_model, block)), doubles(*training_rows(tiny_model, plan, block))
    )
    expected = pairwise.view(QUERIES, PAIRS, SAMPLES, -1).mean((1, 3))

    for ours, theirs in zip(found, expected, strict=True):
        assert spearmanr(ours, theirs).statistic >= 0.9999
    torch.testing.assert_close(found, expected * ALPHA / TRAINING_SIZE, rtol=0, atol=1e-5 * found.abs().max().item())
