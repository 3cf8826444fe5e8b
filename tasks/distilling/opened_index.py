"""Open an index version for answers: compared with what was committed, memory-mapped, with its own settings."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from fastgda_core.errors import UsageError
from fastgda_core.search.build import faiss_version
from fastgda_core.search.searcher import Searcher, SearchSettings, open_index
from storage_schemas import tables
from storage_schemas.commit import Manifest, read_manifest
from storage_schemas.files import UNUSED_SECONDS, AnyPath, file_sha256, local_files, private_folder, stamps
from storage_schemas.heads.records import INDEX_IDS, INDEX_LISTS, IndexRecord, read_index_record

_AGAIN = "`fastgda index build CONFIG` builds it again"


def settings_of(record: IndexRecord) -> SearchSettings:
    """Return the search settings that were chosen when an index was built."""
    return SearchSettings(record.nprobe, record.ef_search, record.k_factor)


def open_search_index(folder: AnyPath, head: str | None = None) -> Searcher:
    """Open the index in this folder, whatever its kind.

    The file is compared with its manifest byte by byte when this machine sees it for the first time, later by size and
    time alone, so that a restart answers at once.

    Args:
        folder: of the version.
        head: version that the index has to be of; None: any.

    Raises:
        UsageError: there is no index; it is damaged, of another head, or of another release of FAISS.
    """
    path, record = folder / "index.faiss", read_index_record(folder)
    manifest = read_manifest(path)
    if manifest is None:
        raise UsageError(f"{folder} holds no finished index: {_AGAIN}")
    if head is not None and record.head and record.head != head:
        raise UsageError(f"index {folder.name} is of head {record.head}, not {head}: build an index of head {head}")
    if record.faiss and release_of(record.faiss) != release_of(faiss_version()):
        raise UsageError(
            f"index {folder.name} was built with FAISS {record.faiss} and this is {faiss_version()}: {_AGAIN} from its "
            "vectors"
        )
    try:
        local = local_files(folder, [path.name, INDEX_LISTS] if record.on_disk else [path.name])
        lists = local / INDEX_LISTS if record.on_disk else None
        if lists is not None:
            _check_lists(lists, folder / INDEX_LISTS)
        _check(local / path.name, path, manifest)
    except FileNotFoundError as error:
        raise UsageError(f"{error.filename or path} is gone: {_AGAIN}") from None
    train_ids = tables.read(folder / INDEX_IDS, tables.INDEX_IDS)["train_id"].to_numpy()
    searcher = open_index(local / path.name, train_ids, settings_of(record), lists)
    if searcher.vectors != manifest.rows:
        raise UsageError(f"{path} has {searcher.vectors:,} vectors and its manifest {manifest.rows:,}: {_AGAIN}")
    return searcher


def believe(path: AnyPath, manifest: Manifest) -> None:
    """Note that a file on this machine's disk is what its manifest says: it was just written, or read through."""
    if isinstance(path, Path):
        _mark(path, manifest).touch()


def _check_lists(local: Path, path: AnyPath) -> None:
    manifest = read_manifest(path)
    if manifest is None:
        raise UsageError(f"{path} has no manifest: {_AGAIN}")
    _check(local, path, manifest)


def _check(local: Path, path: AnyPath, manifest: Manifest) -> None:
    if local.stat().st_size != manifest.size:
        raise UsageError(f"{path} has {local.stat().st_size:,} bytes and its manifest {manifest.size:,}: {_AGAIN}")
    mark = _mark(local, manifest)
    if mark.exists():
        return
    if file_sha256(local) != manifest.sha256:
        raise UsageError(f"{path} is not the file that was committed (sha256): {_AGAIN}")
    for old in mark.parent.iterdir():
        if time.time() - old.lstat().st_mtime > UNUSED_SECONDS:
            old.unlink(missing_ok=True)
    mark.touch()


def _mark(local: Path, manifest: Manifest) -> Path:
    name = hashlib.sha256(f"{stamps([local])} {manifest.sha256}".encode()).hexdigest()[:32]
    return private_folder("verified") / name


def release_of(version: str) -> str:
    """Return major and minor number of FAISS, within which files are read as they were written."""
    return ".".join(version.split(".")[:2])
