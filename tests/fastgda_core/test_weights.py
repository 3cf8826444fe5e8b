from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgda_core.diffusion.codec import PixelUnshuffle
from fastgda_core.diffusion.model import load_model
from fastgda_core.diffusion.weights import check_weights
from fastgda_core.errors import UsageError
from tests.tiny import WEIGHTS


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "my model"))


def pickle(safe: Path) -> None:
    """In place of a safetensors file, what older versions of the libraries wrote: two shards and their index."""
    stem = "pytorch_model" if safe.stem == "model" else safe.stem
    tensors = load_file(safe)
    shards = [dict(list(tensors.items())[half::2]) for half in (0, 1)]
    for number, shard in enumerate(shards):
        torch.save(shard, safe.with_name(f"{stem}-{number}.bin"))
    names = {name: f"{stem}-{number}.bin" for number, shard in enumerate(shards) for name in shard}
    safe.with_name(f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": names}))
    safe.unlink()


def test_whole_weights_pass(folder: Path) -> None:
    check_weights(folder)
    shutil.rmtree(folder / "vae")
    PixelUnshuffle(2).save(folder / "vae")
    check_weights(folder)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_missing_and_damaged_weights_are_named(folder: Path, weights: str) -> None:
    path = folder / weights
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"{path} is damaged"):
            check_weights(folder)
    path.rename(path.with_name("renamed.safetensors"))
    with pytest.raises(UsageError, match=f"{path.parent} lacks {path.name}; it has renamed.safetensors"):
        check_weights(folder)
    path.with_name("renamed.safetensors").unlink()
    with pytest.raises(UsageError, match=f"{path.parent} lacks {path.name}: save"):
        check_weights(folder)


def test_every_shard_behind_an_index_is_looked_at(folder: Path) -> None:
    path = folder / WEIGHTS[0]
    index = path.with_name(path.name + ".index.json")
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    path.unlink()
    save_file({"a": torch.zeros(3)}, path.with_name("1.safetensors"))
    with pytest.raises(UsageError, match=r"lacks 2\.safetensors, which its index names"):
        check_weights(folder)
    save_file({"b": torch.zeros(3)}, path.with_name("2.safetensors"))
    check_weights(folder)
    path.with_name("2.safetensors").write_bytes(b"cut")
    with pytest.raises(UsageError, match=r"2\.safetensors is damaged"):
        check_weights(folder)


def test_the_line_that_is_told_for_pickles_writes_weights_that_pass(folder: Path) -> None:
    before = {weights: load_file(folder / weights) for weights in WEIGHTS}
    for weights in WEIGHTS:
        pickle(folder / weights)
    with pytest.raises(UsageError, match=r"text_encoder/pytorch_model-0\.bin.*which are never opened here") as error:
        check_weights(folder)
    command = shlex.split(str(error.value).splitlines()[1])
    assert command[:2] == ["python", "-c"]
    exec(command[2], {})
    check_weights(folder)
    for weights, tensors in before.items():
        torch.testing.assert_close(load_file(folder / weights), tensors, rtol=0, atol=0)
    load_model(folder, torch.device("cpu"))
