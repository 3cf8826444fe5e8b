"""What a teacher needs, told before it is run: what is fitted, stored, computed and held in memory."""

from __future__ import annotations

from dataclasses import dataclass

GRADIENT_FORWARDS = 2.1  # one forward and backward to the chosen layers, in forwards (benchmarks/RESULTS.md)
MLP_GRADIENT_FORWARDS = 2.6  # the same to the weights of the MLPs, which MUCS moves (benchmarks/RESULTS.md)
EXPECTED_ASCENT = 60  # steps: as published, MUCS took 24 to 59 (benchmarks/RESULTS.md, "MUCS")


@dataclass(frozen=True)
class Work:
    """The size of the work that a teacher is asked for.

    weights: of the layers whose gradients are taken.
    samples: training samples.
    noises: forwards of one sample under the noise plan, over captions and mirrored images.
    pairs: Monte-Carlo (eps, t) pairs of a query's gradient.
    timesteps: of the noise plan.
    images: of a sample that count, 2 with the mirrored one.
    dimensions: of a projection, where they are configured.
    sampler_steps: by which the queries were generated.
    ascent_steps: the most that unlearn a query.
    """

    weights: int
    samples: int
    noises: float
    pairs: int
    timesteps: int = 1
    images: int = 1
    dimensions: int | None = None
    sampler_steps: int = 0
    ascent_steps: int = 1


@dataclass(frozen=True)
class Needs:
    """What a teacher needs for a `Work`. A forward is one of the denoiser; a backward counts as forwards.

    fits: what is fitted before any score, in words; an empty text: nothing.
    stored_bytes: kept on disk for each training sample.
    sample_forwards: of one training sample, once, whatever is asked later.
    query_forwards: of a new query, those of all samples that have to be run again for it among them.
    memory_bytes: beside the model and one micro-batch, at most.
    """

    fits: str
    stored_bytes: float
    sample_forwards: float
    query_forwards: float
    memory_bytes: float
