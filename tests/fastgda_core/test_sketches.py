from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fastgda_core.curvature.fisher import EkfacFisher, Fisher, LayerFactors
from fastgda_core.curvature.layers import Layer
from fastgda_core.diffusion.model import DiffusionModel
from fastgda_core.diffusion.noise import NoisePlan
from fastgda_core.sketches.eigen import EigenSketch, sample_moments, step_moments
from fastgda_core.sketches.factored import FactoredSketch, caption_inputs
from fastgda_core.sketches.int8 import BLOCK, Int8Vectors, bytes_of
from fastgda_core.sketches.principal import PrincipalSketch
from fastgda_core.teachers.micro_batch import MicroBatch
from fastgda_core.teachers.sample_gradients import SampleGradients, sample_gradients
from fastgda_core.teachers.scores import first_order_scores
from fastgda_core.teachers.training_loss import SampleBlock
from fastgda_core.teachers.unlearning import unlearning_update
from tests.fastgda_core.blocks import make_block, pick, stack

ALPHA, SAMPLES = 0.01, 500
EVERY = 10**9  # coordinates: more than there are


@pytest.fixture(params=["one image", "mirrored"])
def some(request: pytest.FixtureRequest, tiny_model: DiffusionModel) -> SampleBlock:
    return make_block(tiny_model, flips=request.param == "mirrored")


@pytest.fixture
def ekfac(fishers: dict[str, Fisher]) -> EkfacFisher:
    fisher = fishers["ekfac"]
    assert isinstance(fisher, EkfacFisher)
    return fisher


def gradients_of(
    model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, block: SampleBlock
) -> SampleGradients:
    (found,) = sample_gradients(model, layers, plan, block, MicroBatch(24))
    return found


def as_queries(gradients: SampleGradients, layers: dict[str, Layer]) -> list[dict[str, Tensor]]:
    """The gradient of each (sample, flip) by layer, as that of a query."""
    return [
        {name: gradients.of(name)[row].view(layer.weight.shape) for name, layer in layers.items()}
        for row in range(gradients.count)
    ]


def test_all_coordinates_give_the_teachers_scores_of_samples_taken_as_queries(
    tiny_model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, some: SampleBlock, ekfac: EkfacFisher
) -> None:
    gradients = gradients_of(tiny_model, layers, plan, some)
    queries = as_queries(gradients, layers)
    updates = [unlearning_update(ekfac, query, alpha=ALPHA, training_size=SAMPLES) for query in queries]
    expected = first_order_scores(tiny_model, layers, plan, some, [stack(updates)], MicroBatch(24))
    moments = sample_moments(ekfac, [gradients])
    sketch = EigenSketch.of_most_energy(ekfac, moments, moments, EVERY)
    assert len(sketch) == sum(layer.weight.numel() for layer in layers.values())
    assert sketch.energy_kept == pytest.approx(1)
    found = sketch.of_samples(gradients)
    assert found.shape == (len(some.train_ids), some.flips, len(sketch))
    asked = torch.stack([sketch.of_query(query) for query in queries])
    torch.testing.assert_close(asked, found.flatten(0, 1), rtol=1e-3, atol=1e-5 * found.abs().max().item())
    scores = torch.einsum("qk,nfk->qnf", asked.double(), found.double()).amax(2) * (ALPHA / SAMPLES)
    assert (scores - expected).norm() < 1e-5 * expected.norm()


def test_a_factored_sketch_is_exact(
    tiny_model: DiffusionModel,
    layers: dict[str, Layer],
    plan: NoisePlan,
    some: SampleBlock,
    updates: dict[str, Tensor],
) -> None:
    sketch = FactoredSketch.of_samples(gradients_of(tiny_model, layers, plan, some))
    inputs = caption_inputs(tiny_model, layers, some.condition, MicroBatch(3))
    expected = first_order_scores(tiny_model, layers, plan, some, [updates], MicroBatch(24))
    halves = [{name: change[part] for name, change in updates.items()} for part in (slice(2), slice(2, None))]
    assert (sketch.scores(inputs, halves) - expected).norm() < 1e-5 * expected.norm()
    weights = sum(layer.weight.numel() for layer in layers.values())
    assert sketch.deltas[0].numel() < weights


