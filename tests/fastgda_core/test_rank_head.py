from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.evaluation.ranking_metrics import (
    average_precision,
    expected_random_average_precision,
    top_mask,
)
from fastgda_core.ranking.batches import RankBatch, RankBatches, RankPairs
from fastgda_core.ranking.head import RankHead, load_head, save_head, start_from_features
from fastgda_core.ranking.training import HeadTraining, RankData, RankModule, TrainedHead, train_head
from fastgda_core.search.index import build_index, read_index, search, write_index

QUERIES, SAMPLES, DIMS, TOP = 60, 300, 24, 30
TRAIN, VALIDATION, TEST = slice(0, 40), slice(40, 50), slice(50, 60)


def pairs_of(scores: Tensor) -> RankPairs:
    """Every (query, sample) with the label rank / K, rank 1 the highest score."""
    ranks = torch.argsort(torch.argsort(scores, dim=1, descending=True), dim=1) + 1
    queries, samples = scores.shape
    return RankPairs(
        torch.arange(queries).repeat_interleave(samples),
        torch.arange(samples).repeat(queries),
        (ranks.float() / samples).flatten(),
    )


def features() -> tuple[Tensor, Tensor, Tensor]:
    """Query and sample features, and teacher scores: cosine after a map that sees few of the dimensions."""
    generator = torch.Generator().manual_seed(0)
    query, sample = (torch.randn(count, DIMS, generator=generator) for count in (QUERIES, SAMPLES))
    sight = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=generator)).Q[:, :3]
    scores = F.normalize(query @ sight, dim=1) @ F.normalize(sample @ sight, dim=1).T
    return query, sample, scores


def rank_data(query: Tensor, sample: Tensor, scores: Tensor) -> RankData:
    return RankData(
        query_features=query,
        sample_features=sample,
        train_pairs=pairs_of(scores[TRAIN]),
        validation=torch.arange(QUERIES)[VALIDATION],
        relevant=top_mask(scores[VALIDATION], TOP),
        candidates=torch.ones(10, SAMPLES, dtype=torch.bool),
    )


def held_out_map(trained: TrainedHead, query: Tensor, sample: Tensor, scores: Tensor) -> float:
    cosine = trained.head(query[TEST]) @ trained.head(sample).T
    return average_precision(cosine, top_mask(scores[TEST], TOP)).mean().item()


OPTIONS = HeadTraining(epochs=5, batch_size=512, seed=3)


def test_head_learns_the_metric_that_ranks_the_samples() -> None:
    query, sample, scores = features()
    untuned = average_precision(
        F.normalize(query[TEST], dim=1) @ F.normalize(sample, dim=1).T, top_mask(scores[TEST], TOP)
    )
    trained = train_head(rank_data(query, sample, scores), OPTIONS)
    tuned = held_out_map(trained, query, sample, scores)
    assert untuned.mean() < 0.25
    assert tuned > 0.6
    assert len(trained.history) == OPTIONS.epochs
    assert trained.best_epoch == np.argmax([score for _, score in trained.history])
    # The head that comes back is that of the best epoch.
    cosine = trained.head(query[VALIDATION]) @ trained.head(sample).T
    best = average_precision(cosine, top_mask(scores[VALIDATION], TOP)).mean().item()
    assert best == pytest.approx(trained.history[trained.best_epoch][1], abs=1e-6)
    assert trained.history[-1][0] < trained.history[0][0]


def test_head_stays_near_chance_on_shuffled_labels() -> None:
    query, sample, _ = features()
    noise = torch.rand(QUERIES, SAMPLES, generator=torch.Generator().manual_seed(1))
    trained = train_head(rank_data(query, sample, noise), OPTIONS)
    chance = expected_random_average_precision(SAMPLES, TOP)
    assert held_out_map(trained, query, sample, noise) == pytest.approx(chance, abs=0.04)
    # Also on the validation queries, of which the best epoch was chosen: none of them was learned from.
    assert max(score for _, score in trained.history) == pytest.approx(chance, abs=0.04)


