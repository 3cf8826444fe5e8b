"""Sections of the model, its curvature, the teacher, and the checks of the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fastgda_core.curvature.damping import DAMPING
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.teachers.registry import DEFAULTS, TEACHERS
from storage_schemas.runs.records import Negatives
from tasks.config.section import Section

Pixels = Annotated[int, Field(ge=16)]


class ModelConfig(Section):
    folder: Path = Field(description="diffusers-style model folder, relative to the config file")
    adapter: Path | None = Field(
        default=None,
        description="folder of a LoRA over the denoiser, by diffusers or peft, relative to the config file: the model "
        "is the folder's with this over it, and teacher.layers is lora by default",
    )
    resolution: Pixels | tuple[Pixels, Pixels] | None = Field(
        default=None,
        description="pixels a side of its images, or [width, height], where it was trained at another than its own",
    )
    micro_batch: int = Field(
        default=64, ge=1, description="denoiser forwards at a time; halves itself where device memory runs out"
    )
    latents: Literal["float32", "bf16"] = Field(
        default="float32", description="how training images' latents are kept; bf16: half the bytes, rounded to 8 bits"
    )
    captions_gb: float = Field(
        default=2.0, ge=0, description="memory of a process for encoded captions; without room they are encoded anew"
    )
    flips: bool = Field(default=False, description="it was trained with mirrored images too: the larger score counts")
    compile: bool = Field(default=False, description="compile the denoiser: a minute or more per process, then faster")

    def seen_from(self, folder: Path) -> ModelConfig:
        """Return the section with its paths as seen from a folder."""
        adapter = None if self.adapter is None else folder / self.adapter
        return self.model_copy(update={"folder": folder / self.folder, "adapter": adapter})

    @property
    def images(self) -> int:
        """How many images of a sample count: 2 with the mirrored one."""
        return 2 if self.flips else 1


class CurvatureConfig(Section):
    samples: int = Field(default=2048, ge=1, description="(training image, eps, t) triples of the Fisher")
    importance: bool = Field(
        default=True,
        description="draw timesteps where gradients are large and weigh them back: the same Fisher with less noise",
    )
    seed: int = Field(default=0, ge=0)


ALL_READ = frozenset({"name", "shard_samples", "shard_queries", "negatives"})  # by teachers of every family


def _teacher_name(name: str) -> str:
    if name not in TEACHERS:
        raise ValueError(f"there is no teacher {name!r:.60}: choose one of {', '.join(TEACHERS)}")
    return name


class TeacherConfig(Section):
    name: Annotated[str, AfterValidator(_teacher_name)] = Field(
        description="abu, abu_plus: exact loss difference with a diagonal or an EK-FAC Fisher; abu_plus_first_order: "
        "the latter's linear part; similarity: cosine of the features of candidates.space; "
        "trak, d_trak, journey_trak, tracin, dmin: inner products of gradient features; "
        "nda: shares of the training patches that a perfect denoiser averages; "
        "mucs: loss ratio after many bounded steps"
    )
    objective: Objective = Field(
        default=Objective.loss,
        description="whose gradients scores are made of: loss as published; output_norm, for pictures that the model "
        "itself made; ratio, a sample's loss held against its size. The twin test says which a model needs",
    )
    checkpoints: tuple[Path, ...] = Field(
        default=(),
        description="folders of the training's checkpoints whose weights Fisher and gradients are taken at, relative "
        "to the config file; default: the model's own weights; of several, standardised scores are added",
    )
    layers: Literal["cross-attn-kv", "cross-attn", "attn", "mlp", "all", "lora"] = Field(
        default="cross-attn-kv",
        description="whose weights the unlearning step moves; of mucs: mlp; with model.adapter: lora; else as the "
        "architecture has it, which is cross-attn-kv but for DiT: attn",
    )
    damping: float = Field(default=DAMPING, gt=0, description="of the Fisher, x the layer's mean eigenvalue")
    precision: Precision = Field(default=Precision.float32, description="of the forwards; tf32, bf16: first order only")
    alpha: float | None = Field(
        default=None, gt=0, validate_default=True, description="step size: Delta theta = (alpha / N) F^-1 grad L"
    )
    learning_rate: float | None = Field(
        default=None, gt=0, validate_default=True, description="of the steps of mucs: a tenth of the training's"
    )
    forget_weight: float = Field(
        default=0.2, gt=0, description="of mucs: how the query's loss counts beside that of retained images"
    )
    most_steps: int = Field(
        default=500,
        ge=1,
        description="of mucs: it ends before, where the query's loss is nearly an untrained model's",
    )
    training_size: int | None = Field(default=None, ge=1, description="N; default: the samples in the workspace")
    timesteps: int = Field(default=10, ge=1, description="T of the noise plan, evenly spaced")
    first_timestep: int = Field(default=0, ge=0, description="where the grid of T timesteps starts, below T_train / T")
    timestep_list: tuple[NonNegativeInt, ...] | None = Field(
        default=None,
        min_length=1,
        description="instead of the even grid: the timesteps themselves; nda: its noise levels, by default a tenth",
    )
    timestep_weights: tuple[PositiveFloat, ...] | None = Field(
        default=None, description="of each timestep listed: the stretch of the schedule that it stands for"
    )
    draws: int = Field(default=1, ge=1, description="noise draws per timestep")
    antithetic: bool = Field(default=False, description="every other draw is the negative of the one before")
    agreement: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="instead of a noise plan: a pilot chooses the cheapest two of which agree so well (Spearman)",
    )
    seed: int = Field(default=0, ge=0, description="of the noise plan")
    gradient_pairs: int = Field(
        default=128, ge=1, description="Monte-Carlo (eps, t) pairs of a query's gradient; of mucs: of each step, 100"
    )
    update_rank: int | None = Field(
        default=None, ge=1, description="keep each layer's Delta theta at this rank, and measure the error"
    )
    projection: int | None = Field(
        default=None, ge=1, description="numbers of a gradient feature; default: as the teacher's paper has it"
    )
    ridge: float | None = Field(
        default=None, ge=0, description="lambda of a kernel of gradient features; default: as in its authors' code"
    )
    patch_sizes: tuple[PositiveInt, ...] = Field(
        default=(7, 14),
        min_length=1,
        description="of nda: pixels a side of its patches; even ones are compared in blocks of two by two pixels",
    )
    patch_matches: PositiveInt | None = Field(
        default=100, description="of nda: the most patches of one sample that count for a patch of the query; null: all"
    )
    patch_pixels: int | None = Field(
        default=None, ge=2, description="of nda: a side of its pictures; default: the model's own, at most 32"
    )
    shard_samples: int = Field(default=256, ge=1, description="training samples per first-order score shard")
    shard_queries: int | None = Field(
        default=None,
        ge=1,
        description="queries per first-order score shard; default: all, so that a sample is run once",
    )
    loaded_queries: int = Field(default=512, ge=1, description="queries whose Delta theta is on the device at a time")
    negatives: Negatives = Field(
        default="keep", description="scores not above 0: ranked as published, or tied at the last rank and 0 in sums"
    )

    def with_default_layers(self, layers: str) -> TeacherConfig:
        """Return the section with these `layers` where nobody chose any and the teacher reads them."""
        if "layers" in self.model_fields_set or "layers" not in TEACHERS[self.name].settings:
            return self
        return self.model_copy(update={"layers": layers})

    @property
    def timestep_count(self) -> int:
        """How many timesteps the noise plan has."""
        return self.timesteps if self.timestep_list is None else len(self.timestep_list)

    def science(self) -> dict[str, object]:
        """Return the settings that a run's scores and its shards depend on, without those about memory and labels.

        Checkpoints are in the keys of what is made at them, by their weights and not by where they lie.
        """
        read = TEACHERS[self.name].settings | ALL_READ
        excluded = {"loaded_queries", "negatives", "checkpoints"}
        found = self.model_dump(mode="json", include=set(read), exclude=excluded)
        if self.agreement is None:  # runs of releases without it keep their keys
            found.pop("agreement", None)
        return found

    def at_checkpoints(self, kind: str) -> list[str]:
        """Return the names of a kind of part at each checkpoint; the kind itself where there are not several."""
        count = len(self.checkpoints)
        return [kind] if count < 2 else [f"{kind} of checkpoint {number}" for number in range(1, count + 1)]

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_teacher(cls, given: Any) -> Any:
        """Fill in what the teacher's source has other than the fields."""
        return {**DEFAULTS.get(str(given.get("name")), {}), **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _settings_are_read(self) -> Self:
        # By value, not by model_fields_set: a stored config names every setting and must load again.
        read = TEACHERS[self.name].settings | ALL_READ
        for name, field in TeacherConfig.model_fields.items():
            if name not in read and getattr(self, name) != field.default:
                raise ValueError(f"{name} is no setting of teacher {self.name}: remove it")
        return self

    @field_validator("alpha", "learning_rate")
    @classmethod
    def _step_is_given(cls, size: float | None, info: ValidationInfo) -> float | None:
        teacher = TEACHERS.get(info.data.get("name", ""))
        if size is None and teacher is not None and info.field_name in teacher.settings:
            raise ValueError("is missing")
        return size

    @field_validator("patch_sizes")
    @classmethod
    def _each_size_counts_once(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(sizes)) != len(sizes):
            raise ValueError("name a size twice: remove one of the two")
        return sizes

    @field_validator("checkpoints")
    @classmethod
    def _each_counts_once(cls, checkpoints: tuple[Path, ...]) -> tuple[Path, ...]:
        if len(set(checkpoints)) != len(checkpoints):
            raise ValueError("name a folder twice: remove one of the two")
        return checkpoints

    @model_validator(mode="after")
    def _mucs_has_one_place(self) -> Self:
        if self.name == "mucs" and len(self.checkpoints) > 1:
            raise ValueError("checkpoints of teacher mucs are at most one: its scores have no Fisher to be added by")
        if self.name == "mucs" and self.objective is Objective.output_norm:
            raise ValueError("objective of teacher mucs is ratio, or loss: an untrained model bounds nothing else")
        return self

    @model_validator(mode="after")
    def _plan_is_given_or_chosen(self) -> Self:
        if self.agreement is None:
            return self
        if len(self.checkpoints) > 1:
            raise ValueError("agreement lets a pilot choose the noise plan at one checkpoint: give timesteps instead")
        for name in ("timesteps", "first_timestep", "timestep_list", "timestep_weights", "draws", "antithetic"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is of a noise plan, which agreement lets a pilot choose: remove one")
        return self

    @model_validator(mode="after")
    def _plan_is_whole(self) -> Self:
        if self.timestep_list is not None:
            # By value, not by model_fields_set: a stored config names every setting and must load again.
            for name in ("timesteps", "first_timestep"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is of an even grid and timestep_list is not: remove one")
            if len(set(self.timestep_list)) != len(self.timestep_list):
                raise ValueError("timestep_list names a timestep twice: remove one of the two")
        if self.timestep_weights is not None and len(self.timestep_weights) != len(self.timestep_list or ()):
            raise ValueError(
                f"timestep_weights has {len(self.timestep_weights)} weights for the {len(self.timestep_list or ())} "
                "timesteps of timestep_list: give one for each"
            )
        if self.antithetic and self.draws % 2:
            raise ValueError("antithetic draws come in pairs: make draws even")
        TEACHERS[self.name].check_precision(self.precision)
        return self


class SketchesConfig(Section):
    size: int = Field(default=1024, ge=1, description="numbers of a sketch, a byte each and a half for their scales")
    coordinates: int = Field(
        default=65_536, ge=1, description="of the gradient in the Fisher's eigenbasis, from which sketches are made"
    )
    pilot: int = Field(default=2048, ge=1, description="samples by whose gradients the sketch is chosen")
    seed: int = Field(default=0, ge=0, description="of the pilot")


class ExactCheckConfig(Section):
    queries: int = Field(ge=1, description="test queries that are also scored by the exact teacher")
    candidates: int = Field(ge=3, description="candidates of each, evenly spaced over the first-order ranking")


class SelfConsistencyConfig(Section):
    queries: int | None = Field(default=None, ge=1, description="test queries that are scored again; default: all")
    samples: int = Field(default=256, ge=8, description="of their candidates, drawn at random")
