"""Kinds of index by FAISS's factory strings, and which of them suits rows, memory and latency.

Sizes and speeds are those of FAISS 1.15 on one core: a scan reads 10 GB a second, and what an approximate kind looks at
in a query takes a few milliseconds. `benchmarks/search.py` measures them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FLAT_ROWS = 20_000  # up to which vectors are kept as they are: a scan of more is twice as fast in half precision
EXACT_ROWS = 200_000  # up to which every vector is looked at
GRAPH_ROWS = 10_000_000  # up to which vectors stay whole, or half as long, in memory
SCANNED_A_SECOND = 10e9  # bytes
LINKS = 32  # of a vector in a graph; twice as many on the lowest floor
BITS = (8, 7, 6, 5, 4)  # of a number by RaBitQ: with fewer, answers have to be refined

_CODES = r"(Flat|SQ(4|6|8|fp16|bf16)|PQ\d+(x\d+)?(fs)?|RaBitQ(fs)?[1-9]?)"
_KIND = re.compile(
    rf"(Flat|SQ(4|6|8|fp16|bf16)|HNSW\d*,(Flat|SQ(4|6|8|fp16|bf16))|((OPQ\d+(_\d+)?|RR\d+),)?IVF\d+(_HNSW\d*)?,{_CODES})"
    r"(,Refine\((Flat|SQ(4|6|8|fp16|bf16))\))?"
)


def is_kind(text: str) -> bool:
    """Return whether a factory string is of a kind that this package builds, searches and filters."""
    return _KIND.fullmatch(text) is not None


@dataclass(frozen=True)
class Choice:
    """A kind of index, and why it is this one."""

    kind: str
    reason: str


def choose_kind(
    rows: int, width: int, *, half: bool = False, memory: float | None = None, latency: float | None = None
) -> Choice:
    """Choose the most accurate kind of index within the budgets.

    Args:
        rows: vectors of the index.
        width: numbers of a vector.
        half: half precision is enough for the vectors, whatever there is room for.
        memory: bytes that the index may take; None: any number.
        latency: milliseconds of one core that a query may take; None: as few as the rows allow.
    """
    for kind, why in _candidates(rows, width, half=half):
        size, takes = rows * bytes_each(kind, width, rows), scan_milliseconds(kind, rows, width)
        if memory is not None and size > memory:
            continue
        if latency is not None and takes > latency:
            continue
        said = [f"{rows:,} vectors of {width}: {why}; {_bytes(size)}"]
        if memory is not None:
            said.append(f"within {_bytes(memory)}")
        if latency is not None and takes:
            said.append(f"a scan of about {takes:.1f} ms is within {latency:g} ms")
        return Choice(kind, ", ".join(said))
    kind = f"{_lists(rows)},PQ{_pieces(width)}"
    size = rows * bytes_each(kind, width, rows)
    beyond = "" if memory is None or size <= memory else f"; beyond {_bytes(memory)}, so the rest stays on disk"
    return Choice(
        kind, f"{rows:,} vectors of {width}: nothing larger fits, a byte for {width // _pieces(width)} numbers{beyond}"
    )


def _candidates(rows: int, width: int, *, half: bool) -> list[tuple[str, str]]:
    """Return kinds and what speaks for each, the most accurate first."""
    whole = [] if half or rows > FLAT_ROWS else [("Flat", "every vector is looked at")]
    exact = [*whole, ("SQfp16", "every vector is looked at, in half precision")]
    lists = _lists(rows)
    # RaBitQ takes numbers of a vector for alike in size, which a random rotation makes them.
    bits = {bits: f"RR{width},{lists},RaBitQ{bits}" for bits in BITS}
    large = [(f"{bits[4]},Refine(SQfp16)", "4 bits a number, the best looked at again in half precision")]
    short = [(kind, f"{each} bits a number") for each, kind in bits.items()]
    # Lists first: they are trained in minutes where a graph takes hours, and can be made in parts.
    small = [(f"{lists},Flat", "lists of vectors"), (f"HNSW{LINKS},SQfp16", "a graph over vectors in half precision")]
    if rows <= EXACT_ROWS:
        return [*exact, *small, *short]
    return [*small, *short] if rows <= GRAPH_ROWS else [*large, *short]


def bytes_each(kind: str, width: int, rows: int) -> float:
    """Return the bytes that an index of so many rows takes for one vector: code, id, links, its share of centroids."""
    body, _, refined = kind.partition(",Refine(")
    total = _code_bytes(refined.rstrip(")"), width) if refined else 0.0
    first, _, code = body.rpartition(",")
    total += _code_bytes(code, width)
    if graph := re.match(r"HNSW(\d*)", first):
        total += 4 * 2 * int(graph[1] or LINKS) + 8
    if lists := re.search(r"IVF(\d+)", first):
        total += 8 + int(lists[1]) * 4 * width / max(1, rows)
    return total


def scan_milliseconds(kind: str, rows: int, width: int) -> float:
    """Return about how long one core takes to look at every vector of an exact kind; 0 of the others."""
    return 0.0 if "," in kind else 1e3 * rows * _code_bytes(kind, width) / SCANNED_A_SECOND


def _code_bytes(code: str, width: int) -> float:
    if code == "Flat":
        return 4.0 * width
    if code.startswith("SQ"):
        bits = {"SQfp16": 16, "SQbf16": 16}.get(code) or int(code[2:])
        return width * bits / 8
    if code.startswith("RaBitQ"):
        bits = int(code[-1]) if code[-1].isdecimal() else 1
        return width * bits / 8 + (8 if bits == 1 else 20)
    pieces, _, bits_text = code.removeprefix("PQ").removesuffix("fs").partition("x")
    return int(pieces) * int(bits_text or 8) / 8


def _lists(rows: int) -> str:
    """Return the coarse part of an IVF kind: about 6 sqrt(rows) lists, whose centroids make a graph where many.

    Of the most rows half as many: to cluster these would take longer than to add all vectors.
    """
    lists, most = 1, (8 if rows <= GRAPH_ROWS else 4) * rows**0.5
    while lists * 2 <= most:
        lists *= 2
    return f"IVF{lists}" if lists < 2**14 else f"IVF{lists}_HNSW{LINKS}"


def _pieces(width: int) -> int:
    """Return into how many pieces PQ cuts a vector: an eighth of its width, or the next number that divides it."""
    return next(pieces for pieces in range(max(1, width // 8), 0, -1) if width % pieces == 0)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
