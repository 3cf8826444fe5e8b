"""The one typed configuration of a pipeline: what `fastgda run CONFIG` reads."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import OF_MODEL, OF_USER, encoder_names
from tasks.config.distilling import EvaluationConfig, HeadConfig, IndexConfig, StudyConfig
from tasks.config.execution import ExecutionConfig
from tasks.config.expected import ExpectedConfig
from tasks.config.faults import faults
from tasks.config.inputs import CandidatesConfig, DataConfig, FeaturesConfig, QueriesConfig, SplitConfig
from tasks.config.judging import JudgeConfig, TailPatchConfig
from tasks.config.section import Section
from tasks.config.teaching import (
    CurvatureConfig,
    ExactCheckConfig,
    ModelConfig,
    SelfConsistencyConfig,
    SketchesConfig,
    TeacherConfig,
)


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
    sketches: SketchesConfig | None = Field(
        default=None,
        description="keep a sketch of every sample's gradient, from which `attribute --tier sketch` answers",
    )
    exact_check: ExactCheckConfig | None = Field(default=None, description="audit the first-order scores")
    self_consistency: SelfConsistencyConfig | None = Field(
        default=SelfConsistencyConfig(), description="score some pairs under other noise: does the teacher agree?"
    )
    tail_patch: TailPatchConfig | None = Field(
        default=None, description="does a training step on what a method names lower the query's loss?"
    )
    judge: JudgeConfig | None = Field(
        default=None, description="hold the teacher against models that `fastgda judge` trains again"
    )
    head: HeadConfig = HeadConfig()
    index: IndexConfig = IndexConfig()
    evaluation: EvaluationConfig
    study: StudyConfig = StudyConfig()
    publish: Literal["alone", "add", "never"] = Field(
        default="alone",
        description="a finished run replaces what is published, or joins it; never: it is curated alone, for a judge "
        "to read",
    )
    execution: ExecutionConfig = ExecutionConfig()
    expected: ExpectedConfig | None = Field(
        default=None, description="what `fastgda plan` counts with until the model and the tars are there"
    )

    @model_validator(mode="after")
    def _encoders_of_the_model(self) -> Self:
        """Return the configuration with `model.folder` as the weights of encoders that are parts of the model.

        Raises:
            ValueError: an encoder has no weights but those of the user, and the configuration names none.
        """
        spaces = [self.features.space, self.candidates.space or self.features.space, *self.study.spaces]
        named = {name for space in spaces for name in encoder_names(space)}
        for name in sorted(named & set(OF_USER) - self.features.weights.keys()):
            raise ValueError(f"features.weights.{name} is missing: name a folder with its weights")
        wanted = named & set(OF_MODEL)
        if not (missing := wanted - self.features.weights.keys()):
            return self
        weights = self.features.weights | {name: str(self.model.folder) for name in sorted(missing)}
        return self.model_copy(update={"features": self.features.model_copy(update={"weights": weights})})

    @model_validator(mode="after")
    def _an_adapter_is_not_trained_again(self) -> Self:
        for name in ("judge", "tail_patch"):
            if self.model.adapter is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} trains the whole denoiser, and the model is a LoRA, model.adapter: remove it")
        return self

    @model_validator(mode="after")
    def _an_index_has_no_features_of_samples(self) -> Self:
        if self.candidates.index is None:
            return self
        if self.teacher.name == "similarity":
            raise ValueError(
                "teacher similarity compares features of all samples in candidates.space, and candidates.index is "
                "there so that none are made: remove one of them"
            )
        for name, rival in self.judge.rivals.items() if self.judge else ():
            if rival.space not in (None, self.candidates.space):
                raise ValueError(f"judge.rivals.{name}.space is not that of candidates.index: remove one of them")
        return self

    @model_validator(mode="after")
    def _sketches_have_first_order(self) -> Self:
        if self.sketches is not None and self.teacher.name != "abu_plus_first_order":
            raise ValueError(
                "sketches are of the gradients that teacher abu_plus_first_order makes: remove them or change "
                "teacher.name"
            )
        if self.sketches is not None and len(self.teacher.checkpoints) > 1:
            raise ValueError(
                f"sketches are of gradients at one place and teacher.checkpoints has {len(self.teacher.checkpoints)}: "
                "name one checkpoint, or remove sketches"
            )
        return self

    @model_validator(mode="after")
    def _gradient_heads_have_sketches(self) -> Self:
        if self.head.kind == "gradient" and self.sketches is None:
            raise ValueError("head.kind gradient answers from sketches: add a section sketches, or make it symmetric")
        return self

    @model_validator(mode="after")
    def _removals_leave_controls(self) -> Self:
        split = self.queries.split
        if self.judge is None or self.judge.leave_out is None or not isinstance(split, SplitConfig):
            return self
        targets, each = self.judge.leave_out.targets, self.judge.leave_out.each
        if each > split.test:
            raise ValueError(f"judge.leave_out.each is {each} but the split has {split.test} test queries: lower it")
        if targets >= split.test:
            raise ValueError(
                f"judge.leave_out.targets is {targets} of the split's {split.test} test queries: lower it, so that "
                "some are left as controls"
            )
        return self

    @model_validator(mode="after")
    def _rivals_can_run(self) -> Self:
        for name in self.judge.rivals if self.judge else ():
            try:
                self.of_rival(name)
            except ValidationError as error:
                told = "; ".join(faults(error, PipelineConfig))
                raise ValueError(f"judge.rivals: {name}: {told}") from None
        return self

    def of_rival(self, name: str) -> PipelineConfig:
        """Return the configuration of the run that scores a rival: the same inputs, another teacher, no more than that.

        All such runs have one name, so that whoever asks for the same rival finds its scores.
        """
        assert self.judge is not None
        rival, candidates = self.judge.rivals[name], self.candidates.model_dump() | {"check": None}
        if rival.nearest is not None:
            candidates |= {"policy": "top_k", "k": rival.nearest, "scored": None}
        candidates["space"] = rival.space or self.candidates.space
        alone = dict.fromkeys(("sketches", "exact_check", "self_consistency", "tail_patch", "judge"))
        evaluation = {"cutoffs": [1], "validation_cutoff": 1, "neighbors": 1}
        return PipelineConfig.model_validate(
            {
                **self.model_dump(exclude={"head", "study"}),
                **alone,
                "name": "rival",
                "teacher": rival.teacher(self.teacher.alpha),
                "candidates": candidates,
                "evaluation": evaluation,
                "publish": "never",
            }
        )

    @model_validator(mode="after")
    def _pictures_have_their_noise(self) -> Self:
        if self.judge is not None and self.judge.regenerate and self.queries.captions is None:
            raise ValueError(
                "judge.regenerate begins with the queries' own noise, which pictures of queries.shards do not tell: "
                "remove it, or give queries.captions"
            )
        return self

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
    if k > samples and config.candidates.index is None:
        raise UsageError(
            f'candidates.k is {k} but the workspace has {samples} samples: lower it or set candidates.policy to "all"'
        )
    if config.candidates.index is not None:
        k = min(k, samples)  # of those that the index names these are the most that can be there
    k = (pool or samples) if config.candidates.policy == "pooled" else config.candidates.scored or k
    asked = {
        "evaluation.cutoffs": max(config.evaluation.cutoffs),
        "evaluation.validation_cutoff": config.evaluation.validation_cutoff,
        "evaluation.neighbors": config.evaluation.neighbors,
    }
    for field, value in asked.items():
        if value >= k:
            raise UsageError(f"{field} is {value} and has to be below a query's {k} candidates: lower it")