def test_same_seed_gives_the_same_head() -> None:
    query, sample, scores = features()
    first, second, other = (
        train_head(rank_data(query, sample, scores), HeadTraining(epochs=1, batch_size=2048, seed=seed)).head
        for seed in (1, 1, 2)
    )
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.mlp[0].weight, other.mlp[0].weight)


def test_samples_that_the_teacher_did_not_rank_do_not_count_in_validation() -> None:
    """Only the relevant samples are candidates: whatever the head says, they come first."""
    query, sample, scores = features()
    data = rank_data(query, sample, scores)
    data = RankData(**{**vars(data), "candidates": data.relevant})
    trained = train_head(data, HeadTraining(epochs=1, batch_size=4096))
    assert trained.history[0][1] == pytest.approx(1.0)


@pytest.fixture
def head() -> RankHead:
    torch.manual_seed(0)
    return RankHead(DIMS).eval().requires_grad_(False)


def test_head_comes_back_from_disk_as_it_was(head: RankHead, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head.safetensors")
    (tmp_path / "head.json").write_text(json.dumps({"features": DIMS}))
    loaded = load_head(tmp_path)
    assert not loaded.training
    query = features()[0]
    assert torch.equal(loaded(query), head(query))
    assert torch.equal(loaded.rank_logits(loaded(query), loaded(query)), head.rank_logits(head(query), head(query)))


def test_head_gives_unit_vectors_and_an_affine_map_of_their_cosine(head: RankHead) -> None:
    query, sample, _ = features()
    a, b = head(query), head(sample[:QUERIES])
    torch.testing.assert_close(a.norm(dim=1), torch.ones(QUERIES))
    cosine = F.cosine_similarity(a.double(), b.double()).numpy()
    # The first logits of an untrained head: -5 x cosine.
    np.testing.assert_allclose(head.rank_logits(a, b).numpy(), -5 * cosine, atol=1e-5)


@pytest.mark.parametrize(("samples", "dims"), [(300, 24), (20, 24), (600, 500)])
def test_head_that_starts_from_the_features_has_the_cosines_of_their_principal_axes(samples: int, dims: int) -> None:
    torch.manual_seed(3)
    known = torch.randn(samples, dims) @ torch.randn(dims, dims) + 5
    queries = known[:10] + torch.randn(10, dims)
    head = RankHead(dims).eval()
    start_from_features(head, known)
    centred, mean = known.double().numpy() - known.double().numpy().mean(0), known.double().numpy().mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:384][: samples - 1]

    def project(rows: Tensor) -> np.ndarray:
        projected = (rows.double().numpy() - mean) @ axes.T
        return projected / np.linalg.norm(projected, axis=1, keepdims=True)

    cosines = (head(queries) @ head(known).T).detach().numpy()
    np.testing.assert_allclose(cosines, project(queries) @ project(known).T, atol=2e-3)


@pytest.mark.parametrize("offset", [None, 0.02])
def test_training_loss_is_the_weighted_mean_of_binary_cross_entropies(offset: float | None) -> None:
    query, sample, scores = features()
    module = RankModule(rank_data(query, sample, scores), HeadTraining(rank_offset=offset), lambda: None)
    module.eval()
    module.on_fit_start()
    label = torch.rand(5) * 0.9 + 0.05
    batch = RankBatch(torch.tensor([7, 4, 9]), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 2, 2, 0]), label)
    cosine = (module.head(query[batch.query]) * module.head(sample[batch.samples][batch.position])).sum(1)
    logit = (module.head.scale * cosine + module.head.bias).detach().double().numpy()
    probability, pi = 1 / (1 + np.exp(-logit)), label.double().numpy()
    losses = -(pi * np.log(probability) + (1 - pi) * np.log(1 - probability))
    weights = np.ones(5) if offset is None else 1 / (pi + offset)
    expected = np.average(losses, weights=weights)
    assert module.training_step(batch, 0).item() == pytest.approx(expected, rel=1e-5)


