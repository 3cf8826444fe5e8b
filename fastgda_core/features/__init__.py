"""Frozen feature encoders."""

from fastgda_core.features.encoders import ENCODERS, Encoder, concatenate, encoder_names, load_encoder

__all__ = ["ENCODERS", "Encoder", "concatenate", "encoder_names", "load_encoder"]
