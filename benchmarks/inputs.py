"""How feature spaces, and max-sim of caption tokens, rank as the teacher does, untuned: mAP on validation and test.

    python -m benchmarks.inputs CONFIG [--spaces pixel caption_tokens ...]
    python -m benchmarks.inputs CONFIG --cpu [--spaces pixel efficientnet_lite0]

CONFIG is of a workspace with published scores; features that are missing are made in it. The denoiser's own caption
tokens are compared by max-sim (Khattab & Zaharia, "ColBERT", 2020), exact and as an inner product of fixed dimensional
encodings (Dhulipala et al., "MUVERA", 2024), beside the mean of the tokens, which the encoder `caption_tokens` gives.
A sample of several captions has the mean over them. With `--cpu`: the seconds of CPU that reading the tars and encoding
1,000 images take, encoder by encoder and by all in one pass, in a workspace of its own.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.diffusion.captions import CaptionTokens
from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.evaluation.ranking_metrics import average_precision, expected_random_average_precision, top_mask
from fastgda_core.features import cosines, encoder_names
from tasks.artifact import Made
from tasks.config.files import load_config
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, open_context
from tasks.distilling.labels import Labels, extract_query_features, read_labels
from tasks.distilling.ranks import candidate_scores, rows_of_split
from tasks.inputs.features import extract_features, in_space, load_encoders, load_features, load_query_features
from tasks.inputs.queries import joined_queries
from tasks.inputs.samples import ingest_samples, samples_table

ENCODINGS = ((2, 32, 8), (3, 32, 8), (4, 16, 16))  # bits of a partition, numbers a cluster, repetitions
AT_ONCE = 512  # captions


@dataclass(frozen=True)
class Tokens:
    """Tokens of captions at length one, (n, tokens, d), and which are not padding, (n, tokens) bool."""

    unit: Tensor
    said: Tensor

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.unit[rows], self.said[rows])


def max_sim(query: Tokens, samples: Tokens) -> Tensor:
    """Return the sum over a query's tokens of the largest cosine with a token of each sample, (queries, samples)."""
    found = []
    for tokens, said in zip(query.unit, query.said, strict=True):
        near = torch.einsum("td,nud->ntu", tokens[said], samples.unit)
        found.append(near.masked_fill(~samples.said[:, None], -torch.inf).amax(2).sum(1))
    return torch.stack(found)


