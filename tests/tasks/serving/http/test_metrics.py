"""Figures of several worker processes, which are added up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tasks.serving.http.metrics import SHARED

WORKER = """
import os
from tasks.serving.http.metrics import ServiceMetrics
metrics = ServiceMetrics()
metrics.ready.set(1)
metrics.swaps.labels("served").inc()
print(metrics.exposition().decode(), flush=True)
os._exit(0)  # as if it were killed: nothing is put in order
"""


def test_a_worker_that_died_is_not_counted_beside_its_successor(tmp_path: Path) -> None:
    environment = {**os.environ, SHARED: str(tmp_path)}
    for number in (1, 2):
        told = subprocess.run(
            [sys.executable, "-c", WORKER], env=environment, check=True, capture_output=True, text=True
        )
        lines = told.stdout.splitlines()
        assert "fastgda_serve_ready 1.0" in lines, told.stderr
        assert f'fastgda_serve_swaps_total{{result="served"}} {number}.0' in lines
