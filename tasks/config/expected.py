"""The section of what `fastgda plan` counts with before model and tars are there. No run reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.config.section import Section


class ExpectedConfig(Section):
    samples: int = Field(ge=1, description="training samples that the tars will hold")
    captions: float = Field(default=1.0, ge=1, description="of one sample, on average")
    image_bytes: int = Field(default=100_000, ge=1, description="of one image in the tars")
    denoiser: Literal["fastgda_coco", "sd14", "sdxl", "sd3", "flux"] = Field(
        description="whose forward, counted by benchmarks/forward_flops.py, stands for the model's"
    )
