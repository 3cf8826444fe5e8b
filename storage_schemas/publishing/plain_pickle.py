"""Read a pickle of plain numpy arrays without running what it says."""

from __future__ import annotations

import pickle
import pickletools
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from storage_schemas.errors import StoreError


class BadRelease(StoreError, ValueError):
    """A file that is no `influence_train.pkl`, arguments that do not fit it, or a run that the layout cannot hold."""


def unpickle(path: Path, file: BinaryIO) -> object:
    """Read a pickle of dicts, text, numbers and arrays, which become `PlainArray`.

    Raises:
        BadRelease: the file is no whole pickle, or names anything else.
    """
    if file.read(4) == b"PK\x03\x04":
        raise BadRelease(f"{path} is a zip archive, as torch.save writes: pickle numpy arrays instead")
    try:
        file.seek(0)
        _check_memo(file)
        file.seek(0)
        return _ArraysOnly(file).load()
    except BadRelease as error:
        raise BadRelease(f"{path} {error}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any, says the documentation of pickle
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadRelease(f"{path} is no whole pickle ({reason}): fetch or write it again") from None


def _check_memo(file: BinaryIO) -> None:
    """Refuse memo numbers that no pickler writes: memory is allocated for them before they are looked at."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if "PUT" in opcode.name and (argument or 0) > count:
            raise BadRelease(
                f"gives the number {argument} to one of its first {count} objects, as no pickler does: it is refused"
            )


class _Dtype:
    """Stands for `numpy.dtype` while a file is read: integers and floats."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[iu][1248]|f[248]", name):
            raise BadRelease(f"has an array of dtype {name!r:.40}, which is refused: only numbers are read")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # (version, byte order, ...); the rest is for other kinds


class PlainArray:
    """Stands for `numpy.ndarray` while a file is read.

    It and its subclasses have a `__setstate__`, so that the file's opcodes cannot change the classes themselves.
    """

    values: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        self._fill(content, kind, shape, "F" if fortran else "C")

    def _fill(self, content: Any, kind: _Dtype, shape: Any, order: Any) -> None:
        self.values = np.frombuffer(content, kind.dtype).reshape(shape, order=order)


class _Reconstructed(PlainArray):
    """Stands for `_reconstruct`, which makes an empty array; its state comes next."""

    def __init__(self, kind: type[PlainArray], shape: tuple[int, ...], code: bytes) -> None:
        pass


class _FromBuffer(PlainArray):
    """Stands for `_frombuffer`, by which pickle protocol 5 makes an array."""

    def __init__(self, content: Any, kind: _Dtype, shape: Any, order: Any) -> None:
        self._fill(content, kind, shape, order)


class _Scalar(PlainArray):
    """Stands for `scalar`: one number."""

    def __init__(self, kind: _Dtype, content: bytes) -> None:
        self._fill(content, kind, (), "C")


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): PlainArray,
    # numpy 1.x and 2.x
    ("numpy.core.multiarray", "_reconstruct"): _Reconstructed,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstructed,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
}


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays of numbers, dicts, text and numbers; everything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise BadRelease(
                f"names {f'{module}.{name}'!r:.80}, which is refused: write it anew, with numpy arrays and text only, "
                "in pickle protocol 4"
            )
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise BadRelease(f"refers to an object outside of it ({pid!r:.80}), which is refused: pickle arrays only")
