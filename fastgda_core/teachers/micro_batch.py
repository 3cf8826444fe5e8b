"""Micro-batches: as many forwards at a time as the device has memory for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from fastgda_core.errors import UsageError, out_of_memory
from fastgda_core.interruption import checkpoint

T = TypeVar("T")
log = logging.getLogger("fastgda.core.micro_batch")


class MicroBatch:
    """Rows per forward; the number is halved when the device runs out of memory, and stays so for all later calls."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.halvings = 0

    def run(self, rows: int, compute: Callable[[slice], T]) -> Iterator[tuple[slice, T]]:
        """Yield each stretch of 0..rows and its `compute`; it is called again on fewer rows where memory runs out.

        `compute` must not change anything that outlives a failure. The work can be stopped before each call.

        Raises:
            UsageError: not even one row fits.
        """
        start = 0
        while start < rows:
            checkpoint()
            stretch = slice(start, min(start + self.size, rows))
            try:
                result = compute(stretch)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                if self.size == 1:
                    raise UsageError(
                        "the device has too little memory for one forward: free some, or choose fewer teacher.layers"
                    ) from error
                self.size = max(1, min(self.size, stretch.stop - stretch.start) // 2)
                self.halvings += 1
                log.info("the device ran out of memory: from now on %d rows at a time", self.size)
            else:
                yield stretch, result
                start = stretch.stop
                continue
            # Outside the handler: the error's traceback no longer holds the tensors of the failed attempt.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
