"""How often a key may ask: a token bucket for each."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

REMEMBERED = 10_000  # keys or addresses


class Buckets:
    """Buckets of `burst` tokens that fill up by `rate` a second; None: no bound. One thread uses them."""

    def __init__(self, rate: float | None, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self._burst, self._clock = rate, burst, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def take(self, name: str, tokens: float = 1.0) -> int:
        """Take tokens; return 0, or the whole seconds after which they would be there."""
        if self.rate is None:
            return 0
        now = self._clock()
        left, at = self._left.pop(name, (float(self._burst), now))
        left = min(float(self._burst), left + (now - at) * self.rate)
        enough = left >= min(tokens, self._burst)  # a request that takes more than a full bucket empties it
        self._left[name] = (left - tokens if enough else left, now)
        while len(self._left) > REMEMBERED:
            self._left.popitem(last=False)
        return 0 if enough else max(1, math.ceil((min(tokens, self._burst) - left) / self.rate))
