"""Commit protocol: a file is either absent or whole, and its manifest says what it was made from.

Write under a temporary name, fsync, take the final name, then the manifest by the same steps. A file counts as
committed only when a manifest with the asked input key stands beside it, so a crash at any
instant leaves work that the next start repeats, never work that it trusts wrongly.

A table's file carries its input key within. So when two workers finish the same shard, or one died between file and
manifest, the file that is there is taken as it stands, after its rows were read once through its page checksums, and
the second copy is thrown away.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas.files import (
    AnyPath,
    create,
    file_sha256,
    read_if_there,
    remove,
    replace,
    replace_through,
    sync_folders,
    write_atomically,
)
from storage_schemas.table import Table, read_native

__all__ = [
    "Manifest",
    "TableCommit",
    "code_version",
    "commit",
    "commit_table",
    "commit_tables",
    "committed",
    "file_sha256",
    "input_key",
    "made_in",
    "manifest_path",
    "read_manifest",
    "worker_name",
    "write_atomically",
]


KEY_VERSION = "2"  # of input keys of what is no table
MANIFEST = ".manifest.json"  # behind the name of the file that it is of
QUARANTINED = "quarantined"  # key in the metadata of a Parquet file


@functools.cache
def code_version() -> str:
    """Return the release, and the commit where this is a git checkout: `0.1.0+bee9285`."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return version("fastgda") + (f"+{commit}" if commit else "")


def worker_name() -> str:
    """Return this host and process, by which manifests name the worker that committed a file."""
    return f"{os.uname().nodename}:{os.getpid()}"


class Manifest(BaseModel):
    """The content of `<file>.manifest.json` beside each committed file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_key: str = Field(description="hash of everything the content depends on")
    rows: int = Field(ge=0, description="rows in the file, or items where it is no table")
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(description="of the file")
    schema_version: str = Field(default="", description="of its table; empty where it is none")
    code_version: str = Field(default="", description="release and commit that made the file; empty before 0.2")
    seconds: float = Field(default=0.0, description="how long the work behind it took")
    device: str = Field(default="cpu", description="where it ran")
    worker: str = Field(default="", description="host and process that committed it")
    committed_at: datetime | None = Field(default=None, description="when, UTC")
    origin: str = Field(default="", description="the Prefect flow run that it was made in")
    quarantined: dict[int, str] = Field(
        default_factory=dict,
        description="training samples that were left out, and why; `fastgda retry` tries again",
    )


_origin: ContextVar[str] = ContextVar("origin", default="")


@contextmanager
def made_in(flow_run: str) -> Iterator[None]:
    """Name this flow run in the manifests of files that are committed in the block."""
    token = _origin.set(flow_run)
    try:
        yield
    finally:
        _origin.reset(token)


def input_key(*parts: object, table: Table | None = None) -> str:
    """Return a 16-digit key of inputs: models, dataclasses, dicts, lists, numbers, text.

    Args:
        table: the table that is made from the inputs, if any: files that are too old to be read have another key.
    """
    version = str(table.oldest) if table is not None else KEY_VERSION
    document = json.dumps([version, *parts], sort_keys=True, default=_plain, ensure_ascii=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be part of an input key")


def manifest_path(path: AnyPath) -> AnyPath:
    return path.with_name(path.name + MANIFEST)


def read_manifest(path: AnyPath) -> Manifest | None:
    """Read the manifest beside `path`, whether or not the file is there; None where it is absent or unreadable."""
    content = read_if_there(manifest_path(path))
    try:
        return None if content is None else Manifest.model_validate_json(content)
    except ValidationError:
        return None


def committed(path: AnyPath, key: str) -> Manifest | None:
    """Return the manifest of `path` if it was committed from the inputs behind `key`, else None."""
    manifest = read_manifest(path)
    if manifest is None or manifest.input_key != key:
        return None
    try:
        return manifest if path.stat().st_size == manifest.size else None
    except FileNotFoundError:
        return None


def commit(
    path: AnyPath,
    write: Callable[[Path], object],
    *,
    key: str,
    rows: int | Callable[[], int],
    started: float,
    device: str = "cpu",
    quarantined: Mapping[int, str] | None = None,
    table: Table | None = None,
) -> Manifest:
    """Write one file through `write(temporary path)` and commit it with its manifest.

    `started` is the `time.monotonic()` at which the work behind the file began. `table` is the table that a Parquet
    file holds. `rows` is called, where it is a function, after the file was written.
    """
    made: list[Manifest] = []
    version = table.metadata["schema_version"] if table is not None else ""

    def look(temporary: Path) -> None:
        size, digest = temporary.stat().st_size, file_sha256(temporary)
        count = rows if isinstance(rows, int) else rows()
        made.append(_manifest(key, count, size, digest, started, device, quarantined, version))
        # A manifest never stands beside a file that it does not describe.
        remove(manifest_path(path))

    replace_through(path, write, look)
    sync_folders([path])
    _write_manifest(path, made[0])
    sync_folders([path])
    return made[0]


@dataclasses.dataclass(frozen=True)
class TableCommit:
    """One table on its way to disk. `started` is the `time.monotonic()` at which the work behind it began."""

    path: AnyPath
    rows: pa.Table
    table: Table
    key: str
    started: float
    device: str = "cpu"
    quarantined: Mapping[int, str] | None = None


def commit_table(
    path: AnyPath,
    rows: pa.Table,
    table: Table,
    *,
    key: str,
    started: float,
    device: str = "cpu",
    quarantined: Mapping[int, str] | None = None,
) -> Manifest:
    """Commit rows as Parquet, cast to the table's schema and written with its settings."""
    return commit_tables([TableCommit(path, rows, table, key, started, device, quarantined)])[0]


