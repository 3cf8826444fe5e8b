"""The configuration with which an imported release is evaluated, trained on, indexed and gone on with."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import yaml

from tasks.importing.fisher import LEARNING_RATE, ReleaseFisher
from tasks.importing.layout import ReleaseFolder

CUTOFFS, VALIDATION_CUTOFF = (500, 1000, 4000), 1000  # L of the paper's mAP(L)
CANDIDATES, PAIRS, TIMESTEPS = 10_000, 50_000, 20
HEADER = "# Written by `fastgda import-release`; another import replaces it: copy it before you change it."
_HEAD = f"""{HEADER}
# Features, model, curvature and teacher are the release's: with other ones its files are not found any more.
# The queries are yours: `fastgda curate` scores those of queries.shards and publishes them beside the release's.
"""


def release_config(
    folder: ReleaseFolder,
    workspace: str,
    model: Path,
    *,
    name: str,
    space: str,
    weights: dict[str, str],
    samples: int,
    candidates: int,
    near: bool,
    fisher: ReleaseFisher | None,
) -> dict[str, Any]:
    """Return the configuration as a document; paths are absolute.

    Args:
        folder: the release's.
        workspace: where it is imported to.
        model: its model folder.
        name: of runs.
        space: the feature space.
        weights: folders of encoders on this machine.
        samples, candidates: how many there are, and how many a training query has.
        near: whether there are features of DINO, by which the release chooses candidates.
        fisher: the release's, where it can be used.
    """
    cutoffs = [each for each in CUTOFFS if each < candidates] or [max(1, candidates // 10)]
    validation = VALIDATION_CUTOFF if VALIDATION_CUTOFF in cutoffs else cutoffs[-1]
    nearest = {"policy": "top_k", "k": min(CANDIDATES, candidates), "space": "dino"}
    curvature = {"samples": fisher.count, "importance": False} if fisher else {}
    return {
        "name": name,
        "workspace": workspace,
        "data": {"shards": glob.escape(str(folder.annotations.resolve()))},
        "model": {"folder": str(model), "flips": True},
        "queries": {
            "shards": "new_queries/*.tar",
            "split": {"validation_share": 0.02, "test_share": 0.02},
            "twins": 0,
        },
        "features": {"space": space, "unit_length": False, "centre": False, "weights": weights},
        "curvature": curvature,
        "candidates": nearest if near else {"policy": "all"},
        "teacher": {
            "name": "abu_plus",
            "layers": fisher.layers if fisher else "cross-attn-kv",
            "alpha": LEARNING_RATE / samples,
            "timesteps": TIMESTEPS,
            "gradient_pairs": PAIRS,
        },
        "self_consistency": None,
        "evaluation": {"cutoffs": cutoffs, "validation_cutoff": validation},
        "publish": "add",
    }


def config_text(document: dict[str, Any]) -> str:
    return _HEAD + yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
