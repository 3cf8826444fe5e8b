"""Records of rank heads, indexes, calibrations and checks of a teacher: four JSON files, each with its model."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, is_there, matching, read_if_there, write_changed
from storage_schemas.runs.ledger import read_run
from storage_schemas.workspace import Workspace

HEAD_FILE, INDEX_FILE = "head.json", "index.json"
INDEX_IDS = "ids.parquet"  # beside it
INDEX_LISTS = "lists.bin"  # beside it, where its inverted lists are a file of their own
EXACT_CHECK = "exact check"  # the only check that writes pairs, and no rows of `metrics`
Record = TypeVar("Record", bound=BaseModel)


class Epoch(BaseModel):
    """One epoch of a head's training."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    loss: float
    validation_map: float


class HeadRecord(BaseModel):
    """`heads/<version>/head.json`: the feature space of a rank head, and what it learned from or came from.

    Heads of earlier releases say less, and did not centre their features.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    feature_space: str
    kind: Literal["symmetric", "gradient"] = Field(
        default="symmetric", description="gradient: queries' gradients are predicted, samples' sketches are the run's"
    )
    features: int | None = Field(default=None, description="width of phi")
    feature_weights: dict[str, str] = Field(default_factory=dict, description="of an encoder: folder or hub id")
    feature_weights_keys: dict[str, str] = Field(default_factory=dict, description="what tells these from others")
    unit_length: bool = True
    centre: bool = False
    loss: str | None = None
    run: str | None = Field(default=None, description="the last run of its snapshot")
    snapshot: str | None = None
    best_epoch: int | None = Field(default=None, description="the epoch kept, from 0")
    history: list[Epoch] = Field(default_factory=list)
    solved: dict[str, float] = Field(default_factory=dict, description="validation mAP by choice")
    imported_from: str | None = Field(default=None, description="file name of a checkpoint of FastGDA's release")
    sha256: str | None = Field(default=None, description="of that file")
    origin: str = Field(default="", description="the Prefect flow run that it was made in")
    code_version: str = ""

    @property
    def validation_map(self) -> float | None:
        """mAP on the validation queries of the epoch kept, or of the best choice where nothing is trained."""
        if self.best_epoch is None:
            return max(self.solved.values(), default=None)
        return self.history[self.best_epoch].validation_map


class IndexRecord(BaseModel):
    """`indexes/<version>/index.json`: the head that made an index's vectors, and the samples that its train_ids number.

    Indexes of earlier releases do not name the samples, or say nothing of what they are: they are Flat or SQfp16.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    head: str = Field(default="", description="version of the head")
    samples: str | None = Field(default=None, description="the table of samples, relative to the workspace")
    kind: str = Field(default="", description="FAISS's factory string")
    reason: str = Field(default="", description="why it is this one")
    faiss: str = Field(default="", description="version of FAISS that wrote it, which has to read it")
    rows: int | None = Field(default=None, description="vectors in it")
    width: int | None = Field(default=None, description="of a vector")
    nprobe: int | None = Field(default=None, description="inverted lists that a query looks at")
    ef_search: int | None = Field(default=None, description="nodes of a graph that a query keeps")
    k_factor: float | None = Field(default=None, description="times k vectors are looked at again")
    target: float | None = Field(default=None, description="recall at 100 that these were chosen to reach")
    recall_at_10: float | None = Field(default=None, description="share of the true first 10 that it finds")
    recall_at_100: float | None = Field(default=None, description="the same of the first 100")
    recall_queries: int = Field(default=0, description="queries that recall was measured on")
    recall_of: str = Field(default="", description="which these are")
    vectors: list[str] = Field(default_factory=list, description="keys of its vectors, in the order of addition")
    on_disk: bool = Field(default=False, description="whether its inverted lists are a file of their own, lists.bin")
    parent: str = Field(default="", description="the index that samples were added to")
    origin: str = Field(default="", description="the Prefect flow run that it was made in")
    code_version: str = ""


class Curve(BaseModel):
    """A monotone curve through points, x ascending, with the deviation of single pairs from it; empty: not known."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    x: list[float] = Field(default_factory=list)
    y: list[float] = Field(default_factory=list)
    error: list[float] = Field(default_factory=list)


class Calibration(BaseModel):
    """`calibrations/<key>.json`: what a head's similarities say of the teacher's rank and score."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    queries: int = Field(description="that the curves are of")
    rank: Curve = Field(description="log of the normalised rank, over similarity in deviations above the mean")
    score: Curve = Field(description="score, over similarity")
    test_queries: int = Field(default=0, description="that they were checked on, by the head's first 100 of each")
    rank_explained: float = Field(default=0.0, description="share of the variance of these that the curve explains")
    score_explained: float = 0.0
    covered: float = Field(default=0.0, description="share of these whose score is within two standard errors")


class CheckRecord(NamedTuple):
    """One check of a run's teacher; the path is relative to the workspace."""

    key: str
    path: str
    rows: int


