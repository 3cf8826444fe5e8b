"""Captions as the denoiser is conditioned on them: encoded where they are used, the last ones kept in memory."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastgda_core.diffusion.loss import Condition
from fastgda_core.interruption import checkpoint
from tasks.context import Context

CAPTIONS_AT_A_TIME = 128
Encode = Callable[[list[str]], Mapping[str, Tensor]]


def encoded_captions(context: Context, captions: Sequence[str]) -> Condition:
    """Return the condition of each caption, one row each, on the context's device.

    A process keeps what it encoded, up to `model.captions_gb`, for the next block.
    """
    cache = _cache(context.model_hash, context.device)
    cache.most_bytes = int(context.config.model.captions_gb * 1e9)
    return cache.conditions(captions, context.model().encode_captions, context.device)


class CaptionCache:
    """Conditions by caption on the CPU, the least recently used of which go first; safe in threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._rows: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def conditions(self, captions: Sequence[str], encode: Encode, device: torch.device) -> dict[str, Tensor]:
        """Return the condition of each caption, (m, ...) each, on a device.

        Args:
            captions: m of them, at least one; the same may come again.
            encode: returns the conditions of distinct captions, so many as `CAPTIONS_AT_A_TIME`, on the device.
            device: of the result.
        """
        places: dict[str, list[int]] = {}
        for place, caption in enumerate(captions):
            places.setdefault(caption, []).append(place)
        whole: dict[str, Tensor] = {}
        known = self._known(places)
        for group in _groups([*known, *(caption for caption in places if caption not in known)], len(known)):
            checkpoint()
            if group[0] in known:
                rows: Mapping[str, Tensor] = _stacked([known[caption] for caption in group], device)
            else:
                rows = encode(group)
                self._keep(group, rows)
            if not whole:
                whole = {
                    name: torch.empty(len(captions), *tensor.shape[1:], dtype=tensor.dtype, device=device)
                    for name, tensor in rows.items()
                }
            row = [number for number, caption in enumerate(group) for _ in places[caption]]
            wanted = [place for caption in group for place in places[caption]]
            for name, tensor in rows.items():
                whole[name][torch.tensor(wanted, device=device)] = tensor[torch.tensor(row, device=device)]
        return whole

    def _known(self, captions: Mapping[str, object]) -> dict[str, dict[str, Tensor]]:
        with self._lock:
            found = {caption: self._rows[caption] for caption in captions if caption in self._rows}
            for caption in found:
                self._rows.move_to_end(caption)
            return found

    def _keep(self, captions: Sequence[str], rows: Mapping[str, Tensor]) -> None:
        on_cpu = {name: tensor.cpu() for name, tensor in rows.items()}
        with self._lock:
            for number, caption in enumerate(captions):
                if caption not in self._rows:
                    # A copy, as a view would keep the whole batch in memory.
                    self._rows[caption] = {name: tensor[number].clone() for name, tensor in on_cpu.items()}
                    self.bytes += _bytes_of(self._rows[caption])
                self._rows.move_to_end(caption)
            while self.bytes > self.most_bytes:
                _, old = self._rows.popitem(last=False)
                self.bytes -= _bytes_of(old)


@functools.lru_cache(maxsize=1)  # as the model
def _cache(_model_hash: str, _device: torch.device) -> CaptionCache:
    return CaptionCache(0)


def _groups(captions: Sequence[str], known: int) -> Iterator[list[str]]:
    """Yield so many as are encoded at a time of the captions that are known, which come first, and of the others."""
    for some in (captions[:known], captions[known:]):
        for start in range(0, len(some), CAPTIONS_AT_A_TIME):
            yield list(some[start : start + CAPTIONS_AT_A_TIME])


def _stacked(rows: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}


def _bytes_of(row: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in row.values())
