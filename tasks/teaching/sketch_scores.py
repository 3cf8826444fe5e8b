"""First-order scores of any image against stored sketches: one gradient, then inner products."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.sketches.int8 import Int8Vectors
from fastgda_core.sketches.principal import PrincipalSketch
from storage_schemas.files import local_copy
from storage_schemas.which_workspace import command
from tasks.context import Context, load_tensors
from tasks.teaching.families import Artifacts
from tasks.teaching.sketches import SketchParts, load_sketch
from tasks.teaching.updates import gradients_of, owner_of

GROUPS = 4  # of a query's pairs at most: their spread is the standard error of its scores
_AT_ONCE = 2**26  # numbers that are unpacked at a time


class SketchScores(NamedTuple):
    """Scores of some training samples, each (n,): the larger of the two flips where these count, in units of scores.

    standard_errors: over groups of the query's pairs; they say nothing of the samples' noise and of the Fisher.
    norms: length of each sample's sketch, that of its whitened gradient.
    by_group: scores by group of the query's pairs, (groups, n), whose mean is `scores`.
    """

    train_ids: NDArray[np.int64]
    scores: Tensor
    standard_errors: Tensor
    norms: Tensor
    by_group: Tensor


@dataclass(frozen=True, eq=False)
class StoredSketches:
    """The sketches of a run, and the model, Fisher and basis that make the sketch of a query."""

    context: Context
    artifacts: Artifacts
    run: str

    def __post_init__(self) -> None:
        """Raise UsageError where sketches are missing."""
        if missing := self.parts.missing():
            lacking = f"{len(missing)} of {self.parts.count} parts of its sketches"
            goes_on = command(self.context.workspace, f"retry {self.run}")
            raise UsageError(f"run {self.run} lacks {lacking}: {goes_on} makes them")

    @functools.cached_property
    def parts(self) -> SketchParts:
        found = SketchParts.of_run(self.context, self.artifacts)
        assert found is not None, "asked of a run that keeps none: see check_sketched"
        return found

    @property
    def sketch(self) -> PrincipalSketch:
        """What makes the sketch of a query's gradient."""
        return load_sketch(self.context, self.parts.curvature, self.parts.basis)

    @property
    def train_ids(self) -> NDArray[np.int64]:
        """The samples that have sketches, ascending."""
        return self._loaded[0]

    def dense(self, train_ids: Tensor) -> Tensor:
        """Return the sketches of some samples, (n, size) on the model's device: zeros where a sample was left out.

        Of mirrored images the first one's.
        """
        return _dense(train_ids, *self._loaded)

    def dense_from_parts(self, train_ids: Tensor) -> Tensor:
        """Return what `dense` returns, from the parts of these samples alone: memory does not grow with the samples."""
        numbers = (train_ids // self.parts.step).unique().tolist()
        return _dense(train_ids, *self._read(numbers))

    @property
    def samples(self) -> int:
        """How many training samples there are, left-out ones among them."""
        return self.artifacts["latents"].rows

    @property
    def bytes_each(self) -> float:
        """Bytes of one sample's sketch, as it is kept in memory."""
        ids, values, scales = self._loaded
        return (values.numel() * values.element_size() + scales.numel() * scales.element_size()) / len(ids)

    def ask(self, image: Image.Image, caption: str) -> Tensor:
        """Return the sketch of a query's gradient in groups of its pairs, (groups, size), times alpha / N.

        Its noise is a function of the image and the caption: the same question has the same answer.
        """
        config = self.context.config.teacher
        groups = max(count for count in range(1, GROUPS + 1) if config.gradient_pairs % count == 0)
        owner = owner_of(image, caption)
        gradients = gradients_of(self.context, image, caption, owner=owner, seed=config.seed, groups=groups)
        assert config.alpha is not None
        return self.sketch.of_query(gradients) * (config.alpha / (config.training_size or self.samples))

    def scores(self, asked: Tensor, train_ids: NDArray[np.int64] | None = None) -> SketchScores:
        """Return the scores of all samples, or of some, in ascending order; left-out ones have none.

        Args:
            asked: of `ask`, (groups, size).
            train_ids: of whom; their sketches alone are read.
        """
        pieces = [
            (ids, *_inner_products(asked, values, scales))
            for ids, values, scales in (self._whole() if train_ids is None else self._some(np.unique(train_ids)))
        ]
        ids, by_group, norms = zip(*pieces, strict=True)
        groups = torch.cat(by_group, dim=1)
        errors = groups.std(0) / len(groups) ** 0.5 if len(groups) > 1 else torch.full_like(groups[0], torch.nan)
        return SketchScores(np.concatenate(ids), groups.mean(0), errors, torch.cat(norms), groups)

    @functools.cached_property
    def _loaded(self) -> tuple[NDArray[np.int64], Tensor, Tensor]:
        """All sketches, a byte a number, on the device where the model is."""
        return self._read(range(self.parts.count))

    def _read(self, numbers: Iterable[int]) -> tuple[NDArray[np.int64], Tensor, Tensor]:
        tensors = [load_tensors(self.parts.path(number)) for number in numbers]
        together = {name: torch.cat([each[name] for each in tensors]) for name in ("train_ids", "values", "scales")}
        device = self.context.device
        return together["train_ids"].numpy(), together["values"].to(device), together["scales"].to(device)

    def _whole(self) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        ids, values, scales = self._loaded
        step = max(1, _AT_ONCE // values[0].numel())
        for start in range(0, len(ids), step):
            stretch = slice(start, start + step)
            yield ids[stretch], values[stretch], scales[stretch]

    def _some(self, train_ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        """Read the sketches of some samples out of their parts, row by row."""
        device = self.context.device
        for number in np.unique(train_ids // self.parts.step).tolist():
            with safe_open(local_copy(self.parts.path(number)), "pt") as file:
                there = file.get_tensor("train_ids").numpy()
                rows = np.flatnonzero(np.isin(there, train_ids))
                slices = {name: file.get_slice(name) for name in ("values", "scales")}
                read = {
                    name: torch.cat([each[0:0], *(each[row : row + 1] for row in rows.tolist())])
                    for name, each in slices.items()
                }
            yield there[rows], read["values"].to(device), read["scales"].to(device)


def _dense(train_ids: Tensor, ids: NDArray[np.int64], values: Tensor, scales: Tensor) -> Tensor:
    place = torch.searchsorted(torch.from_numpy(ids), train_ids).clamp_max(len(ids) - 1)
    there = torch.from_numpy(ids)[place] == train_ids
    mine = place.to(values.device)
    found = Int8Vectors(values[mine, 0], scales[mine, 0]).dense()
    return found * there.to(found.device)[:, None]


def _inner_products(asked: Tensor, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores by group, (groups, n) float64, and norms, (n,), of sketches of one byte, on the CPU.

    Of the two flips that one counts whose mean over the groups is larger.
    """
    samples, flips = values.shape[:2]
    sketches = Int8Vectors(values.flatten(0, 1), scales.flatten(0, 1)).dense()
    products = (asked @ sketches.T).double().view(len(asked), samples, flips)
    larger = products.mean(0).argmax(1)
    each = torch.arange(samples, device=values.device)
    return products[:, each, larger].cpu(), sketches.norm(dim=1).view(samples, flips)[each, larger].double().cpu()
