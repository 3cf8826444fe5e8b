"""Answer attribution queries from the published index."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.features import concatenate
from fastgda_core.images import as_rgb
from storage_schemas.heads.records import index_samples, read_head_record
from storage_schemas.snapshots.published import read_published
from storage_schemas.workspace import Workspace
from tasks.devices import pick_device
from tasks.distilling.answering import answering_head
from tasks.distilling.head_space import recorded_space
from tasks.distilling.index import read_index_mean
from tasks.distilling.opened_index import open_search_index
from tasks.inputs.features import encode_query, load_encoders
from tasks.inputs.samples import samples_table


@dataclass(frozen=True)
class Attribution:
    """One training sample of an answer, best first."""

    position: int
    train_id: int
    similarity: float
    key: str
    caption: str
    shard: str


class AttributionService:
    """The published encoders, head and index, loaded once; each call is one encoder pass and one search."""

    def __init__(self, workspace: Workspace) -> None:
        published = read_published(workspace)
        if published.head is None or published.index is None:
            raise UsageError(f"{workspace.root} has scores but no index yet: let the run finish")
        # Nothing else of the configuration is needed, which another release may have written.
        self.device = pick_device(str(published.config.get("device", "auto")))
        head = workspace.file(published.head)
        # The head's own space: a run that was published since may have been configured with another.
        space = recorded_space(read_head_record(head), workspace)
        self.unit_length = space.unit_length
        self.encoders = load_encoders(space, self.device)
        self.head = answering_head(workspace, head)
        index = workspace.file(published.index)
        self.mean = read_index_mean(index) if space.centre else None
        self.index = open_search_index(index, head.name)
        self.samples_path = workspace.file(published.index_samples or index_samples(workspace, head, index))
        self.samples = samples_table(self.samples_path)

    @torch.no_grad()
    def embed(self, image: Image.Image, caption: str) -> Tensor:
        """Return the vector that one query is searched by, (1, width of the head)."""
        parts = encode_query(self.encoders, as_rgb(image), caption)
        return self.head.queries(concatenate(parts, unit_length=self.unit_length, mean=self.mean), [caption])

    def attribute(self, image: Image.Image, caption: str, k: int) -> list[Attribution]:
        """Return the k training samples that influenced the image most, by the rank head's estimate."""
        similarity, train_ids = self.index.search(self.embed(image, caption).numpy(), k)
        rows = self.samples.take(train_ids[0]).to_pylist()
        return [
            Attribution(position, row["train_id"], float(cosine), row["key"], row["captions"][0], row["shard"])
            for position, (row, cosine) in enumerate(zip(rows, similarity[0], strict=True), start=1)
        ]