def test_a_sketch_is_the_same_alone_and_in_any_batch(
    tiny_model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, block: SampleBlock, ekfac: EkfacFisher
) -> None:
    gradients = gradients_of(tiny_model, layers, plan, block)
    moments = sample_moments(ekfac, [gradients])
    sketch = EigenSketch.of_most_energy(ekfac, moments, moments, 200)
    together = sketch.of_samples(gradients)
    for samples in ([6, 2, 0], [4], [3]):
        (alone,) = sample_gradients(tiny_model, layers, plan, pick(block, samples), MicroBatch(5))
        found = sketch.of_samples(alone)
        torch.testing.assert_close(found, together[samples], rtol=0, atol=1e-5 * together.abs().max().item())


def test_few_coordinates_are_those_of_all(
    tiny_model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, some: SampleBlock, ekfac: EkfacFisher
) -> None:
    """A few are gathered token by token, many are taken out of the whole product."""
    gradients = gradients_of(tiny_model, layers, plan, some)
    moments = sample_moments(ekfac, [gradients])
    whole, few = (EigenSketch.of_most_energy(ekfac, moments, moments, size) for size in (EVERY, 50))
    assert torch.equal(few.place, whole.place[:50]) and torch.equal(few.layer, whole.layer[:50])
    expected = whole.of_samples(gradients)
    torch.testing.assert_close(
        few.of_samples(gradients), expected[..., :50], rtol=1e-4, atol=1e-6 * expected.abs().max().item()
    )


def test_moments_of_samples_are_those_of_their_gradients(
    tiny_model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, some: SampleBlock, ekfac: EkfacFisher
) -> None:
    gradients = gradients_of(tiny_model, layers, plan, some)
    queries = as_queries(gradients, layers)
    found, expected = sample_moments(ekfac, [gradients]), step_moments(ekfac, [stack(queries[:2]), stack(queries[2:])])
    for name, moments in expected.items():
        torch.testing.assert_close(found[name], moments, rtol=1e-3, atol=1e-6 * moments.max().item())


def test_the_coordinates_with_most_energy_are_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    fisher = EkfacFisher(
        {
            name: LayerFactors(torch.eye(3), torch.eye(2), torch.rand(2, 3, generator=generator))
            for name in ("one", "two")
        },
        damping=0.5,
    )
    samples = {name: torch.rand(6, generator=generator, dtype=torch.float64) for name in fisher.layers}
    queries = [{name: torch.randn(2, 3, generator=generator) for name in fisher.layers} for _ in range(4)]
    steps = [{name: fisher.solve(name, gradient) for name, gradient in query.items()} for query in queries]
    sketch = EigenSketch.of_most_energy(fisher, samples, step_moments(fisher, [stack(steps[:1]), stack(steps[1:])]), 5)
    energies, scales = {}, {}
    for name, factors in fisher.layers.items():
        eigenvalues = factors.eigenvalues.flatten().tolist()
        damping = 0.5 * sum(eigenvalues) / 6
        asked = [sum(query[name].flatten()[place].item() ** 2 for query in queries) / 4 for place in range(6)]
        for place, (value, seen) in enumerate(zip(eigenvalues, samples[name].tolist(), strict=True)):
            energies[name, place] = seen * asked[place] / (value + damping) ** 2  # E[g^2] E[u^2]
            scales[name, place] = (value + damping) ** -0.5
    best = sorted(energies, key=lambda where: -energies[where])[:5]
    chosen = zip((sketch.names[number] for number in sketch.layer.tolist()), sketch.place.tolist(), strict=True)
    assert list(chosen) == best
    assert sketch.scale.tolist() == pytest.approx([scales[where] for where in best])
    assert sketch.energy_kept == pytest.approx(sum(energies[where] for where in best) / sum(energies.values()))


