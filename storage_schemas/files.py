"""Bytes on a local disk or in an object store: whole or absent, and durable when the call returns.

A local file is written under a hidden name that only this package uses (`TEMPORARY`), fsynced and then renamed or
linked to its own name; an object is one PUT, which stores show whole or not at all. `AnyPath` is a `pathlib.Path` on
disk and a `upath.UPath` for any other URL that fsspec knows (`s3://bucket/workspace`, options from the environment, as
the store's own client takes them).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from storage_schemas.errors import StoreError

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
UNUSED_SECONDS = 7 * 86_400.0  # after which a copy of an object is deleted
TEMPORARY = ".fastgda-tmp-"  # begins the name of every unfinished file and of nothing else: `vacuum` relies on it


def any_path(location: str | AnyPath) -> AnyPath:
    """Return a folder by its path, or by its URL where it has a scheme.

    Raises:
        StoreError: there is no such kind of store, or the package that reaches it is not installed.
    """
    if isinstance(location, str) and "://" in location:
        # Importing fsspec takes a tenth of a second, which commands on a disk need not wait for.
        from fsspec import get_filesystem_class  # type: ignore[import-untyped]
        from upath import UPath

        try:
            found = UPath(location, use_listings_cache=False)  # others write there too
            get_filesystem_class(found.protocol)
        except ValueError as error:
            raise StoreError(f"{location}: {error}: name a folder, or a store as s3://bucket/workspace") from None
        except ImportError as error:
            line = ": pip install 'fastgda[s3]'" if location.startswith("s3") else ""
            raise StoreError(f"{location}: {error}{line}") from None
        return found if not isinstance(found, Path) else Path(found.path)
    return Path(location) if isinstance(location, str) else location


Stamps: TypeAlias = tuple[tuple[str, int, int], ...]


def stamps(paths: Iterable[AnyPath]) -> Stamps:
    """Return path, size and time in nanoseconds of each file: as long as they stay the same, so does its content."""
    return tuple((str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths)


def folder_stamps(folder: Path) -> Stamps:
    """Stamp every file below a folder, in order."""
    return stamps(sorted(path for path in folder.rglob("*") if path.is_file()))


def file_sha256(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # any binary file


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Replace a small file in one step."""
    replace(path, content)
    sync_folders([path])


def write_changed(path: AnyPath, content: bytes) -> None:
    """As `write_atomically`, and nothing is written where the file holds that already."""
    if read_if_there(path) != content:
        replace(path, content)
    sync_folders([path])  # whoever wrote it may have died before


def replace(path: AnyPath, content: bytes) -> None:
    """Replace a small file in one step; unlike `write_atomically`, durable in its folder only after `sync_folders`."""
    if isinstance(path, Path):
        with _written(path, content) as temporary:
            temporary.replace(path)
    else:
        path.fs.pipe_file(path.path, bytes(content))


def create(path: AnyPath, content: bytes) -> bool:
    """Write a file that is not there yet; return False and change nothing where it is there.

    Of several writers the first wins. The folder's entry is durable after `sync_folders`.
    """
    if isinstance(path, Path):
        with _written(path, content) as temporary:
            try:
                os.link(temporary, path)  # unlike a rename, it fails where the name is taken
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
                # A file system without hard links: two that come in the same instant leave the later one.
                if path.exists():
                    return False
                temporary.replace(path)
        return True
    try:
        path.fs.pipe_file(path.path, bytes(content), mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        answer = getattr(error.__cause__, "response", {})
        if answer.get("Error", {}).get("Code") != "ConditionalRequestConflict":
            raise
        return False  # S3: another one is taking the name at this instant
    return True


def replace_through(path: AnyPath, write: Callable[[Path], object], look: Callable[[Path], None]) -> None:
    """Replace a file by what `write` puts at a local path; `look` sees the finished file before it takes the name."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            with _full_disk_explained(path):
                write(temporary)
                look(temporary)
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        write(local)
        look(local)
        path.fs.put_file(str(local), path.path)


def private_folder(name: str) -> Path:
    """Make a folder of this machine and user alone, among the temporary ones, for what can be made again.

    Raises:
        StoreError: another user can write there, so that its files are not to be trusted.
    """
    folder = Path(tempfile.gettempdir()) / f"fastgda-{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise StoreError(f"{folder} is not yours alone: delete it, or set TMPDIR to a folder of your own")
    return folder


def local_copy(path: AnyPath) -> Path:
    """Return a file on this machine's disk: itself, or a copy of an object."""
    return local_files(path.parent, [path.name]) / path.name


def local_files(folder: AnyPath, names: Iterable[str]) -> Path:
    """Return a folder on this machine's disk with these files of a folder: itself, or one with copies.

    Objects are fetched once as long as they stay the same. Copies that nobody asked for in a week go when others are
    made.
    """
    if isinstance(folder, Path):
        return folder
    # Not by fsspec's caches: what a broken connection leaves of a file they give out as the whole file from then on.
    objects = [folder / name for name in names]
    copies = private_folder("copies")
    together = copies / hashlib.sha256(repr([_object_stamp(path) for path in objects]).encode()).hexdigest()[:32]
    if not together.exists():
        _evict(copies)
        together.mkdir(exist_ok=True, mode=0o700)
    os.utime(together)
    for path in objects:
        copy = together / path.name
        if not copy.exists():
            temporary = _temporary(copy)
            path.fs.get_file(path.path, str(temporary))
            temporary.replace(copy)
    return together


def _object_stamp(path: UPath) -> tuple[str, int | None, str]:
    info = path.fs.info(path.path)
    return str(path), info.get("size"), stamp_of(info)


def stamp_of(entry: dict[str, Any]) -> str:
    """Return what changes with an object's content, from what its store tells of it."""
    return str(entry.get("ETag") or entry.get("LastModified") or entry.get("mtime") or entry.get("created"))


def _evict(copies: Path) -> None:
    for folder in copies.iterdir():
        if time.time() - folder.lstat().st_mtime > UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)  # a process that reads one keeps its open file


