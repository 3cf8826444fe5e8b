"""What training the rank head costs, beside the plain way; prints a Markdown table.

    python benchmarks/rank_head.py                  pairs per second, quality, mAP
    python benchmarks/rank_head.py --work memory    peak memory at 100 million score rows, written and ranked first
    python benchmarks/rank_head.py --work gpu       50 million pairs x 10 epochs on a GPU

The plain way is that of most code for such pairs: a Dataset that yields one (query, training sample, rank) at a time, a
DataLoader that shuffles, both sides encoded for each pair.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.evaluation.ranking_metrics import average_precision, top_mask
from fastgda_core.ranking.batches import RankBatches, RankPairs
from fastgda_core.ranking.head import RankHead
from fastgda_core.ranking.losses import rank_loss
from fastgda_core.ranking.training import HeadTraining, RankData, train_head

BATCH = 4096
TOP = 100


class PlainPairs(Dataset[tuple[int, int, float]]):
    def __init__(self, pairs: RankPairs) -> None:
        self.pairs, self.query = pairs, pairs.query

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[int, int, float]:
        return int(self.query[number]), int(self.pairs.sample[number]), float(self.pairs.label[number])


def train_plainly(data: RankData, batches: int) -> tuple[RankHead, float]:
    """The head after so many batches, and pairs per second; no outsiders are drawn."""
    torch.manual_seed(0)
    head = RankHead(data.sample_features.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    started = time.perf_counter()
    for number, (query, sample, label) in enumerate(plain_batches(data.train_pairs)):
        if number == batches:
            break
        cosine = (head(data.query_features[query]) * head(data.sample_features[sample])).sum(1)
        loss = F.binary_cross_entropy_with_logits(head.affine(cosine)[:, 0], label.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.eval(), batches * BATCH / (time.perf_counter() - started)


def plain_batches(pairs: RankPairs) -> Iterator[list[Tensor]]:
    while True:
        yield from DataLoader(PlainPairs(pairs), batch_size=BATCH, shuffle=True)


def made_up(queries: int, samples: int, candidates: int, dims: int, seen: int) -> tuple[RankData, Tensor]:
    """Queries ranked by the cosine of the first `seen` of their features, and the scores; the last 20 validate."""
    generator = torch.Generator().manual_seed(0)
    query, sample = (torch.randn(count, dims, generator=generator) for count in (queries, samples))
    scores = F.normalize(query[:, :seen], dim=1) @ F.normalize(sample[:, :seen], dim=1).T
    train = queries - 20
    rows, columns, labels = [], [], []
    for number in range(train):
        chosen = torch.randperm(samples, generator=generator)[:candidates]
        rank = torch.argsort(torch.argsort(scores[number, chosen], descending=True)) + 1
        rows.append(torch.full((candidates,), number))
        columns.append(chosen)
        labels.append(rank / candidates)
    pairs = RankPairs.of(torch.cat(rows), torch.cat(columns), torch.cat(labels), queries=queries, samples=samples)
    validation = torch.arange(train, queries)
    everything = CandidateScores(torch.arange(samples, dtype=torch.int32).repeat(20, 1), scores[train:].double())
    return RankData(query, sample, pairs, validation, everything, top_mask(everything.scores, TOP)), scores


def throughput() -> None:
    """MSCOCO's shape, a sixth of its width: 8.5 % of the samples are candidates of a query, 1,280-d features."""
    data, _ = made_up(queries=820, samples=19_700, candidates=1_680, dims=1280, seen=8)
    _, plain = train_plainly(data, batches=4)
    started = time.perf_counter()
    train_head(data, HeadTraining(epochs=1, batch_size=BATCH))
    ours = len(data.train_pairs) / (time.perf_counter() - started)
    row("training, pairs/s, 1,280-d, batch 4,096", f"{ours:,.0f}", f"{plain:,.0f}", ours / plain, "2.5 x")


