"""Answers of tier fast by today's service, in the form that the HTTP routes ask for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import UsageError
from fastgda_core.images import as_rgb
from fastgda_core.search.index import search
from storage_schemas.heads.records import read_head_record
from storage_schemas.snapshots.published import read_published
from storage_schemas.workspace import Workspace
from tasks.inputs.queries import Query, load_queries, queries_artifact
from tasks.serving.answers import Agreement, Answer, Hit, Tier, Versions
from tasks.serving.attribute import AttributionService


class Attributor:
    """The published state, loaded once."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        published = read_published(workspace)
        self.service = AttributionService(workspace)
        self.width = self.service.index.d
        assert published.head and published.index
        record = read_head_record(workspace.file(published.head))
        self.versions = Versions(
            published.version,
            published.run,
            published.snapshot,
            Path(published.head).name,
            Path(published.index).name,
            vectors=self.service.index.ntotal,
        )
        self.agreement = Agreement("mAP", record.validation_map, None, published.teacher)
        self.queries = {
            query.query_id: query
            for path in published.queries
            for query in load_queries(queries_artifact(workspace.file(path)))
        }
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def encode_many(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> NDArray[np.float32]:
        found = [self.service.embed(as_rgb(image), caption) for image, caption in zip(pictures, captions, strict=True)]
        return torch.cat(found).numpy()

    def attribute(self, image: Image.Image | None, caption: str | None, k: int, tier: Tier, **more: Any) -> Answer:
        assert image is not None
        return self.attribute_vector(self.encode_many([image], [caption or ""])[0], k, tier, **more)

    def attribute_query(self, query_id: str, k: int = 20, **more: Any) -> Answer:
        query = self.query(query_id)
        if query_id not in self._vectors:
            self._vectors[query_id] = self.encode_many([query.image], [query.caption])[0]
        return self.attribute_vector(self._vectors[query_id], k, **more)

    def query(self, query_id: str) -> Query:
        if query_id not in self.queries:
            raise UsageError(f"no query {query_id} is published: GET /v1/queries lists them")
        return self.queries[query_id]

    def attribute_vector(self, vector: NDArray[np.float32], k: int = 20, tier: Tier = "fast", **more: Any) -> Answer:
        if tier != "fast" or any(more.values()):
            raise UsageError("only tier fast without filters is answered yet")
        started = time.perf_counter()
        similarity, train_ids = search(self.service.index, vector[None], k)
        hits = [
            self.hit(int(train_id), rank, float(cosine))
            for rank, (train_id, cosine) in enumerate(zip(train_ids[0], similarity[0], strict=True), start=1)
        ]
        lineage = hashlib.sha256(repr((self.versions, vector.tobytes(), k)).encode()).hexdigest()[:16]
        return Answer(tier, hits, [], [], self.agreement, self.versions, lineage, time.perf_counter() - started)

    def hit(self, train_id: int, rank: int = 0, similarity: float | None = None) -> Hit:
        (row,) = self.service.samples.slice(train_id, 1).to_pylist()
        return Hit(rank, train_id, row["key"], row["captions"], row["shard"], row["offset"], similarity)

    def sample(self, train_id: int) -> Hit:
        if not 0 <= train_id < self.service.samples.num_rows:
            raise UsageError(f"no sample {train_id}: there are {self.service.samples.num_rows}")
        return self.hit(train_id)

    def picture(self, train_id: int) -> tuple[bytes, str]:
        self.sample(train_id)
        (row,) = self.service.samples.slice(train_id, 1).select(["shard", "offset", "size"]).to_pylist()
        with Path(row["shard"]).open("rb") as file:
            file.seek(row["offset"])
            content = file.read(row["size"])
        return content, "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
