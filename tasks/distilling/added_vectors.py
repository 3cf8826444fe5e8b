"""A head's vectors of samples that are added to an index, without a run: encoded, and of a gradient head sketched."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.features import ENCODERS, concatenate, encoder_names, load_encoder
from fastgda_core.sketches.int8 import Int8Vectors
from storage_schemas import tables
from storage_schemas.commit import input_key
from storage_schemas.files import AnyPath
from storage_schemas.listings import committed_parts
from storage_schemas.runs.noise_plan import NOISE_PLAN
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.answering import Answering, ByGradients, answering_head
from tasks.distilling.vectors import VECTOR_PART_SAMPLES, Block, write_vectors
from tasks.inputs.features import PART_ITEMS, encode_items
from tasks.progress import stage
from tasks.teaching.latents import LatentParts, latents_of
from tasks.teaching.sketch_scores import StoredSketches
from tasks.teaching.sketches import load_sketch, sketched


class AddedVectors:
    """The vectors of the samples from `first` on, in parts as those of all samples.

    context: in the head's feature space. mean: that of the index's features, which is not computed anew: old and new
    vectors have to be of one space.
    """

    def __init__(self, context: Context, samples: Artifact, head: Artifact, first: int, mean: Tensor | None) -> None:
        self.context, self.samples, self.head = context, samples, head
        self.first, self.mean = first, mean
        centre = [] if mean is None else [hashlib.sha256(mean.numpy().tobytes()).hexdigest()]
        key = input_key("vectors added", head.key, samples.key, first, centre, table=tables.VECTORS)
        self.artifact = Artifact("vectors", key, context.workspace.vectors(key), samples.rows - first)

    @property
    def paths(self) -> list[AnyPath]:
        """The path of every part."""
        count = -(-self.artifact.rows // VECTOR_PART_SAMPLES)
        return [part(self.artifact.path, number) for number in range(count)]

    def made(self) -> None:
        """Make the parts that are missing."""
        there = committed_parts(self.artifact.path, self.artifact.key)
        missing = [number for number, path in enumerate(self.paths) if path.name not in there]
        if not missing:
            return
        answering = answering_head(self.context.workspace, self.head.path, by_part=True)
        with stage("vectors", self.artifact.rows) as advance:
            for number in missing:
                started, start = time.monotonic(), self.first + number * VECTOR_PART_SAMPLES
                ids = np.arange(start, min(start + VECTOR_PART_SAMPLES, self.samples.rows))
                pieces = [self._vectors(answering, some) for some in _in_blocks(ids)]
                block = Block(ids, torch.cat(pieces).float().numpy())
                write_vectors(self.paths[number], block, key=self.artifact.key, started=started)
                advance(len(ids))

    def _vectors(self, answering: Answering, train_ids: NDArray[np.int64]) -> Tensor:
        phi = self._phi(train_ids.tolist())
        if isinstance(answering, ByGradients):
            sketches = self._sketches(answering.stored, train_ids)
            return answering.head.samples(sketches, phi.to(sketches.device)).cpu()
        return answering.samples(torch.from_numpy(train_ids), phi)

    def _phi(self, train_ids: list[int]) -> Tensor:
        config, parts = self.context.config.features, []
        for name in encoder_names(config.space):
            encoder = load_encoder(name, self.context.device, config.weights.get(name))
            size = config.batch_size or ENCODERS[name].batch
            parts.append(encode_items(encoder, self.samples, train_ids, size, lambda _: None)[0])
        return concatenate(parts, unit_length=config.unit_length, mean=self.mean)

    def _sketches(self, stored: StoredSketches, train_ids: NDArray[np.int64]) -> Tensor:
        """Sketch new samples' gradients as the run's were: one backward a sample and noise, on the context's model."""
        parts = stored.parts
        context = stored.context
        latents = LatentParts(context, self.samples, latents_of(context, self.samples))
        step = latents.rows(0)
        for number in sorted({int(train_id) // step for train_id in train_ids}):
            if latents.made(number) is None:
                latents.make(number)
        sketch = load_sketch(context, parts.curvature, parts.basis)
        plan = stored.artifacts.get(NOISE_PLAN)
        found = sketched(context, latents.artifact, train_ids, sketch, plan)
        if found.left_out:
            train_id, why = next(iter(found.left_out.items()))
            raise UsageError(f"sample {train_id} has no gradient ({why}): mend it or leave its tar out")
        return Int8Vectors.of(found.sketches[:, 0]).dense().to(context.device)


def _in_blocks(train_ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(train_ids), PART_ITEMS):
        yield train_ids[start : start + PART_ITEMS]
