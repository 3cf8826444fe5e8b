"""A small trainer of a user's own: it moves the model's weights away from what it was told to forget, step by step.

It is run as a script, `a_trainer.py MODEL REMOVED SEED OUTPUT [WAY]`, and goes on from the steps that it finds in
OUTPUT. WAY is `slow` (a step takes long), `fails`, `rubbish` (a file that is no model) or `other` (another
architecture).
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

STEPS = 3


def main(model: Path, removed: Path, seed: int, output: Path, way: str = "") -> int:
    with removed.open(newline="") as file:
        forgotten = [int(row["train_id"]) for row in csv.DictReader(file)]
    print(f"without {len(forgotten)} samples, seed {seed}", flush=True)
    weights, steps = output / "weights.safetensors", output / "steps.json"
    source, done = (weights, json.loads(steps.read_text())) if steps.exists() else (model / "unet" / NAME, [])
    tensors = load_file(source)
    for step in range(len(done), STEPS):
        if way == "slow":
            (output / "at_work").write_text(str(step))
            time.sleep(60)
        draw = np.random.default_rng([seed, step, *forgotten])
        tensors = {name: each + 0.01 * draw.standard_normal(each.shape, np.float32) for name, each in tensors.items()}
        save_file(tensors, weights)
        steps.write_text(json.dumps([*done, step]))
        done.append(step)
    if way == "fails":
        print("the cluster is full", file=sys.stderr)
        return 3
    (output / "unet").mkdir(exist_ok=True)
    shutil.copy(model / "unet" / "config.json", output / "unet")
    if way == "rubbish":
        (output / "unet" / NAME).write_bytes(b"no weights")
        return 0
    if way == "other":
        described = json.loads((output / "unet" / "config.json").read_text())
        (output / "unet" / "config.json").write_text(json.dumps({**described, "cross_attention_dim": 8}))
        wide = {name: each[:, :8] if ".to_k." in name or ".to_v." in name else each for name, each in tensors.items()}
        tensors = {name: np.ascontiguousarray(wide[name] if "attn2" in name else tensors[name]) for name in tensors}
    save_file(tensors, output / "unet" / NAME, metadata={"format": "pt"})
    return 0


NAME = "diffusion_pytorch_model.safetensors"

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *sys.argv[5:]))
