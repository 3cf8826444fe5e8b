"""The one typed configuration of a pipeline: what `fastgda run CONFIG` reads."""

from __future__ import annotations

import glob
import random
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from fastgda_core.curvature.damping import DAMPING
from fastgda_core.diffusion.objective import Objective
from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import SOURCES, encoder_names
from fastgda_core.ranking.loss_names import LossName
from fastgda_core.teachers.teachers import TEACHERS
from storage_schemas.ledger import Negatives
from tasks.config_document import read_document, workspace_from
from tasks.config_faults import faults
from tasks.config_section import Section
from tasks.execution_config import ExecutionConfig


class DataConfig(Section):
    shards: str = Field(min_length=1, description="glob of WebDataset tars, relative to the config file")


class ModelConfig(Section):
    folder: Path = Field(description="diffusers-style model folder, relative to the config file")
    micro_batch: int = Field(
        default=64, ge=1, description="denoiser forwards at a time; halves itself where device memory runs out"
    )
    flips: bool = Field(default=False, description="it was trained with mirrored images too: the larger score counts")
    compile: bool = Field(default=False, description="compile the denoiser: a minute or more per process, then faster")


class SplitConfig(Section):
    train: int = Field(ge=1, description="queries that the rank head learns from")
    validation: int = Field(ge=1, description="queries that choose the best epoch")
    test: int = Field(ge=1, description="queries that the metrics are measured on")

    @property
    def total(self) -> int:
        return self.train + self.validation + self.test

    def of(self, queries: int) -> SplitConfig:
        """The split of this many queries.

        Raises:
            UsageError: it is one of another number.
        """
        if queries != self.total:
            raise UsageError(
                f"queries.shards holds {queries} usable queries but queries.split adds up to {self.total}: "
                "make them equal, or give shares"
            )
        return self

    def assign(self, seed: int) -> list[str]:
        """The split of each query in the order listed: each split is drawn evenly along the list.

        Captions are listed by kind as a rule; a few test queries drawn anywhere would leave whole kinds out.
        """
        draw = random.Random(seed)
        names = ["train"] * self.total
        for split, count in (("test", self.test), ("validation", self.validation)):
            free = [place for place, name in enumerate(names) if name == "train"]
            for stratum in range(count):
                start, stop = (len(free) * edge // count for edge in (stratum, stratum + 1))
                names[free[draw.randrange(start, stop)]] = split
        return names


class SplitShares(Section):
    validation_share: float = Field(gt=0, lt=1, description="of the queries, at least one; the rest is for training")
    test_share: float = Field(gt=0, lt=1, description="of the queries, at least one")

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share and test_share leave nothing to train on: lower them")
        return self

    def of(self, queries: int) -> SplitConfig:
        """The split of this many queries.

        Raises:
            UsageError: there are fewer than three.
        """
        if queries < 3:
            raise UsageError(f"queries.shards holds {queries} usable queries, and a split needs 3: add some")
        validation, test = (max(1, round(share * queries)) for share in (self.validation_share, self.test_share))
        while validation + test >= queries:  # both were rounded up and nothing is left to train on
            validation, test = (validation, test - 1) if test >= validation else (validation - 1, test)
        return SplitConfig(train=queries - validation - test, validation=validation, test=test)


def _kind_of_split(given: object) -> str:
    if not isinstance(given, (dict, Section)):
        return "counts"  # where it is refused
    named = given if isinstance(given, dict) else type(given).model_fields
    return "shares" if any(str(name).endswith("_share") for name in named) else "counts"


Split = Annotated[
    Annotated[SplitConfig, Tag("counts")] | Annotated[SplitShares, Tag("shares")], Discriminator(_kind_of_split)
]


class QueriesConfig(Section):
    captions: list[str] | None = Field(default=None, description="captions to generate one image each from")
    shards: str | None = Field(default=None, description="or a glob of WebDataset tars of generated images")
    partition: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._-]*$",
        description="what {partition} in shards stands for, as a date; scheduled runs and backfills set it",
    )
    split: Split = Field(description="numbers of queries, or shares of however many there are")
    twins: int = Field(
        default=8,
        ge=0,
        description="of the twin test: queries generated from training captions, and as many training images taken as "
        "queries, in no split; 0: no test",
    )
    seed: int = Field(default=0, ge=0, description="of the starting noise and of the split")
    steps: int = Field(default=25, ge=1, description="DDIM steps")
    guidance_scale: float = Field(default=3.0, ge=0, description="classifier-free guidance")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.captions is None) == (not self.shards):
            raise ValueError("give either captions (images are generated) or shards (images exist), not both")
        if self.partition and "{partition}" not in (self.shards or ""):
            raise ValueError("partition is given but shards has no {partition} in it: add it there or remove this")
        if self.captions is not None:
            if isinstance(self.split, SplitConfig) and len(self.captions) != self.split.total:
                raise ValueError(
                    f"{len(self.captions)} captions but the split adds up to {self.split.total}: make them equal"
                )
            if len(set(self.captions)) != len(self.captions):
                raise ValueError("a caption occurs twice: remove one")
            if not all(caption.strip() for caption in self.captions):
                raise ValueError("a caption is empty: write one or remove it")
        return self


