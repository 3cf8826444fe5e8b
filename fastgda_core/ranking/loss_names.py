"""The names of the rank head's losses; apart from them, as a configuration checks them without torch."""

from typing import Literal

LossName = Literal["bce", "mse", "ordinal", "regression", "listwise"]
