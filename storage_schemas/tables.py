"""Every table on disk: columns, what each means, and how its Parquet files are written.

A column name is spelled in this module only. Each file carries the version of its table in its metadata. To give a
table a column, raise its `version` and name the column in `added`, with what files of earlier versions have in it:
they are read as before, and their input keys stay. For any other change raise `oldest` too: then earlier files are
refused and made again. A table without a key of its own goes with the one that it is made with: candidates and plans
with scores, twins with queries, rejected samples with samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage_schemas.files import AnyPath, matching
from storage_schemas.table import Added, DamagedTable, Table, damaged, open_native, read_native, read_stored, schema

INSTANT = pa.timestamp("us", tz="UTC")
TEXTS = pa.list_(pa.field("element", pa.string(), nullable=False))
VECTOR = pa.list_(pa.field("element", pa.float32(), nullable=False))


_OF_IMAGE = (
    ("offset", pa.int64(), "first byte of the image in the tar"),
    ("size", pa.int64(), "length of the image in bytes"),
    ("captions", TEXTS, "its captions, the first is the primary"),
    ("width", pa.int32(), "pixels"),
    ("height", pa.int32(), "pixels"),
    ("image_sha256", pa.string(), "sha256 of the image's bytes in the tar"),
)
_METADATA = ("metadata", pa.string(), "JSON object: further fields of its .json in the tar that hold one value")

SAMPLES = Table(
    "samples",
    "a training sample: where it lies, captions, size",
    schema(
        ("train_id", pa.int64(), "row number of the training sample, dense from 0 in shard order"),
        ("key", pa.string(), "the name of its members up to the last dot"),
        ("shard", pa.string(), "path of the tar that holds the image"),
        *_OF_IMAGE,
        ("image_look", pa.binary(), "perceptual hash and colours; empty where an earlier release indexed it"),
        _METADATA,
    ),
    sorted_by=("train_id",),
    dictionary=("shard",),
    delta=("train_id", "offset", "size"),
    version=3,
    added={"image_look": Added(3, ""), "metadata": Added(3, "{}")},
)

SCANNED = Table(
    "scanned",
    "something that a part of the tars holds, in order: a sample, or what could not be used",
    schema(
        ("shard", pa.string(), "path of the tar"),
        ("key", pa.string(), "the name of its members up to the last dot; empty where the whole shard is meant"),
        ("reason", pa.string(), "what is wrong and how to mend it; empty of a sample, and what follows is one's alone"),
        *_OF_IMAGE,
        ("image_look", pa.binary(), "perceptual hash and colours"),
        _METADATA,
        ("pictures", pa.int32(), "pictures in the image's file, of which the first is used"),
    ),
    dictionary=("shard",),
    delta=("offset", "size"),
)

REJECTED_SAMPLES = Table(
    "rejected_samples",
    "something in the tars that could not be used, and why",
    schema(
        ("shard", pa.string(), "path of the tar"),
        ("key", pa.string(), "WebDataset key; empty where the whole shard is meant"),
        ("reason", pa.string(), "what is wrong and how to mend it"),
    ),
    dictionary=("shard",),
)

QUERIES = Table(
    "queries",
    "a generated image with its caption and split",
    schema(
        ("query_id", pa.string(), "identifier of the query"),
        ("split", pa.string(), "train, validation or test; of the twin test twin or pseudo, see twins"),
        ("caption", pa.string(), "the caption it was generated from"),
        ("image", pa.binary(), "the generated image, PNG; of split pseudo a training image"),
        ("image_sha256", pa.string(), "sha256 of the PNG"),
    ),
    dictionary=("split",),
)

TWIN, PSEUDO = "twin", "pseudo"  # queries of the twin test, in place of a split

TWINS = Table(
    "twins",
    "a query of the twin test: the training sample that a right teacher ranks first",
    schema(
        ("query_id", pa.string(), "the query; it is in no split"),
        ("train_id", pa.int64(), "its twin: the query was generated from its caption, or is its image"),
    ),
)

FEATURES = Table(
    "features",
    "an item in a feature space",
    schema(
        ("item", pa.string(), "row number from 0, as text: a sample's train_id, a query's place in its query set"),
        ("feature", VECTOR, "output of the frozen encoder, unnormalised"),
    ),
)

VECTORS = Table(
    "vectors",
    "the vector of a training sample by a rank head, from which any index is built",
    schema(
        ("train_id", pa.int64(), "the training sample"),
        ("vector", VECTOR, "what a query's vector is multiplied with"),
    ),
    sorted_by=("train_id",),
    delta=("train_id",),
    split=("vector",),
)

CANDIDATES = Table(
    "candidates",
    "a training sample that a query is scored against",
    schema(
        ("query_id", pa.string(), "the query"),
        ("train_id", pa.int64(), "a training sample that it is scored against"),
        (
            "neighbor_rank",
            pa.int32(),
            "among all samples; 1 = the highest similarity; 0 = an index did not name it",
        ),
        ("similarity", pa.float32(), "cosine in the untuned feature space, centred unless features.centre is false"),
    ),
    dictionary=("query_id",),
    delta=("train_id", "neighbor_rank"),
)

BASE_LOSSES = Table(
    "base_losses",
    "the loss of a training sample under the untouched model",
    schema(
        ("train_id", pa.int64(), "the training sample"),
        ("flip", pa.int32(), "1: of its mirrored image"),
        ("base_loss", pa.float64(), "L(z_i, theta_0) under the noise plan"),
        (
            "row_losses",
            pa.list_(pa.float64()),
            "the losses that it is the mean of, by caption, draw, timestep; null where scores do not need them",
        ),
        nullable={"row_losses"},
    ),
    sorted_by=("train_id", "flip"),
    dictionary=("flip",),
    delta=("train_id",),
    version=3,
    added={"row_losses": Added(3, None)},
)

SCORES = Table(
    "scores",
    "the teacher's score of a (query, training sample) pair",
    schema(
        ("query_id", pa.string(), "the query"),
        ("train_id", pa.int64(), "the training sample"),
        ("score", pa.float64(), "the teacher's score; higher = more influential"),
        ("standard_error", pa.float32(), "of the score over the noise plan's draws; null where it is not known"),
        nullable={"standard_error"},
    ),
    sorted_by=("query_id", "train_id"),
    dictionary=("query_id",),
    delta=("train_id",),
    version=3,
    added={"standard_error": Added(3, None)},
)

RANKS = Table(
    "ranks",
    "a scored pair with its rank and rank label",
    # Its files take the place of those of `scores`, so they hold all that these hold, in the same versions.
    pa.schema(
        [
            *SCORES.schema,
            *schema(
                ("rank", pa.int32(), "1 = the most influential of the query's candidates; ties only at the last rank"),
                ("rank_label", pa.float32(), "rank / candidates of the query, in (0, 1]"),
            ),
        ]
    ),
    sorted_by=("query_id", "rank"),
    dictionary=("query_id",),
    delta=("train_id", "rank"),
    version=SCORES.version,
    oldest=SCORES.oldest,
    added=SCORES.added,
)

RETRAININGS = Table(
    "retrainings",
    "a model that was trained again without some samples, and why without these",
    schema(
        ("retraining", pa.string(), "recipe, removed samples and seed, hashed"),
        ("recipe", pa.string(), "how it was trained, on what, and what it was asked: a hash"),
        ("seed", pa.int64(), "of its weights and draws"),
        ("method", pa.string(), "that named what is removed; subset: drawn at random; empty: nothing is removed"),
        ("k", pa.int32(), "first samples of each target that are removed; 0 of subsets"),
        ("samples_left", pa.int64(), "how many it was trained on"),
        ("removed", pa.list_(pa.field("element", pa.int64(), nullable=False)), "train_ids, ascending"),
        ("query_id", pa.string(), "the only query that they were named for; empty where there are several, or none"),
    ),
    dictionary=("recipe", "method", "query_id"),
    version=3,
    added={"query_id": Added(3, "")},
)

RETRAINED_LOSSES = Table(
    "retrained_losses",
    "the loss of a query at one draw of its noise, under a model that was trained again without some samples",
    schema(
        ("retraining", pa.string(), "recipe, removed samples and seed, hashed"),
        ("query_id", pa.string(), "the query"),
        ("draw", pa.int32(), "number of the (timestep, noise) pair, the same of all models"),
        ("timestep", pa.int32(), "of the draw"),
        ("loss", pa.float64(), "the model's training loss on the query there"),
    ),
    sorted_by=("query_id", "draw"),
    dictionary=("retraining", "query_id"),
)

REGENERATIONS = Table(
    "regenerations",
    "the picture of a query's caption, from the query's own noise, by a model that was trained again",
    schema(
        ("retraining", pa.string(), "recipe, removed samples and seed, hashed"),
        ("query_id", pa.string(), "the query"),
        ("image", pa.binary(), "encoded PNG"),
        ("image_sha256", pa.string(), "sha256 of the encoded image"),
    ),
    sorted_by=("query_id",),
    dictionary=("retraining",),
)

REGENERATION_DISTANCES = Table(
    "regeneration_distances",
    "how far such a picture is from the query's, which the attributed model made",
    schema(
        ("retraining", pa.string(), "recipe, removed samples and seed, hashed"),
        ("query_id", pa.string(), "the query"),
        ("mse", pa.float64(), "mean squared difference over pixels and colours, each from 0 to 1"),
        ("space", pa.string(), "the encoders of similarity: those of the configured space that see images"),
        ("similarity", pa.float64(), "cosine of the two pictures' features, not centred; null where no encoder sees"),
        nullable={"similarity"},
    ),
    sorted_by=("query_id",),
    dictionary=("retraining", "space"),
)

REMOVALS = Table(
    "removals",
    "the samples that a method named for some queries, and a model is trained again without",
    schema(
        ("method", pa.string(), "teacher, untuned, captions alone, random"),
        ("k", pa.int32(), "first samples of each target"),
        ("targets", TEXTS, "the queries that they were named for"),
        ("removed", pa.list_(pa.field("element", pa.int64(), nullable=False)), "train_ids, ascending"),
        ("pooled", pa.bool_(), "named for all targets together, and not for one query"),
    ),
    version=3,
    added={"pooled": Added(3, True)},
)

INDEX_IDS = Table(
    "index_ids",
    "the training sample behind a vector of an index",
    schema(("train_id", pa.int64(), "training sample of each vector, in the index's order")),
    delta=("train_id",),
)

METRICS = Table(
    "metrics",
    "a figure: metric, ranking, split, cutoff, value, standard error",
    schema(
        (
            "metric",
            pa.string(),
            "mAP, AP (one query), ndcg, overlap, recall, spearman, kendall, twin share, ...",
        ),
        (
            "space",
            pa.string(),
            "what is compared with the teacher: untuned, tuned, captions alone, chance, another teacher, ...",
        ),
        (
            "split",
            pa.string(),
            "the queries it was measured on: test, or twin or pseudo of the twin test; empty for costs",
        ),
        ("cutoff", pa.int32(), "L of mAP(L), k of the others; 0 where it has none"),
        ("query_id", pa.string(), "one query, or empty for the mean over the split"),
        ("value", pa.float64(), "the figure"),
        ("standard_error", pa.float64(), "over queries; 0 for a single query"),
        ("queries", pa.int32(), "how many queries the figure rests on"),
    ),
    dictionary=("metric", "space", "split", "cutoff"),
)

STUDY = Table(
    "study",
    "a figure of a head that a study trained: the question, the choice and the seed that it answers for, the figure",
    pa.schema(
        [
            *schema(
                ("question", pa.string(), "what is varied: feature space, loss, queries, candidates, ..."),
                ("choice", pa.string(), "what the head was trained with: pixel, listwise, a share as text, ..."),
                ("seed", pa.int32(), "0, 1, ...: which training of this choice; 0 of features alone, which need none"),
            ),
            *METRICS.schema,
        ]
    ),
    dictionary=("question", "choice", "seed", *METRICS.dictionary),
    version=METRICS.version,
    oldest=METRICS.oldest,
    added=METRICS.added,
)


PLAN_SHARDS = Table(
    "plan_shards",
    "a score shard as it was planned",
    schema(
        ("shard", pa.int32(), "number of the score shard in its run"),
        ("input_key", pa.string(), "hash of everything its rows depend on"),
        ("query_block", pa.int32(), "the block of queries that it scores; see plan_queries"),
        ("pairs", pa.int64(), "rows that it has when done"),
    ),
    sorted_by=("shard",),
)

PLAN_QUERIES = Table(
    "plan_queries",
    "a query of a run: which shards score it, and how many rows it has when they are done",
    schema(
        ("query_id", pa.string(), "the query"),
        ("query_block", pa.int32(), "the block of queries that are scored together"),
        ("pairs", pa.int64(), "its candidates"),
    ),
)

SHARDS = Table(
    "shards",
    "a score shard of a run: the ledger",
    schema(
        ("run", pa.string(), "the run"),
        ("shard", pa.int32(), "number of the score shard in its run"),
        ("state", pa.string(), "pending, running, done, failed or quarantined"),
        ("attempts", pa.int32(), "how often it was started; at least 1 when done"),
        ("worker", pa.string(), "host:process of the last attempt"),
        ("device", pa.string(), "where the last attempt ran"),
        ("error_class", pa.string(), "class of the last attempt's error; empty when there is none"),
        ("error", pa.string(), "its message"),
        ("seconds", pa.float64(), "work behind the shard when done, else length of the last attempt"),
        ("pairs", pa.int64(), "rows planned"),
        ("rows", pa.int64(), "rows committed"),
        ("finished_at", INSTANT, "when the last attempt ended, UTC; null before"),
        ("path", pa.string(), "its file, relative to the workspace"),
        nullable={"finished_at"},
    ),
    sorted_by=("run", "shard"),
    dictionary=("run", "state", "worker", "device", "error_class"),
)

QUARANTINED_SAMPLES = Table(
    "quarantined_samples",
    "a training sample that a run left out, and why; `fastgda retry` tries it again",
    schema(
        ("run", pa.string(), "the run"),
        ("train_id", pa.int64(), "the training sample"),
        ("found_in", pa.string(), "the kind of part that could not use it: features, latents, base losses or scores"),
        ("reason", pa.string(), "what is wrong"),
    ),
    sorted_by=("run", "train_id"),
    dictionary=("run", "found_in"),
)

RUNS = Table(
    "runs",
    "one execution of a curation plan",
    schema(
        ("run", pa.string(), "the run"),
        ("name", pa.string(), "the configuration's name"),
        ("teacher", pa.string(), "the method that scored"),
        ("state", pa.string(), "planned, running, incomplete, done or published"),
        ("created_at", INSTANT, "when it was planned, UTC"),
        ("code_version", pa.string(), "release and commit that planned it"),
        ("shards", pa.int64(), "score shards planned"),
        ("done", pa.int64(), "of these, committed, when its ledger was last written"),
        ("failed", pa.int64(), "failed or quarantined"),
        ("pairs", pa.int64(), "rows planned"),
        ("rows", pa.int64(), "rows committed"),
        ("seconds", pa.float64(), "device seconds behind the rows"),
        ("config", pa.string(), "the configuration, JSON"),
        ("stale", pa.bool_(), "whether samples that it scored were taken down since; see tombstones"),
    ),
)

HEADS = Table(
    "heads",
    "a trained rank head",
    schema(
        ("head", pa.string(), "its version"),
        ("run", pa.string(), "the run whose rank labels it learned; empty where it was imported"),
        ("snapshot", pa.string(), "exactly which rows those were; empty where its description names none"),
        ("feature_space", pa.string(), "the frozen encoders below it"),
        ("best_epoch", pa.int32(), "the epoch that was kept; null where it was imported"),
        ("validation_map", pa.float64(), "mAP of that epoch on the validation queries; null where it was imported"),
        ("served", pa.bool_(), "whether `attribute` answers through it"),
        ("stale", pa.bool_(), "whether samples that it learned from were taken down since; see tombstones"),
        nullable={"best_epoch", "validation_map"},
    ),
)

INDEXES = Table(
    "indexes",
    "one built, immutable FAISS index",
    schema(
        ("index_version", pa.string(), "its version"),
        ("head", pa.string(), "the rank head that made its vectors; empty where it is not known"),
        ("vectors", pa.int64(), "training samples in it"),
        ("size", pa.int64(), "bytes"),
        ("served", pa.bool_(), "whether `attribute` answers from it"),
        ("stale", pa.bool_(), "whether it holds vectors of samples that were taken down since; see tombstones"),
        ("kind", pa.string(), "FAISS's name of it; empty where an earlier release built it"),
        ("recall_at_10", pa.float64(), "share of the true first 10 that it finds; null where it was not measured"),
        ("recall_at_100", pa.float64(), "the same of the first 100"),
        ("parent", pa.string(), "the index that samples were added to; empty where it was built as a whole"),
        nullable={"recall_at_10", "recall_at_100"},
    ),
)

SKETCHES = Table(
    "sketches",
    "the sketches that a run keeps of its samples' gradients",
    schema(
        ("run", pa.string(), "the run"),
        ("kind", pa.string(), "principal: directions among coordinates of the Fisher's eigenbasis"),
        ("size", pa.int32(), "numbers of one sketch, a byte each beside their scales"),
        ("coordinates", pa.int32(), "of the eigenbasis, that sketches are made from"),
        ("coordinates_energy", pa.float64(), "share of all coordinates' energy that these hold"),
        ("directions_energy", pa.float64(), "share of the pilot's squared length in these that the sketches hold"),
        ("samples", pa.int64(), "training samples to sketch"),
        ("parts", pa.int32(), "parts planned"),
        ("done", pa.int32(), "of these, committed"),
        ("bytes", pa.int64(), "of the committed parts"),
        ("path", pa.string(), "their folder, relative to the workspace"),
    ),
)

TOMBSTONES = Table(
    "tombstones",
    "a training sample that was taken down: who, when, why, and what held it then",
    schema(
        ("number", pa.int64(), "of the take-down, which may be of several samples"),
        ("in_force", pa.bool_(), "false where a later record lifted it"),
        ("train_id", pa.int64(), "the sample, in the table below"),
        ("key", pa.string(), "its key there"),
        ("samples", pa.string(), "the table of samples: one row for each that held the image then"),
        ("image_sha256", pa.string(), "sha256 of the image's bytes, by which later tables are searched, too"),
        ("removed_at", INSTANT, "when, UTC"),
        ("removed_by", pa.string(), "who"),
        ("reason", pa.string(), "why"),
        ("indexes", TEXTS, "index versions that were built of its table"),
        ("heads", TEXTS, "heads that learned from runs of its table"),
        ("runs", TEXTS, "runs of its table"),
        ("snapshots", TEXTS, "snapshots of these runs"),
        ("reports", TEXTS, "pages of these runs, which stay as they are"),
        ("lifted_by", pa.string(), "who lifted the take-down; null where it is in force"),
        ("lifted_at", INSTANT, "when, UTC"),
        ("lifted_reason", pa.string(), "why"),
        nullable={"lifted_by", "lifted_at", "lifted_reason"},
    ),
)

TRAIN_IDS = pa.list_(pa.field("element", pa.int64(), nullable=False))

ANSWERS_CHANGED = Table(
    "answers_changed",
    "a query whose first ten samples changed when what is published now was published: `fastgda diff` compares others",
    schema(
        ("before", pa.string(), "a snapshot"),
        ("after", pa.string(), "the snapshot that is compared with it"),
        ("query_id", pa.string(), "the query"),
        ("k", pa.int32(), "how many of its first samples are compared; none that is taken down is among them"),
        ("change", pa.string(), "changed: other samples; reordered: the same; new, gone: the query is in one alone"),
        ("overlap", pa.float64(), "share of the samples that are in both"),
        ("moved", pa.int64(), "of these, how many have another place"),
        ("entered", TRAIN_IDS, "train_ids that came, best first"),
        ("dropped", TRAIN_IDS, "train_ids that went, best first, as the snapshot before numbers them"),
    ),
)

EXACT_CHECK = Table("exact_check", "a pair that the exact teacher scored too", SCORES.schema)

RANKS_VIEW = Table(
    "ranks",
    RANKS.comment,
    pa.schema(
        [
            *RANKS.schema,
            pa.field(
                "influence",
                pa.float64(),
                nullable=False,
                metadata={
                    "comment": "what sums of influence add up: the score; 0 for negative scores where they are tied"
                },
            ),
        ]
    ),
)

SHARES_VIEW = Table(
    "shares",
    "what part of a query's positive influence falls on the samples of a tar; shares_by(column): of another payee",
    schema(
        ("query_id", pa.string(), "the query"),
        ("payee", pa.string(), "whose samples these are: path of the tar"),
        ("samples", pa.int64(), "how many of them were scored"),
        ("influence", pa.float64(), "sum of their positive influence"),
        ("share", pa.float64(), "of all positive influence on the query; null where there is none"),
        ("standard_error", pa.float64(), "of the share by the noise of the scores; null where that is not known"),
        ("uniform", pa.float64(), "what the share would be if all samples were paid the same"),
        nullable={"share", "standard_error"},
    ),
)

RUN_SCORES = Table(
    "run_scores",
    "a scored pair of any run, published or not, as soon as its shard is committed",
    pa.schema([pa.field("run", pa.string(), nullable=False, metadata={"comment": "the run"}), *SCORES.schema]),
)


def read(
    path: AnyPath, table: Table, chosen: pc.Expression | None = None, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read one Parquet file of ours, or the rows that fulfil an expression, or some columns.

    Rows of a file that is older than a column have the column's default in it.

    Raises:
        DamagedTable: the file is damaged, lacks a column, or is of a version that this release does not read.
    """
    # A stream: no name of a folder is taken for a partition. All bytes at once, except where columns that are not asked
    # for would be most of them.
    with _opened(path, every=columns is None, choosing=chosen is not None) as source:
        try:
            stored = pq.read_schema(source)
            absent = _absent(path, table, stored)
            # Before columns are filled no expression that names them can be evaluated.
            wanted = table.schema.names if columns is None or (absent and chosen is not None) else columns
            rows = read_stored(source, [name for name in wanted if name not in absent], None if absent else chosen)
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from None
    rows = table.filled(rows, wanted)
    if absent and chosen is not None:
        rows = rows.filter(chosen)
    return rows if columns is None else rows.select(columns)


