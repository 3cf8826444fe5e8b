"""Images that look alike: the nearest by the frozen features, which no teacher taught."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.errors import UsageError
from fastgda_core.features import image_space, text_space
from fastgda_core.search.searcher import Searcher
from storage_schemas.workspace import Workspace
from tasks.config.inputs import FeaturesConfig
from tasks.inputs.features import feature_blocks, feature_folders, feature_mean
from tasks.teaching.run import read_run_anew

Kind = Literal["images", "captions"]
MOST_BYTES = 2 * 2**30  # of features in memory, in half precision


def space_of(kind: Kind, space: str) -> str:
    """Return the encoders of a feature space that see images, or read captions, joined by `+`; empty: none does."""
    return text_space(space) if kind == "captions" else image_space(space)


def numbers_of(kind: Kind, widths: Mapping[str, int]) -> slice:
    """Return which numbers of phi the encoders of one kind give, of a space whose encoders have these widths.

    Raises:
        UsageError: they do not stand beside each other.
    """
    names = list(widths)
    mine = [name in space_of(kind, "+".join(names)).split("+") for name in names]
    first, last = mine.index(True), len(mine) - mine[::-1].index(True)
    if not all(mine[first:last]):
        raise UsageError("name the encoders of images before those of captions in features.space")
    start = sum(widths[name] for name in names[:first])
    return slice(start, start + sum(widths[name] for name in names[first:last]))


class Untuned:
    """The features of a run's training samples in one space, in half precision; concurrent calls may share it.

    Args:
        space: whose encoders made them.
        numbers: which of phi's numbers are compared, as those of one encoder.

    Raises:
        UsageError: the features are gone, or more than fit into memory.
        StoreError: the run was imported without them.
    """

    def __init__(self, workspace: Workspace, run: str, space: FeaturesConfig, numbers: slice) -> None:
        found = read_run_anew(str(workspace.root), run)
        samples = found.artifacts["samples"]
        self.samples_path, self.numbers, self.rows = samples.path, numbers, samples.rows
        config = found.config.model_copy(update={"features": space})
        context = dataclasses.replace(found.context, config=config)
        if any(not folder.exists() for folder, _ in feature_folders(context, samples).values()):
            raise UsageError("the training samples' features are gone: `fastgda run CONFIG` makes them again")
        index: faiss.Index | None = None
        for block in feature_blocks(context, samples, feature_mean(context, samples)):
            part = block[:, numbers]
            width = part.shape[1]
            if index is None:
                size = 2 * width * samples.rows
                if size > MOST_BYTES:
                    much = f"{size / 2**30:.0f} GB of features of {samples.rows:,} samples"
                    raise UsageError(f"{much} are more than are kept in memory for that")
                index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
            index.add(F.normalize(part, dim=1).numpy())
        self._searcher = Searcher(index)

    @torch.no_grad()
    def nearest(
        self, features: Tensor, k: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return cosine and train_id of the k nearest samples of one question's phi, (d,): (k,) each.

        What `allowed` says of samples that were added to the run's, behind them, is not looked at.
        """
        asked = F.normalize(features[None, self.numbers].float(), dim=1).cpu().numpy()
        among = None if allowed is None else allowed[: self.rows]
        cosine, train_ids = self._searcher.search(asked, k, allowed=among)
        return cosine[0], train_ids[0]