@dataclass(frozen=True)
class FixedEncoding:
    """MUVERA's encodings: tokens are parted by SimHash, a query's summed in each cluster, a sample's averaged.

    A sample's empty cluster has the token whose code is nearest.

    planes: (repetitions, bits, d); projections: (repetitions, d, numbers).
    """

    planes: Tensor
    projections: Tensor

    @classmethod
    def drawn(cls, width: int, bits: int, numbers: int, repetitions: int) -> FixedEncoding:
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (repetitions, width, numbers), generator=draw) * 2.0 - 1
        return cls(torch.randn(repetitions, bits, width, generator=draw), signs / numbers**0.5)

    def queries(self, tokens: Tokens) -> Tensor:
        return self._encoded(tokens, lambda sums, _counts, _bits: sums)

    def samples(self, tokens: Tokens) -> Tensor:
        def filled(sums: Tensor, counts: Tensor, bits: Tensor) -> Tensor:
            codes = torch.cartesian_prod(*[torch.tensor([0, 1])] * bits.shape[2]).view(-1, bits.shape[2])
            distance = (bits[:, :, None] != codes).sum(3).masked_fill(~tokens.said[..., None], bits.shape[2] + 1)
            nearest = distance.argmin(1)[..., None].expand_as(sums)
            return torch.where(
                counts[..., None] > 0, sums / counts[..., None].clamp(min=1), tokens.unit.gather(1, nearest)
            )

        return self._encoded(tokens, filled)

    def _encoded(self, tokens: Tokens, cluster: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        found = []
        for planes, projection in zip(self.planes, self.projections, strict=True):
            bits = (tokens.unit @ planes.T > 0).long()
            places = 2 ** torch.arange(bits.shape[2] - 1, -1, -1)
            member = F.one_hot((bits * places).sum(2), 2 ** bits.shape[2]) * tokens.said[..., None]
            sums = torch.einsum("ntk,ntd->nkd", member.to(tokens.unit.dtype), tokens.unit)
            found.append((cluster(sums, member.sum(1), bits) @ projection).flatten(1))
        return torch.cat(found, dim=1) / len(self.planes) ** 0.5


@dataclass(frozen=True)
class Judge:
    """The teacher's scores of the validation and test queries, with the rows of these among all queries."""

    scores: dict[str, CandidateScores]
    rows: dict[str, Tensor]
    cutoff: int

    def row(self, name: str, similarity: Callable[[str], Tensor]) -> str:
        """Return a line of the table; `similarity` gives (queries of a split, samples)."""
        cells = []
        for split, scores in self.scores.items():
            candidates = scores.train_ids.long().masked_fill(~scores.known, 0)
            found = similarity(split).gather(1, candidates).masked_fill(~scores.known, -torch.inf)
            precision = average_precision(found, top_mask(scores.scores, self.cutoff))
            error = precision.std().item() / len(precision) ** 0.5
            cells.append(f"{precision.mean().item():.3f} ± {error:.3f}")
        return f"| {name} | {' | '.join(cells)} |"

    def chance(self) -> str:
        cells = []
        for scores in self.scores.values():
            counts = zip(
                scores.known.sum(1).tolist(), top_mask(scores.scores, self.cutoff).sum(1).tolist(), strict=True
            )
            cells.append(f"{statistics.fmean(expected_random_average_precision(*each) for each in counts):.3f}")
        return f"| a random order | {' | '.join(cells)} |"


def judge_of(config: PipelineConfig, context: Context, labels: Labels) -> Judge:
    several = joined_queries(labels.queries)
    rows = {split: rows_of_split(labels.queries, split) for split in ("validation", "test")}
    names = {split: [several[row].query_id for row in some.tolist()] for split, some in rows.items()}
    scores = {split: candidate_scores(context.workspace, labels.ranks, some) for split, some in names.items()}
    return Judge(scores, rows, config.evaluation.validation_cutoff)


def of_spaces(context: Context, labels: Labels, judge: Judge, spaces: list[str]) -> Iterator[str]:
    """Yield a line for each feature space: cosines of its features, centred where the configuration says so."""
    for space in spaces:
        there = in_space(context, space=space)
        extract_features.fn(there, labels.samples)
        extract_query_features(there, labels)
        samples = load_features(there, labels.samples, labels.samples)
        queries = load_query_features(there, labels.queries, labels.samples)
        yield judge.row(f"`{space}`", lambda split, q=queries, s=samples: cosines(q[judge.rows[split]], s))


def of_tokens(context: Context, labels: Labels, judge: Judge) -> Iterator[str]:
    """Yield a line for each way to compare the caption's tokens."""
    several = samples_table(labels.samples.path)["captions"].to_pylist()
    owner = torch.tensor([sample for sample, captions in enumerate(several) for _ in captions])
    counts = torch.bincount(owner)
    firsts = torch.cumsum(counts, 0) - counts
    asked = [query.caption for query in joined_queries(labels.queries)]
    raw, said = _tokens(context, [caption for captions in several for caption in captions])
    raw_queries, said_queries = _tokens(context, asked)

    def of_samples(by_caption: Tensor) -> Tensor:
        return torch.zeros(len(by_caption), len(several)).index_add_(1, owner, by_caption) / counts

    def pooled(tokens: Tensor, mask: Tensor) -> Tensor:
        return F.normalize((tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)

    alone, queries = pooled(raw, said)[firsts], pooled(raw_queries, said_queries)
    mean = alone.mean(0)
    yield judge.row(
        "mean of tokens, first caption alone", lambda split: cosines(queries[judge.rows[split]] - mean, alone - mean)
    )
    for name, shift in (("tokens", torch.zeros(())), ("tokens less their mean", raw[said].mean(0))):
        samples = Tokens(F.normalize(raw - shift, dim=2), said)
        of_queries = Tokens(F.normalize(raw_queries - shift, dim=2), said_queries)
        exact = of_samples(_in_blocks(samples, lambda some, q=of_queries: max_sim(q, some).T).T)
        yield judge.row(f"max-sim of {name}, exact", lambda split, e=exact: e[judge.rows[split]])
        for sizes in ENCODINGS:
            encoding = FixedEncoding.drawn(raw.shape[2], *sizes)
            found = of_samples(encoding.queries(of_queries) @ _in_blocks(samples, encoding.samples).T)
            size = 2 ** sizes[0] * sizes[1] * sizes[2]
            yield judge.row(f"the same by {size:,} numbers", lambda split, f=found: f[judge.rows[split]])


def _tokens(context: Context, captions: list[str]) -> tuple[Tensor, Tensor]:
    model, found = context.model(), []
    assert isinstance(model.captions, CaptionTokens), "the model has no caption tokens"
    for start in range(0, len(captions), AT_ONCE):
        some = captions[start : start + AT_ONCE]
        found.append((model.encode_captions(some)["encoder_hidden_states"].cpu(), model.captions.said(some).cpu()))
    tokens, said = zip(*found, strict=True)
    return torch.cat(tokens), torch.cat(said)


def _in_blocks(tokens: Tokens, encode: Callable[[Tokens], Tensor]) -> Tensor:
    starts = range(0, len(tokens.unit), AT_ONCE)
    return torch.cat([encode(tokens[start : start + AT_ONCE]) for start in starts])


def of_cpu(config: PipelineConfig, spaces: list[str]) -> Iterator[str]:
    """Yield a line for each thing that is done with an image: seconds of CPU for 1,000 of them."""

    def line(name: str, work: Callable[[], Made]) -> str:
        before, made = process_time(), work()
        return f"| {name} | {(process_time() - before) / made.artifact.rows * 1000:.2f} |"

    with TemporaryDirectory() as folder:
        context = open_context(config.model_copy(update={"workspace": folder}), model=False)
        yield line("read the tars", lambda: ingest_samples.fn(context))
        samples = ingest_samples.fn(context).artifact
        for space in [*spaces, "+".join(spaces)]:
            there = in_space(context, space=space, centre=False)
            place = context.workspace.root / "features"
            if isinstance(place, Path) and place.exists():
                shutil.rmtree(place)
            load_encoders(there.config.features, context.device)  # imports and files, which are read once
            yield line(f"encode by `{space}`", lambda there=there: extract_features.fn(there, samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--cpu", action="store_true", help="measure seconds of CPU, and no ranking")
    parser.add_argument("--spaces", nargs="*", help="feature spaces; by default single encoders, and joined to its own")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    own, more = config.features.space, ["caption_tokens", "bottleneck"]
    spaces = arguments.spaces or [*encoder_names(own), own, *more, *(f"{own}+{each}" for each in more)]
    if arguments.cpu:
        print("| of 1,000 images | CPU s |\n| --- | ---: |")
        for line in of_cpu(config, arguments.spaces or encoder_names(own)):
            print(line, flush=True)
        return
    # Read anew, so that encoders that are parts of the model find its folder.
    document = config.model_dump() | {"study": {"spaces": spaces}}
    config = PipelineConfig.model_validate(document)
    context = open_context(config)
    labels = read_labels(context.workspace, None)
    judge = judge_of(config, context, labels)
    counts = {split: len(rows) for split, rows in judge.rows.items()}
    print(f"| | {' | '.join(f'{count} {split} queries' for split, count in counts.items())} |\n| --- | ---: | ---: |")
    for lines in (of_spaces(context, labels, judge, spaces), of_tokens(context, labels, judge), [judge.chance()]):
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
