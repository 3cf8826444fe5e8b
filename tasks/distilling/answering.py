"""The vectors by which a head of either kind answers, of queries and of training samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.ranking.head import RankHead
from fastgda_core.ranking.query_tower import GradientHead, QueryTower
from fastgda_core.sketches.factored import CaptionInputs
from storage_schemas.files import AnyPath, local_copy
from storage_schemas.heads.records import HeadRecord, read_head_record
from storage_schemas.workspace import Workspace
from tasks.context import Context
from tasks.distilling.versions import load_trained_head
from tasks.teaching.run import read_run_anew
from tasks.teaching.sketch_scores import StoredSketches

AT_ONCE = 32  # queries whose gradients are predicted together


class Answering(Protocol):
    """A head that answers: the inner product of a query's vector and a sample's grows with the sample's influence."""

    def queries(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        """Return vectors of queries, (q, width) on the CPU, from phi, (q, d), and captions."""

    def samples(self, train_ids: Tensor, features: Tensor) -> Tensor:
        """Return vectors of training samples, (n, width) on the CPU, from train_ids, (n,), and their phi, (n, d)."""


@dataclass(frozen=True)
class Symmetric:
    """Both sides through one network: cosines of its outputs."""

    head: RankHead

    @torch.no_grad()
    def queries(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        return self.head.queries(features)

    @torch.no_grad()
    def samples(self, train_ids: Tensor, features: Tensor) -> Tensor:
        return self.head(features)


@dataclass(frozen=True)
class ByGradients:
    """Exact sketches of samples' gradients against predicted ones of queries'.

    by_part: samples are asked for stretch by stretch, and their sketches are not to be kept in memory.
    """

    head: GradientHead
    stored: StoredSketches
    by_part: bool = False

    def queries(self, features: Tensor, captions: Sequence[str]) -> Tensor:
        sketches = predicted_sketches(self.stored.context, self.head.tower, features, captions)
        return self.head.queries(sketches, features.to(sketches.device)).cpu()

    def samples(self, train_ids: Tensor, features: Tensor) -> Tensor:
        sketches = (self.stored.dense_from_parts if self.by_part else self.stored.dense)(train_ids)
        return self.head.samples(sketches, features.to(sketches.device)).cpu()


@torch.no_grad()
def predicted_sketches(context: Context, tower: QueryTower, features: Tensor, captions: Sequence[str]) -> Tensor:
    """Return the sketches of queries' gradients as a tower predicts them, (q, R), on the model's device.

    Args:
        context: of the run whose sketches they are held against.
    """
    model, first = context.teacher_model(), frozenset(tower.layers)

    def look() -> CaptionInputs:
        layers = context.layers(model)
        wanted = {name: layers[name] for name in first}
        return CaptionInputs(model, wanted, context.micro_batch("gradients"), captions[0])

    inputs = context.loaded.once("caption inputs", first, look)
    found = []
    for start in range(0, len(captions), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        seen = inputs.of(model.encode_captions(list(captions[some])))
        phi = F.normalize(features[some], dim=1).to(context.device)
        found.append(tower.sketches(seen, phi))
    return torch.cat(found)


def answering_head(workspace: Workspace, folder: AnyPath, *, by_part: bool = False) -> Answering:
    """Load a head version as what answers; `by_part`: samples will be asked for in stretches, once each.

    Raises:
        StoreError: the run whose sketches it answers from is gone.
    """
    record = read_head_record(folder)
    if record.kind == "symmetric":
        return Symmetric(load_trained_head(folder))
    stored = sketches_behind(workspace, record)
    head = GradientHead.load(local_copy(folder / "head.safetensors"), stored.context.device)
    return ByGradients(head, stored, by_part)


def sketches_behind(workspace: Workspace, record: HeadRecord) -> StoredSketches:
    """Return the sketches that a head of kind gradient answers from: those of the run that it learned from."""
    assert record.run is not None
    run = read_run_anew(str(workspace.root), record.run)
    return StoredSketches(run.context, run.artifacts, run.name)
