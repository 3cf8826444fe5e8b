"""How far the pictures of models that were trained again are from those that the attributed model made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.evaluation.counterfactual import pixel_mse
from fastgda_core.features import Encoder, concatenate, image_space
from fastgda_core.images import decode_image
from storage_schemas import tables
from storage_schemas.workspace import regenerated
from tasks.inputs.features import in_space, load_encoders
from tasks.teaching.kept_models import queries_drawn_again
from tasks.teaching.retrainings import RemovalParts
from tasks.teaching.run import Run


def regeneration_distances(run: Run) -> pa.Table:
    """Compare every model's pictures with the queries': in pixels, and by the image encoders of the run's space."""
    parts = run.parts[RemovalParts.kind]
    space = image_space(run.config.features.space)
    encoders = load_encoders(in_space(run.context, space=space).config.features, run.context.device) if space else []
    asked = {query.query_id: query.image for query in queries_drawn_again(run.artifacts["queries"])}
    before = dict(zip(asked, _features(encoders, list(asked.values())), strict=True))
    rows = []
    assert isinstance(parts, RemovalParts)
    for name in parts.ids:
        drawn = tables.read(regenerated(parts.artifact.path, name), tables.REGENERATIONS)
        ids, pictures = drawn["query_id"].to_pylist(), list(map(decode_image, drawn["image"].to_pylist()))
        mse = pixel_mse(_bytes(pictures), _bytes([asked[each] for each in ids]))
        alike = F.cosine_similarity(_features(encoders, pictures), torch.stack([before[each] for each in ids]))
        rows.append(
            tables.REGENERATION_DISTANCES.rows(
                retraining=[name] * len(ids),
                query_id=ids,
                mse=mse.numpy(),
                space=[space] * len(ids),
                similarity=alike.double().numpy() if space else [None] * len(ids),
            )
        )
    return pa.concat_tables(rows)


def _features(encoders: Sequence[Encoder], pictures: list[Image.Image]) -> Tensor:
    """Return phi of some pictures, (n, d), not centred; of no encoder (n, 0)."""
    if not encoders:
        return torch.empty(len(pictures), 0)
    return concatenate([encoder.encode_queries(pictures) for encoder in encoders]).cpu()


def _bytes(pictures: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
