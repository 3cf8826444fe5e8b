from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.evaluation.ranking_metrics import (
    average_precision,
    expected_random_average_precision,
    top_mask,
)
from fastgda_core.ranking.batches import RankBatch, RankBatches, RankPairs
from fastgda_core.ranking.head import RankHead, load_head, load_release_checkpoint, save_head, start_from_features
from fastgda_core.ranking.losses import LOSSES, rank_loss
from fastgda_core.ranking.training import HeadTraining, RankData, TrainedHead, fetched_ahead, train_head
from fastgda_core.search.build import add, new_index, write_index
from fastgda_core.search.searcher import open_index

QUERIES, SAMPLES, DIMS, TOP = 60, 300, 24, 30
TRAIN, VALIDATION, TEST = slice(0, 40), slice(40, 50), slice(50, 60)


def pairs_of(scores: Tensor) -> RankPairs:
    """Every (query, sample) with the label rank / K, rank 1 the highest score."""
    ranks = torch.argsort(torch.argsort(scores, dim=1, descending=True), dim=1) + 1
    queries, samples = scores.shape
    query, sample = torch.arange(queries).repeat_interleave(samples), torch.arange(samples).repeat(queries)
    return RankPairs.of(query, sample, (ranks.float() / samples).flatten(), queries=queries, samples=samples)


def features() -> tuple[Tensor, Tensor, Tensor]:
    """Query and sample features, and teacher scores: cosine after a map that sees few of the dimensions."""
    generator = torch.Generator().manual_seed(0)
    query, sample = (torch.randn(count, DIMS, generator=generator) for count in (QUERIES, SAMPLES))
    sight = torch.linalg.qr(torch.randn(DIMS, DIMS, generator=generator)).Q[:, :3]
    scores = F.normalize(query @ sight, dim=1) @ F.normalize(sample @ sight, dim=1).T
    return query, sample, scores


def everything(scores: Tensor) -> CandidateScores:
    """Scores, (queries, samples), of which all samples are candidates."""
    return CandidateScores(torch.arange(scores.shape[1], dtype=torch.int32).repeat(len(scores), 1), scores.double())


def rank_data(query: Tensor, sample: Tensor, scores: Tensor) -> RankData:
    return RankData(
        query_features=query,
        sample_features=sample,
        train_pairs=pairs_of(scores[TRAIN]),
        validation=torch.arange(QUERIES)[VALIDATION],
        validation_scores=everything(scores[VALIDATION]),
        relevant=top_mask(scores[VALIDATION], TOP),
    )


def held_out_map(trained: TrainedHead, query: Tensor, sample: Tensor, scores: Tensor) -> float:
    cosine = trained.head(query[TEST]) @ trained.head(sample).T
    return average_precision(cosine, top_mask(scores[TEST], TOP)).mean().item()


OPTIONS = HeadTraining(epochs=5, batch_size=512, seed=3)


@pytest.mark.integration
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


@pytest.mark.integration
def test_head_becomes_the_metric_where_there_are_queries_enough() -> None:
    generator = torch.Generator().manual_seed(7)
    query, sample = torch.randn(240, 16, generator=generator), torch.randn(500, 16, generator=generator)
    scores = F.normalize(query[:, :3], dim=1) @ F.normalize(sample[:, :3], dim=1).T
    data = RankData(
        query_features=query,
        sample_features=sample,
        train_pairs=pairs_of(scores[:200]),
        validation=torch.arange(200, 220),
        validation_scores=everything(scores[200:220]),
        relevant=top_mask(scores[200:220], 50),
    )
    head = train_head(data, HeadTraining(epochs=4, batch_size=1024)).head
    tuned = average_precision(head(query[220:]) @ head(sample).T, top_mask(scores[220:], 50)).mean()
    untuned = F.normalize(query[220:], dim=1) @ F.normalize(sample, dim=1).T
    assert average_precision(untuned, top_mask(scores[220:], 50)).mean() < 0.5
    assert tuned >= 0.95


