"""A folder as clip-retrieval lays it out: an IVF index by FAISS, metadata in two Parquet files, embeddings in two .npy.

Its rows are the drawings of `tests.tiny.draw`, in another order than their numbers; its vectors are their thumbnails.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.features import load_encoder
from tests import tiny

ROWS = 90
LISTS = 6
URL = "https://example.org/{}.jpg"
ORDER = np.random.default_rng(5).permutation(ROWS)  # the drawing of each row


def embeddings(numbers: Iterable[int]) -> NDArray[np.float32]:
    """Thumbnails of drawings at length one, (n, 3072)."""
    encoder = load_encoder("pixel", torch.device("cpu"))
    images = [Image.open(io.BytesIO(tiny.draw(int(number))[0])).convert("RGB") for number in numbers]
    found: NDArray[np.float32] = encoder.encode(images).numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def write_folder(folder: Path, *, metric: int = faiss.METRIC_INNER_PRODUCT) -> Path:
    """Write image.index, metadata/ and img_emb/."""
    vectors = embeddings(ORDER)
    index = faiss.index_factory(vectors.shape[1], f"IVF{LISTS},Flat", metric)
    index.train(vectors)
    index.add(vectors)
    (folder / "metadata").mkdir(parents=True)
    (folder / "img_emb").mkdir()
    faiss.write_index(index, str(folder / "image.index"))
    half = ROWS // 2
    for number, rows in enumerate((range(half), range(half, ROWS))):
        numbers = ORDER[list(rows)].tolist()
        table = pa.table(
            {
                "image_path": [f"{row:09d}" for row in rows],
                "caption": [tiny.draw(each)[1] for each in numbers],
                "URL": [URL.format(each) for each in numbers],
                "sha256": [hashlib.sha256(str(each).encode()).hexdigest() for each in numbers],
                "similarity": [0.3] * len(numbers),
            }
        )
        pq.write_table(table, folder / "metadata" / f"metadata_{number}.parquet", row_group_size=10)
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors[list(rows)].astype(np.float16))
    return folder


def write_shards(path: Path, rows: Iterable[int], *, with_row: bool = True) -> Path:
    """Write the tar that img2dataset makes of some rows: new keys, and a .json with what it was told to keep."""
    members = []
    for place, row in enumerate(rows):
        number = int(ORDER[row])
        image, caption = tiny.draw(number)
        told = {"url": URL.format(number), "caption": caption, "key": f"{place:09d}", "status": "success"}
        told |= {"sha256": hashlib.sha256(str(number).encode()).hexdigest(), "error_message": None}
        told |= {"index_row": int(row)} if with_row else {}
        key = f"{place:09d}" if with_row else f"{row:09d}"
        members += [(f"{key}.jpg", image), (f"{key}.json", json.dumps(told).encode()), (f"{key}.txt", caption.encode())]
    return tiny.write_tar(path, members)
