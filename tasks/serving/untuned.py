"""Images that look alike: the nearest by the frozen features, which no teacher taught."""

from __future__ import annotations

import dataclasses

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.errors import UsageError
from fastgda_core.search.searcher import Searcher
from storage_schemas.files import AnyPath
from storage_schemas.workspace import Workspace
from tasks.config.inputs import FeaturesConfig
from tasks.inputs.features import feature_blocks, feature_folders, feature_mean
from tasks.teaching.run import read_run_anew

MOST_BYTES = 2 * 2**30  # of features in memory, in half precision


class Untuned:
    """The features of all training samples of a run in one space, in half precision; concurrent calls may share it.

    Raises:
        UsageError: the features are gone, of other samples, or more than fit into memory.
        StoreError: the run was imported without them.
    """

    def __init__(self, workspace: Workspace, run: str, space: FeaturesConfig, samples_path: AnyPath) -> None:
        found = read_run_anew(str(workspace.root), run)
        samples = found.artifacts["samples"]
        if samples.path != samples_path:
            raise UsageError("the published run is of other training samples than the index")
        config = found.config.model_copy(update={"features": space})
        context = dataclasses.replace(found.context, config=config)
        if any(not folder.exists() for folder, _ in feature_folders(context, samples).values()):
            raise UsageError("the training samples' features are gone: `fastgda run CONFIG` makes them again")
        index: faiss.Index | None = None
        for block in feature_blocks(context, samples, feature_mean(context, samples)):
            width = block.shape[1]
            if index is None:
                size = 2 * width * samples.rows
                if size > MOST_BYTES:
                    much = f"{size / 2**30:.0f} GB of features of {samples.rows:,} samples"
                    raise UsageError(f"{much} are more than are kept in memory for that")
                index = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
            index.add(F.normalize(block, dim=1).numpy())
        self._searcher = Searcher(index)

    @torch.no_grad()
    def nearest(
        self, features: Tensor, k: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return cosine and train_id of the k nearest samples of one question's phi, (d,): (k,) each."""
        asked = F.normalize(features[None].float(), dim=1).cpu().numpy()
        cosine, train_ids = self._searcher.search(asked, k, allowed=allowed)
        return cosine[0], train_ids[0]
