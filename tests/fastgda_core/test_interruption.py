from __future__ import annotations

import threading

import pytest

from fastgda_core import interruption
from fastgda_core.errors import Stopped


def test_work_in_every_thread_ends_at_its_next_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_stop", threading.Event())
    ended, going = [], threading.Barrier(3)

    def work() -> None:
        interruption.checkpoint()
        going.wait()
        try:
            while True:
                interruption.checkpoint()
        except Stopped:
            ended.append(True)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    going.wait()
    interruption.stop_here()
    for thread in threads:
        thread.join(10)
    assert len(ended) == 2
