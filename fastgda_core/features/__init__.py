"""Frozen feature encoders."""

from fastgda_core.features.encoders import ENCODERS, Encoder, concatenate, cosines, encoder_names, load_encoder

__all__ = ["ENCODERS", "Encoder", "concatenate", "cosines", "encoder_names", "load_encoder"]