def commit_tables(batch: Sequence[TableCommit]) -> list[Manifest]:
    """Commit several tables; each folder is synced once for all of them, which is what makes small shards cheap.

    A crash in the middle leaves some committed and the others not.
    """
    manifests = [_commit_one(item) for item in batch]
    sync_folders(item.path for item in batch)
    return manifests


def _commit_one(item: TableCommit) -> Manifest:
    # The file too says which samples were left out: if it is adopted, its new manifest has to say so.
    left_out = {str(train_id): reason for train_id, reason in (item.quarantined or {}).items()}
    metadata = {"input_key": item.key, **({QUARANTINED: json.dumps(left_out)} if left_out else {})}
    content = item.table.encode(item.rows, metadata)
    digest = hashlib.sha256(content).hexdigest()
    manifest = _manifest(
        item.key,
        item.rows.num_rows,
        len(content),
        digest,
        item.started,
        item.device,
        item.quarantined,
        item.table.metadata["schema_version"],
    )
    if not create(item.path, content):
        there = _adopted(item)
        if there is not None:
            return there
        remove(manifest_path(item.path))
        sync_folders([item.path])
        replace(item.path, content)
    _write_manifest(item.path, manifest)
    return manifest


def _adopted(item: TableCommit) -> Manifest | None:
    """Return the manifest of the file that another worker left at this place, if it is the same work and whole."""
    manifest = committed(item.path, item.key)
    if manifest is not None:
        return manifest
    try:
        content = read_native(item.path)
        found = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    except (FileNotFoundError, pa.ArrowException, OSError):
        return None
    metadata = found.schema.metadata or {}
    if metadata.get(b"input_key") != item.key.encode():
        return None
    digest = hashlib.sha256(content).hexdigest()
    left_out = {int(name): why for name, why in json.loads(metadata.get(QUARANTINED.encode(), b"{}")).items()}
    version = metadata.get(b"schema_version", b"").decode()
    manifest = _manifest(item.key, found.num_rows, len(content), digest, item.started, item.device, left_out, version)
    _write_manifest(item.path, manifest)
    return manifest


def _manifest(
    key: str,
    rows: int,
    size: int,
    digest: str,
    started: float,
    device: str,
    quarantined: Mapping[int, str] | None,
    schema_version: str,
) -> Manifest:
    return Manifest(
        input_key=key,
        rows=rows,
        size=size,
        sha256=digest,
        schema_version=schema_version,
        code_version=code_version(),
        seconds=time.monotonic() - started,
        device=device,
        worker=worker_name(),
        committed_at=datetime.now(UTC),
        origin=_origin.get(),
        quarantined=dict(quarantined or {}),
    )


def _write_manifest(path: AnyPath, manifest: Manifest) -> None:
    replace(manifest_path(path), manifest.model_dump_json(indent=2).encode() + b"\n")
