"""The similarity teacher: cosines of features that are extracted already; nothing is made before the scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.teachers.similarity import SimilarityTeacher
from storage_schemas.commit import input_key
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.candidates import candidate_space
from tasks.inputs.features import features_key, load_features, map_features, unreadable_items
from tasks.parts import Parts
from tasks.teaching.cost import KindCost, Size, block_shape, score_shards
from tasks.teaching.families import Artifacts, BlockScores


class Similarity:
    """The family of the similarity teacher, in the candidates' feature space; see `tasks.teaching.families.Family`."""

    def check(self, context: Context) -> None:
        """Check nothing: a fault of a feature space is reported when its features are extracted."""

    def artifacts(self, context: Context, samples: Artifact, queries: Artifact) -> list[Artifact]:
        return []

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        return []

    def key(self, context: Context, artifacts: Artifacts) -> str:
        space = candidate_space(context)
        return input_key("similarity", *(features_key(space, artifacts[name]) for name in ("samples", "queries")))

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        return block_shape(config, queries)

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        space, samples = candidate_space(context), artifacts["samples"]
        left_out = unreadable_items(space, samples, train_ids.tolist())
        good = train_ids[~np.isin(train_ids, list(left_out))]
        queries, mapped = self._features(context, artifacts)
        scores = SimilarityTeacher().scores(queries[query_numbers], mapped[torch.from_numpy(good)])
        return BlockScores(good, scores, torch.full_like(scores, torch.nan), left_out)

    def costs(self, config: PipelineConfig, size: Size) -> list[KindCost]:
        shards, _ = score_shards(config, size)
        return [KindCost("scores", shards, size.queries * size.candidates, 0.0)]

    def _features(self, context: Context, artifacts: Artifacts) -> tuple[Tensor, Tensor]:
        """Load phi of the queries, (queries, d), in memory, and map phi of the training samples, (samples, d).

        They are kept from one shard to the next.
        """

        def load() -> tuple[Tensor, Tensor]:
            space, samples = candidate_space(context), artifacts["samples"]
            return load_features(space, artifacts["queries"], samples), map_features(space, samples)

        return context.loaded.once("features", self.key(context, artifacts), load)


FAMILY = Similarity()
