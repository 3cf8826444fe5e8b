"""The base of all sections of a configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section that is closed (an unknown field is refused), unchangeable, and without infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
