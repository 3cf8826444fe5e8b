"""Sections of what comes in: data, queries, features, candidates."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import OF_MODEL, OF_USER, SOURCES, encoder_names
from tasks.config.section import Section


class DataConfig(Section):
    shards: str = Field(
        min_length=1,
        description="glob of WebDataset tars, relative to the config file; or MSCOCO's "
        "annotations/captions_NAME.json with its pictures in NAME/ beside annotations/",
    )


class SplitConfig(Section):
    train: int = Field(ge=1, description="queries that the rank head learns from")
    validation: int = Field(ge=1, description="queries that choose the best epoch")
    test: int = Field(ge=1, description="queries that the metrics are measured on")

    @property
    def total(self) -> int:
        return self.train + self.validation + self.test

    def of(self, queries: int) -> SplitConfig:
        """Return the split of this many queries.

        Raises:
            UsageError: the split adds up to another number.
        """
        if queries != self.total:
            raise UsageError(
                f"queries.shards holds {queries} usable queries but queries.split adds up to {self.total}: "
                "make them equal, or give shares"
            )
        return self

    def assign(self, seed: int) -> list[str]:
        """Return the split of each query in the order listed; each split is drawn evenly along the list.

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
        """Return the split of this many queries.

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

    @property
    def pattern(self) -> str:
        """The glob of `shards`, with the partition in its place; empty where images are generated."""
        return (self.shards or "").replace("{partition}", self.partition)

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
        default={},
        description="of clip, clip_text, dino, dinov2: a folder, relative to the config file, or a hub id; of "
        "caption_tokens, bottleneck: the folder of a diffusion model, by default model.folder; of abc_clip, abc_dino: "
        "a folder with the weights of clip or dino and AbC's clip_tuned.pth or dino_tuned.pth",
    )

    @field_validator("space")
    @classmethod
    def _known(cls, space: str) -> str:
        encoder_names(space)
        return space

    @field_validator("weights")
    @classmethod
    def _wanted(cls, weights: dict[str, str]) -> dict[str, str]:
        takers = [name for name, source in SOURCES.items() if source or name in (*OF_MODEL, *OF_USER)]
        if strange := sorted(weights.keys() - set(takers)):
            raise ValueError(f"{strange[0]!r} is no encoder that takes weights: these are {', '.join(takers)}")
        return weights

    def seen_from(self, folder: Path) -> Self:
        """Return the section with folders made absolute; what is no folder is a hub id.

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


class CandidateIndexConfig(Section):
    folder: Path = Field(
        description="with image.index and metadata/, as clip-retrieval makes it of all training images, relative to "
        "the config file"
    )
    file: str = Field(
        default="image.index",
        pattern=r"^[^/]+$",
        description="the FAISS index in it, whose vectors are those of candidates.space",
    )
    nprobe: int | None = Field(
        default=None,
        ge=1,
        description="inverted lists that a query looks at; null: as many as hold 16 k rows, at least 64",
    )
    match: str = Field(
        default="index_row",
        min_length=1,
        description="which row of the index a sample is: index_row: its .json in the tar tells, as of a list by "
        "`fastgda candidates`; key: that of its tar; or a column of the metadata that is a field of the .json, as url",
    )


class CandidateCheckConfig(Section):
    queries: int = Field(default=16, ge=1, description="test queries")
    random: int | None = Field(
        default=None, ge=1, description="of all samples, drawn at random and scored beside the candidates; null: all"
    )


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
    index: CandidateIndexConfig | None = Field(
        default=None,
        description="of policy top_k: a similarity index that is there already names the nearest, in place of a matrix "
        "of all samples' features",
    )
    check: CandidateCheckConfig | None = Field(
        default=None, description="of policy top_k: which share of the teacher's first is among the k nearest"
    )

    @field_validator("space")
    @classmethod
    def _known(cls, space: str | None) -> str | None:
        if space is not None:
            encoder_names(space)
        return space

    def science(self) -> dict[str, object]:
        """Return what the choice depends on, beside the features."""
        return self.model_dump(mode="json", exclude={"space", "index", "check"})

    @model_validator(mode="after")
    def _k_with_neighbors(self) -> Self:
        if (self.policy != "all") != (self.k is not None):
            raise ValueError("k belongs to policies top_k and pooled, and to no other")
        if self.scored is not None and (self.policy != "top_k" or self.scored > (self.k or 0)):
            raise ValueError("scored belongs to policy top_k and is at most k")
        for name in ("index", "check"):
            if getattr(self, name) is not None and self.policy != "top_k":
                raise ValueError(f"{name} belongs to policy top_k: change policy, or remove it")
        return self

    def seen_from(self, folder: Path) -> Self:
        """Return the section with the index's folder made absolute."""
        if self.index is None:
            return self
        index = self.index.model_copy(update={"folder": folder / self.index.folder})
        return self.model_copy(update={"index": index})
