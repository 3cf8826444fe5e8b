"""The committed parts of a folder, known from one listing of it.

A folder may hold ten thousand parts, and in an object store each question about one of them is a request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pydantic import ValidationError

from storage_schemas.commit import MANIFEST, Manifest, manifest_path, read_manifest
from storage_schemas.files import AnyPath, remote_entries, stamp_of


class Entry(NamedTuple):
    """A file as a listing shows it: its bytes, and a stamp that changes with its content."""

    size: int
    stamp: str


Listing: TypeAlias = dict[str, Entry]  # by name

_known: dict[str, tuple[Entry, Manifest]] = {}  # by the manifest's path: only what is new is read


def list_folder(folder: AnyPath) -> Listing:
    """List every file of a folder by name; nothing where there is no folder."""
    if isinstance(folder, Path):
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return {}
        listing = {}
        for entry in entries:
            with suppress(FileNotFoundError):  # another process renames or deletes it meanwhile
                listing[entry.name] = _local(entry.stat())
        return listing
    return {name: _remote(entry) for name, entry in remote_entries(folder).items()}


def list_tree(folder: AnyPath) -> Listing:
    """List every file below a folder by its path from there; nothing where there is no folder."""
    if isinstance(folder, Path):
        listing = {}
        for path in folder.rglob("*"):
            with suppress(FileNotFoundError):  # another process deletes it meanwhile
                if path.is_file():
                    listing[path.relative_to(folder).as_posix()] = _local(path.stat())
        return listing
    found = folder.fs.find(folder.path, detail=True, refresh=True)
    return {name.removeprefix(f"{folder.path}/"): _remote(entry) for name, entry in found.items()}


def _local(stat: os.stat_result) -> Entry:
    return Entry(stat.st_size, f"{stat.st_ino}-{stat.st_mtime_ns}")


def _remote(entry: dict[str, Any]) -> Entry:
    return Entry(entry["size"], stamp_of(entry))


def committed_parts(folder: AnyPath, key: str) -> dict[str, Manifest]:
    """Return the manifest of every part that was committed from the inputs behind `key`, by the part's name."""
    listing = list_folder(folder)
    manifests = ((path.name, manifest) for path, manifest in listed_manifests(folder, listing).items())
    return {
        name: manifest
        for name, manifest in manifests
        if manifest.input_key == key and name in listing and listing[name].size == manifest.size
    }


def folder_manifests(folder: AnyPath) -> dict[AnyPath, Manifest]:
    """Return the manifest of every part of a folder, whether or not the part is there, by the part's path."""
    return listed_manifests(folder, list_folder(folder))


def listed_manifests(folder: AnyPath, listing: Listing) -> dict[AnyPath, Manifest]:
    """Return what `folder_manifests` returns, from a listing of the folder."""
    paths = [folder / name.removesuffix(MANIFEST) for name in sorted(listing) if name.endswith(MANIFEST)]
    _read_together([path for path in paths if _known_as(path, listing) is None], listing)
    return {path: manifest for path in paths if (manifest := listed_manifest(path, listing)) is not None}


def listed_manifest(path: AnyPath, listing: Listing) -> Manifest | None:
    """Return the manifest of one part; None where the listing has none or it cannot be read."""
    if manifest_path(path).name not in listing:
        return None
    manifest = _known_as(path, listing)
    if manifest is None and (manifest := read_manifest(path)) is not None:
        _known[str(path)] = listing[manifest_path(path).name], manifest
    return manifest


def quarantined_in(parts: Iterable[AnyPath], wanted: Iterable[int]) -> dict[int, str]:
    """Return which of these training samples some parts left out, and why."""
    chosen = set(wanted)
    manifests = _read_manifests(list(parts))
    left_out = {train_id: why for _, manifest in manifests for train_id, why in manifest.quarantined.items()}
    return {train_id: why for train_id, why in left_out.items() if train_id in chosen}


def _known_as(path: AnyPath, listing: Listing) -> Manifest | None:
    entry, manifest = _known.get(str(path), (None, None))
    return manifest if entry == listing[manifest_path(path).name] else None


def _read_together(paths: list[AnyPath], listing: Listing) -> None:
    """Read manifests of an object store many at a time; on disk one after the other is as fast."""
    for path, manifest in _read_manifests([path for path in paths if not isinstance(path, Path)]):
        _known[str(path)] = listing[manifest_path(path).name], manifest


def _read_manifests(paths: list[AnyPath]) -> Iterator[tuple[AnyPath, Manifest]]:
    """Yield the manifests that are there and can be read, those of an object store from requests at the same time."""
    remote = {manifest_path(path).path: path for path in paths if not isinstance(path, Path)}  # type: ignore[union-attr]
    for path in paths:
        if isinstance(path, Path) and (manifest := read_manifest(path)) is not None:
            yield path, manifest
    if not remote:
        return
    store = next(iter(remote.values())).fs
    for place, content in store.cat(list(remote), on_error="omit", max_concurrency=1).items():  # see `read_whole`
        with suppress(ValidationError):
            yield remote[place], Manifest.model_validate_json(content)
