"""The feature space of a head, written so that another machine can find the encoders' weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import encoder_names
from storage_schemas.heads.records import HeadRecord
from storage_schemas.workspace import Workspace
from tasks.config.inputs import FeaturesConfig
from tasks.inputs.features import weights_key

ENVIRONMENT = "FASTGDA_ENCODERS"
_INSIDE = "./"  # before a path seen from the workspace's folder: a hub id begins otherwise


def space_record(space: FeaturesConfig, workspace: Workspace) -> HeadRecord:
    """Return the record of a head's feature space; `recorded_space` reads it."""
    weights = {name: space.weights[name] for name in encoder_names(space.space) if name in space.weights}
    return HeadRecord(
        feature_space=space.space,
        feature_weights={name: _named(source, workspace) for name, source in weights.items()},
        feature_weights_keys={name: weights_key(name, source) for name, source in weights.items()},
        unit_length=space.unit_length,
        centre=space.centre,
    )


def recorded_space(
    record: HeadRecord, workspace: Workspace, configured: Mapping[str, str] | None = None
) -> FeaturesConfig:
    """Return the feature space of a head.

    Weights that lie outside of the workspace may lie elsewhere on this machine: where a configuration says, or under
    the encoder's name in the folder that FASTGDA_ENCODERS names.

    Args:
        record: the head's record.
        workspace: the head's.
        configured: weights of encoders by a configuration of this machine.

    Raises:
        UsageError: the weights are nowhere on this machine, or those found elsewhere are others.
    """
    keys = record.feature_weights_keys
    return FeaturesConfig(
        space=record.feature_space,
        weights={
            name: _found(name, source, workspace, keys.get(name), configured or {})
            for name, source in record.feature_weights.items()
        },
        unit_length=record.unit_length,
        centre=record.centre,
    )


def _named(source: str, workspace: Workspace) -> str:
    """Name weights inside the workspace by their path from it; others keep their name."""
    path = Path(source).resolve()
    inside = isinstance(workspace.root, Path) and Path(source).is_dir() and path.is_relative_to(workspace.root)
    return f"{_INSIDE}{workspace.relative(path)}" if inside else source


def _found(name: str, source: str, workspace: Workspace, key: str | None, configured: Mapping[str, str]) -> str:
    if source.startswith(_INSIDE):
        return str(workspace.file(source))
    if not Path(source).is_absolute() or Path(source).is_dir():
        return source
    together = os.environ.get(ENVIRONMENT)
    for place in filter(None, [configured.get(name), together and str(Path(together, name))]):
        if Path(place).is_dir():
            if key is not None and weights_key(name, place) != key:
                raise UsageError(
                    f"encoder {name}: the weights in {place} are not those of {source}, which the head was made for"
                )
            return place
    raise UsageError(
        f"encoder {name}: the head was made for the weights in {source}, which is no folder of this machine: copy it "
        f"to a folder {name} and set {ENVIRONMENT} to the folder that this one is in"
    )