def quality() -> None:
    """The same pairs, drawn by groups and one by one: what is lost a step, and won in the same time?"""
    data, scores = made_up(queries=220, samples=2_000, candidates=1_000, dims=64, seen=4)

    def validation(head: RankHead) -> float:
        with torch.no_grad():
            cosine = head(data.query_features[data.validation]) @ head(data.sample_features).T
        return average_precision(cosine, top_mask(scores[data.validation], TOP)).mean().item()

    started = time.perf_counter()
    plain, _ = train_plainly(data, batches=2 * -(-len(data.train_pairs) // BATCH))
    theirs = time.perf_counter() - started
    for epochs in (2, 4):
        ours, trained = timed(
            lambda epochs=epochs: train_head(data, HeadTraining(epochs=epochs, outside_probability=0.0))
        )
        figures = f"{validation(trained.head):.3f} in {ours:.1f} s", f"{validation(plain):.3f} in {theirs:.1f} s"
        what = f"validation mAP(100), {epochs} epochs against 2"
        row(what, *figures, validation(trained.head) / validation(plain), "1 x")


def precision() -> None:
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(110, 118_287, generator=generator)
    relevant = top_mask(torch.randn(110, 118_287, generator=generator) + scores, 1000)
    ours, found = timed(lambda: average_precision(scores, relevant))
    theirs, expected = timed(
        lambda: [average_precision_score(a, b) for a, b in zip(relevant.numpy(), scores.numpy(), strict=True)]
    )
    np.testing.assert_allclose(found, expected, atol=1e-9)
    row("mAP(1000), 110 queries x 118,287, s", f"{ours:.2f}", f"{theirs:.2f}", theirs / ours, "10 x")


def memory() -> None:
    """From Parquet to the batches of an epoch, with the real store below."""
    from benchmarks import score_store
    from storage_schemas.publishing.publish import publish_runs
    from storage_schemas.snapshots.snapshots import read_snapshot
    from storage_schemas.workspace import Workspace
    from tasks.artifact import Artifact
    from tasks.distilling.ranks import rank_pairs

    queries, candidates = 10_000, 10_000
    with tempfile.TemporaryDirectory(prefix="fastgda-rank-head-") as name:
        workspace = Workspace(Path(name))
        with ProcessPoolExecutor(1) as other:  # whose memory is not ours
            other.submit(score_store.commit, workspace, queries, candidates).result()
            published = other.submit(publish_runs, workspace, [score_store.RUN]).result()
        found = read_snapshot(workspace, published.snapshot)
        ranks = Artifact("rank labels", found.snapshot, workspace.root, found.rows)
        before, started = peak_memory(), time.perf_counter()
        ids = [score_store.query_id(number) for number in range(queries)]
        pairs = rank_pairs(workspace, ranks, ids, torch.arange(queries), score_store.SAMPLES, standardised=False)
        read = time.perf_counter() - started
        generator = torch.Generator().manual_seed(0)
        features = [torch.randn(count, 1280, generator=generator) for count in (queries, score_store.SAMPLES)]
        size = sum(each.nbytes for each in features) / 2**30
        head = RankHead(1280)
        optimizer = torch.optim.AdamW(head.parameters())
        for batch in itertools.islice(RankBatches(pairs, BATCH, 0.1, 0, lambda: 0), 100):
            encoded = [head(each[rows]) for each, rows in zip(features, (batch.queries, batch.samples), strict=True)]
            optimizer.zero_grad()
            rank_loss("bce", head.affine(encoded[0] @ encoded[1].T), batch.label, None).backward()
            optimizer.step()
        peak = peak_memory()
        print(f"| pairs | {len(pairs):,}, read in {read:.0f} s |")
        print(f"| peak memory | {peak:.2f} GiB, of which features {size:.2f} and the process before {before:.2f} |")


def gpu() -> None:
    """The paper's job, 1 GPU-hour on an A100 there: MSCOCO's 5,000 queries, 10,000 candidates each."""
    queries, samples, candidates = 5_020, 118_287, 10_000
    data, _ = made_up(queries, samples, candidates, dims=1280, seen=8)
    started = time.perf_counter()
    trained = train_head(data, HeadTraining())
    seconds = time.perf_counter() - started
    maps = ", ".join(f"{value:.3f}" for _, value in trained.history)
    print(
        f"| {torch.cuda.get_device_name()} | {10 * len(data.train_pairs):,} pairs | {seconds:.0f} s | mAP(100) {maps} |"
    )


def peak_memory() -> float:
    """Of this process, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def row(what: str, ours: str, theirs: str, ratio: float, goal: str) -> None:
    print(f"| {what} | {ours} | {theirs} | {ratio:.2f} x | {goal} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=["compare", "memory", "gpu"], default="compare")
    work = parser.parse_args().work
    if work == "compare":
        print(
            "| work | FastGDA | the plain way, scikit-learn | ratio | to reach |\n| --- | ---: | ---: | ---: | ---: |"
        )
        throughput()
        quality()
        precision()
    else:
        {"memory": memory, "gpu": gpu}[work]()


if __name__ == "__main__":
    main()
