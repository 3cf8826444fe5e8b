"""Sections of the judges: how models are trained again, and of how many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from fastgda_core.feature_spaces import SOURCES, encoder_names
from fastgda_core.teachers.registry import TEACHERS
from tasks.config.section import Section
from tasks.config.teaching import TeacherConfig


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

# Methods whose images may be removed, whatever rivals there are. The first two always are: who is judged, and chance.
ALWAYS_REMOVED = TEACHER, RANDOM = "teacher", "random"
BASELINES = UNTUNED, CAPTIONS = "untuned", "captions alone"
# Other rows of tables and of `retrainings`, or how they begin; every feature space is one, too.
OTHER_ROWS = (
    *("captions + images", "symmetric head", "gradient head", "sketch", "two stages", "best "),
    *("subset", "nothing removed", "retraining again", "what a score can reach"),
)


class LeaveOutConfig(Section):
    methods: list[str] = Field(
        default=list(BASELINES),
        description="beside the teacher and chance, the methods whose samples are removed: untuned, captions alone, "
        "names of rivals",
    )
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
        methods = len(ALWAYS_REMOVED) + len(self.methods)
        return self.seeds * (1 + methods * (len(self.pooled_k) + self.each * len(self.own_k)))

    @property
    def most(self) -> int:
        """The most samples of one query that are removed."""
        return max([*self.pooled_k, *self.own_k])

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


class RivalConfig(TeacherConfig):
    """A teacher beside the run's own: fields of the section `teacher`, with its defaults.

    A step size that is left out is the run's.
    """

    space: str | None = Field(
        default=None,
        description="encoders joined by '+' in whose space samples are near: what teacher similarity compares, and "
        "what nearest goes by; default: candidates.space of the run",
    )
    nearest: int | None = Field(
        default=None, ge=2, description="score each query against so many nearest samples; all others count as 0"
    )

    @field_validator("alpha")
    @classmethod
    def _step_is_given(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        return alpha  # the run's where there is none

    @field_validator("space")
    @classmethod
    def _known(cls, space: str | None) -> str | None:
        if space is not None:
            encoder_names(space)
        return space

    def teacher(self, alpha: float | None) -> dict[str, Any]:
        """Return the section `teacher` of the rival's own run.

        Args:
            alpha: of the run that it is a rival of.
        """
        found = self.model_dump(exclude={"space", "nearest"})
        if "layers" not in self.model_fields_set:
            del found["layers"]  # the architecture's default, as of the run
        if found["alpha"] is None and "alpha" in TEACHERS[self.name].settings:
            found["alpha"] = alpha
        return found


RivalName = Annotated[str, Field(pattern=r"^[^\s|;][^|;\n]{0,59}$", description="row of the table")]


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
    rivals: dict[RivalName, RivalConfig] = Field(
        default={},
        description="teachers by the name of their row, each scored on the run's samples and queries and judged beside "
        "the run's own",
    )

    def seen_from(self, folder: Path) -> Self:
        """Return the section with the folders of a command and of rivals' checkpoints made absolute."""
        retrain, rivals = self.retrain, {}
        if isinstance(retrain, TrainerConfig):
            retrain = retrain.model_copy(update={"folder": folder / retrain.folder})
        for name, rival in self.rivals.items():
            rivals[name] = rival.model_copy(update={"checkpoints": tuple(folder / each for each in rival.checkpoints)})
        return self.model_copy(update={"retrain": retrain, "rivals": rivals})

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

    @model_validator(mode="after")
    def _rivals_have_names_of_their_own(self) -> Self:
        for name in self.rivals:
            spaces = name.removesuffix(", centred").split("+")
            known = name in (*ALWAYS_REMOVED, *BASELINES) or name.startswith(OTHER_ROWS)
            if known or all(each in SOURCES for each in spaces):
                raise ValueError(f"rivals has a {name!r}, which is another row of the table: give it another name")
        return self

    @model_validator(mode="after")
    def _removed_are_methods(self) -> Self:
        for name in self.leave_out.methods if self.leave_out else ():
            if name not in (*BASELINES, *self.rivals):
                known = ", ".join([*BASELINES, *self.rivals])
                raise ValueError(f"leave_out.methods has {name!r:.60}: choose of {known}")
            nearest = self.rivals[name].nearest if name in self.rivals else None
            if self.leave_out is not None and nearest is not None and nearest < self.leave_out.most:
                raise ValueError(
                    f"leave_out removes the first {self.leave_out.most} samples of {name}, which scores the nearest "
                    f"{nearest} alone: lower k, or leave it out of leave_out.methods"
                )
        return self