def test_as_many_directions_as_samples_keep_the_teachers_scores(
    tiny_model: DiffusionModel, layers: dict[str, Layer], plan: NoisePlan, some: SampleBlock, ekfac: EkfacFisher
) -> None:
    """What of a query stands at right angles to all samples adds nothing to any score."""
    gradients = gradients_of(tiny_model, layers, plan, some)
    generator = torch.Generator().manual_seed(5)
    queries = {name: torch.randn(3, *layer.weight.shape, generator=generator) for name, layer in layers.items()}
    update = unlearning_update(ekfac, queries, alpha=ALPHA, training_size=SAMPLES)
    expected = first_order_scores(tiny_model, layers, plan, some, [update], MicroBatch(24))
    moments = sample_moments(ekfac, [gradients])
    eigen = EigenSketch.of_most_energy(ekfac, moments, moments, EVERY)
    sketch = PrincipalSketch.of_samples_like(eigen, eigen.of_samples(gradients).flatten(0, 1), EVERY)
    assert len(sketch) <= gradients.count
    assert sketch.energy_kept[-1].item() == pytest.approx(1)
    found, asked = sketch.of_samples(gradients), sketch.of_query(queries)
    scores = torch.einsum("qk,nfk->qnf", asked.double(), found.double()).amax(2) * (ALPHA / SAMPLES)
    assert (scores - expected).norm() < 1e-4 * expected.norm()


def test_directions_are_the_right_singular_vectors_of_the_samples_sketches(ekfac: EkfacFisher) -> None:
    generator = torch.Generator().manual_seed(6)
    moments = {
        name: torch.rand(factors.eigenvalues.numel(), generator=generator, dtype=torch.float64)
        for name, factors in ekfac.layers.items()
    }
    eigen = EigenSketch.of_most_energy(ekfac, moments, moments, 40)
    sketches = torch.randn(25, 40, generator=generator) * torch.linspace(3, 0.1, 40)
    sketch = PrincipalSketch.of_samples_like(eigen, sketches, 6)
    _, values, right = torch.linalg.svd(sketches.double(), full_matrices=False)
    projector = right[:6].T @ right[:6]
    assert (sketch.directions.double() @ sketch.directions.double().T - projector).norm() < 1e-5
    assert sketch.energy_kept.tolist() == pytest.approx(
        (values.square().cumsum(0) / values.square().sum())[:6].tolist()
    )
    rounded = PrincipalSketch.of_samples_like(eigen, sketches.bfloat16(), 6).directions.double()
    assert (rounded @ rounded.T - projector).norm() < 0.05  # of sqrt(12) at most


def test_a_sketch_is_loaded_as_it_was_saved(
    tmp_path: Path,
    tiny_model: DiffusionModel,
    layers: dict[str, Layer],
    plan: NoisePlan,
    some: SampleBlock,
    ekfac: EkfacFisher,
) -> None:
    gradients = gradients_of(tiny_model, layers, plan, some)
    moments = sample_moments(ekfac, [gradients])
    eigen = EigenSketch.of_most_energy(ekfac, moments, moments, 300)
    sketch = PrincipalSketch.of_samples_like(eigen, eigen.of_samples(gradients).flatten(0, 1), 4)
    sketch.save(tmp_path / "sketch")
    again = PrincipalSketch.load(load_file(tmp_path / "sketch"), ekfac)
    expected = sketch.of_samples(gradients)
    torch.testing.assert_close(again.of_samples(gradients), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert again.energy_kept.tolist() == sketch.energy_kept.tolist()


def test_a_layer_whose_input_moves_has_no_factored_sketch(
    tiny_model: DiffusionModel, plan: NoisePlan, block: SampleBlock, layers: dict[str, Layer]
) -> None:
    gradients = gradients_of(tiny_model, layers, plan, block)
    moving = replace(gradients, moving={"conv": torch.zeros(7, 2, 2)})
    with pytest.raises(ValueError, match="layer conv changes with the timestep"):
        FactoredSketch.of_samples(moving)


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3 * BLOCK), st.floats(-30, 30), st.integers(0, 2**31))
def test_int8_is_off_by_half_a_scale_at_most(count: int, size: int, power: float, seed: int) -> None:
    vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) * 10**power
    vectors[0, : size // 2] = 0
    packed = Int8Vectors.of(vectors)
    assert packed.values.dtype == torch.int8 and packed.values.shape == vectors.shape
    largest = torch.nn.functional.pad(vectors, (0, -size % BLOCK)).view(count, -1, BLOCK).abs().amax(2)
    allowed = (largest / 254 * 1.001).repeat_interleave(BLOCK, dim=1)[:, :size]
    assert bool(((packed.dense() - vectors).abs() <= allowed).all())
    assert bytes_of(size) == size + 4 * -(-size // BLOCK)


def test_int8_refuses_what_is_no_number() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Int8Vectors.of(torch.tensor([[1.0, float("nan")]]))
