"""The device that a process computes on."""

from __future__ import annotations

import fcntl
import functools
import os

import torch

from fastgda_core.errors import UsageError
from storage_schemas.files import private_folder


def pick_device(name: str) -> torch.device:
    """Return the CPU, or a GPU: this process's own where it holds one, else the first that it can see.

    Raises:
        UsageError: CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError('device is "cuda" but torch sees no GPU: install a CUDA build of torch or set device: auto')
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{_held[0] if _held else 0}")


_held: list[int] = []


def hold_device() -> None:
    """Take a GPU of this machine for this process, as long as it lives, where it can see several.

    It is for processes that make parts. A coordinator, which encodes a few images, shares the first GPU with them. A
    Ray worker, a container or a pod sees only what was given to it.

    Raises:
        UsageError: all GPUs are taken.
    """
    if not _held and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        _held.append(claim_slot("gpu", torch.cuda.device_count()))


@functools.cache
def claim_slot(name: str, count: int) -> int:
    """Claim a number below `count` that no other process of this user on this machine holds, until this one ends.

    Raises:
        UsageError: all numbers are taken.
    """
    folder = private_folder("slots")
    for number in range(count):
        handle = os.open(folder / f"{name}-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
        else:
            return number  # the handle stays open, and with it the lock, as long as the process lives
    raise UsageError(f"all {count} GPUs of this machine are held by other processes: lower execution.workers or wait")
