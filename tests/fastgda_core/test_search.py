"""Indexes of every kind against brute force in NumPy: answers, filters, settings, merging, files that are not whole."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgda_core.errors import UsageError
from fastgda_core.search import rounded
from fastgda_core.search.build import add, can_merge, has_own_ids, merge, new_index, read_index, train, write_index
from fastgda_core.search.kinds import bytes_each, choose_kind, is_kind
from fastgda_core.search.recall import Neighbours, exact_neighbours, measure, perturbed, recall, settings_for
from fastgda_core.search.rounded import Rounded
from fastgda_core.search.searcher import MANY, TRIED, Searcher, SearchSettings, open_index

COUNT, WIDTH, K = 3000, 32, 10
KINDS = (
    *("Flat", "SQfp16", "HNSW16,SQfp16", "HNSW16,Flat", "IVF16,Flat", "IVF16_HNSW8,SQ8", "IVF16,RaBitQ6"),
    *("IVF16,RaBitQ4,Refine(SQfp16)", "IVF16,RaBitQfs,Refine(Flat)", "OPQ8_32,IVF16,PQ8x4fs,Refine(SQfp16)"),
    *("IVF16,PQ16x4", "RR32,IVF16,RaBitQ6"),
)
EVERYTHING = SearchSettings(nprobe=16, ef_search=512, k_factor=16.0)
Vectors = NDArray[np.float32]


def unit(rows: Vectors) -> Vectors:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, WIDTH))
    return unit((centres[rng.integers(0, 40, COUNT)] + 0.5 * rng.standard_normal((COUNT, WIDTH))).astype(np.float32))


@pytest.fixture(scope="module")
def queries(vectors: Vectors) -> Vectors:
    rng = np.random.default_rng(1)
    return unit(vectors[:20] + 0.3 * rng.standard_normal((20, WIDTH)).astype(np.float32))


@pytest.fixture(scope="module")
def train_ids() -> NDArray[np.int64]:
    """Every third is missing, as where samples were removed before."""
    numbers = np.arange(COUNT * 3 // 2)
    return numbers[numbers % 3 != 1]


def built(kind: str, vectors: Vectors, train_ids: NDArray[np.int64]) -> Searcher:
    index = new_index(kind, WIDTH)
    train(index, vectors, kind=kind)
    for some in np.array_split(np.arange(len(vectors)), 3):
        add(index, vectors[some], train_ids[some])
    return Searcher(index, train_ids, EVERYTHING)


def brute_force(queries: Vectors, vectors: Vectors, train_ids: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    return train_ids[np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]]


def found_of(expected: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    return float(
        np.mean([len(set(mine) & set(right)) / len(right) for mine, right in zip(found, expected, strict=True)])
    )


def test_flat_is_brute_force(vectors: Vectors, queries: Vectors, train_ids: NDArray[np.int64]) -> None:
    similarity, found = built("Flat", vectors, train_ids).search(queries, K)
    expected = brute_force(queries, vectors, train_ids, K)
    assert np.array_equal(found, expected)
    np.testing.assert_allclose(similarity, -np.sort(-(queries @ vectors.T), axis=1)[:, :K], rtol=1e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_train_ids_and_honours_a_filter(
    kind: str, vectors: Vectors, queries: Vectors, train_ids: NDArray[np.int64], tmp_path: Path
) -> None:
    searcher = built(kind, vectors, train_ids)
    least = {"IVF16,PQ16x4": 0.5, "IVF16,RaBitQfs,Refine(Flat)": 0.85}.get(kind, 0.9)
    found = searcher.search(queries, K)[1]
    assert found_of(brute_force(queries, vectors, train_ids, K), found) >= least

    allowed = np.zeros(train_ids[-1] + 1, dtype=bool)
    allowed[::2] = True
    here = allowed[train_ids]
    expected = brute_force(queries, vectors[here], train_ids[here], K)
    found = searcher.search(queries, K, allowed=allowed)[1]
    assert allowed[found].all() and np.isin(found, train_ids).all()
    assert found_of(expected, found) >= least

    few = np.zeros(train_ids[-1] + 1, dtype=bool)
    few[train_ids[[7, 400, 2900]]] = True  # a graph leads to none of them, and lists that are near hold none
    narrow = SearchSettings(nprobe=1, ef_search=8, k_factor=1.0)
    found = searcher.search(queries, K, allowed=few, settings=narrow)[1]
    assert found.shape == (len(queries), 3)
    assert all(set(row) == set(train_ids[[7, 400, 2900]]) for row in found)

    write_index(searcher.index, tmp_path / "index.faiss")
    mapped = open_index(tmp_path / "index.faiss", train_ids, EVERYTHING)
    for settings in (EVERYTHING, narrow):
        mine, theirs = (each.search(queries, K, allowed=allowed, settings=settings) for each in (mapped, searcher))
        assert np.array_equal(mine[1], theirs[1])
        np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5)


def test_threads_share_an_index_with_settings_and_filters_of_their_own(
    vectors: Vectors, queries: Vectors, train_ids: NDArray[np.int64]
) -> None:
    searcher = built("IVF16,Flat", vectors, train_ids)
    everyone = np.ones(train_ids[-1] + 1, dtype=bool)
    cases = []
    for nprobe in (1, 16):
        for part in (2, 3):
            allowed = everyone.copy()
            allowed[::part] = False
            cases.append((SearchSettings(nprobe=nprobe), searcher.selection(allowed)))
    expected = [searcher.search(queries, K, allowed=chosen, settings=settings)[1] for settings, chosen in cases]
    wrong: list[int] = []

    def ask(number: int) -> None:
        settings, chosen = cases[number % len(cases)]
        for _ in range(20):
            found = searcher.search(queries, K, allowed=chosen, settings=settings)[1]
            if not np.array_equal(found, expected[number % len(cases)]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_filter_that_ends_too_early_or_allows_nothing(
    vectors: Vectors, queries: Vectors, train_ids: NDArray[np.int64]
) -> None:
    for kind in ("Flat", "IVF16,Flat"):
        searcher = built(kind, vectors, train_ids)
        with pytest.raises(UsageError, match="does not reach train_id"):
            searcher.search(queries, K, allowed=np.ones(train_ids[-1], dtype=bool))
        similarity, found = searcher.search(queries, K, allowed=np.zeros(train_ids[-1] + 5, dtype=bool))
        assert similarity.shape == found.shape == (len(queries), 0)
    with pytest.raises(UsageError, match="an index of 3,000 vectors has ids of 2,999"):
        Searcher(built("Flat", vectors, train_ids).index, train_ids[1:])


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith(("HNSW", "OPQ"))])
def test_parts_that_are_merged_are_the_index_that_was_built_at_once(
    kind: str, vectors: Vectors, queries: Vectors, train_ids: NDArray[np.int64], tmp_path: Path
) -> None:
    empty = new_index(kind, WIDTH)
    train(empty, vectors, kind=kind)
    write_index(empty, tmp_path / "trained.faiss")
    whole, merged = (read_index(tmp_path / "trained.faiss") for _ in range(2))
    add(whole, vectors, train_ids)
    for number, some in enumerate(np.array_split(np.arange(COUNT), 4)):
        later = read_index(tmp_path / "trained.faiss")
        add(later, vectors[some], train_ids[some])
        if number:
            merge(merged, later)
        else:
            merged = later
    assert merged.ntotal == COUNT and can_merge(merged)
    write_index(merged, tmp_path / "merged.faiss")
    assert read_index(tmp_path / "merged.faiss").ntotal == COUNT
    one, other = (Searcher(index, train_ids, EVERYTHING).search(queries, K) for index in (whole, merged))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    assert np.array_equal(one[1], other[1])


def test_only_inverted_lists_keep_train_ids_of_their_own_and_only_graphs_cannot_be_merged() -> None:
    own = {kind: has_own_ids(new_index(kind, WIDTH)) for kind in KINDS}
    assert {kind for kind in KINDS if own[kind]} == {
        *("IVF16,Flat", "IVF16_HNSW8,SQ8", "IVF16,RaBitQ6", "IVF16,PQ16x4", "RR32,IVF16,RaBitQ6"),
    }
    assert {kind for kind in KINDS if not can_merge(new_index(kind, WIDTH))} == {"HNSW16,SQfp16", "HNSW16,Flat"}


@pytest.mark.parametrize("kind", ["Flat", "HNSW16,SQfp16", "IVF16,RaBitQ4,Refine(SQfp16)"])
def test_a_file_that_is_cut_short_or_no_index_is_refused_in_one_line(
    kind: str, vectors: Vectors, train_ids: NDArray[np.int64], tmp_path: Path
) -> None:
    path = tmp_path / "index.faiss"
    write_index(built(kind, vectors, train_ids).index, path)
    whole = path.read_bytes()
    for content in (b"", whole[:3], whole[:100], whole[: len(whole) // 2], whole[:-1], b"\x89PNG" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"is no whole index \(.*\): `fastgda index build CONFIG`") as refused:
            open_index(path, train_ids)
        assert "\n" not in str(refused.value)
        with pytest.raises(UsageError, match="is no whole index"):
            read_index(path)


def test_recall_counts_what_is_as_near_as_the_last(vectors: Vectors, queries: Vectors) -> None:
    ids = np.arange(COUNT)
    blocks = [(ids[some], vectors[some]) for some in np.array_split(ids, 7)]
    truth = exact_neighbours(queries, blocks, K)
    assert np.array_equal(truth.train_ids[:, :K], brute_force(queries, vectors, ids, K))
    assert recall(truth.train_ids, truth, K) == 1.0
    half = truth.train_ids[:, :K].copy()
    half[:, K // 2 :] = -1
    assert recall(half, truth, K) == 0.5
    doubled = np.concatenate([vectors[:30], vectors[:30]])
    twice = exact_neighbours(vectors[:1], [(np.arange(60), doubled)], 1)
    assert recall(np.array([[0]]), twice, 1) == recall(np.array([[30]]), twice, 1) == 1.0
    assert recall(np.array([[1]]), twice, 1) == 0.0


def surely(searcher: Searcher, queries: Vectors, truth: Neighbours, settings: SearchSettings) -> float:
    """Recall at 100, less a standard error over queries."""
    each = [
        measure(searcher, queries[row : row + 1], Neighbours(*(part[row : row + 1] for part in truth)), settings).at_100
        for row in range(len(queries))
    ]
    return float(np.mean(each) - np.std(each) / len(each) ** 0.5)


@pytest.mark.heavy
def test_settings_are_the_cheapest_that_reach_the_target(vectors: Vectors, train_ids: NDArray[np.int64]) -> None:
    asked = perturbed(vectors, 64, seed=5)
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, atol=1e-5)
    truth = exact_neighbours(asked, [(train_ids, vectors)], 100)
    for kind, name in (("IVF16,Flat", "nprobe"), ("HNSW8,SQfp16", "ef_search")):
        searcher = built(kind, vectors, train_ids)
        chosen = settings_for(searcher, asked, truth, 0.9)
        value = getattr(chosen, name)
        assert surely(searcher, asked, truth, chosen) >= 0.9
        if value > {"nprobe": 1, "ef_search": 16}[name]:
            assert surely(searcher, asked, truth, SearchSettings(**{name: value // 2})) < 0.9
    refined = settings_for(built("IVF16,RaBitQ,Refine(SQfp16)", vectors, train_ids), asked, truth, 0.9)
    assert refined.nprobe and refined.k_factor and refined.k_factor > 1
    assert settings_for(built("Flat", vectors, train_ids), asked, truth, 0.9) == SearchSettings()


@pytest.mark.parametrize(
    ("rows", "budgets", "expected"),
    [
        (20_000, {}, "Flat"),
        (20_000, {"half": True}, "SQfp16"),
        (20_000, {"memory": 0.04e9}, "SQfp16"),
        (20_000, {"latency": 5.0}, "SQfp16"),
        (118_287, {}, "SQfp16"),
        (118_287, {"latency": 5.0}, "IVF2048,Flat"),
        (1_000_000, {}, "IVF4096,Flat"),
        (1_000_000, {"memory": 2e9}, "HNSW32,SQfp16"),
        (1_000_000, {"memory": 0.768e9}, "RR768,IVF4096,RaBitQ7"),
        (100_000_000, {}, "RR768,IVF32768_HNSW32,RaBitQ4,Refine(SQfp16)"),
        (100_000_000, {"memory": 50e9}, "RR768,IVF32768_HNSW32,RaBitQ4"),
        (400_000_000, {"memory": 1e9}, "IVF65536_HNSW32,PQ96"),
    ],
)
def test_the_most_accurate_kind_within_the_budgets_is_chosen_and_says_why(
    rows: int, budgets: dict[str, float], expected: str
) -> None:
    choice = choose_kind(rows, 768, **budgets)  # type: ignore[arg-type]
    assert choice.kind == expected and is_kind(expected)
    assert choice.reason.startswith(f"{rows:,} vectors of 768: ")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "OPQ" not in kind and "fs" not in kind])
def test_the_bytes_that_are_reckoned_with_are_those_of_a_file(
    kind: str, vectors: Vectors, train_ids: NDArray[np.int64], tmp_path: Path
) -> None:
    write_index(built(kind, vectors, train_ids).index, tmp_path / "index.faiss")
    size = (tmp_path / "index.faiss").stat().st_size / COUNT
    assert bytes_each(kind, WIDTH, COUNT) == pytest.approx(size, rel=0.35)


@pytest.mark.parametrize(
    "text", ["", "auto", "IDMap,Flat", "Flat;", "IVF16", "IVF16,Flat,Refine(x)", "LSH", "NSG16,Flat"]
)
def test_what_is_no_kind_is_told_from_what_is_one(text: str) -> None:
    assert not is_kind(text) and all(map(is_kind, KINDS))


def test_a_kind_that_does_not_fit_is_refused_in_one_line(vectors: Vectors) -> None:
    with pytest.raises(UsageError, match=r"index\.kind IVF16,PQ7 of vectors of 32: "):
        new_index("IVF16,PQ7", WIDTH)
    with pytest.raises(UsageError, match="has 64 lists and there are 10 vectors: lower it"):
        train(new_index("IVF64,Flat", WIDTH), vectors[:10], kind="IVF64,Flat")


@pytest.mark.parametrize("kind", ["Flat", "SQfp16"])
@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_many_queries_are_answered_as_one_by_one(
    kind: str, spread: float, train_ids: NDArray[np.int64], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors that are nearly alike are told apart, although a product of rounded ones cannot."""
    monkeypatch.setattr(rounded, "LEAST", 0)
    rng = np.random.default_rng(7)
    drawn = (rng.standard_normal(WIDTH) + spread * rng.standard_normal((COUNT, WIDTH))).astype(np.float32)
    drawn[5] = 0
    asked = (rng.standard_normal(WIDTH) + spread * rng.standard_normal((MANY, WIDTH))).astype(np.float32)
    write_index(built(kind, drawn, train_ids).index, tmp_path / "index.faiss")
    searcher = open_index(tmp_path / "index.faiss", train_ids)
    held = drawn if kind == "Flat" else drawn.astype(np.float16).astype(np.float32)
    allowed = np.zeros(train_ids[-1] + 1, dtype=bool)
    allowed[::5] = True
    for chosen in (None, allowed):
        here = np.ones(COUNT, dtype=bool) if chosen is None else chosen[train_ids]
        exact = asked.astype(np.float64) @ held[here].astype(np.float64).T
        # One by one, while FAISS answers and later; at once.
        alone = [searcher.search(query[None], K, allowed=chosen) for query in asked]
        for similarity, found in (
            map(np.concatenate, zip(*alone, strict=True)),
            searcher.search(asked, K, allowed=chosen),
        ):
            np.testing.assert_allclose(similarity, -np.sort(-exact, axis=1)[:, :K], rtol=2e-6, atol=1e-5)
            place = np.searchsorted(train_ids[here], found)
            np.testing.assert_allclose(np.take_along_axis(exact, place, 1), similarity, rtol=2e-6, atol=1e-5)
    few = np.zeros(train_ids[-1] + 1, dtype=bool)
    few[train_ids[[3, 9]]] = True
    assert {tuple(sorted(row)) for row in searcher.search(asked, K, allowed=few)[1]} == {tuple(train_ids[[3, 9]])}


