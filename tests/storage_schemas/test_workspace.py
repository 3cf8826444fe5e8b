"""Where things lie in a workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage_schemas.workspace import Workspace


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("latents", "latents/k"),
        ("curvature", "curvature/k"),
        ("unlearning steps", "updates/k"),
        ("base losses", "base_losses/k"),
        ("noise maps", "parts/noise_maps/k"),
    ],
)
def test_parts_lie_where_their_kind_says_and_those_of_earlier_releases_where_they_lay(kind: str, place: str) -> None:
    workspace = Workspace(Path("/w"))
    assert workspace.relative(workspace.parts(kind, "k")) == place