@pytest.mark.integration
def test_head_stays_near_chance_on_shuffled_labels() -> None:
    query, sample, _ = features()
    noise = torch.rand(QUERIES, SAMPLES, generator=torch.Generator().manual_seed(1))
    trained = train_head(rank_data(query, sample, noise), OPTIONS)
    chance = expected_random_average_precision(SAMPLES, TOP)
    assert held_out_map(trained, query, sample, noise) == pytest.approx(chance, abs=0.04)
    # Also on the validation queries, of which the best epoch was chosen: none of them was learned from.
    assert max(score for _, score in trained.history) == pytest.approx(chance, abs=0.04)


@pytest.mark.heavy
def test_training_leaves_the_log_levels_of_the_process_alone() -> None:
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.DEBUG)
    try:
        train_head(rank_data(*features()), HeadTraining(epochs=1, batch_size=4096))
        assert log.level == logging.DEBUG
    finally:
        log.setLevel(before)


@pytest.mark.heavy
def test_same_seed_gives_the_same_head() -> None:
    query, sample, scores = features()
    first, second, other = (
        train_head(rank_data(query, sample, scores), HeadTraining(epochs=1, batch_size=2048, seed=seed)).head
        for seed in (1, 1, 2)
    )
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.mlp.layers[0].weight, other.mlp.layers[0].weight)


def test_samples_that_the_teacher_did_not_rank_do_not_count_in_validation() -> None:
    """Only the relevant samples are candidates: whatever the head says, they come first."""
    query, sample, scores = features()
    data = rank_data(query, sample, scores)
    row, train_id = data.relevant.nonzero(as_tuple=True)
    few = CandidateScores.of(row, train_id, scores[VALIDATION][data.relevant], queries=10)
    data = dataclasses.replace(data, validation_scores=few, relevant=torch.ones(10, TOP, dtype=torch.bool))
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
    assert torch.equal(loaded.scale, head.scale) and torch.equal(loaded.bias, head.bias)


def test_head_gives_unit_vectors_and_an_affine_map_of_their_cosine(head: RankHead) -> None:
    query, sample, _ = features()
    a, b = head(query), head(sample[:QUERIES])
    torch.testing.assert_close(a.norm(dim=1), torch.ones(QUERIES))
    cosine = F.cosine_similarity(a.double(), b.double()).numpy()
    # The first logits of an untrained head: -5 x cosine.
    np.testing.assert_allclose(head.affine((a * b).sum(1))[:, 0].numpy(), -5 * cosine, atol=1e-5)


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


def release_weights(*, input_norm: bool) -> dict[str, Tensor]:
    """As FastGDA's release saves them: three hidden layers, scale and bias of one entry."""
    generator = torch.Generator().manual_seed(1)
    widths = (DIMS, 40, 50, 60, 30)
    names = [*(f"mlp.layers.{number}" for number in range(3)), "mlp.output_layer"]
    found = {}
    for name, (width_in, width_out) in zip(names, itertools.pairwise(widths), strict=True):
        found[f"{name}.weight"] = torch.randn(width_out, width_in, generator=generator)
        found[f"{name}.bias"] = torch.randn(width_out, generator=generator)
    if input_norm:
        found |= {f"mlp.input_norm.{name}": torch.rand(DIMS, generator=generator) for name in ("weight", "bias")}
    return {**found, "scale": torch.tensor([-3.0]), "bias": torch.tensor([0.5])}


