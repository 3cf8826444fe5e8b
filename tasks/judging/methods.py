"""The methods that the judges compare: the run's teacher, what needs none, and what answers in the teacher's place."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.features import encoder_names, text_space
from tasks.artifact import Artifact
from tasks.config import judging
from tasks.context import Context
from tasks.distilling.ranks import candidate_scores
from tasks.inputs.features import extract_features, features_key, in_space, load_features
from tasks.inputs.queries import load_queries
from tasks.judging.rivals import Rivals
from tasks.judging.tiers import Tiers
from tasks.teaching.run import Run
from tasks.watching.trust import CAPTIONS, TEACHER

UNTUNED, RANDOM, SUM = judging.UNTUNED, judging.RANDOM, "captions + images"


def every_method(run: Run, ranks: Artifact, tiers: Tiers) -> dict[str, Tensor]:
    """Return scores of all samples for all queries by method, (queries, samples) float64: `own_methods` and tiers."""
    return own_methods(run, ranks) | tiers.scores(run)


def own_methods(run: Run, ranks: Artifact) -> dict[str, Tensor]:
    """Return scores of all samples for all queries by the methods that stand for themselves, and for no teacher.

    They are those of `method_scores`, the rivals, every feature space, centred and not, and the sum of caption and
    image. Several checks ask for them: what is read and multiplied is kept with the run.
    """
    chosen = list(range(run.artifacts["queries"].rows))

    def make() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return method_scores(run, ranks, chosen), _of_spaces(run, chosen)

    first, spaces = run.context.loaded.once("judged methods", methods_key(run, ranks), make)
    return first | Rivals.of(run).scores(left_out=0.0) | spaces


def methods_key(run: Run, ranks: Artifact) -> Hashable:
    """Return what the scores of `own_methods` depend on."""
    judge, queries = run.config.judge, run.artifacts["queries"].key
    return ranks.key, queries, spaces_key(run), tuple(Rivals.of(run).key), judge.seed if judge else 0


def method_scores(run: Run, ranks: Artifact, chosen: list[int]) -> dict[str, Tensor]:
    """Return scores of all samples for some queries by method, (queries, samples) float64; 0 of what was left out.

    These few are what models may be trained again without.
    """
    several = load_queries(run.artifacts["queries"])
    names = [several[number].query_id for number in chosen]
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    teacher = teacher_scores(run, ranks, names, left_out=0.0)
    found = {TEACHER: teacher}
    for name, spaces in named_spaces(run).items():
        if name in (UNTUNED, CAPTIONS):
            found[name] = _cosines(spaces[0], samples, queries, chosen)
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


def named_spaces(run: Run) -> dict[str, tuple[Context, ...]]:
    """Return the feature spaces that are methods, by name: the context of each space whose cosines are added up.

    They are the configured space and its captions, the spaces of the run and of their encoders, centred and not, where
    that is neither of the two, and the sum of captions and images.
    """
    context, features = run.context, run.config.features
    words = text_space(features.space)
    found: dict[str, tuple[Context, ...]] = {UNTUNED: (context,)}
    if words and words != features.space:
        found[CAPTIONS] = (in_space(context, space=words),)
    spaces = [features.space, context.config.candidates.space or features.space]
    named = {(features.space, features.centre), (words, features.centre)}
    for space in dict.fromkeys([*spaces, *(name for each in spaces for name in encoder_names(each))]):
        for centre in (False, True):
            if (space, centre) not in named:
                found[f"{space}, centred" if centre else space] = (in_space(context, space=space, centre=centre),)
    images = "+".join(name for name in encoder_names(features.space) if name not in words.split("+"))
    if words and images:
        found[SUM] = tuple(in_space(context, space=each) for each in (words, images))
    return found


def spaces_key(run: Run) -> tuple[tuple[str, ...], ...]:
    """Return the names of `named_spaces`, each with the keys of its features."""
    samples = run.artifacts["samples"]
    return tuple(
        (name, *(features_key(each, samples) for each in several)) for name, several in named_spaces(run).items()
    )


def _of_spaces(run: Run, chosen: list[int]) -> dict[str, Tensor]:
    """Return cosines in the feature spaces that are methods, but for the configured one and its captions."""
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    return {
        name: torch.stack([_cosines(each, samples, queries, chosen) for each in spaces]).sum(0)
        for name, spaces in named_spaces(run).items()
        if name not in (UNTUNED, CAPTIONS)
    }


def _cosines(space: Context, samples: Artifact, queries: Artifact, chosen: list[int]) -> Tensor:
    """Return the cosine of some queries' features and each sample's, (queries, samples) float64."""
    for items in (samples, queries):
        extract_features.fn(space, items)
    phi = [F.normalize(load_features(space, items, samples).double(), dim=1) for items in (queries, samples)]
    return phi[0][chosen] @ phi[1].T
