"""Faults for worker processes: this folder on PYTHONPATH makes their device, network and data fail now and then.

Nothing in the product knows of it: after `tasks.teaching.scores` is imported, what it calls is wrapped. FAULTS names a
folder; `faults.json` in it holds probabilities of each fault per micro-batch, and train_ids: whose loss is no number
(`nan`), at whose sight the process dies (`deadly`), or the code fails (`bug`). A hang or a reset connection happens
once for each file `hang-*` or `reset-*` in the folder, which it takes away.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import random
import sys
import time
from pathlib import Path


class _AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "tasks.teaching.scores":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def then_patch(module):
            execute(module)
            _patch()

        spec.loader.exec_module = then_patch
        return spec


def _patch() -> None:
    import torch

    from fastgda_core.teachers import sample_gradients

    folder = Path(os.environ["FAULTS"])
    chance = random.Random(os.getpid())
    gradients, check = sample_gradients.output_gradients, sample_gradients.check_finite

    def settings() -> dict:
        try:
            return json.loads((folder / "faults.json").read_text())
        except FileNotFoundError:
            return {}

    def taken(pattern: str) -> bool:
        for file in folder.glob(pattern):
            try:
                file.unlink()
            except FileNotFoundError:
                continue
            return True
        return False

    def output_gradients(model, layers, clean, *rest):
        faults = settings()
        if len(clean) > 1 and chance.random() < faults.get("out_of_memory", 0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if chance.random() < faults.get("connection", 0):
            raise ConnectionResetError(104, "Connection reset by peer")
        if chance.random() < faults.get("device", 0):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if chance.random() < faults.get("slow", 0):
            time.sleep(faults.get("slow_seconds", 1.0))
        if taken("hang-*"):
            time.sleep(3600)
        if taken("reset-*"):
            raise ConnectionResetError(104, "Connection reset by peer")
        return gradients(model, layers, clean, *rest)

    def check_finite(losses, owners, timesteps):
        present = set(owners.tolist())
        if settings().get("deadly") in present:
            _die_in_company(folder)
        if (folder / "dying").exists():
            (folder / f"beside-{os.getpid()}").touch()
            time.sleep(30)
        if settings().get("bug") in present:
            raise KeyError("a bug")
        nan = torch.tensor(settings().get("nan", -1)).flatten()
        return check(losses.masked_fill(torch.isin(owners, nan), torch.nan), owners, timesteps)

    sample_gradients.output_gradients, sample_gradients.check_finite = output_gradients, check_finite


def _die_in_company(folder: Path) -> None:
    """End this process once another is in flight beside it, whose part its pool then loses too, or after a while."""
    (folder / "dying").touch()
    for _ in range(60):
        if any(Path("/proc", file.name.split("-")[1]).exists() for file in folder.glob("beside-*")):
            break
        time.sleep(0.1)
    (folder / "dying").unlink()
    os._exit(9)


if "FAULTS" in os.environ:
    sys.meta_path.insert(0, _AfterImport())
