"""Tier exact: the published run's teacher, asked on the spot; minutes where the other tiers take a moment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage_schemas.workspace import Workspace
from tasks.serving.sketched import MODEL
from tasks.teaching.any_image import check_askable, scores_of_image
from tasks.teaching.families import BlockScores
from tasks.teaching.run import read_run_anew
from tasks.teaching.updates import owner_of

FIRST = 400  # of the fast tier's, that the teacher scores: on the demo 99.7 % of its own first 400 are among these

Progress = Callable[[float], None]
"""Called with the share of the work that is done."""


class ExactTier:
    """The published run, whose teacher scores samples anew for one image.

    Raises:
        StoreError: the run was imported, and has no teacher here.
        UsageError: its teacher cannot be asked about one image.
    """

    def __init__(self, workspace: Workspace, run: str) -> None:
        self.run = read_run_anew(str(workspace.root), run)
        check_askable(self.run.context)
        self.samples_path = self.run.artifacts["samples"].path

    def scores(
        self, image: Image.Image, caption: str, train_ids: NDArray[np.int64], owner: int | None, progress: Progress
    ) -> BlockScores:
        """Return the teacher's scores of some samples, (1, n), for an RGB image.

        Args:
            image: the generated image.
            caption: that it was generated from.
            train_ids: of the samples, ascending.
            owner: of a stored query, so that its published scores come out again; None: of the image and its caption.
            progress: what it raises ends the work.
        """
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done / len(train_ids))

        owner = owner_of(image, caption) if owner is None else owner
        return scores_of_image(self.run, image, caption, train_ids, owner=owner, alone=MODEL, advance=advance)
