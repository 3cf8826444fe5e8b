"""Tier fast: the published head and its index; a question costs one pass of the encoders and one search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import UsageError
from fastgda_core.features import concatenate
from fastgda_core.images import as_rgb
from fastgda_core.search.index import read_index, search
from storage_schemas.files import local_copy
from storage_schemas.heads.records import index_samples, read_head_record
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.devices import pick_device
from tasks.distilling.answering import answering_head
from tasks.distilling.head_space import recorded_space
from tasks.distilling.index import read_index_mean
from tasks.inputs.features import load_encoders


class FastTier:
    """The published encoders, head and index, loaded once; concurrent calls may share it.

    Raises:
        UsageError: neither is published yet, or the encoders' weights are not on this machine.
    """

    def __init__(self, workspace: Workspace, published: Published) -> None:
        if published.head is None or published.index is None:
            raise UsageError(f"{workspace.root} has scores but no index yet: let the run finish")
        # Nothing else of the configuration is needed, which another release may have written.
        self.device = pick_device(str(published.config.get("device", "auto")))
        head, index = workspace.file(published.head), workspace.file(published.index)
        # The head's own space: a run that was published since may have been configured with another.
        record = read_head_record(head)
        self.space, self.kind = recorded_space(record, workspace), record.kind
        self.encoders = load_encoders(self.space, self.device)
        self.head = answering_head(workspace, head)
        self.mean = read_index_mean(index) if self.space.centre else None
        self.index = read_index(local_copy(index / "index.faiss"))
        self.samples_path = workspace.file(published.index_samples or index_samples(workspace, head, index))

    @torch.no_grad()
    def vectors(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors that queries are searched by, (queries, width), encoded together."""
        images, texts = [as_rgb(picture) for picture in pictures], list(captions)
        parts = [encoder.encode_queries(images if encoder.modality == "image" else texts) for encoder in self.encoders]
        phi = concatenate(parts, unit_length=self.space.unit_length, mean=self.mean)
        found: NDArray[np.float32] = self.head.queries(phi, texts).float().numpy()
        return found

    def search(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return similarities and train_ids of the k best that are allowed, (queries, k) each."""
        return search(self.index, vectors, k, allowed=allowed)

    @property
    def can_lower(self) -> bool:
        """Whether a very negative similarity means that a sample lowers the image's likelihood.

        It does where the vectors are gradients. A symmetric head learned an order alone: its lowest means no influence.
        """
        return self.kind == "gradient"