def test_index_ranks_as_the_head_does(head: RankHead, tmp_path: Path) -> None:
    query, sample, _ = features()
    train_ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(5)).numpy() + 2**33
    write_index(build_index(head(sample).numpy(), train_ids), tmp_path / "index.faiss")
    similarity, found = search(read_index(tmp_path / "index.faiss"), head(query).numpy(), 2 * SAMPLES)
    cosine = (head(query).double() @ head(sample).double().T).numpy()
    order = np.argsort(-cosine, axis=1, kind="stable")
    assert np.array_equal(found, train_ids[order])
    np.testing.assert_allclose(similarity, np.take_along_axis(cosine, order, 1), atol=1e-5)
    assert np.array_equal(search(read_index(tmp_path / "index.faiss"), head(query).numpy(), 7)[1], found[:, :7])


@st.composite
def some_pairs(draw: st.DrawFn) -> tuple[RankPairs, int]:
    """A random subset of all (query, sample), in random order, each with a label of its own below 1."""
    queries, samples = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    everything = [(query, sample) for query in range(queries) for sample in range(samples)]
    chosen = draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    query, sample = torch.tensor(chosen).T
    return RankPairs(query, sample, (torch.arange(len(chosen)) + 1) / (len(chosen) + 1)), samples


@settings(max_examples=80, deadline=None)
@given(some_pairs(), st.integers(1, 60), st.integers(0, 3))
def test_every_pair_occurs_exactly_once_an_epoch(
    given_pairs: tuple[RankPairs, int], batch_size: int, seed: int
) -> None:
    pairs, samples = given_pairs
    expected = sorted(zip(pairs.query.tolist(), pairs.sample.tolist(), pairs.label.tolist(), strict=True))
    batches = RankBatches(pairs, samples, batch_size, outside_probability=0.0, seed=seed)
    most = int(torch.bincount(pairs.sample).max())
    for _epoch in range(2):
        seen = []
        for batch in batches:
            assert len(batch.samples) == len(set(batch.samples.tolist()))
            assert len(batch.label) < batch_size + most
            seen += zip(batch.query.tolist(), batch.samples[batch.position].tolist(), batch.label.tolist(), strict=True)
        assert sorted(seen) == expected


@pytest.mark.parametrize("candidates", [5, 1000, 1900])
def test_a_tenth_of_the_pairs_become_non_candidates_of_label_one(candidates: int) -> None:
    samples, queries, probability = 2000, 12_000 // candidates + 1, 0.1
    generator = torch.Generator().manual_seed(0)
    sample = torch.cat([torch.randperm(samples, generator=generator)[:candidates] for _ in range(queries)])
    query = torch.arange(queries).repeat_interleave(candidates)
    pairs = RankPairs(query, sample, torch.full((len(query),), 0.5))
    own = set(zip(query.tolist(), sample.tolist(), strict=True))
    replaced = 0
    for batch in RankBatches(pairs, samples, 512, probability, seed=1):
        found = zip(batch.query.tolist(), batch.samples[batch.position].tolist(), batch.label.tolist(), strict=True)
        for number, row, label in found:
            assert ((number, row) in own) == (label == 0.5)
            assert label in (0.5, 1.0)
            replaced += label == 1.0
    standard_error = (probability * (1 - probability) / len(query)) ** 0.5
    assert abs(replaced / len(query) - probability) < 5 * standard_error


def test_a_query_with_every_sample_as_candidate_keeps_its_own() -> None:
    pairs = pairs_of(torch.rand(3, 20, generator=torch.Generator().manual_seed(0)))
    for batch in RankBatches(pairs, 20, 16, outside_probability=1.0, seed=0):
        own = batch.query * 20 + batch.samples[batch.position]
        assert torch.equal(batch.label, pairs.label[own])
