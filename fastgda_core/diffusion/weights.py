"""Check that the weights of a model folder can be read, by names, sizes and headers alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fastgda_core.diffusion.folder import DENOISERS, TEXT_ENCODERS, read_index
from fastgda_core.errors import UsageError


def check_weights(folder: Path) -> None:
    """Check the weight files of every part of a model folder; gigabytes stay unread.

    Raises:
        UsageError: a file is missing, damaged, or a pickle.
    """
    pickled: dict[Path, list[Path]] = {}
    for part in read_index(folder).parts:
        config = folder / part / "config.json"
        if part not in (*DENOISERS, "vae", *TEXT_ENCODERS) or not config.is_file() or _without_weights(config):
            continue
        stem = "model" if part in TEXT_ENCODERS else "diffusion_pytorch_model"
        safe = folder / part / f"{stem}.safetensors"
        if found := weight_files(safe):
            for path in found:
                check_header(path)
        elif found := weight_files(safe.with_name("pytorch_model.bin" if stem == "model" else f"{stem}.bin")):
            pickled[safe] = found
        else:
            there = sorted(path.name for path in safe.parent.iterdir() if path.suffix == safe.suffix)
            renamed = f"; it has {', '.join(there)}, which may be renamed" if there else ""
            raise UsageError(f"{safe.parent} lacks {safe.name}{renamed}: save the model with save_pretrained()")
    if pickled:
        names = ", ".join(str(files[0].relative_to(folder)) for files in pickled.values())
        raise UsageError(
            f"model.folder {folder} has its weights in pickles ({names}), which are never opened here, as they may "
            f"hold any program: on a machine where you trust them, run\n{_conversion(pickled)}"
        )


def _without_weights(config: Path) -> bool:
    try:
        return json.loads(config.read_text()).get("_class_name") == "PixelUnshuffle"
    except (ValueError, AttributeError):
        return False  # the part's loader says what is wrong with it


def weight_files(path: Path) -> list[Path]:
    """Return the file of a part's weights, or the files that its index names; an empty list where neither is there."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return [path] if path.is_file() else []
    try:
        files = [path.with_name(name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"{index} is no index of weights: save the model again ({error})") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise UsageError(f"{path.parent} lacks {', '.join(missing)}, which its index names: copy the model again")
    return files


def _conversion(pickled: dict[Path, list[Path]]) -> str:
    """Return a shell command that writes safetensors beside the pickles."""
    files = [([str(path) for path in old], str(new)) for new, old in pickled.items()]
    tensors = "{k: v.clone() for p in old for k, v in torch.load(p, map_location='cpu', weights_only=True).items()}"
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"[save_file({tensors}, new, {{'format': 'pt'}}) for old, new in {files}]"
    )
    return f"python -c {shlex.quote(code)}"


def check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="np"):  # it compares the header with the file's size
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error}): copy the model again") from error
