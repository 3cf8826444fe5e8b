"""Frozen feature encoders."""

from fastgda_core.feature_spaces import encoder_names
from fastgda_core.features.encoder import Encoder
from fastgda_core.features.encoders import (
    ENCODERS,
    concatenate,
    cosines,
    image_space,
    load_encoder,
    mean_over,
    text_space,
)

__all__ = [
    "ENCODERS",
    "Encoder",
    "concatenate",
    "cosines",
    "encoder_names",
    "image_space",
    "load_encoder",
    "mean_over",
    "text_space",
]