class TeacherChecks(RootModel[dict[str, CheckRecord]]):
    """`runs/<run>/checks.json`: the checks of the run's teacher, by name."""


def as_json(record: BaseModel) -> bytes:
    """Return a record as it stands in its file."""
    return record.model_dump_json(indent=2, exclude_none=True).encode() + b"\n"


def read_head_record(head: AnyPath) -> HeadRecord:
    """Read the record of the head in this folder.

    Raises:
        StoreError: there is no such file, or it is damaged.
    """
    content = read_if_there(head / HEAD_FILE)
    if content is None:
        raise StoreError(f"{head / HEAD_FILE} is gone: `fastgda train CONFIG` makes the head again")
    return _parsed(HeadRecord, content, head / HEAD_FILE)


def read_index_record(index: AnyPath) -> IndexRecord:
    """Read the record of the index in this folder; an empty record where there is no file.

    Raises:
        StoreError: the file is damaged.
    """
    return _parsed(IndexRecord, read_if_there(index / INDEX_FILE) or b"{}", index / INDEX_FILE)


def read_calibration_record(path: AnyPath) -> Calibration | None:
    """Read a calibration; None where there is no file, as in workspaces of earlier releases.

    Raises:
        StoreError: the file is damaged.
    """
    content = read_if_there(path)
    return None if content is None else _parsed(Calibration, content, path)


def read_checks_record(workspace: Workspace, run: str) -> dict[str, CheckRecord]:
    """Read the checks of a run's teacher, by name; none before the teacher was judged.

    Raises:
        StoreError: the file is damaged.
    """
    path = workspace.checks(run)
    return _parsed(TeacherChecks, read_if_there(path) or b"{}", path).root


def check_tables(workspace: Workspace, run: str) -> list[AnyPath]:
    """Return the files of `metrics` rows that the checks of a run's teacher wrote.

    Raises:
        StoreError: one of them is gone, or the record is damaged.
    """
    checks = {name: workspace.file(check.path) for name, check in read_checks_record(workspace, run).items()}
    found = [path for name, path in checks.items() if name != EXACT_CHECK]
    for path in found:
        if not is_there(path):
            raise StoreError(
                f"{path}, which a check of run {run} wrote, is gone: `fastgda judge CONFIG` makes it again"
            )
    return found


def write_checks_record(workspace: Workspace, run: str, checks: dict[str, CheckRecord]) -> None:
    """Replace the record of the checks of a run's teacher."""
    write_changed(workspace.checks(run), as_json(TeacherChecks(checks)))


def _parsed(model: type[Record], content: bytes, path: AnyPath) -> Record:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all"
        raise StoreError(f"{path} is damaged ({where}: {first['msg']}): `fastgda verify` says what else is") from None


def index_samples(workspace: Workspace, head: AnyPath, index: AnyPath) -> str:
    """Return the table of samples that an index's train_ids number, relative to the workspace.

    Indexes of earlier releases do not name it. They were built on the data of the snapshot that their head learned
    from.

    Raises:
        StoreError: such an index has a head that learned from no snapshot.
    """
    return _samples_of(workspace, head, index, read_index_record(index))


def _samples_of(workspace: Workspace, head: AnyPath, index: AnyPath, record: IndexRecord) -> str:
    samples = record.samples
    if samples is None and (learned := read_head_record(head)).snapshot and learned.run:
        samples = read_run(workspace, learned.run).samples
    if samples is None:
        raise StoreError(
            f"{index} does not say which training data it is of: `fastgda index build CONFIG --head {head.name}` "
            "writes it down"
        )
    return samples


def taught_by(workspace: Workspace) -> dict[str, str]:
    """Return the run that each head learned from, by the head's version; empty where it was imported."""
    heads = [path.parent for path in matching(workspace.root / "heads", f"*/{HEAD_FILE}")]
    return {head.name: read_head_record(head).run or "" for head in heads}


def holds_any(index: AnyPath, train_ids: NDArray[np.int64]) -> bool:
    """Return whether an index has vectors of any of these samples; true where its list of them is gone."""
    if not len(train_ids):
        return False
    chosen = pc.field("train_id").isin(pa.array(train_ids, pa.int64()))
    try:
        return bool(tables.read(index / INDEX_IDS, tables.INDEX_IDS, chosen).num_rows)
    except FileNotFoundError:
        return True


def indexed_tables(workspace: Workspace) -> dict[str, str]:
    """Return the table of samples of each index, by the index's version; empty where nobody knows."""
    folders = [path.parent for path in matching(workspace.root / "indexes", "*/index.faiss")]
    return {folder.name: indexed_table(workspace, folder, read_index_record(folder)) for folder in folders}


def indexed_table(workspace: Workspace, index: AnyPath, record: IndexRecord) -> str:
    """Return what `indexed_tables` does for one index, whose record was read."""
    try:
        return _samples_of(workspace, workspace.head(record.head or "none"), index, record)
    except StoreError:  # of an earlier release, with a head that is gone or was imported
        return ""
