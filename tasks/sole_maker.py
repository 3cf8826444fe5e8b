"""What is committed once and costs much is made by one process, whoever else asks for it at the same time."""

from __future__ import annotations

from contextlib import AbstractContextManager

from storage_schemas.commit import committed
from storage_schemas.files import AnyPath
from storage_schemas.runs import lease
from tasks.context import Context
from tasks.progress import console


def sole_maker(context: Context, what: str, path: AnyPath, key: str) -> AbstractContextManager[None]:
    """Let one process at a time into the block, which commits a file with this key; the others find it there.

    Args:
        what: for people, who are told why a process waits.
    """

    def waiting(owner: str) -> None:
        console.print(f"{what} {key}: {owner} makes it already; waiting for it", highlight=False, soft_wrap=True)

    return lease.sole_maker(context.workspace, key, lambda: committed(path, key) is not None, waiting)
