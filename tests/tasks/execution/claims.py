"""What a spawned process runs: it imports this module alone, not that of the test with all that it uses."""

from __future__ import annotations

import multiprocessing
import threading

from fastgda_core.errors import UsageError
from tasks.devices import claim_slot


def claim(count: int, claimed: multiprocessing.Queue[object], leave: threading.Event) -> None:
    try:
        claimed.put(claim_slot("test", count))
    except UsageError as error:
        claimed.put(str(error))
    leave.wait(30)