def sync_folders(paths: Iterable[AnyPath]) -> None:
    """Make the entries of these files in their folders durable, each folder once."""
    for folder in {path.parent for path in paths if isinstance(path, Path)}:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Return the files below a folder that match a glob, by name, but for hidden ones; none without a folder."""
    if isinstance(folder, Path) or "/" in pattern:
        paths: Iterator[AnyPath] = folder.glob(pattern)
    else:  # a glob asks an object store four times where one listing tells as much
        paths = (folder / name for name in remote_entries(folder) if fnmatchcase(name, pattern))
    return sorted((path for path in paths if not path.name.startswith(".")), key=str)


def remote_entries(folder: UPath) -> dict[str, dict[str, Any]]:
    """Return what an object store tells of each entry of a folder, by name, from one listing; none without a folder."""
    try:
        entries = folder.fs.ls(folder.path, detail=True, refresh=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rsplit("/", 1)[-1]: entry for entry in entries}


def leftovers(folder: Path, below: Collection[str] | None = None) -> Iterator[Path]:
    """Yield unfinished files and folders in a folder and below: in the making, or left by a process that died.

    No link is followed, and no hidden folder entered.

    Args:
        below: names of the only folders in it that are entered; all where None.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # what we cannot read is not ours
        return
    for entry in entries:
        if entry.is_symlink():
            continue
        if entry.name.startswith(TEMPORARY):
            yield Path(entry.path)
        elif entry.is_dir() and not entry.name.startswith(".") and (below is None or entry.name in below):
            yield from leftovers(Path(entry.path))


def move(old: AnyPath, new: AnyPath) -> None:
    """Give a file another name in the same workspace, if it is there."""
    try:
        if not isinstance(old, Path):
            old.fs.mv(old.path, str(new) if isinstance(new, Path) else new.path)
        else:
            new.parent.mkdir(parents=True, exist_ok=True)
            old.replace(str(new))
    except FileNotFoundError:
        return


def remove(path: AnyPath) -> None:
    """Delete a file, if it is there."""
    path.unlink(missing_ok=True)


def remove_folder(folder: AnyPath) -> None:
    """Delete a folder and all files below it, whoever else does so at the same time."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(FileNotFoundError):
        folder.fs.rm(folder.path, recursive=True)


@contextmanager
def _written(path: Path, content: bytes) -> Iterator[Path]:
    """Write a durable file under a hidden name beside `path`; it is deleted after the block."""
    temporary = _temporary(path)
    try:
        with _full_disk_explained(path):
            try:
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            with os.fdopen(handle, "wb", buffering=0) as file:
                view = memoryview(content)
                while view:  # one write() takes 2 GiB at most
                    view = view[file.write(view) :]
                os.fsync(handle)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _full_disk_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        what = os.strerror(error.errno)
        raise OSError(
            error.errno, f"{what}: make room and start the same command again; what is finished is kept", str(path)
        ) from error


def temporary_name(name: str) -> str:
    """Return the name of a file or folder until it is whole and called `name`; every thread has its own."""
    # Hidden, so that no glob for the final name sees it; the suffix stays, as writers choose the format by it. Host and
    # thread, as several hosts may share the folder.
    return f"{TEMPORARY}{_HOST}-{os.getpid()}-{threading.get_ident()}-{name}"


def _temporary(path: Path) -> Path:
    return path.with_name(temporary_name(path.name))


_HOST = os.uname().nodename[:32]


def read_whole(path: AnyPath) -> bytes:
    """Return the content of a file as it is at one moment.

    It takes one request of an object store. To open the file there takes more, and fails where the object is replaced
    in between.
    """
    if isinstance(path, Path):
        return path.read_bytes()
    # By several requests at a time s3fs would ask for the size first, and, where there is none, for a listing.
    return bytes(path.fs.cat_file(path.path, max_concurrency=1))


def read_if_there(path: AnyPath) -> bytes | None:
    """Return what `read_whole` returns, None where there is no file."""
    try:
        return read_whole(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_there(path: AnyPath) -> bool:
    """Return whether there is such a file, not empty, by one request of an object store, where `exists` lists."""
    if isinstance(path, Path):
        return path.exists()
    try:
        path.fs.cat_file(path.path, start=0, end=1)
    except FileNotFoundError:
        return False
    return True
