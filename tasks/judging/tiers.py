"""What answers in the teacher's place, as far as a run has it: heads, sketches, and sketches of what a head names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact
from tasks.distilling.answering import answering_head
from tasks.distilling.versions import heads_of_run, read_head, space_of_head
from tasks.inputs.features import extract_features, load_features
from tasks.inputs.queries import Query, load_queries
from tasks.judging.sketches import SKETCH
from tasks.progress import stage
from tasks.teaching.run import Run
from tasks.teaching.sketch_scores import StoredSketches

HEADS = {"symmetric": "symmetric head", "gradient": "gradient head"}  # names of methods by kind of head
TWO_STAGES = "two stages"
log = logging.getLogger("fastgda.judging")


@dataclass(frozen=True)
class Tiers:
    """The tiers of a run.

    heads: the newest of each kind that learned from the run, newest first, by kind.
    sketched: whether the run keeps sketches; first: how many samples of the fast tier these put in order again.
    """

    heads: Mapping[str, Artifact]
    sketched: bool
    first: int

    @classmethod
    def of(cls, run: Run) -> Tiers:
        samples, sketched = run.artifacts["samples"].rows, "sketches" in run.artifacts
        first = min(samples, max(run.config.evaluation.cutoffs))
        heads = heads_of_run(run.workspace, run.name)
        return cls({kind: head for kind, head in heads.items() if _answers(run.workspace, head)}, sketched, first)

    @property
    def names(self) -> list[str]:
        """The methods that `scores` returns."""
        heads = [HEADS[kind] for kind in self.heads]
        stages = [f"{TWO_STAGES}, first {self.first}"] if heads else []
        return [*heads, SKETCH, *stages] if self.sketched else heads

    def key(self, run: Run) -> list[object]:
        """Return what the scores depend on."""
        sketches = [run.artifacts["sketches"].key, self.first] if self.sketched else []
        return [*(head.key for head in self.heads.values()), *sketches]

    def scores(self, run: Run) -> dict[str, Tensor]:
        """Return scores of all samples for all queries by tier, (queries, samples) float64; 0 of what was left out.

        Where the run's labels tie negative scores, those by sketches are 0, too, so that teacher and sketches are
        summed alike.
        """
        queries = load_queries(run.artifacts["queries"])
        found = {HEADS[kind]: by_head(run, head, queries) for kind, head in self.heads.items()}
        if not self.sketched:
            return found
        sketched = _by_sketches(run, queries)
        if run.config.teacher.negatives == "tie":
            sketched = sketched.clamp_min(0)
        fast = next(iter(found.values()), None)
        found[SKETCH] = sketched
        if fast is not None:
            found[f"{TWO_STAGES}, first {self.first}"] = again(fast, sketched, self.first)
        return found


def _answers(workspace: Workspace, head: Artifact) -> bool:
    """Return whether a head can be asked; one that cannot, as of an earlier release, is named and left out."""
    try:
        answering_head(workspace, head.path)
    except (UsageError, StoreError) as error:
        log.warning("head %s is not judged: %s", head.key, error)
        return False
    return True


def by_head(run: Run, head: Artifact, queries: Sequence[Query]) -> Tensor:
    """Return how a head answers, as an index built of it does: inner products, (queries, samples) float64."""
    artifacts = run.artifacts
    space = space_of_head(run.context, read_head(run.workspace, head.key)[1])
    for items in (artifacts["samples"], artifacts["queries"]):
        extract_features.fn(space, items)
    answering = answering_head(run.workspace, head.path)
    of_queries, of_samples = (
        load_features(space, artifacts[items], artifacts["samples"]) for items in ("queries", "samples")
    )
    asked = answering.queries(of_queries, [query.caption for query in queries])
    return asked.double() @ answering.samples(torch.arange(len(of_samples)), of_samples).double().T


def again(fast: Tensor, slow: Tensor, first: int) -> Tensor:
    """Return the slow tier's scores of the samples that the fast tier has first, and 0 of all others.

    Args:
        fast: (queries, samples).
        slow: of the same shape.
        first: how many samples of a query are scored again.
    """
    chosen = fast.topk(first, dim=1).indices
    return torch.zeros_like(slow).scatter(1, chosen, slow.gather(1, chosen))


def _by_sketches(run: Run, queries: Sequence[Query]) -> Tensor:
    """Return the scores by which the sketch tier answers, each query's gradient drawn anew."""
    stored = StoredSketches(run.context, run.artifacts, run.name)
    scores = torch.zeros(len(queries), run.artifacts["samples"].rows, dtype=torch.float64)
    with stage("queries asked of sketches", len(queries)) as advance:
        for row, query in enumerate(queries):
            found = stored.scores(stored.ask(query.image, query.caption))
            scores[row, torch.from_numpy(found.train_ids)] = found.scores
            advance(1)
    return scores
