"""Rows of tensors in safetensors files, read by byte range: on disk, or in an object store.

Of a few rows here and there little more than their own bytes is read: `SLACK` bounds what lies between them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple

from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath

SLACK = 0.05  # of the bytes asked for: so many between them are read along, so that there are fewer reads
HEAD_BYTES = 5120  # a header, and behind it what a file of 512 rows has of one integer a row
_LENGTH_BYTES = 8  # at the start of a file: how long its header is
_LONGEST_HEADER = 100_000_000  # as in safetensors
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}


class Span(NamedTuple):
    """Bytes of a file, from start to before stop."""

    path: AnyPath
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def read_spans(spans: Sequence[Span]) -> list[memoryview]:
    """Return the bytes of each span, in order; any two are the same, or have no byte in common.

    Those that lie close together are read in one go, those of an object store many at a time.

    Raises:
        StoreError: a file ends before a span does.
    """
    together = _together(sorted({span for span in spans if span.size}, key=lambda each: (str(each.path), each.start)))
    stretches = [Span(group[0].path, group[0].start, group[-1].stop) for group in together]
    found: dict[Span, memoryview] = {}
    for group, stretch, content in zip(together, stretches, _read(stretches), strict=True):
        if len(content) != stretch.size:
            raise StoreError(
                f"{stretch.path} is cut short: `fastgda verify` names such files, and what they held is made again"
            )
        for span in group:
            found[span] = memoryview(content)[span.start - stretch.start : span.stop - stretch.start]
    return [found.get(span, memoryview(b"")) for span in spans]


def _together(spans: Sequence[Span]) -> list[list[Span]]:
    """Group spans, which come in order, into what is read in one go: the smallest gaps go along while slack is left."""
    gaps = {
        number: after.start - before.stop
        for number, (before, after) in enumerate(pairwise(spans), 1)
        if before.path == after.path
    }
    left, joined = SLACK * sum(span.size for span in spans), set[int]()
    for number in sorted(gaps, key=gaps.__getitem__):
        left -= gaps[number]
        if left < 0:
            break
        joined.add(number)
    groups: list[list[Span]] = []
    for number, span in enumerate(spans):
        if number in joined:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _read(spans: Sequence[Span]) -> list[bytes]:
    """Read spans as they are, those of a file one after the other."""
    contents: list[bytes] = []
    for path, several in groupby(spans, key=lambda span: span.path):
        if not isinstance(path, Path):  # and so are all others
            places = [str(span.path.path) for span in spans]  # type: ignore[union-attr]
            starts, stops = [span.start for span in spans], [span.stop for span in spans]
            return list(path.fs.cat_ranges(places, starts, stops, on_error="raise"))
        handle = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):  # else the system reads ahead of what is asked for
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            contents += [_read_at(handle, span) for span in several]
        finally:
            os.close(handle)
    return contents


def _read_at(handle: int, span: Span) -> bytes:
    pieces, place = list[bytes](), span.start
    while place < span.stop and (piece := os.pread(handle, span.stop - place, place)):  # 2 GiB at most at a time
        pieces.append(piece)
        place += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: type as safetensors names it, and where its bytes are."""

    path: AnyPath
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype] * prod(self.shape[1:])

    def rows(self, first: int, last: int) -> Span:
        """Return where some consecutive rows are."""
        return Span(self.path, self.start + first * self.row_bytes, self.start + last * self.row_bytes)


@dataclass(frozen=True)
class TensorHead:
    """What the header of a safetensors file tells.

    tensors: by name. beginning: the file's first bytes, at most `HEAD_BYTES`.
    """

    path: AnyPath
    tensors: Mapping[str, StoredTensor]
    beginning: memoryview

    def read(self, name: str) -> memoryview:
        """Return a whole tensor's bytes, without another read where the file begins with it."""
        tensor = self.tensors[name]
        span = tensor.rows(0, tensor.shape[0])
        if span.stop <= len(self.beginning):
            return self.beginning[span.start : span.stop]
        return read_spans([span])[0]


def read_heads(paths: Sequence[AnyPath]) -> list[TensorHead]:
    """Read the headers of safetensors files, those of an object store many at a time.

    Raises:
        StoreError: a file is none, or is cut short.
    """
    beginnings = _read([Span(path, 0, HEAD_BYTES) for path in paths])
    return [_head(path, beginning) for path, beginning in zip(paths, beginnings, strict=True)]


def _head(path: AnyPath, beginning: bytes) -> TensorHead:
    data = _LENGTH_BYTES + int.from_bytes(beginning[:_LENGTH_BYTES], "little")
    try:
        header = beginning[_LENGTH_BYTES:data]
        if data > len(beginning):
            header = bytes(read_spans([Span(path, _LENGTH_BYTES, data)])[0]) if data < _LONGEST_HEADER else b""
        told = json.loads(header)
        tensors = {
            name: StoredTensor(path, each["dtype"], tuple(each["shape"]), data + each["data_offsets"][0])
            for name, each in told.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StoreError(
            f"{path} is no safetensors file: `fastgda verify` names damaged files, and what they held is made again"
        ) from None
    return TensorHead(path, tensors, memoryview(beginning))
