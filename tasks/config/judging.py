"""Sections of the judges: how models are trained again, and of how many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, model_validator

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


class TrainerConfig(Section):
    """A trainer of the user's own, which is run for each model in place of the built-in recipe.

    In each word of the command `{removed}` is replaced by the path of a CSV file with the samples to leave out
    (train_id, key, shard), `{seed}` by the seed, `{output}` by the folder for the model, and `{device}`, which may be
    left out, by the device as torch names it.
    """

    command: list[str] = Field(
        min_length=1,
        description="program and arguments, run without a shell, with {removed}, {seed}, {output} in them; it writes a "
        "diffusers model folder, or the denoiser's alone, into {output}",
    )
    folder: Path = Field(default=Path(), description="where it runs, relative to the config file")

    @model_validator(mode="before")
    @classmethod
    def _no_recipe_beside_it(cls, given: Any) -> Any:
        if isinstance(given, dict) and (beside := sorted(given.keys() & RetrainConfig.model_fields.keys())):
            raise ValueError(f"the command says itself how it trains: remove {', '.join(beside)}, or the command")
        return given

    @model_validator(mode="after")
    def _told_what_to_do(self) -> Self:
        for place in ("{removed}", "{seed}", "{output}"):
            if not any(place in word for word in self.command):
                raise ValueError(f"command lacks {place}: the trainer has to be told")
        return self

    def words(self, **places: object) -> list[str]:
        """Return the command with `{name}` replaced by the text of each of `places`, and nothing else."""
        found = self.command
        for name, value in places.items():
            found = [word.replace(f"{{{name}}}", str(value)) for word in found]
        return found


def _kind_of_recipe(given: object) -> str:
    named = given if isinstance(given, dict) else getattr(type(given), "model_fields", {})
    return "trainer" if "command" in named else "recipe"


Retrain = Annotated[
    Annotated[RetrainConfig, Tag("recipe")] | Annotated[TrainerConfig, Tag("trainer")], Discriminator(_kind_of_recipe)
]

METHODS = 4  # whose images are removed: teacher, untuned features, captions alone, chance


class LeaveOutConfig(Section):
    k: list[Annotated[int, Field(ge=1)]] = Field(
        default=[10], min_length=1, description="most influential samples of each target that are removed, all at once"
    )
    targets: int = Field(
        default=6,
        ge=0,
        description="test queries whose samples are removed together, once for each method; the others are controls; "
        "0: none are",
    )
    each: int = Field(
        default=0, ge=0, description="test queries that have models of their own: one for each method and k of each_k"
    )
    each_k: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="most influential samples of one query that are removed; empty: those of k"
    )
    seeds: int = Field(default=1, ge=1, description="trainings of each removal, and as many with nothing removed")

    @property
    def own_k(self) -> list[int]:
        """How many samples of one query are removed, ascending; empty where no query has models of its own."""
        return sorted(set(self.each_k or self.k)) if self.each else []

    @property
    def pooled_k(self) -> list[int]:
        """How many samples of each target are removed at once; empty where there are no targets."""
        return self.k if self.targets else []

    @property
    def models(self) -> int:
        """How many models are trained, at most."""
        return self.seeds * (1 + METHODS * (len(self.pooled_k) + self.each * len(self.own_k)))

    @model_validator(mode="after")
    def _something_is_removed(self) -> Self:
        if not self.targets and not self.each:
            raise ValueError("targets and each are both 0: raise one, or remove leave_out")
        if self.each_k and not self.each:
            raise ValueError("each_k is of queries with models of their own, and each is 0: raise each, or remove it")
        return self


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
    retrain: Retrain
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
    regenerate: bool = Field(
        default=False,
        description="models without what was named generate the test queries' pictures again, from the same noise",
    )
    keep_weights: bool = Field(default=False, description="keep every model's weights; else its losses alone")

    def seen_from(self, folder: Path) -> Self:
        """Return the section with the folder in which a command runs made absolute."""
        if isinstance(self.retrain, RetrainConfig):
            return self
        retrain = self.retrain.model_copy(update={"folder": folder / self.retrain.folder})
        return self.model_copy(update={"retrain": retrain})

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides a model and its losses, beside what it is taught and asked: part of the models' key."""
        return self.model_dump(mode="json", include={"draws": True, "seed": True, "retrain": self._decisive})

    @property
    def _decisive(self) -> Any:
        return {"command"} if isinstance(self.retrain, TrainerConfig) else True

    @model_validator(mode="after")
    def _again_are_subsets(self) -> Self:
        if self.again and not 3 <= self.again <= self.subsets:
            raise ValueError(f"again is {self.again}: give 0, or from 3 to the {self.subsets} subsets")
        return self

    @model_validator(mode="after")
    def _pictures_are_of_removals(self) -> Self:
        if self.regenerate and self.leave_out is None:
            raise ValueError("regenerate shows pictures without what was named for them: add leave_out")
        return self
