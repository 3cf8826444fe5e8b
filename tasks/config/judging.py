"""Sections of the judges: how models are trained again, and of how many."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from tasks.config.section import Section


class RetrainConfig(Section):
    """The recipe that made the attributed model: a judge is as good as this is like it."""

    continued: bool = Field(
        default=False,
        description="go on from the model's own weights, without the removed samples; else from fresh ones",
    )
    steps: int = Field(ge=1, description="of the optimiser")
    batch_size: int = Field(default=64, ge=1, description="images a step")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW, at its highest")
    warmup_steps: int = Field(default=200, ge=1, description="in which the learning rate rises; it falls as a cosine")
    weight_decay: float = Field(default=0.01, ge=0)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1, description="share of images whose caption is left empty")
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="of the averaged weights, which are the model")

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of `DenoiserTraining`, by name, but for the seed."""
        return self.model_dump(exclude={"continued"})


METHODS = 4  # whose images are removed: teacher, untuned features, captions alone, chance


class LeaveOutConfig(Section):
    k: list[Annotated[int, Field(ge=1)]] = Field(
        default=[40], min_length=1, description="most influential samples of each target that are removed, all at once"
    )
    targets: int = Field(default=6, ge=1, description="test queries whose samples are removed; the others are controls")
    seeds: int = Field(default=1, ge=1, description="trainings of each removal, and as many with nothing removed")

    @property
    def models(self) -> int:
        """How many models are trained, at most."""
        return self.seeds * (1 + METHODS * len(self.k))


class TailPatchConfig(Section):
    k: list[Annotated[int, Field(ge=1)]] = Field(
        default=[10], min_length=1, description="most influential samples of each query that the model's step is on"
    )
    length: float = Field(
        default=3e-4, gt=0, description="of the step, as a share of the length of all weights; a long one overshoots"
    )
    queries: int | None = Field(default=None, ge=1, description="test queries; default: all")
    pairs: int = Field(default=32, ge=1, description="(timestep, noise) pairs of each sample's gradient")
    draws: int = Field(default=128, ge=1, description="(timestep, noise) pairs of a query's loss")
    seed: int = Field(default=0, ge=0, description="of the pairs")


class JudgeConfig(Section):
    retrain: RetrainConfig
    subsets: int = Field(default=32, ge=3, description="models, each trained on a random subset of the samples")
    share: float = Field(default=0.5, gt=0, lt=1, description="of the samples in a subset")
    again: int = Field(
        default=8, ge=0, description="subsets trained on a second time, from another seed: what a score can reach"
    )
    draws: int = Field(
        default=128, ge=1, description="(timestep, noise) pairs of a query's loss, the same of all models"
    )
    seed: int = Field(default=0, ge=0, description="of the subsets, the trainings and the losses")
    leave_out: LeaveOutConfig | None = Field(
        default=None, description="train without what the teacher, and cheaper methods, name for some test queries"
    )

    @model_validator(mode="after")
    def _again_are_subsets(self) -> Self:
        if self.again and not 3 <= self.again <= self.subsets:
            raise ValueError(f"again is {self.again}: give 0, or from 3 to the {self.subsets} subsets")
        return self