class FeaturesConfig(Section):
    space: str = Field(default="efficientnet_lite0+minilm_text", description="encoders joined by '+'")
    unit_length: bool = Field(
        default=True, description="each encoder's output at length one; false: as it is, which FastGDA's release takes"
    )
    centre: bool = Field(
        default=True,
        description="take the mean over the training samples off the features of samples and queries, before any "
        "cosine and before the rank head; heads imported from FastGDA's release never saw that and go without it",
    )
    batch_size: int | None = Field(default=None, ge=1, description="items per encoder pass; null: the encoder's own")
    weights: dict[str, str] = Field(
        default={}, description="of clip, clip_text, dino, dinov2: a folder, relative to the config file, or a hub id"
    )

    @field_validator("space")
    @classmethod
    def _known(cls, space: str) -> str:
        encoder_names(space)
        return space

    @field_validator("weights")
    @classmethod
    def _wanted(cls, weights: dict[str, str]) -> dict[str, str]:
        takers = [name for name, source in SOURCES.items() if source]
        if strange := sorted(weights.keys() - set(takers)):
            raise ValueError(f"{strange[0]!r} is no encoder that takes weights: these are {', '.join(takers)}")
        return weights

    def seen_from(self, folder: Path) -> Self:
        """With folders made absolute; what is no folder is a hub id.

        Raises:
            UsageError: a path leads nowhere.
        """
        found = {}
        for name, source in self.weights.items():
            path = folder / source
            if not path.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
                raise UsageError(f"features.weights.{name}: there is no folder {path}")
            found[name] = str(path) if path.is_dir() else source
        return self.model_copy(update={"weights": found})


class CurvatureConfig(Section):
    samples: int = Field(default=2048, ge=1, description="(training image, eps, t) triples of the Fisher")
    importance: bool = Field(
        default=True,
        description="draw timesteps where gradients are large and weigh them back: the same Fisher with less noise",
    )
    seed: int = Field(default=0, ge=0)


