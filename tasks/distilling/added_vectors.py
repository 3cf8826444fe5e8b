"""A head's vectors of samples that are added to an index, without a run: encoded, and of a gradient head sketched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.features import ENCODERS, concatenate, encoder_names
from fastgda_core.sketches.int8 import Int8Vectors
from storage_schemas import tables
from storage_schemas.commit import input_key
from storage_schemas.runs.noise_plan import NOISE_PLAN
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.answering import Answering, ByGradients
from tasks.distilling.vectors import VectorParts
from tasks.inputs.encoded_items import InBatches, encode_items
from tasks.inputs.features import PART_ITEMS, load_encoders
from tasks.teaching.latents import LatentParts, latents_of
from tasks.teaching.sketch_scores import StoredSketches
from tasks.teaching.sketches import load_sketch, sketched


def added_vectors(context: Context, samples: Artifact, head: Artifact, first: int, mean: Tensor | None) -> VectorParts:
    """Return the vectors of the samples from `first` on.

    Args:
        context: in the head's feature space.
        mean: of the index's features, (d,), which is not computed anew: old and new vectors have to be of one space.
    """
    centre = [] if mean is None else [hashlib.sha256(mean.numpy().tobytes()).hexdigest()]
    key = input_key("vectors added", head.key, samples.key, first, centre, table=tables.VECTORS)
    artifact = Artifact("vectors", key, context.workspace.vectors(key), samples.rows - first)
    return VectorParts(context.workspace, artifact, head, first, _NewSamples(context, samples, mean).vectors)


@dataclass(frozen=True, eq=False)
class _NewSamples:
    """What makes vectors of samples that no run has looked at."""

    context: Context
    samples: Artifact
    mean: Tensor | None

    def vectors(self, answering: Answering, train_ids: Tensor) -> Iterator[Tensor]:
        for some in train_ids.split(PART_ITEMS):
            phi = self._phi(some.tolist())
            if isinstance(answering, ByGradients):
                sketches = self._sketches(answering.stored, some.numpy())
                yield answering.head.samples(sketches, phi.to(sketches.device)).cpu()
            else:
                yield answering.samples(some, phi)

    @cached_property
    def _encoders(self) -> dict[str, InBatches]:
        config = self.context.config.features
        loaded = zip(encoder_names(config.space), load_encoders(config, self.context.device), strict=True)
        return {name: InBatches(each, config.batch_size or ENCODERS[name].batch) for name, each in loaded}

    def _phi(self, train_ids: list[int]) -> Tensor:
        config = self.context.config.features
        encoded = encode_items(self._encoders, self.samples, train_ids, lambda _: None).encoded
        for train_id, why in (each for of_one in encoded.values() for each in of_one.unreadable.items()):
            raise UsageError(f"sample {train_id} cannot be read any more ({why}): mend it or leave its tar out")
        parts = [encoded[name].features for name in self._encoders]
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
