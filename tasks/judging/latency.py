"""The latency of a new query: what answers is loaded and warm, and each of some queries is asked by itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.features import concatenate
from fastgda_core.images import as_rgb
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.answering import answering_head
from tasks.distilling.versions import read_head, space_of_head
from tasks.inputs.features import encode_query, feature_mean, load_encoders, load_features
from tasks.inputs.queries import Query
from tasks.teaching.families import family_of
from tasks.teaching.run import Run

WARM, MEASURED = 10, 20  # queries, as for Table 1 of FastGDA (arXiv 2511.10721)
SHOWN = 20  # samples of an answer
WHOLE_PASSES = 3  # queries that are scored against all samples

Answer = Callable[[Image.Image, str], Tensor]  # scores of all samples, (samples,), for a picture and its caption


class Latency(NamedTuple):
    """Seconds of one query: the mean, and its standard error over queries.

    whole_pass: every sample is looked at by the model anew.
    """

    seconds: float
    error: float = 0.0
    whole_pass: bool = False

    def and_then(self, other: Latency) -> Latency:
        """Return the latency of both, one after the other."""
        error = (self.error**2 + other.error**2) ** 0.5
        return Latency(self.seconds + other.seconds, error, self.whole_pass or other.whole_pass)


@torch.no_grad()
def measured(answer: Answer, queries: Sequence[Query], device: torch.device) -> Latency:
    """Ask some queries to warm up, then measure each of some more, from the decoded picture to the first samples."""
    asked = [(as_rgb(query.image), query.caption) for query in queries[:MEASURED]]
    seconds = []
    for number in range(WARM + MEASURED):
        started = time.perf_counter()
        scores = answer(*asked[number % len(asked)])
        scores.topk(min(SHOWN, len(scores)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    warm = torch.tensor(seconds[WARM:], dtype=torch.float64)
    return Latency(warm.mean().item(), (warm.std() / len(warm) ** 0.5).item())


def by_features(spaces: Sequence[Context], samples: Artifact) -> Answer:
    """Return what answers by cosines of features, which are extracted, added up over the spaces."""
    known = [F.normalize(load_features(space, samples, samples), dim=1) for space in spaces]
    encode = [encoding(space, samples) for space in spaces]

    def answer(image: Image.Image, caption: str) -> Tensor:
        products = [of(image, caption) @ phi.T for of, phi in zip(encode, known, strict=True)]
        return torch.stack(products).sum(0)[0]

    return answer


def encoding(space: Context, samples: Artifact) -> Answer:
    """Return what makes phi of a query in a feature space, (1, d) of length one."""
    encoders, unit_length = load_encoders(space.config.features, space.device), space.config.features.unit_length
    mean = feature_mean(space, samples)

    def encode(image: Image.Image, caption: str) -> Tensor:
        parts = encode_query(encoders, image, caption)
        return F.normalize(concatenate(parts, unit_length=unit_length, mean=mean), dim=1)

    return encode


def by_head(run: Run, head: Artifact) -> tuple[Answer, int]:
    """Return what answers by a head of the run, and the bytes of the samples' vectors."""
    samples = run.artifacts["samples"]
    space = space_of_head(run.context, read_head(run.workspace, head.key)[1])
    answering, unit_length = answering_head(run.workspace, head.path), space.config.features.unit_length
    encoders, mean = load_encoders(space.config.features, space.device), feature_mean(space, samples)
    phi = load_features(space, samples, samples)
    vectors = answering.samples(torch.arange(len(phi)), phi)

    def answer(image: Image.Image, caption: str) -> Tensor:
        parts = encode_query(encoders, image, caption)
        asked = answering.queries(concatenate(parts, unit_length=unit_length, mean=mean), [caption])
        return (asked @ vectors.T)[0]

    return answer, vectors.numel() * vectors.element_size()


def scored_anew(run: Run, *, most: float) -> Latency:
    """Return what the scores of one query against its candidates take, from all that leads to them.

    Args:
        run: a finished one.
        most: seconds after which no further query is asked.
    """
    # Scores are to be made alone, not sketches beside them.
    context = dataclasses.replace(run.context, config=run.config.model_copy(update={"sketches": None}))
    artifacts = {name: each for name, each in run.artifacts.items() if not name.startswith("sketch")}
    family, plan, seconds = family_of(run.config), run.score_run, []
    family.scores(context, artifacts, [0], plan.candidates[0][:1])  # what is loaded once is loaded now
    for number in range(min(WHOLE_PASSES, len(plan.query_ids))):
        started = time.perf_counter()
        family.scores(context, artifacts, [number], plan.candidates[number])
        seconds.append(time.perf_counter() - started)
        if sum(seconds) > most:
            break
    taken = torch.tensor(seconds, dtype=torch.float64)
    return Latency(taken.mean().item(), (taken.std() / len(taken) ** 0.5).item() if len(taken) > 1 else 0.0)