class CandidatesConfig(Section):
    policy: Literal["all", "top_k", "pooled"] = Field(
        description="all samples; each query's nearest in the untuned space; or the nearest of any query, for all"
    )
    k: int | None = Field(default=None, ge=2, description="neighbours per query of policies top_k and pooled")
    scored: int | None = Field(default=None, ge=2, description="of policy top_k: how many of the k, drawn at random")
    seed: int = Field(default=0, ge=0, description="of that draw")
    space: str | None = Field(
        default=None,
        description="encoders in whose space a sample is near, joined by '+'; null: those of features.space. Named "
        "here, features.space may change without another choice of candidates",
    )

    @field_validator("space")
    @classmethod
    def _known(cls, space: str | None) -> str | None:
        if space is not None:
            encoder_names(space)
        return space

    def science(self) -> dict[str, object]:
        """What the choice depends on, beside the features."""
        return self.model_dump(mode="json", exclude={"space"})

    @model_validator(mode="after")
    def _k_with_neighbors(self) -> Self:
        if (self.policy != "all") != (self.k is not None):
            raise ValueError("k belongs to policies top_k and pooled, and to no other")
        if self.scored is not None and (self.policy != "top_k" or self.scored > (self.k or 0)):
            raise ValueError("scored belongs to policy top_k and is at most k")
        return self


