"""The layout of a part of latents, and its rows read by byte range.

A part is a safetensors file: `train_ids` (n,), `latents` (n, f, c, h, w), the captions of all its samples one after the
other as JSON lists in UTF-8, `captions` (bytes,), and where each list ends, `captions_end` (n,). Parts of earlier
releases have the captions' embeddings in their place, a row each, `condition/NAME`, and how many rows each sample has,
`captions_of` (n,).
"""

from __future__ import annotations

import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from storage_schemas.files import AnyPath
from storage_schemas.tensor_rows import Span, StoredTensor, TensorHead, read_heads, read_spans
from storage_schemas.workspace import part

LATENT_PART_SAMPLES = 512
_CONDITION = "condition/"  # of an earlier release
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_HEADS_KEPT = 16_384  # 70 MB


def part_tensors(latents: Tensor, train_ids: list[int], captions: Sequence[list[str]]) -> dict[str, Tensor]:
    """Return what a part holds of its samples, whose latents are (n, f, c, h, w), as safetensors takes it."""
    lists = [json.dumps(several, ensure_ascii=False).encode() for several in captions]
    return {
        "train_ids": torch.tensor(train_ids),
        "captions_end": torch.cumsum(torch.tensor([len(each) for each in lists]), 0),
        "latents": latents.contiguous(),
        "captions": torch.frombuffer(bytearray(b"".join(lists)), dtype=torch.uint8),
    }


@dataclass(frozen=True)
class LatentRows:
    """Some samples of one part, on the CPU.

    train_ids: (n,). latents: (n, f, c, h, w) float32.
    captions: of each sample; None in parts of an earlier release.
    condition: of the captions of all samples, one after the other, in such parts; else empty.
    captions_of: (n,) how many each has.
    """

    train_ids: Tensor
    latents: Tensor
    captions: list[list[str]] | None
    condition: dict[str, Tensor]
    captions_of: Tensor

    def with_captions(self, most: int) -> LatentRows:
        """Return the same samples with so many captions of each at most, the first ones."""
        numbers = torch.cat([torch.arange(count) for count in self.captions_of.tolist()])
        captions = None if self.captions is None else [own[:most] for own in self.captions]
        condition = {name: tensor[numbers < most] for name, tensor in self.condition.items()}
        return replace(self, captions=captions, condition=condition, captions_of=self.captions_of.clamp(max=most))


def read_latent_rows(folder: AnyPath, train_ids: Iterable[int]) -> list[LatentRows]:
    """Read some samples' latents and captions, part by part; those of a part in the order given."""
    by_part: dict[int, list[int]] = {}
    for train_id in train_ids:
        by_part.setdefault(train_id // LATENT_PART_SAMPLES, []).append(train_id % LATENT_PART_SAMPLES)
    heads = _heads([part(folder, number, "safetensors") for number in by_part])
    spans = [span for head, rows in zip(heads, by_part.values(), strict=True) for span in head.spans(rows)]
    contents = iter(read_spans(spans))
    return [
        head.loaded(number * LATENT_PART_SAMPLES, rows, contents)
        for head, (number, rows) in zip(heads, by_part.items(), strict=True)
    ]


@dataclass(frozen=True)
class _Head:
    """Where a part has the rows of its samples.

    by_caption: tensors whose rows belong to captions, by name; those of sample i end at ends[i].
    """

    latents: StoredTensor
    by_caption: Mapping[str, StoredTensor]
    ends: array[int]

    @property
    def earlier(self) -> bool:
        """Whether it is a part of an earlier release."""
        return "captions" not in self.by_caption

    def _stretch(self, row: int) -> tuple[int, int]:
        return self.ends[row - 1] if row else 0, self.ends[row]

    def spans(self, rows: list[int]) -> Iterator[Span]:
        yield from (self.latents.rows(row, row + 1) for row in rows)
        for tensor in self.by_caption.values():
            yield from (tensor.rows(*self._stretch(row)) for row in rows)

    def loaded(self, first: int, rows: list[int], contents: Iterator[memoryview]) -> LatentRows:
        """Return some samples from the next contents, which are those of `spans(rows)`."""
        latents = _tensor(self.latents, [next(contents) for _ in rows])
        lengths = [last - start for start, last in map(self._stretch, rows)]
        found = {name: [next(contents) for _ in rows] for name in self.by_caption}
        captions, condition = None, dict[str, Tensor]()
        if self.earlier:
            condition = {name: _tensor(self.by_caption[name], several) for name, several in found.items()}
        else:
            captions = [json.loads(bytes(each)) for each in found["captions"]]
            lengths = [len(several) for several in captions]
        ids = torch.tensor([first + row for row in rows])
        return LatentRows(ids, latents.float(), captions, condition, torch.tensor(lengths))


def _tensor(stored: StoredTensor, rows: Sequence[memoryview]) -> Tensor:
    flat = torch.frombuffer(bytearray(b"".join(rows)), dtype=_TYPES[stored.dtype])
    return flat.view(-1, *stored.shape[1:])


# What a part's head says follows from the part's key, and stays the same where the part is made again: its samples,
# their captions and the model's latent shape are in the key. Only an earlier release's part may be made again in this
# one's layout, so that the heads of such parts are not kept.
_kept: OrderedDict[str, _Head] = OrderedDict()
_lock = threading.Lock()


def _heads(paths: list[AnyPath]) -> list[_Head]:
    """Return the heads of some parts, of which the last ones asked for stay in memory."""
    with _lock:
        known = {str(path): _kept[str(path)] for path in paths if str(path) in _kept}
    missing = [path for path in paths if str(path) not in known]
    for path, told in zip(missing, read_heads(missing) if missing else [], strict=True):
        known[str(path)] = _head(told)
    with _lock:
        for name, head in known.items():
            if not head.earlier:
                _kept[name] = head
                _kept.move_to_end(name)
        while len(_kept) > _HEADS_KEPT:
            _kept.popitem(last=False)
    return [known[str(path)] for path in paths]


def _head(told: TensorHead) -> _Head:
    tensors = told.tensors
    earlier = {name.removeprefix(_CONDITION): each for name, each in tensors.items() if name.startswith(_CONDITION)}
    numbers = array("q", bytes(told.read("captions_of" if earlier else "captions_end")))
    if earlier:
        return _Head(tensors["latents"], earlier, array("q", accumulate(numbers)))
    return _Head(tensors["latents"], {"captions": tensors["captions"]}, numbers)
