"""A run whose answers are known: shapes with licences and creators, copies among them, and both tiers."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from tests import tiny
from tests.tasks.whole_runs import WholeRun, configuration, whole_run

SHAPES = 24
COPIES = {24: 5, 25: 5, 26: 9}  # train_id of a copy: of whose picture
LICENCES = ("CC0", "CC BY", "none")


def members() -> list[tuple[str, bytes]]:
    """24 shapes and copies of some of these: the same bytes, or the same picture as a PNG."""
    found = []
    for train_id in range(SHAPES + len(COPIES)):
        jpeg, caption = tiny.draw(COPIES.get(train_id, train_id))
        image, suffix = jpeg, "jpg"
        if train_id in (25, 26):
            buffer = io.BytesIO()
            Image.open(io.BytesIO(jpeg)).save(buffer, "PNG")
            image, suffix = buffer.getvalue(), "png"
        told = {"caption": caption, "licence": LICENCES[train_id % 3], "year": 2000 + train_id}
        key = f"s{train_id:04d}"
        found += [(f"{key}.{suffix}", image), (f"{key}.json", json.dumps(told).encode())]
    return found


def answered_run(folder: Path, model: Path, **changes: object) -> WholeRun:
    teacher = {"name": "abu_plus_first_order", "alpha": 1e-4, "timesteps": 2, "gradient_pairs": 4, "shard_samples": 16}
    config = configuration(
        folder,
        model,
        teacher=teacher,
        curvature={"samples": 16},
        sketches={},
        self_consistency=None,
        candidates={"policy": "all"},
        **changes,
    )
    tiny.write_tar(folder / "shapes.tar", members())
    head = config.head.model_copy(
        update={"kind": "gradient", "gradient": config.head.gradient.model_copy(update={"axes": 5, "timesteps": 2})}
    )
    return whole_run(config.model_copy(update={"head": head}))
