"""Frozen feature encoders."""

from fastgda_core.features.encoders import Encoder, concatenate, encoder_names, load_encoder

__all__ = ["Encoder", "concatenate", "encoder_names", "load_encoder"]