class TeacherConfig(Section):
    name: Literal["abu", "abu_plus", "abu_plus_first_order"] = Field(
        description="exact loss difference with a diagonal or an EK-FAC Fisher, or the latter's linear part"
    )
    objective: Objective = Field(
        default=Objective.loss,
        description="whose gradients scores are made of: loss as published, or output_norm, for pictures that the "
        "model itself made; the twin test says which a model needs",
    )
    layers: Literal["cross-attn-kv", "cross-attn", "attn", "all"] = Field(
        default="cross-attn-kv", description="whose weights the unlearning step moves"
    )
    damping: float = Field(default=DAMPING, gt=0, description="of the Fisher, x the layer's mean eigenvalue")
    precision: Precision = Field(default=Precision.float32, description="of the forwards; tf32, bf16: first order only")
    alpha: float = Field(gt=0, description="step size: Delta theta = (alpha / N) F^-1 grad L")
    training_size: int | None = Field(default=None, ge=1, description="N; default: the samples in the workspace")
    timesteps: int = Field(default=10, ge=1, description="T of the noise plan, evenly spaced")
    first_timestep: int = Field(default=0, ge=0, description="where the grid of T timesteps starts, below T_train / T")
    timestep_list: tuple[NonNegativeInt, ...] | None = Field(
        default=None, min_length=1, description="instead of the even grid: the timesteps themselves"
    )
    timestep_weights: tuple[PositiveFloat, ...] | None = Field(
        default=None, description="of each timestep listed: the stretch of the schedule that it stands for"
    )
    draws: int = Field(default=1, ge=1, description="noise draws per timestep")
    antithetic: bool = Field(default=False, description="every other draw is the negative of the one before")
    seed: int = Field(default=0, ge=0, description="of the noise plan")
    gradient_pairs: int = Field(default=128, ge=1, description="Monte-Carlo (eps, t) pairs of a query's gradient")
    update_rank: int | None = Field(
        default=None, ge=1, description="keep each layer's Delta theta at this rank, and measure the error"
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

    def science(self) -> dict[str, object]:
        """What scores depend on; the rest is about memory, or about what is made of scores."""
        return self.model_dump(mode="json", exclude={"loaded_queries", "negatives"})

    @model_validator(mode="after")
    def _plan_is_whole(self) -> Self:
        if self.timestep_list is not None:
            # By value, not by model_fields_set: a stored config names every setting and must load again.
            for name in ("timesteps", "first_timestep"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is of an even grid and timestep_list is not: remove one")
            if len(set(self.timestep_list)) != len(self.timestep_list):
                raise ValueError("timestep_list names one twice: remove it")
        if self.timestep_weights is not None and len(self.timestep_weights) != len(self.timestep_list or ()):
            raise ValueError("timestep_weights needs as many as timestep_list has")
        if self.antithetic and self.draws % 2:
            raise ValueError("antithetic draws come in pairs: make draws even")
        TEACHERS[self.name].check_precision(self.precision)
        return self


class ExactCheckConfig(Section):
    queries: int = Field(ge=1, description="test queries that are also scored by the exact teacher")
    candidates: int = Field(ge=3, description="candidates of each, evenly spaced over the first-order ranking")


class SelfConsistencyConfig(Section):
    queries: int | None = Field(default=None, ge=1, description="test queries that are scored again; default: all")
    samples: int = Field(default=256, ge=8, description="of their candidates, drawn at random")


class HeadConfig(Section):
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=4096, ge=1, description="pairs")
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    outside_probability: float = Field(default=0.1, ge=0, lt=1, description="pairs replaced by non-candidates, pi = 1")
    loss: LossName = Field(default="bce", description="what the head learns from; `fastgda study` compares them")
    input_norm: bool = Field(default=False, description="a LayerNorm before the first layer")
    patience: int | None = Field(
        default=None, ge=1, description="epochs without a better validation mAP after which training ends; null: never"
    )
    devices: PositiveInt | Literal["auto"] = Field(default=1, description="GPUs that train together")
    strategy: str | None = Field(default=None, description="Lightning's, for several; null: ddp_spawn")
    resident: bool = Field(
        default=True, description="features in device memory; else in a memory-mapped file, fetched ahead"
    )
    initialization: Literal["xavier", "features"] = Field(
        default="xavier", description="random, or cosines that start as those of the features: for few queries"
    )
    rank_offset: float | None = Field(
        default=None, gt=0, description="weigh a pair by 1 / (pi + rank_offset): top ranks count; null: all alike"
    )
    seed: int = Field(default=0, ge=0)

    @property
    def learned(self) -> dict[str, Any]:
        """The settings on which the head depends."""
        return self.model_dump(exclude={"strategy", "resident"})


class EvaluationConfig(Section):
    cutoffs: list[PositiveInt] = Field(min_length=1, description="L of mAP(L)")
    validation_cutoff: int = Field(ge=1, description="L of the mAP that picks the best epoch")
    neighbors: int = Field(default=8, ge=1, description="training images per row of the report")
    floor: float | None = Field(
        default=None, gt=0, lt=1, description="tuned mAP(validation_cutoff) below which a head is not promoted"
    )
    gain_floor: float | None = Field(
        default=1.0, gt=0, description="the same as a multiple of the untuned features' mAP; null: none"
    )
    shown_queries: int = Field(default=24, ge=1, description="test queries that the report shows, spread over all")

    @model_validator(mode="after")
    def _validated_is_measured(self) -> Self:
        if self.validation_cutoff not in self.cutoffs:
            raise ValueError(
                f"validation_cutoff {self.validation_cutoff} is not among evaluation.cutoffs: add it there"
            )
        return self


Share = Annotated[float, Field(gt=0, le=1)]


class StudyConfig(Section):
    spaces: list[str] = Field(default=[], description="feature spaces; none: features.space and each of its encoders")
    losses: list[LossName] = Field(default=list(get_args(LossName)), description="losses of the head")
    query_shares: list[Share] = Field(default=[0.125, 0.25, 0.5, 1.0], description="of the training queries")
    candidate_shares: list[Share] = Field(default=[0.05, 0.1, 0.25, 0.5, 1.0], description="of a query's candidates")
    outside_probabilities: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.0, 0.05, 0.1, 0.2, 0.5], description="of pairs outside the candidates"
    )
    nearest: Share = Field(
        default=0.1, description="share of the candidates, nearest in the untuned space, that these are outside of"
    )
    seeds: int = Field(default=3, ge=1, description="trainings of each kind")

    @field_validator("spaces")
    @classmethod
    def _known(cls, spaces: list[str]) -> list[str]:
        for space in spaces:
            encoder_names(space)
        return spaces


