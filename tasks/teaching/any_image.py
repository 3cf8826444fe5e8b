"""The teacher on the spot: scores of a run's samples for an image that is no query of the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import NonFiniteLoss, UsageError
from fastgda_core.teachers.registry import TEACHERS, UNLEARNING_TEACHERS
from fastgda_core.teachers.unlearning import compress, expand, expected_spread
from tasks.context import Context
from tasks.teaching.checkpoints import Asked, AtCheckpoint, at_checkpoints
from tasks.teaching.families import BlockScores
from tasks.teaching.run import Run
from tasks.teaching.unlearning import scores_of
from tasks.teaching.updates import device_fisher, gradients_of, update_of

BLOCK = 128  # training samples that are scored between two looks at the clock


def check_askable(context: Context) -> None:
    """Raise UsageError where a run's teacher cannot be asked about one image."""
    name = context.config.teacher.name
    if name not in UNLEARNING_TEACHERS:
        family = TEACHERS[name].family
        raise UsageError(
            f"tier exact asks the run's teacher on the spot, which {name} of the family {family} cannot do: "
            f"it can where teacher.name is one of {', '.join(UNLEARNING_TEACHERS)}"
        )


def scores_of_image(
    run: Run,
    image: Image.Image,
    caption: str,
    train_ids: NDArray[np.int64],
    *,
    owner: int,
    alone: AbstractContextManager[object],
    advance: Callable[[int], None],
) -> BlockScores:
    """Return the scores of some training samples for an image, (1, n), as the run's teacher makes them for a query.

    Args:
        run: whose teacher, curvature and latents these are.
        image: RGB.
        caption: that it was generated from.
        train_ids: of the samples, ascending.
        owner: stands for the image in noise streams, as `tasks.teaching.updates.owner_of` or a query's own.
        alone: entered for each piece of work with the model, whose weights a step moves.
        advance: told the number of samples that were just scored; what it raises ends the work.

    Raises:
        UsageError: the image's gradient is no number.
    """
    with alone:
        asked = [_asked(at, image, caption, owner, run) for at in at_checkpoints(run.context, run.artifacts)]
    blocks = []
    for start in range(0, len(train_ids), BLOCK):
        some = train_ids[start : start + BLOCK]
        with alone:
            blocks.append(scores_of(run.context, run.artifacts, asked, 1, some))
        advance(len(some))
    return BlockScores(
        np.concatenate([np.empty(0, np.int64), *(block.train_ids for block in blocks)]),
        torch.cat([torch.empty(1, 0, dtype=torch.float64), *(block.scores for block in blocks)], dim=1),
        torch.cat([torch.empty(1, 0, dtype=torch.float64), *(block.errors for block in blocks)], dim=1),
        {train_id: why for block in blocks for train_id, why in block.left_out.items()},
    )


def _asked(at: AtCheckpoint, image: Image.Image, caption: str, owner: int, run: Run) -> Asked:
    """Return the unlearning step of an image at one checkpoint, as the run keeps those of its queries."""
    context, config = at.context, at.context.config.teacher
    try:
        gradients = gradients_of(context, image, caption, owner=owner, seed=config.seed, groups=1)
    except NonFiniteLoss as error:
        raise UsageError("the image's loss is no number, so that there is no gradient to ask by") from error
    fisher = device_fisher(context, at.curvature)
    update = update_of(
        context, {name: each[0] for name, each in gradients.items()}, fisher, run.artifacts["latents"].rows
    )
    spread = None
    if len(context.at_checkpoints()) > 1:
        spread = torch.tensor([expected_spread(fisher, update)], dtype=torch.float64)
    if config.update_rank is not None:
        update = expand(compress(update, config.update_rank)[0])
    return Asked(context, [{name: layer[None] for name, layer in update.items()}], spread)
