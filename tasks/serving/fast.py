"""Tier fast: the published head and its index; a question costs one pass of the encoders and one search."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.features import Encoder, concatenate, encoder_names
from fastgda_core.images import as_rgb
from storage_schemas.heads.records import index_samples, read_head_record
from storage_schemas.snapshots.published import Published
from storage_schemas.workspace import Workspace
from tasks.devices import pick_device
from tasks.distilling.answering import answering_head
from tasks.distilling.calibration import read_calibration
from tasks.distilling.head_space import recorded_space
from tasks.distilling.index import read_index_mean
from tasks.distilling.opened_index import open_search_index
from tasks.inputs.features import load_encoders
from tasks.inputs.samples import samples_table
from tasks.serving.predicted import Predictions

Picture = Image.Image | None
Caption = str | None
_BLANK = Image.new("RGB", (64, 64), "white")


class FastTier:
    """The published encoders, head and index, loaded once; concurrent calls may share it.

    Raises:
        UsageError: neither is published yet, the encoders' weights are not on this machine, or the index is damaged.
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
        self._lock = threading.Lock()  # of a gradient head, which may have to look at the model's layers
        self.mean = read_index_mean(index) if self.space.centre else None
        self.index = open_search_index(index, head.name)
        self.samples_path = workspace.file(published.index_samples or index_samples(workspace, head, index))
        self.samples = samples_table(self.samples_path).num_rows
        calibration = read_calibration(workspace, published.metrics) if published.metrics else None
        self.predictions = Predictions(calibration, self.index, self.samples)
        # A gradient head loads the model at its first question, which nobody should wait for.
        self.vectors(self.features([_BLANK], ["a picture"]), ["a picture"])

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> Tensor:
        """Return phi of several questions, (questions, d), encoded together.

        What a question lacks, its picture or its caption, stands as the mean of the training samples: zero.

        Raises:
            UsageError: the head cannot answer without what a question lacks.
        """
        for picture, caption in zip(pictures, captions, strict=True):
            self._check_parts(picture, caption)
        images = [None if picture is None else as_rgb(picture) for picture in pictures]
        known = [images if encoder.modality == "image" else list(captions) for encoder in self.encoders]
        parts = [_encoded(encoder, items) for encoder, items in zip(self.encoders, known, strict=True)]
        phi = concatenate(parts, unit_length=self.space.unit_length, mean=self.mean)
        for part, items in zip(phi.split([part.shape[1] for part in parts], dim=1), known, strict=True):
            part[[item is None for item in items]] = 0
        return phi

    @torch.no_grad()
    def vectors(self, features: Tensor, captions: Sequence[Caption]) -> NDArray[np.float32]:
        """Return the vectors that questions are searched by, (questions, width), from their phi."""
        texts = ["" if caption is None else caption for caption in captions]
        if self.kind == "symmetric":
            return _as_array(self.head.queries(features, texts))
        with self._lock:
            return _as_array(self.head.queries(features, texts))

    def search(
        self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return similarities and train_ids of the k best that are allowed, (questions, k) each; -1: no more found."""
        return self.index.search(vectors, k, allowed=allowed)

    def reaching(self, allowed: NDArray[np.bool_] | None, samples: int) -> NDArray[np.bool_] | None:
        """Return a filter over the first so many samples as `search` takes it; what was added behind is not named."""
        if samples >= self.samples:
            return allowed
        wide = np.zeros(self.samples, np.bool_)
        wide[:samples] = True if allowed is None else allowed
        return wide

    @property
    def can_lower(self) -> bool:
        """Whether a very negative similarity means that a sample lowers the image's likelihood.

        It does where the vectors are gradients. A symmetric head learned an order alone: its lowest means no influence.
        """
        return self.kind == "gradient"

    @functools.cached_property
    def sees(self) -> set[str]:
        """What the head's encoders look at: image, text or both."""
        return {str(encoder.modality) for encoder in self.encoders}

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """How many numbers of phi each encoder gives, in their order."""
        names = encoder_names(self.space.space)
        return {name: _encoded(encoder, [None]).shape[1] for name, encoder in zip(names, self.encoders, strict=True)}

    def _check_parts(self, picture: Picture, caption: Caption) -> None:
        """Raise UsageError where the head cannot answer for want of a picture or of a caption."""
        if picture is None and caption is None:
            raise UsageError("a question needs an image, a caption, or best both")
        lacking = [what for what, part in (("image", picture), ("caption", caption)) if part is None]
        if not lacking:
            return
        modality = "image" if lacking == ["image"] else "text"
        if self.kind == "gradient" and lacking == ["caption"]:
            raise UsageError(
                "this head answers by a gradient that it predicts from the caption's tokens: give the caption, too"
            )
        if modality in self.sees and (len(self.sees) == 1 or not self.space.centre):
            why = "looks at nothing else" if len(self.sees) == 1 else "has features that are not centred"
            raise UsageError(f"this head cannot answer without the {lacking[0]}: it {why}")


def _encoded(encoder: Encoder, items: Sequence[object]) -> Tensor:
    """Return the features of several items, (items, width); any of those that are None."""
    there = [item for item in items if item is not None]
    blank: object = _BLANK if encoder.modality == "image" else "a picture"
    found = encoder.encode_queries(there or [blank])
    whole = found.new_zeros(len(items), found.shape[1])
    if there:
        whole[[item is not None for item in items]] = found
    return whole


def _as_array(vectors: Tensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = vectors.float().cpu().numpy()
    return found
