"""Checkpoints of a training: what is refused, what tells them apart, and their standardised sum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgda_core.curvature.fisher import Fisher
from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.checkpoints import WEIGHTS, check_checkpoint, checkpoint_hash
from fastgda_core.diffusion.model import DiffusionModel, at_checkpoint, load_model
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.errors import UsageError
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.scores import Scores, first_order_scores_and_errors, standardised_sum
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import expected_spread, unlearning_update
from tests.fastgda_core.blocks import random_updates
from tests.tiny import save_checkpoint


@pytest.fixture
def checkpoint(model_folder: Path, tmp_path: Path) -> Path:
    return save_checkpoint(model_folder, tmp_path / "half way", seed=3)


def test_a_checkpoint_is_its_weights_in_the_models_place(model_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    check_checkpoint(checkpoint, model_folder)
    model = load_model(model_folder, torch.device("cpu"))
    found = at_checkpoint(model, checkpoint, "unet")
    assert found.captions is model.captions and found.codec is model.codec and found.schedule is model.schedule
    stored = load_file(checkpoint / "unet" / WEIGHTS)
    for name, tensor in found.denoiser.state_dict().items():
        assert torch.equal(tensor, stored[name]) and not tensor.requires_grad
    whole = Path(shutil.copytree(model_folder, tmp_path / "whole"))
    shutil.rmtree(whole / "unet")
    shutil.copytree(checkpoint / "unet", whole / "unet")
    alike = load_model(whole, torch.device("cpu"))
    for ours, theirs in zip(found.denoiser.parameters(), alike.denoiser.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    check_checkpoint(whole, model_folder)
    assert checkpoint_hash(whole, model_folder) == checkpoint_hash(checkpoint, model_folder), "wherever they lie"


def test_other_weights_are_another_checkpoint_and_other_notes_are_not(model_folder: Path, checkpoint: Path) -> None:
    before = checkpoint_hash(checkpoint, model_folder)
    config = checkpoint / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": "elsewhere"}))
    assert checkpoint_hash(checkpoint, model_folder) == before
    weights = checkpoint / "unet" / WEIGHTS
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights)
    assert checkpoint_hash(checkpoint, model_folder) != before


def change(checkpoint: Path, kind: str) -> None:
    part = checkpoint / "unet"
    tensors, config = load_file(part / WEIGHTS), json.loads((part / "config.json").read_text())
    if kind == "no folder":
        shutil.rmtree(checkpoint)
    elif kind == "no unet":
        part.rename(checkpoint / "transformer")
    elif kind == "no weights":
        (part / WEIGHTS).unlink()
    elif kind == "no config":
        (part / "config.json").unlink()
    elif kind == "damaged":
        (part / WEIGHTS).write_bytes((part / WEIGHTS).read_bytes()[:-1])
    elif kind == "no json":
        (part / "config.json").write_text("[")
    elif kind == "other heads":
        (part / "config.json").write_text(json.dumps({**config, "attention_head_dim": 4}))
    elif kind == "other shape":
        save_file({**tensors, "conv_in.bias": torch.zeros(9)}, part / WEIGHTS)
    elif kind == "a weight less":
        tensors.pop("conv_in.bias")
        save_file(tensors, part / WEIGHTS)
    else:
        save_file({**tensors, "more": torch.zeros(9)}, part / WEIGHTS)


REFUSED = {
    "no folder": "half way does not exist: give a checkpoint",
    "no unet": "half way has no folder unet: ",
    "no weights": f"unet lacks {WEIGHTS}: ",
    "no config": "unet lacks config.json: ",
    "damaged": f"{WEIGHTS} is damaged",
    "no json": "config.json is no config",
    "other heads": "attention_head_dim is 4 in .*unet and 2 in the model: ",
    "other shape": r"weight conv_in.bias is \[9\] in .*unet and \[8\] in the model: ",
    "a weight less": "unet has no weight conv_in.bias, as the other has: ",
    "a weight more": "the model has no weight more, as the other has: ",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_checkpoint_of_the_model_is_refused_in_one_line(
    model_folder: Path, checkpoint: Path, kind: str
) -> None:
    change(checkpoint, kind)
    with pytest.raises(UsageError, match=REFUSED[kind]) as refused:
        check_checkpoint(checkpoint, model_folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_expected_spread_is_the_root_of_the_dense_quadratic_form(fishers: dict[str, Fisher], kind: str) -> None:
    """The Fisher as one dense float64 matrix a layer, from its columns: F x = (F + damping) x - damping x."""
    fisher, total = fishers[kind], 0.0
    shapes = {name: tensor.shape for name, tensor in _like(fisher).items()}
    gradient = {name: torch.randn(shape, generator=torch.Generator().manual_seed(5)) for name, shape in shapes.items()}
    update = unlearning_update(fisher, gradient, alpha=0.3, training_size=7)
    for name, step in update.items():
        flat = step.double().flatten()
        total += float(flat @ _dense(fisher, name) @ flat)
    assert expected_spread(fisher, update) == pytest.approx(total**0.5, rel=1e-5)


def _like(fisher: Fisher) -> dict[str, Tensor]:
    tensors = fisher.tensors()
    return {key.rsplit("/", 1)[0]: each for key, each in tensors.items() if key.endswith(("/diagonal", "/eigenvalues"))}


def _dense(fisher: Fisher, name: str) -> Tensor:
    tensors = {key.rsplit("/", 1)[1]: each.double() for key, each in fisher.tensors().items() if key.startswith(name)}
    if "diagonal" in tensors:
        return torch.diag(tensors["diagonal"].flatten())
    basis = torch.kron(tensors["output_basis"], tensors["input_basis"])
    return basis @ torch.diag(tensors["eigenvalues"].flatten()) @ basis.T


def test_a_sum_has_the_errors_of_its_draws_and_not_those_of_its_terms(
    tiny_model: DiffusionModel, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    """One checkpoint twice: the draws are the same, so the error doubles, and by no root of two."""
    plan, updates = NoisePlan(seed=5, timesteps=(10, 80), draws=4), random_updates(layers)
    once = first_order_scores_and_errors(tiny_model, layers, plan, block, [updates], MicroBatch(24))
    spread = torch.linspace(1, 3, len(once.values), dtype=torch.float64)
    both = standardised_sum([once, once], [spread, spread / 2])
    torch.testing.assert_close(both.values, 3 * once.values / spread[:, None])
    torch.testing.assert_close(both.errors, 3 * once.errors / spread[:, None])


def test_groups_of_different_checkpoints_add_up_before_their_spread_is_taken() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    of_group = torch.full((4,), 0.25, dtype=torch.float64)
    spreads = [torch.tensor([2.0, 5.0], dtype=torch.float64), torch.tensor([0.1, 7.0], dtype=torch.float64)]
    found = standardised_sum([Scores(first, of_group), Scores(second, of_group)], spreads)
    means = 4 * (first / spreads[0][:, None, None] + second / spreads[1][:, None, None])  # of each group: the score
    torch.testing.assert_close(found.values, means.mean(2))
    torch.testing.assert_close(found.errors, means.std(2) / 4**0.5)
    assert standardised_sum([Scores.whole(first[..., 0])] * 2, spreads).errors.isnan().all()
