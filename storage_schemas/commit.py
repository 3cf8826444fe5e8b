"""Commit protocol: a file is either absent or whole, and its manifest says what it was made from.

Write under a temporary name, fsync, rename, then the manifest by the same steps. A file counts as
committed only when a manifest with the asked input key stands beside it, so a crash at any
instant leaves work that the next start repeats, never work that it trusts wrongly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas.tables import SCHEMA_VERSION


class Manifest(BaseModel):
    """What stands in `<file>.manifest.json` beside each committed file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input_key: str = Field(description="hash of everything the content depends on")
    rows: int = Field(ge=0, description="rows in the file, or items where it is no table")
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(description="of the file")
    schema_version: str = SCHEMA_VERSION
    seconds: float = Field(default=0.0, description="how long the work behind it took")
    device: str = Field(default="cpu", description="where it ran")


def input_key(*parts: object) -> str:
    """A 16-digit key of inputs (models, dataclasses, dicts, lists, numbers, text) and the version of the schemas."""
    document = json.dumps([SCHEMA_VERSION, *parts], sort_keys=True, default=_plain, ensure_ascii=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be part of an input key")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def committed(path: Path, key: str) -> Manifest | None:
    """The manifest of `path` if it was committed from the inputs behind `key`, else None."""
    try:
        manifest = Manifest.model_validate_json(manifest_path(path).read_bytes())
        whole = path.stat().st_size == manifest.size
    except (FileNotFoundError, ValidationError):
        return None
    return manifest if whole and manifest.input_key == key else None


def commit(
    path: Path, write: Callable[[Path], None], *, key: str, rows: int, started: float, device: str = "cpu"
) -> Manifest:
    """Write one file through `write(temporary path)` and commit it with its manifest.

    `started` is the `time.monotonic()` at which the work behind the file began.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write(temporary)
        manifest = Manifest(
            input_key=key,
            rows=rows,
            size=temporary.stat().st_size,
            sha256=file_sha256(temporary),
            seconds=time.monotonic() - started,
            device=device,
        )
        # A manifest never stands beside a file that it does not describe.
        manifest_path(path).unlink(missing_ok=True)
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomically(manifest_path(path), manifest.model_dump_json(indent=2).encode() + b"\n")
    return manifest


def commit_table(
    path: Path, table: pa.Table, schema: pa.Schema, *, key: str, started: float, device: str = "cpu"
) -> Manifest:
    """Commit an Arrow table as zstd Parquet, cast to its schema."""

    def write(temporary: Path) -> None:
        pq.write_table(table.cast(schema), temporary, compression="zstd")

    return commit(path, write, key=key, rows=table.num_rows, started=started, device=device)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a small file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # Hidden, so that no glob for the final name sees it; the suffix stays, as writers go by it.
    return path.with_name(f".{os.getpid()}-{path.name}")


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