def read_in_blocks(path: AnyPath, table: Table, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield some columns of a file of ours, one row group at a time: for more rows than there is memory.

    Raises:
        DamagedTable: as `read`.
    """
    return _row_groups(path, table, columns, None)


def read_row_group(path: AnyPath, table: Table, number: int, columns: Sequence[str]) -> pa.Table:
    """Read some columns of one row group of a file of ours.

    Raises:
        DamagedTable: as `read`.
    """
    (found,) = _row_groups(path, table, columns, [number])
    return found


def _row_groups(
    path: AnyPath, table: Table, columns: Sequence[str], numbers: Sequence[int] | None
) -> Iterator[pa.Table]:
    """Yield some row groups, or all, from a file that is opened once."""
    with _opened(path, every=False, choosing=False) as source:
        try:
            file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
            absent = _absent(path, table, file.schema_arrow)
            wanted = [name for name in columns if name not in absent]
            for number in range(file.num_row_groups) if numbers is None else numbers:
                yield table.filled(file.read_row_group(number, wanted, use_threads=False), columns)
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from None


def row_group_sizes(path: AnyPath) -> list[int]:
    """Return how many rows each row group of a file has.

    Raises:
        DamagedTable: the file is damaged.
    """
    with _opened(path, every=False, choosing=False) as source:
        try:
            found = pq.read_metadata(source)
        except (OSError, pa.ArrowException) as error:
            raise damaged(path, error) from None
    return [found.row_group(number).num_rows for number in range(found.num_row_groups)]


def _opened(path: AnyPath, *, every: bool, choosing: bool) -> pa.NativeFile | BinaryIO:
    if every:
        return pa.BufferReader(read_native(path))
    return open_native(path) if choosing or isinstance(path, Path) else path.open("rb")


def _absent(path: AnyPath, table: Table, stored: pa.Schema) -> set[str]:
    """Return the columns that a file is too old to have.

    Raises:
        DamagedTable: the file is of a version that is not read, or lacks a column that its version has.
    """
    text = (stored.metadata or {}).get(b"schema_version", b"none").decode()
    version = int(text) if text.isdecimal() else 0
    if not table.oldest <= version <= table.version:
        read = f"{table.oldest} to {table.version}" if table.oldest < table.version else str(table.version)
        mend = "run the stage that wrote it again, or use the release that did"
        if version > table.version:
            mend = "use the release that wrote it, or a newer one"
        raise DamagedTable(f"{path} has schema version {text}, this release reads {read} of {table.name}: {mend}")
    absent = set(table.schema.names) - set(stored.names)
    unexplained = [name for name in absent if name not in table.added or table.added[name].version <= version]
    if unexplained:
        raise DamagedTable(
            f"{path} lacks {', '.join(sorted(unexplained))}, which every file of {table.name} of schema version "
            f"{version} has: run the stage that wrote it again"
        )
    return absent


def read_parts(folder: AnyPath, table: Table) -> pa.Table:
    """Concatenate `part-*.parquet` of a folder in name order."""
    parts = matching(folder, "part-*.parquet")
    return pa.concat_tables([read(part, table) for part in parts]) if parts else table.schema.empty_table()
