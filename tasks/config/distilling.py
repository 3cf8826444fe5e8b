"""Sections of the rank head, of its evaluation, and of the study of what makes it good."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from fastgda_core.feature_spaces import encoder_names
from fastgda_core.ranking.loss_names import LossName
from fastgda_core.search.kinds import is_kind
from tasks.config.section import Section


class GradientHeadConfig(Section):
    size: int = Field(default=768, ge=1, description="numbers of a sketch that an index holds, at most sketches.size")
    axes: int = Field(default=256, ge=0, description="of the features, beside them")
    queries: int = Field(default=2048, ge=1, description="training samples that stand for queries, at most")
    timesteps: int = Field(default=4, ge=1, description="of the gradient of one, evenly spaced")
    seed: int = Field(default=1, ge=0, description="of their noise, another than teacher.seed")


class HeadConfig(Section):
    kind: Literal["symmetric", "gradient"] = Field(
        default="symmetric",
        description="symmetric: one network for both sides, as published; gradient: samples' sketches against the "
        "predicted gradient of the query, which needs `sketches` and reads no field but `gradient`",
    )
    gradient: GradientHeadConfig = GradientHeadConfig()
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
    def training(self) -> dict[str, Any]:
        """The settings of the training of a symmetric head."""
        return self.model_dump(exclude={"kind", "gradient"})

    @property
    def learned(self) -> dict[str, Any]:
        """Those of them on which the head depends."""
        return {name: value for name, value in self.training.items() if name not in ("strategy", "resident")}


class IndexConfig(Section):
    kind: str = Field(
        default="auto", description="FAISS factory string (Flat, IVF4096,RaBitQ6, ...); auto: by rows and budgets"
    )
    memory_gb: float | None = Field(default=None, gt=0, description="that the index may take; null: any")
    latency_ms: float | None = Field(
        default=None, gt=0, description="of one core that a scan of all vectors may take; null: what the rows allow"
    )
    recall: float = Field(
        default=0.95, gt=0, le=1, description="at 100, that nprobe, efSearch and k_factor are chosen to reach"
    )
    recall_queries: int = Field(
        default=1000, ge=1, description="held-out vectors that recall is measured on, against exact search"
    )

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind != "auto" and not is_kind(kind):
            raise ValueError(
                f"{kind} is no kind of index that is known here: write auto, Flat, SQfp16, HNSW32,SQfp16, "
                "IVF4096,Flat, IVF4096,RaBitQ6, IVF4096,PQ96 or the like, with Refine(SQfp16) behind it if you wish"
            )
        return kind


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
    query_shares: list[Share] = Field(
        default=[0.125, 0.25, 0.5, 1.0],
        description="of the training queries; of a gradient head: of head.gradient.queries",
    )
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