@pytest.mark.parametrize("input_norm", [False, True])
def test_the_releases_checkpoint_computes_what_its_layers_say(tmp_path: Path, input_norm: bool) -> None:
    weights = release_weights(input_norm=input_norm)
    torch.save(weights, tmp_path / "head.pth")
    head = load_release_checkpoint(tmp_path / "head.pth")
    query = features()[0]
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    x = query.double().numpy()
    if input_norm:
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        x = x * w["mlp.input_norm.weight"] + w["mlp.input_norm.bias"]
    for number in range(3):
        x = np.maximum(x @ w[f"mlp.layers.{number}.weight"].T + w[f"mlp.layers.{number}.bias"], 0)
    x = x @ w["mlp.output_layer.weight"].T + w["mlp.output_layer.bias"]
    np.testing.assert_allclose(head(query).numpy(), x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-5)
    assert head.affine(torch.tensor([0.5])).item() == pytest.approx(-1.0)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "content",
    [
        {"mlp.layers.0.weight": Malicious()},
        [torch.zeros(2)],
        {"weights": torch.zeros(2)},
        {**release_weights(input_norm=False), "mlp.layers.1.weight": torch.zeros(50, 41)},
    ],
    ids=["code", "list", "other names", "other shape"],
)
def test_what_is_no_rank_head_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(UsageError, match=r"head\.pth is no ") as caught:
        load_release_checkpoint(tmp_path / "head.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("scale", [-3.0, 0.98])
def test_an_imported_head_ranks_by_its_logits_whatever_the_sign_of_its_scale(scale: float, tmp_path: Path) -> None:
    """The release orders samples by scale * cos + bias, the lowest logit first (its `get_rank`)."""
    torch.save({**release_weights(input_norm=False), "scale": torch.tensor([scale])}, tmp_path / "head.pth")
    head = load_release_checkpoint(tmp_path / "head.pth")
    queries, samples = torch.randn(2, 5, head.features, generator=torch.Generator().manual_seed(0))
    logits = scale * F.cosine_similarity(head(queries)[:, None], head(samples)[None], dim=2) + 0.5
    similarity = head.queries(queries) @ head(samples).T
    assert torch.equal(similarity.argsort(1, descending=True), logits.argsort(1))


@pytest.mark.parametrize("scale", [[0.0], [1.0, -1.0]])
def test_a_head_whose_cosines_say_nothing_is_refused(scale: list[float], tmp_path: Path) -> None:
    content = {**release_weights(input_norm=False), "scale": torch.tensor(scale), "bias": torch.zeros(len(scale))}
    torch.save(content, tmp_path / "head.pth")
    with pytest.raises(UsageError, match=r"head\.pth: its scale is \["):
        load_release_checkpoint(tmp_path / "head.pth")


LABELS = torch.tensor([[0.12, torch.nan, 0.85, 0.45], [torch.nan, 1.0, 0.35, torch.nan]])


def numbers(name: str) -> tuple[Tensor, np.ndarray, list[tuple[int, int]]]:
    """Outputs, the same in float64, and which pairs there are."""
    outputs = torch.randn(2, 4, LOSSES[name].outputs, generator=torch.Generator().manual_seed(2))
    return outputs, outputs.double().numpy(), [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2)]


@pytest.mark.parametrize("offset", [None, 0.02])
@pytest.mark.parametrize("name", ["bce", "mse", "ordinal", "regression"])
def test_losses_of_pairs_are_the_weighted_means_of_their_definitions(name: str, offset: float | None) -> None:
    outputs, x, pairs = numbers(name)

    def cross_entropy(logit: float, target: float) -> float:
        probability = 1 / (1 + math.exp(-logit))
        return -(target * math.log(probability) + (1 - target) * math.log(1 - probability))

    of_pair = {
        "bce": lambda x, pi: cross_entropy(x[0], pi),
        "mse": lambda x, pi: (1 / (1 + math.exp(-x[0])) - pi) ** 2,
        "ordinal": lambda x, pi: np.mean([cross_entropy(x[k], float(pi > (k + 1) / 10)) for k in range(9)]),
        "regression": lambda x, score: (x[0] - score) ** 2,
    }[name]
    losses = [of_pair(x[pair], LABELS[pair].item()) for pair in pairs]
    weighted = offset is not None and name != "regression"
    weights = [1 / (LABELS[pair].item() + offset) if weighted else 1.0 for pair in pairs]
    found = rank_loss(name, outputs, LABELS, offset)
    assert found.item() == pytest.approx(np.average(losses, weights=weights), rel=1e-5)


