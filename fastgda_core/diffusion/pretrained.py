"""Load one frozen part of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgda_core.errors import UsageError


def load_frozen(kind: Any, folder: Path, device: torch.device, **options: Any) -> Any:
    """Load a diffusers or transformers module, frozen and in eval mode; nothing is fetched and no pickle is read.

    Args:
        kind: the module's class.
        folder: what the module's `save_pretrained` wrote.
        device: where to put the module.
        options: for `from_pretrained`; diffusers calls the precision `torch_dtype`, transformers `dtype`.

    Raises:
        UsageError: a weight is missing from the file, so that `from_pretrained` would draw it at random.
    """
    module, info = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )
    if missing := sorted(info["missing_keys"]):
        raise UsageError(f"{folder} lacks the weights {', '.join(missing[:5])}: save the model again")
    return module.to(device).eval().requires_grad_(False)
