"""API keys: who may read, and who may administer.

A key is 256 random bits, of which the file holds the SHA-256. A slow hash (scrypt) protects passwords, which people
choose and others can guess; nobody guesses 256 bits, and a slow hash would be paid by every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from storage_schemas.errors import StoreError
from storage_schemas.files import write_atomically
from tasks.config.section import Section

Scope = Literal["read", "admin"]
PREFIX = "fgda_"  # by which scanners find a key that was committed by mistake
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)


class StoredKey(Section):
    """A key as its file knows it: by its hash."""

    name: str
    scope: Scope
    sha256: str
    created_at: datetime


class KeyFile(Section):
    """The file of keys."""

    keys: list[StoredKey] = Field(default_factory=list)


@dataclass(frozen=True)
class Caller:
    """Whoever sent a request: the key's name, or the address where no keys are asked for."""

    name: str
    scope: Scope


def read_keys(path: Path) -> KeyFile:
    """Read a file of keys.

    Raises:
        StoreError: there is no such file, it is damaged, or others may write to it.
    """
    try:
        if path.stat().st_mode & 0o022:
            raise StoreError(f"{path}: others may write to it, and so let themselves in: `chmod go-w {path}`")
        return KeyFile.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{path} is not there: `fastgda keys add NAME --keys {path}` makes the first key") from None
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise StoreError(f"{path} is no file of keys ({error.errors()[0]['msg']}): make keys anew") from None


def add_key(path: Path, name: str, scope: Scope) -> str:
    """Add a key to a file, which is made where there is none, and return the key: it is written down nowhere else.

    Raises:
        StoreError: the name is taken, or no name.
    """
    if not _NAME.fullmatch(name):
        raise StoreError(f"{name!r} is no name of a key: letters, digits and . @ _ - make one, 64 at most")
    known = read_keys(path).keys if path.exists() else []
    if any(key.name == name for key in known):
        raise StoreError(f"{path} has a key {name} already: revoke it first, or choose another name")
    token = PREFIX + secrets.token_urlsafe(32)
    _write(path, [*known, StoredKey(name=name, scope=scope, sha256=_digest(token), created_at=datetime.now(UTC))])
    return token


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of a file: running services refuse it within a second.

    Raises:
        StoreError: there is no such key.
    """
    known = read_keys(path).keys
    if not any(key.name == name for key in known):
        raise StoreError(f"{path} has no key {name}: it has {', '.join(key.name for key in known) or 'none'}")
    _write(path, [key for key in known if key.name != name])


def _write(path: Path, keys: list[StoredKey]) -> None:
    write_atomically(path, KeyFile(keys=keys).model_dump_json(indent=2).encode() + b"\n")
    path.chmod(0o600)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Keys:
    """The keys of a file, read again when it changes, so that a revoked key is refused without a restart."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._keys = read_keys(path).keys

    def caller(self, token: str) -> Caller | None:
        """Return whose key this is; None where nobody's. It takes as long whichever key it is, or none."""
        self._refresh()
        digest, found = _digest(token), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return Caller(found.name, found.scope) if found else None

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        with self._lock:
            # A file that is gone or damaged lets nobody in: to go on with the old keys might let in a revoked one.
            try:
                self._keys = read_keys(self.path).keys
            except StoreError:
                self._keys = []
            self._stamp = stamp

    def _look(self) -> tuple[int, int, int]:
        try:
            found = self.path.stat()
        except OSError:
            return (0, 0, 0)
        return found.st_mtime_ns, found.st_size, found.st_ino
