from __future__ import annotations

import torch
from scipy.stats import spearmanr
from torch.nn import functional as F

from benchmarks.inputs import FixedEncoding, Tokens, max_sim


def drawn(count: int, seed: int) -> Tokens:
    """Captions of one to eight tokens, each token near one of a dozen words."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randn(12, 24, generator=torch.Generator().manual_seed(9))
    near = words[torch.randint(12, (count, 8), generator=draw)] + 0.5 * torch.randn(count, 8, 24, generator=draw)
    lengths = torch.randint(1, 9, (count, 1), generator=draw)
    return Tokens(F.normalize(near, dim=2), torch.arange(8) < lengths)


def by_loop(query: Tokens, samples: Tokens) -> list[list[float]]:
    found = []
    for asked, mine in zip(query.unit, query.said, strict=True):
        row = []
        for tokens, said in zip(samples.unit, samples.said, strict=True):
            several = [token for token, real in zip(tokens, said, strict=True) if real]
            nearest = [
                max(float(token @ other) for other in several) for token, real in zip(asked, mine, strict=True) if real
            ]
            row.append(sum(nearest))
        found.append(row)
    return found


def test_max_sim_is_the_loop_and_fixed_encodings_come_near_it_with_their_size() -> None:
    queries, samples = drawn(6, 0), drawn(80, 1)
    expected = by_loop(queries, samples)
    torch.testing.assert_close(max_sim(queries, samples), torch.tensor(expected), rtol=1e-5, atol=1e-5)

    def agreement(repetitions: int) -> float:
        encoding = FixedEncoding.drawn(24, 4, 24, repetitions)
        found = encoding.queries(queries) @ encoding.samples(samples).T
        rows = [spearmanr(row, exact).statistic for row, exact in zip(found, expected, strict=True)]
        return sum(rows) / len(rows)

    small, large = agreement(2), agreement(100)
    assert small + 0.1 < large and large > 0.85, (small, large)


def test_a_padding_token_changes_no_fixed_encoding() -> None:
    tokens, encoding = drawn(20, 2), FixedEncoding.drawn(24, 3, 8, 4)
    other = Tokens(torch.where(tokens.said[..., None], tokens.unit, -tokens.unit), tokens.said)
    torch.testing.assert_close(encoding.queries(other), encoding.queries(tokens))
    torch.testing.assert_close(encoding.samples(other), encoding.samples(tokens))
