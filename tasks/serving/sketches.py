"""The sketch tier: one gradient of the query against the stored sketches of the published run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import UsageError
from fastgda_core.images import as_rgb
from storage_schemas.snapshots.published import read_published
from storage_schemas.workspace import Workspace
from tasks.inputs.samples import samples_table
from tasks.serving.attribute import AttributionService
from tasks.teaching.run import read_run_anew
from tasks.teaching.sketch_scores import SketchScores, StoredSketches


@dataclass(frozen=True)
class Influence:
    """One training sample of an answer, best first.

    score: in units of the teacher's first-order scores; of a relative answer divided by the sample's own length.
    standard_error: over groups of the query's (timestep, noise) pairs; None where they make one group.
    """

    position: int
    train_id: int
    score: float
    standard_error: float | None
    key: str
    caption: str
    shard: str


@dataclass(frozen=True)
class InfluenceAnswer:
    """The training samples that influenced an image most, and how much of all influence they hold.

    scored: how many samples were scored.
    positive, negative: sums of the scores above and below 0 over these; share: of `positive` that the answer holds.
    """

    samples: list[Influence]
    scored: int
    positive: float
    negative: float
    share: float


class SketchService:
    """The model, Fisher and sketches of the published run, loaded once; each call is one gradient of the query."""

    def __init__(self, workspace: Workspace) -> None:
        run = read_run_anew(str(workspace.root), read_published(workspace).run)
        self.sketches = StoredSketches(run.context, run.artifacts, run.name)
        self.samples_path = run.artifacts["samples"].path
        self.samples = samples_table(self.samples_path)
        self.fast: AttributionService | None = None
        self.workspace = workspace

    def attribute(
        self, image: Image.Image, caption: str, k: int, *, first: int | None = None, relative: bool = False
    ) -> InfluenceAnswer:
        """Return the k training samples that influenced the image most.

        Args:
            image: the generated image.
            caption: that it was generated from.
            k: how many.
            first: score the fast tier's first so many alone, whose sketches are read one by one; None: all samples.
            relative: divide a score by the length of the sample's gradient, so that samples with large gradients do
                not head every answer (Barshan et al., "RelatIF", 2020).
        """
        picture = as_rgb(image)
        asked = self.sketches.ask(picture, caption)
        found = self.sketches.scores(asked, None if first is None else self._first(picture, caption, first))
        return self._answer(_relative(found) if relative else found, k)

    def _first(self, image: Image.Image, caption: str, count: int) -> NDArray[np.int64]:
        if self.fast is None:
            self.fast = AttributionService(self.workspace)
        if self.fast.samples_path != self.samples_path:
            raise UsageError(
                "the served index is of other training samples than the published run: `fastgda index CONFIG` and "
                "`fastgda evaluate CONFIG` with the run's configuration serve one of these"
            )
        return np.array([answer.train_id for answer in self.fast.attribute(image, caption, count)])

    def _answer(self, found: SketchScores, k: int) -> InfluenceAnswer:
        best = found.scores.topk(min(k, len(found.scores)))
        chosen = best.indices.tolist()
        rows = self.samples.take(found.train_ids[chosen]).to_pylist()
        errors = found.standard_errors[best.indices].tolist()
        samples = [
            Influence(
                position,
                row["train_id"],
                score,
                None if math.isnan(error) else error,
                row["key"],
                row["captions"][0],
                row["shard"],
            )
            for position, (row, score, error) in enumerate(
                zip(rows, best.values.tolist(), errors, strict=True), start=1
            )
        ]
        positive, negative = (float(part.sum()) for part in (found.scores.clamp_min(0), found.scores.clamp_max(0)))
        held = float(best.values.clamp_min(0).sum())
        return InfluenceAnswer(samples, len(found.scores), positive, negative, held / positive if positive else 0.0)


def _relative(found: SketchScores) -> SketchScores:
    length = found.norms.clamp_min(torch.finfo(torch.float64).tiny)
    return found._replace(
        scores=found.scores / length, standard_errors=found.standard_errors / length, by_group=found.by_group / length
    )
