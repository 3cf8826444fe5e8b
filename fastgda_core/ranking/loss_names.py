"""The names of the rank head's losses, in a module of their own so that a configuration checks them without torch."""

from typing import Literal

LossName = Literal["bce", "mse", "ordinal", "regression", "listwise"]
