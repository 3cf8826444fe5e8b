"""Tier sketch: one gradient of the query against the stored sketches of the published run."""

from __future__ import annotations

import threading

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from storage_schemas.workspace import Workspace
from tasks.serving.question import check_sketched
from tasks.teaching.run import read_run_anew
from tasks.teaching.sketch_scores import SketchScores, StoredSketches

# Of the model, which all of a process share: its layers are watched while a gradient is taken, and an exact teacher
# moves their weights.
MODEL = threading.Lock()


class SketchTier:
    """The model, Fisher and sketches of the published run, loaded once; a question costs one gradient of the query.

    Raises:
        UsageError: the run keeps no sketches, or lacks some.
    """

    def __init__(self, workspace: Workspace, run: str) -> None:
        check_sketched(workspace, run)
        found = read_run_anew(str(workspace.root), run)
        self.stored = StoredSketches(found.context, found.artifacts, found.name)
        self.samples_path = found.artifacts["samples"].path

    def scores(
        self, image: Image.Image, caption: str, train_ids: NDArray[np.int64] | None, *, relative: bool = False
    ) -> SketchScores:
        """Return the scores of all samples, or of some, in ascending order of train_id.

        Args:
            image: the generated image, RGB.
            caption: that it was generated from.
            train_ids: of whom; their sketches alone are read.
            relative: divide a score by the length of the sample's gradient, so that samples with large gradients do
                not head every answer (Barshan et al., "RelatIF", 2020).
        """
        with MODEL:
            found = self.stored.scores(self.stored.ask(image, caption), train_ids)
        return _relative(found) if relative else found


def _relative(found: SketchScores) -> SketchScores:
    length = found.norms.clamp_min(torch.finfo(torch.float64).tiny)
    return found._replace(
        scores=found.scores / length,
        standard_errors=found.standard_errors / length,
        by_group=found.by_group / length,
    )
