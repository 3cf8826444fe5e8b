"""Arrow schemas of every table on disk: the only place where a column name is spelled.

Each schema carries its version in the metadata; `read` refuses a file of another version.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA_VERSION = "2"


def _schema(*fields: tuple[str, pa.DataType, str]) -> pa.Schema:
    return pa.schema(
        [pa.field(name, kind, nullable=False, metadata={"comment": comment}) for name, kind, comment in fields],
        metadata={"schema_version": SCHEMA_VERSION},
    )


SAMPLES = _schema(
    ("train_id", pa.int64(), "row number of the training sample, dense from 0 in shard order"),
    ("key", pa.string(), "WebDataset key: the member's name up to its first dot"),
    ("shard", pa.string(), "path of the tar that holds the image"),
    ("offset", pa.int64(), "first byte of the image in the tar"),
    ("size", pa.int64(), "length of the image in bytes"),
    ("captions", pa.list_(pa.field("element", pa.string(), nullable=False)), "its captions, the first is the primary"),
    ("width", pa.int32(), "pixels"),
    ("height", pa.int32(), "pixels"),
    ("image_sha256", pa.string(), "sha256 of the image's bytes in the tar"),
)

REJECTED_SAMPLES = _schema(
    ("shard", pa.string(), "path of the tar"),
    ("key", pa.string(), "WebDataset key; empty where the whole shard is meant"),
    ("reason", pa.string(), "what is wrong and how to mend it"),
)

QUERIES = _schema(
    ("query_id", pa.string(), "identifier of the query"),
    ("split", pa.string(), "train, validation or test"),
    ("caption", pa.string(), "the caption it was generated from"),
    ("image", pa.binary(), "the generated image, PNG"),
    ("image_sha256", pa.string(), "sha256 of the PNG"),
)

FEATURES = _schema(
    ("item", pa.string(), "train_id or query_id, as text"),
    (
        "feature",
        pa.list_(pa.field("element", pa.float32(), nullable=False)),
        "output of the frozen encoder, unnormalised",
    ),
)

CANDIDATES = _schema(
    ("query_id", pa.string(), "the query"),
    ("train_id", pa.int64(), "a training sample that it is scored against"),
    ("neighbor_rank", pa.int32(), "among all samples; 1 = nearest in the untuned feature space"),
    ("similarity", pa.float32(), "cosine in the untuned feature space"),
)

BASE_LOSSES = _schema(
    ("train_id", pa.int64(), "the training sample"),
    ("flip", pa.int32(), "1: of its mirrored image"),
    ("base_loss", pa.float64(), "L(z_i, theta_0) under the noise plan"),
)

SCORES = _schema(
    ("query_id", pa.string(), "the query"),
    ("train_id", pa.int64(), "the training sample"),
    ("score", pa.float64(), "the teacher's score; higher = more influential"),
)

RANKS = _schema(
    ("query_id", pa.string(), "the query"),
    ("train_id", pa.int64(), "the training sample"),
    ("score", pa.float64(), "the teacher's score; higher = more influential"),
    ("rank", pa.int32(), "1 = the most influential of the query's candidates"),
    ("rank_label", pa.float32(), "rank / candidates of the query, in (0, 1]"),
)

INDEX_IDS = _schema(("train_id", pa.int64(), "training sample of each vector, in the index's order"))

METRICS = _schema(
    ("metric", pa.string(), "mAP, AP (one query), spearman, relative error"),
    ("space", pa.string(), "what is compared with the teacher's scores: untuned, tuned, chance, teacher with ..."),
    ("split", pa.string(), "the queries it was measured on"),
    ("cutoff", pa.int32(), "L of mAP(L); 0 where it has none"),
    ("query_id", pa.string(), "one query, or empty for the mean over the split"),
    ("value", pa.float64(), "the figure"),
    ("standard_error", pa.float64(), "over queries; 0 for a single query"),
    ("queries", pa.int32(), "how many queries the figure rests on"),
)


def read(path: Path, schema: pa.Schema) -> pa.Table:
    """Read one Parquet file of ours.

    Raises:
        ValueError: the file is of another schema version.
    """
    table = pq.read_table(path, partitioning=None)
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this release reads {SCHEMA_VERSION}: "
            "run the stage that wrote it again, or use the release that did"
        )
    return table.cast(schema)


def read_parts(folder: Path, schema: pa.Schema) -> pa.Table:
    """Concatenate `part-*.parquet` of a folder in name order."""
    parts = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([read(part, schema) for part in parts]) if parts else schema.empty_table()