def test_the_listwise_loss_is_the_cross_entropy_of_two_distributions() -> None:
    outputs, x, pairs = numbers("listwise")
    expected = 0.0
    for row in range(2):
        mine = [pair for pair in pairs if pair[0] == row]
        gains = np.array([1 / (LABELS[pair].item() + 0.02) for pair in mine])
        logits = np.array([-x[pair][0] for pair in mine])
        expected -= (gains / gains.sum() * (logits - np.log(np.exp(logits).sum()))).sum() / 2
    assert rank_loss("listwise", outputs, LABELS, None).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_pairs_that_there_are_not_send_no_gradient(name: str) -> None:
    outputs = numbers(name)[0].requires_grad_()
    rank_loss(name, outputs, LABELS, 0.02).backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()
    assert torch.equal((outputs.grad != 0).any(-1), ~LABELS.isnan())


@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_learns_the_metric_that_ranks_the_samples(name: str) -> None:
    query, sample, scores = features()
    data = rank_data(query, sample, scores)
    if LOSSES[name].standardised_scores:
        labels = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
        pairs = data.train_pairs
        mine = labels[pairs.query, pairs.sample]
        data = dataclasses.replace(data, train_pairs=dataclasses.replace(pairs, label=mine))
    trained = train_head(data, HeadTraining(epochs=5, batch_size=512, seed=3, loss=name))
    assert held_out_map(trained, query, sample, scores) > 0.6


def test_index_ranks_as_the_head_does(head: RankHead, tmp_path: Path) -> None:
    query, sample, _ = features()
    index = new_index("Flat", head(sample).shape[1])
    add(index, head(sample).detach().numpy(), np.arange(SAMPLES))
    write_index(index, tmp_path / "index.faiss")
    searcher = open_index(tmp_path / "index.faiss")
    similarity, found = searcher.search(head(query).numpy(), 2 * SAMPLES)
    cosine = (head(query).double() @ head(sample).double().T).numpy()
    order = np.argsort(-cosine, axis=1, kind="stable")
    assert np.array_equal(found, order)
    np.testing.assert_allclose(similarity, np.take_along_axis(cosine, order, 1), atol=1e-5)
    assert np.array_equal(searcher.search(head(query).numpy(), 7)[1], found[:, :7])


@st.composite
def some_pairs(draw: st.DrawFn) -> RankPairs:
    """A random subset of all (query, sample), in random order, each with a label of its own below 1."""
    queries, samples = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    everything = [(query, sample) for query in range(queries) for sample in range(samples)]
    chosen = draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    query, sample = torch.tensor(chosen).T
    labels = (torch.arange(len(chosen)) + 1) / (len(chosen) + 1)
    return RankPairs.of(query, sample, labels, queries=queries, samples=samples)


def pairs_in(batch: RankBatch) -> list[tuple[int, int, float]]:
    row, column = torch.nonzero(~batch.label.isnan(), as_tuple=True)
    labels = batch.label[row, column].tolist()
    return list(zip(batch.queries[row].tolist(), batch.samples[column].tolist(), labels, strict=True))


@pytest.mark.heavy
@settings(max_examples=80)
@given(some_pairs(), st.integers(1, 60), st.integers(0, 3))
def test_every_pair_occurs_exactly_once_an_epoch(pairs: RankPairs, batch_size: int, seed: int) -> None:
    expected = sorted(zip(pairs.query.tolist(), pairs.sample.tolist(), pairs.label.tolist(), strict=True))
    for epoch in range(2):
        seen = []
        for batch in RankBatches(pairs, batch_size, 0.0, seed, lambda epoch=epoch: epoch):
            assert len(batch.queries) == len(set(batch.queries.tolist()))
            assert len(batch.samples) == len(set(batch.samples.tolist()))
            assert len(pairs_in(batch)) <= batch_size
            seen += pairs_in(batch)
        assert sorted(seen) == expected


@settings(max_examples=80)
@given(some_pairs())
def test_pairs_are_found_among_all_that_there_might_be(pairs: RankPairs) -> None:
    query, sample = torch.cartesian_prod(torch.arange(pairs.queries), torch.arange(pairs.samples)).T
    own = set(zip(pairs.query.tolist(), pairs.sample.tolist(), strict=True))
    expected = [pair in own for pair in zip(query.tolist(), sample.tolist(), strict=True)]
    assert pairs.contain(query, sample).tolist() == expected


