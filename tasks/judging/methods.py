"""The methods that the judges compare: the run's teacher, what needs none, and what answers in the teacher's place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.features import encoder_names, text_space
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.ranks import candidate_scores
from tasks.inputs.features import extract_features, in_space, load_features
from tasks.inputs.queries import load_queries
from tasks.judging.tiers import Tiers
from tasks.teaching.run import Run
from tasks.watching.trust import CAPTIONS, TEACHER

UNTUNED, RANDOM, SUM = "untuned", "random", "captions + images"


def every_method(run: Run, ranks: Artifact, tiers: Tiers) -> dict[str, Tensor]:
    """Return scores of all samples for all queries by method: those of `method_scores`, and all that cost no training.

    Beside them stand every feature space, centred and not, the sum of caption and image, and the run's tiers.
    """
    chosen = list(range(run.artifacts["queries"].rows))
    return method_scores(run, ranks, chosen) | _of_spaces(run, chosen) | tiers.scores(run)


def method_scores(run: Run, ranks: Artifact, chosen: list[int]) -> dict[str, Tensor]:
    """Return scores of all samples for some queries by method, (queries, samples) float64; 0 of what was left out.

    These few are what models may be trained again without.
    """
    several = load_queries(run.artifacts["queries"])
    names = [several[number].query_id for number in chosen]
    context, samples, queries = run.context, run.artifacts["samples"], run.artifacts["queries"]
    teacher = teacher_scores(run, ranks, names, left_out=0.0)
    found = {TEACHER: teacher}
    spaces = {UNTUNED: context}
    words = text_space(context.config.features.space)
    if words and words != context.config.features.space:
        spaces[CAPTIONS] = in_space(context, space=words)
    for name, space in spaces.items():
        found[name] = _cosines(space, samples, queries, chosen)
    draw = torch.Generator().manual_seed(run.config.judge.seed if run.config.judge else 0)
    found[RANDOM] = torch.randn(teacher.shape, generator=draw, dtype=torch.float64)
    return found


def teacher_scores(run: Run, ranks: Artifact, query_ids: list[str], *, left_out: float) -> Tensor:
    """Return the run's scores of some queries, (queries, samples) float64; of what is no candidate, `left_out`."""
    labels = candidate_scores(run.workspace, ranks, query_ids)
    found = torch.full((len(query_ids), run.artifacts["samples"].rows), left_out, dtype=torch.float64)
    for row, (train_ids, scores, known) in enumerate(zip(labels.train_ids, labels.scores, labels.known, strict=True)):
        found[row, train_ids[known].long()] = scores[known].double()
    return found


def _of_spaces(run: Run, chosen: list[int]) -> dict[str, Tensor]:
    """Return cosines in the feature spaces of the run, and in those of their encoders, centred and not.

    The configured space and its captions have names of their own, as the configuration has them, and are left out.
    """
    context, samples, queries = run.context, run.artifacts["samples"], run.artifacts["queries"]
    features = context.config.features
    spaces = [features.space, context.config.candidates.space or features.space]
    words = text_space(features.space)
    named = {(features.space, features.centre), (words, features.centre)}
    found: dict[str, Tensor] = {}
    for space in dict.fromkeys([*spaces, *(name for each in spaces for name in encoder_names(each))]):
        for centre in (False, True):
            if (space, centre) not in named:
                there = in_space(context, space=space, centre=centre)
                found[f"{space}, centred" if centre else space] = _cosines(there, samples, queries, chosen)
    images = "+".join(name for name in encoder_names(features.space) if name not in words.split("+"))
    if words and images:
        both = (_cosines(in_space(context, space=each), samples, queries, chosen) for each in (words, images))
        found[SUM] = sum(both, torch.zeros((), dtype=torch.float64))
    return found


def _cosines(space: Context, samples: Artifact, queries: Artifact, chosen: list[int]) -> Tensor:
    """Return the cosine of some queries' features and each sample's, (queries, samples) float64."""
    for items in (samples, queries):
        extract_features.fn(space, items)
    phi = [F.normalize(load_features(space, items, samples).double(), dim=1) for items in (queries, samples)]
    return phi[0][chosen] @ phi[1].T
