"""The release's EK-FAC factors, `ekfac_fisher/*.safetensors`, as this project's Fisher.

Its `lambda_matrix` holds sums over `num_lambda_processed` gradients. The release scales them by N^2 / count and steps
by 0.01; here eigenvalues are means, lambda / count, and the same step is alpha = 0.01 / N in (alpha / N) F^-1 grad L.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastgda_core.curvature.fisher import EkfacFisher, LayerFactors
from fastgda_core.curvature.layers import SELECTIONS, matrix_shape, select_layers
from fastgda_core.errors import UsageError
from tasks.importing.layout import FISHER_FILES

LEARNING_RATE = 0.01  # of the release's step


@dataclass(frozen=True)
class ReleaseFisher:
    """The factors, the selection of layers that they are of, and how many gradients stand behind the eigenvalues."""

    fisher: EkfacFisher
    layers: str
    count: int


def read_fisher(folder: Path, unet: Any) -> ReleaseFisher:
    """Read the four files for the layers of a network.

    Raises:
        UsageError: a file is missing or damaged, or the factors are not those of one of this network's selections.
    """
    with ExitStack() as stack:
        vectors_in, vectors_out, sums, counts = (_open(stack, folder / f"{name}.safetensors") for name in FISHER_FILES)
        names = set(sums.keys())
        selection, layers = _selection(folder, unet, names)
        found, behind = {}, set()
        for name, layer in layers.items():
            try:
                factors = vectors_in.get_tensor(name), vectors_out.get_tensor(name), sums.get_tensor(name)
                count = int(counts.get_tensor(name).item())
            except (SafetensorError, RuntimeError) as error:
                told = " ".join(str(error).split())
                raise UsageError(f"{folder} has not all four factors of {name} ({told}): fetch it again") from error
            d_out, d_in = matrix_shape(layer)
            shapes = [tuple(factor.shape) for factor in factors]
            if shapes != [(d_in, d_in), (d_out, d_out), (d_out, d_in)]:
                raise UsageError(f"{folder}: {name} has factors of shapes {shapes}, its layer is {(d_out, d_in)}")
            if count < 1 or not all(bool(factor.isfinite().all()) for factor in factors):
                raise UsageError(f"{folder}: the factors of {name} are not finite, or of no gradient: fetch them again")
            behind.add(count)
            found[name] = LayerFactors(factors[0].float(), factors[1].float(), (factors[2].double() / count).float())
    return ReleaseFisher(EkfacFisher(found), selection, min(behind))


def _open(stack: ExitStack, path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} is missing: fetch the folder ekfac_fisher")
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error}): fetch it again") from error


def _selection(folder: Path, unet: Any, names: set[str]) -> tuple[str, dict[str, Any]]:
    """Return the value of `teacher.layers` whose layers these are, with the layers."""
    for selection in SELECTIONS:
        try:
            layers = select_layers(unet, selection)
        except UsageError:  # the network has none
            continue
        if layers.keys() == names:
            return selection, layers
    raise UsageError(
        f"{folder} has factors of {len(names)} layers, as {min(names, default='none')}, which are not those of one of "
        f"{', '.join(SELECTIONS)} in model.bin: move the folder away to import without it"
    )