def test_queries_that_are_drawn_a_few_at_a_time_are_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgda_core.ranking.batches.PAIRS_AT_ONCE", 200)
    pairs = pairs_of(torch.rand(17, 90, generator=torch.Generator().manual_seed(0)))
    batches = RankBatches(pairs, 40, 0.0, 0, lambda: 0)
    assert 1 < batches.at_once * batches.group < 17
    seen = [(query, sample) for batch in batches for query, sample, _ in pairs_in(batch)]
    assert sorted(seen) == [(query, sample) for query in range(17) for sample in range(90)]


def test_an_epochs_batches_depend_on_its_number_and_the_seed_alone() -> None:
    pairs = pairs_of(torch.rand(7, 90, generator=torch.Generator().manual_seed(0)))

    def epoch(number: int, seed: int = 1) -> list[list[tuple[int, int, float]]]:
        return [pairs_in(batch) for batch in RankBatches(pairs, 40, 0.1, seed, lambda: number)]

    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4) and epoch(3) != epoch(3, seed=2)


def test_processes_share_an_epoch_in_equal_parts() -> None:
    pairs = pairs_of(torch.rand(7, 90, generator=torch.Generator().manual_seed(0)))
    shares = [list(RankBatches(pairs, 40, 0.0, 1, lambda: 0, rank, 3)) for rank in range(3)]
    whole = list(RankBatches(pairs, 40, 0.0, 1, lambda: 0))
    assert len({len(share) for share in shares}) == 1
    together = [pair for share in shares for batch in share for pair in pairs_in(batch)]
    assert len(together) == len(set(together)) >= len(pairs) - 40 * 2
    assert sum(map(len, shares)) == len(whole) // 3 * 3