class PipelineConfig(Section):
    """Everything one pipeline does, from tar shards to a served index."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$", description="lower-case name; run ids start with it")
    workspace: str = Field(
        min_length=1, description="folder for everything that is made, relative to the config file, or a URL (s3://...)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the models run")
    data: DataConfig
    model: ModelConfig
    queries: QueriesConfig
    features: FeaturesConfig = FeaturesConfig()
    curvature: CurvatureConfig = CurvatureConfig()
    candidates: CandidatesConfig
    teacher: TeacherConfig
    exact_check: ExactCheckConfig | None = Field(default=None, description="audit the first-order scores")
    self_consistency: SelfConsistencyConfig | None = Field(
        default=SelfConsistencyConfig(), description="score some pairs under other noise: does the teacher agree?"
    )
    head: HeadConfig = HeadConfig()
    evaluation: EvaluationConfig
    study: StudyConfig = StudyConfig()
    publish: Literal["alone", "add"] = Field(
        default="alone", description="a finished run replaces what is published, or joins it"
    )
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _check_has_first_order(self) -> Self:
        split = self.queries.split
        tests = split.test if isinstance(split, SplitConfig) else None
        if self.exact_check is not None:
            if self.teacher.name != "abu_plus_first_order":
                raise ValueError("exact_check audits teacher abu_plus_first_order: remove it or change teacher.name")
            if tests is not None and self.exact_check.queries > tests:
                raise ValueError(
                    f"exact_check.queries is {self.exact_check.queries} but the split has {tests} test queries: "
                    "lower it"
                )
        if self.self_consistency is not None:
            again = self.self_consistency.queries or 0
            if tests is not None and again > tests:
                raise ValueError(
                    f"self_consistency.queries is {again} but the split has {tests} test queries: lower it"
                )
        return self


def check_sizes(config: PipelineConfig, samples: int, pool: int | None = None) -> None:
    """Compare what is asked with how many samples there are, before any work.

    Args:
        samples: in the workspace.
        pool: of policy pooled, how many samples the queries brought together, where that is known.

    Raises:
        UsageError: more is asked than there is.
    """
    k = config.candidates.k or samples
    if k > samples:
        raise UsageError(
            f'candidates.k is {k} but the workspace has {samples} samples: lower it or set candidates.policy to "all"'
        )
    k = (pool or samples) if config.candidates.policy == "pooled" else config.candidates.scored or k
    asked = {
        "evaluation.cutoffs": max(config.evaluation.cutoffs),
        "evaluation.validation_cutoff": config.evaluation.validation_cutoff,
        "evaluation.neighbors": config.evaluation.neighbors,
    }
    for field, value in asked.items():
        if value >= k:
            raise UsageError(f"{field} is {value} but a query has {k} candidates: lower it")


def load_config(path: Path) -> PipelineConfig:
    """Read a YAML config; paths in it are made absolute, seen from its own folder.

    Raises:
        UsageError: unreadable, a field unknown, missing or out of range; one line per fault.
    """
    try:
        config = PipelineConfig.model_validate(read_document(path))
    except ValidationError as error:
        raise UsageError("\n".join(f"{path}: {fault}" for fault in faults(error, PipelineConfig))) from None
    folder = path.resolve().parent
    literal = Path(glob.escape(str(folder)))  # only what the config itself says is a pattern
    return config.model_copy(
        update={
            "workspace": workspace_from(path, config.workspace),
            "data": DataConfig(shards=str(literal / config.data.shards)),
            "model": config.model.model_copy(update={"folder": folder / config.model.folder}),
            "features": config.features.seen_from(folder),
            "queries": config.queries.model_copy(
                update={"shards": str(literal / config.queries.shards) if config.queries.shards else None}
            ),
        }
    )


def with_runner(config: PipelineConfig, runner: str) -> PipelineConfig:
    """The configuration with its parts made elsewhere.

    Raises:
        UsageError: the other settings of `execution` do not fit.
    """
    try:
        execution = ExecutionConfig.model_validate({**config.execution.model_dump(), "runner": runner})
    except ValidationError as error:
        lines = [fault.removeprefix("config: ") for fault in faults(error, ExecutionConfig)]
        raise UsageError("\n".join(f"--runner {runner}: execution: {line}" for line in lines)) from None
    return config.model_copy(update={"execution": execution})
