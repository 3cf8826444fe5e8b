"""What comes of many writers to one lake: who was in the way is waited for, anything else is said in one line."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

import duckdb

from storage_schemas.errors import StoreError

T = TypeVar("T")

PATIENCE = 120.0  # seconds that a transaction is tried again while others are in its way


class LakeUnavailable(StoreError):
    """DuckLake cannot be used here, or its catalog cannot be opened."""


class LakeConflict(StoreError):
    """The lake does not hold what the workspace holds, or other writers left no room."""


def patiently(attempt: Callable[[], T]) -> T:
    """Call `attempt` again while other writers are in its way; raise any other error at once."""
    deadline = time.monotonic() + PATIENCE
    wait = 0.01
    while True:
        try:
            return attempt()
        except duckdb.Error as error:
            if not _in_the_way(error):
                raise
            if time.monotonic() > deadline:
                raise LakeConflict(
                    f"other writers kept the lake busy for {PATIENCE:.0f} s: start the same command again"
                ) from None
        time.sleep(wait * random.uniform(0.5, 1.5))
        wait = min(2 * wait, 2.0)


def _in_the_way(error: duckdb.Error) -> bool:
    """Return whether another writer was first, so that trying again helps."""
    text = str(error).lower()
    return any(
        sign in text
        for sign in (
            "conflict",
            "database is locked",
            "unique constraint",
            "duplicate key",
            "could not serialize",
            '"ducklake_metadata" already exists',  # two processes that make a catalog's tables, found missing by both
        )
    )


def catalog_fault(catalog: str, error: duckdb.Error) -> str:
    """Return one line that says why a catalog cannot be used."""
    first = without_password(str(error).strip().splitlines()[0])
    return f"the lake's catalog {without_password(catalog)} cannot be used: {first}"


def without_password(text: str) -> str:
    """Return a connection string, or a text that holds one, without the password in it."""
    text = re.sub(r"(password\s*=\s*)('[^']*'|[^\s\"]+)", r"\1***", text, flags=re.IGNORECASE)
    return re.sub(r"(://[^:/@\s]*:)[^@\s]*@", r"\1***@", text)