@pytest.mark.parametrize("density", [1.0, 0.1, 0.01])
def test_a_batch_has_far_fewer_items_than_pairs(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, samples, size = 500, 4000, 1024
    query, sample = torch.nonzero(torch.rand(queries, samples, generator=generator) < density, as_tuple=True)
    pairs = RankPairs.of(query, sample, torch.rand(len(query), generator=generator), queries=queries, samples=samples)
    batches = list(itertools.islice(RankBatches(pairs, size, 0.0, 0, lambda: 0), 50))
    full = [batch for batch in batches if (~batch.label.isnan()).sum() == size]
    assert len(full) >= 0.8 * len(batches)
    items = np.mean([len(batch.queries) + len(batch.samples) for batch in full])
    assert items < 1.2 * 2 * (size / density) ** 0.5


@pytest.mark.heavy
@pytest.mark.parametrize("candidates", [5, 1000, 1900])
def test_a_tenth_of_the_pairs_become_non_candidates_of_label_one(candidates: int) -> None:
    samples, queries, probability = 2000, 12_000 // candidates + 1, 0.1
    generator = torch.Generator().manual_seed(0)
    sample = torch.cat([torch.randperm(samples, generator=generator)[:candidates] for _ in range(queries)])
    query = torch.arange(queries).repeat_interleave(candidates)
    pairs = RankPairs.of(query, sample, torch.full((len(query),), 0.5), queries=queries, samples=samples)
    own = set(zip(query.tolist(), sample.tolist(), strict=True))
    replaced = []
    for epoch in range(5):
        for batch in RankBatches(pairs, 512, probability, 1, lambda epoch=epoch: epoch):
            for number, row, label in pairs_in(batch):
                assert ((number, row) in own) == (label == 0.5)
                assert label in (0.5, 1.0)
                if label == 1.0:
                    replaced.append(row)
    drawn = 5 * len(query)
    standard_error = (probability * (1 - probability) / drawn) ** 0.5
    # A query may draw the same sample twice in a batch, which then is one pair.
    assert -0.03 * probability - 5 * standard_error < len(replaced) / drawn - probability < 5 * standard_error
    if candidates < 1900:  # uniform over the samples: the mean of their numbers
        assert abs(np.mean(replaced) - samples / 2) < 0.06 * samples


def test_a_query_with_every_sample_as_candidate_keeps_its_own() -> None:
    pairs = pairs_of(torch.rand(3, 20, generator=torch.Generator().manual_seed(0)))
    for batch in RankBatches(pairs, 16, 1.0, 0, lambda: 0):
        for query, sample, label in pairs_in(batch):
            assert label == pairs.label[query * 20 + sample]


def test_a_pair_that_occurs_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        RankPairs.of(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.rand(2), queries=1, samples=2)


class Killed(Exception): ...


@pytest.mark.integration
@pytest.mark.parametrize("loss", ["bce", "listwise"])
def test_a_training_that_was_killed_goes_on_to_the_same_head(tmp_path: Path, loss: str) -> None:
    query, sample, scores = features()
    data, options = rank_data(query, sample, scores), HeadTraining(epochs=4, batch_size=2048, seed=3, loss=loss)
    whole = train_head(data, options)
    epochs = iter(range(2))

    def kill() -> None:
        if next(epochs, None) is None:
            raise Killed

    with pytest.raises(Killed):
        train_head(data, options, kill, tmp_path)
    resumed = train_head(data, options, checkpoints=tmp_path)
    assert resumed.history == whole.history and resumed.best_epoch == whole.best_epoch
    for name, tensor in whole.head.state_dict().items():
        assert torch.equal(tensor, resumed.head.state_dict()[name])
    finished = train_head(data, options, kill, tmp_path)
    assert finished.history == whole.history, "one that was finished is not begun again"


@pytest.mark.integration
def test_two_processes_train_together() -> None:
    query, sample, scores = features()
    options = HeadTraining(epochs=3, batch_size=512, seed=3, devices=2)
    trained = train_head(rank_data(query, sample, scores), options, lambda: None)
    assert len(trained.history) == 3
    assert held_out_map(trained, query, sample, scores) > 0.6
    alone = train_head(rank_data(query, sample, scores), dataclasses.replace(options, devices=1))
    assert trained.history != alone.history, "each draws batches of its own"


@pytest.mark.heavy
def test_a_checkpoint_in_pieces_is_no_obstacle(tmp_path: Path) -> None:
    query, sample, scores = features()
    data, options = rank_data(query, sample, scores), HeadTraining(epochs=1, batch_size=2048)
    whole = train_head(data, options, checkpoints=tmp_path)
    latest = tmp_path / "latest.ckpt"
    latest.write_bytes(latest.read_bytes()[:1000])
    again = train_head(data, options, checkpoints=tmp_path)
    assert again.history == whole.history


@pytest.mark.integration
def test_features_that_stay_in_main_memory_give_the_same_head() -> None:
    query, sample, scores = features()
    data = rank_data(query, sample, scores)
    first, second = (train_head(data, HeadTraining(epochs=2, batch_size=512, resident=r)).head for r in (True, False))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@pytest.mark.heavy
def test_training_ends_when_validation_no_longer_improves() -> None:
    query, sample, _ = features()
    noise = torch.rand(QUERIES, SAMPLES, generator=torch.Generator().manual_seed(1))
    trained = train_head(rank_data(query, sample, noise), HeadTraining(epochs=60, batch_size=2048, patience=2))
    assert len(trained.history) < 60
    assert len(trained.history) == trained.best_epoch + 1 + 2


def test_items_fetched_ahead_come_in_order_and_a_failure_comes_through() -> None:
    def some() -> Iterator[int]:
        yield from range(10)
        raise KeyError("no more")

    found = fetched_ahead(some())
    assert [next(found) for _ in range(10)] == list(range(10))
    with pytest.raises(KeyError):
        next(found)
    running = threading.active_count()
    endless = fetched_ahead(itertools.count())
    assert next(endless) == 0
    endless.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > running:
        assert time.monotonic() < deadline, "the thread stays behind"
        time.sleep(0.01)
