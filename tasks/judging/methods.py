"""The methods that the judges compare: the run's teacher, and what needs none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.features import text_space
from tasks.artifact import Artifact
from tasks.distilling.ranks import candidate_scores
from tasks.inputs.features import extract_features, in_space, load_features
from tasks.inputs.queries import load_queries
from tasks.teaching.run import Run
from tasks.watching.trust import CAPTIONS, TEACHER

UNTUNED, RANDOM = "untuned", "random"


def method_scores(run: Run, ranks: Artifact, chosen: list[int]) -> dict[str, Tensor]:
    """Return scores of all samples for some queries by method, (queries, samples) float64; 0 of what was left out."""
    several = load_queries(run.artifacts["queries"])
    names = [several[number].query_id for number in chosen]
    context, samples, queries = run.context, run.artifacts["samples"], run.artifacts["queries"]
    labels = candidate_scores(run.workspace, ranks, names)
    teacher = torch.zeros(len(names), samples.rows, dtype=torch.float64)
    for row, (train_ids, scores, known) in enumerate(zip(labels.train_ids, labels.scores, labels.known, strict=True)):
        teacher[row, train_ids[known].long()] = scores[known].double()
    found = {TEACHER: teacher}
    spaces = {UNTUNED: context}
    words = text_space(context.config.features.space)
    if words and words != context.config.features.space:
        spaces[CAPTIONS] = in_space(context, space=words)
    for name, space in spaces.items():
        for items in (samples, queries):
            extract_features.fn(space, items)
        phi = [F.normalize(load_features(space, items, samples).double(), dim=1) for items in (queries, samples)]
        found[name] = phi[0][chosen] @ phi[1].T
    draw = torch.Generator().manual_seed(run.config.judge.seed if run.config.judge else 0)
    found[RANDOM] = torch.randn(teacher.shape, generator=draw, dtype=torch.float64)
    return found
