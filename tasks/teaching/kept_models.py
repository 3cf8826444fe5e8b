"""What is kept of a model that was trained again, beside its losses: its weights, and the queries' pictures by it."""

from __future__ import annotations

import functools
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fastgda_core.diffusion.model import DiffusionModel
from storage_schemas import tables
from storage_schemas.commit import commit, commit_table, committed, input_key
from storage_schemas.files import AnyPath, write_changed
from storage_schemas.workspace import regenerated, retrained_weights
from tasks.artifact import Artifact
from tasks.config.inputs import QueriesConfig
from tasks.context import load_tensors
from tasks.inputs.queries import Query, draw_again, load_queries


@dataclass(frozen=True)
class KeptModel:
    """The places of one model's weights and pictures.

    folder: of the recipe; key: of the recipe; name: the model's hash; part: what diffusers calls the denoiser's folder.
    """

    folder: AnyPath
    key: str
    name: str
    part: str

    @property
    def _weights(self) -> AnyPath:
        return retrained_weights(self.folder, self.name, self.part)

    def has_weights(self) -> bool:
        return committed(self._weights, self.key) is not None

    def keep_weights(self, denoiser: Any) -> None:
        """Commit a denoiser as diffusers lays it out, in float32."""
        started, tensors = time.monotonic(), denoiser.state_dict()
        write_changed(self._weights.with_name("config.json"), denoiser.to_json_string().encode())
        flat = {name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}

        def write(path: Path) -> None:
            save_file(flat, path, metadata={"format": "pt"})

        commit(self._weights, write, key=self.key, rows=len(flat), started=started)

    def load_into(self, denoiser: Any) -> Any:
        """Load the weights that were kept into a denoiser of that architecture; return it, frozen in eval mode."""
        denoiser.load_state_dict(load_tensors(self._weights))
        return denoiser.eval().requires_grad_(False)

    def has_pictures(self) -> bool:
        return committed(regenerated(self.folder, self.name), pictures_key(self.key)) is not None

    def keep_pictures(self, model: DiffusionModel, config: QueriesConfig, queries: Artifact) -> None:
        """Generate the test queries' pictures again, each from its own starting noise, and commit them.

        Args:
            model: the attributed one, with the trained denoiser in it.
            config: how the queries were generated.
            queries: all of them.
        """
        started, several = time.monotonic(), queries_drawn_again(queries)
        pictures = draw_again(model, config, several)
        table = tables.REGENERATIONS.rows(
            retraining=[self.name] * len(several),
            query_id=[query.query_id for query in several],
            image=pictures,
            image_sha256=[hashlib.sha256(picture).hexdigest() for picture in pictures],
        )
        path, key = regenerated(self.folder, self.name), pictures_key(self.key)
        commit_table(path, table, tables.REGENERATIONS, key=key, started=started, device=str(model.device))


@functools.cache
def pictures_key(recipe: str) -> str:
    """Return the key of a recipe's pictures: queries, and with them their sampler, are part of the recipe's key."""
    return input_key("regenerations", recipe, table=tables.REGENERATIONS)


def queries_drawn_again(queries: Artifact) -> list[Query]:
    """Return the queries whose pictures retrained models generate: those of the test split."""
    return [query for query in load_queries(queries) if query.split == "test"]