@pytest.mark.parametrize(("fall", "spread"), [(0.0, 1.0), (1.0, 1.0), (0.0, 1e-3)])
def test_what_rounded_vectors_name_is_what_a_scan_in_float64_finds(fall: float, spread: float) -> None:
    """Lengths from 1 to 1,000, numbers that fall off, and so many alike that queries are given back."""
    rng = np.random.default_rng(8)
    scale = np.arange(1, WIDTH + 1) ** -fall
    drawn = scale * (rng.standard_normal(WIDTH) + spread * rng.standard_normal((20_000, WIDTH)))
    drawn = (drawn * 10 ** rng.uniform(0, 3, (20_000, 1)) if spread == 1 else drawn).astype(np.float32)
    asked = (scale * rng.standard_normal((70, WIDTH))).astype(np.float32)
    index = new_index("Flat", WIDTH)
    add(index, drawn, np.arange(len(drawn)))
    similarity, places, vain = Rounded(index).search(asked, K, None)
    assert vain.mean() == (0 if spread == 1 else 1)
    exact = (asked.astype(np.float64) @ drawn.astype(np.float64).T)[~vain]
    found = np.take_along_axis(exact, places[~vain], 1)
    np.testing.assert_allclose(found, -np.sort(-exact, axis=1)[:, :K], rtol=1e-5)
    np.testing.assert_allclose(similarity[~vain], found, rtol=1e-4, atol=1e-4)


def test_rounded_vectors_are_given_up_where_they_help_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded, "LEAST", 0)
    rng = np.random.default_rng(9)
    drawn = rng.standard_normal((COUNT, WIDTH)).astype(np.float32)
    alike = (np.ones(WIDTH) + 1e-4 * rng.standard_normal((COUNT, WIDTH))).astype(np.float32)
    for vectors, kept in ((drawn, True), (alike, False)):
        searcher = built("Flat", vectors, np.arange(COUNT))
        searcher.prepare()
        for number in range(TRIED):
            searcher.search(drawn[number : number + 1], K)
        assert (searcher._rounded is not None) == kept
        searcher.prepare()
        assert (searcher._rounded is not None) == kept
