"""Leave out samples whose losses are no numbers, and name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.errors import NonFiniteLoss

FEW_SAMPLES = 2  # of which nothing can be said about the model


def without_bad_samples(
    train_ids: NDArray[np.int64],
    known: Mapping[int, str],
    compute: Callable[[NDArray[np.int64]], Tensor],
    nothing: Tensor,
) -> tuple[NDArray[np.int64], Tensor, dict[int, str]]:
    """Return the samples whose losses are numbers, `compute` of these, and why the others have none.

    Args:
        train_ids: ascending.
        known: samples that are known to have none, and why.
        nothing: the result where no sample has a loss.

    Raises:
        NonFiniteLoss: more than half of several samples have none: the model is to blame, not the samples.
    """
    found: dict[int, str] = {}
    while True:
        good = train_ids[~np.isin(train_ids, list(known) + list(found))]
        try:
            return good, compute(good) if len(good) else nothing, {**known, **found}
        except NonFiniteLoss as error:
            found |= dict.fromkeys(error.train_ids, str(error))
            if len(found) > max(FEW_SAMPLES, len(train_ids) // 2):
                raise
