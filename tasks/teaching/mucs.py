"""The family of MUCS: latents, one model without each query, base losses at the shared noise, then ratios."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.diffusion.model import train_timesteps
from fastgda_core.errors import NonFiniteLoss, UsageError
from fastgda_core.evaluation.retraining import to_train
from fastgda_core.teachers.mucs import NULL_ROWS, Ascent, Unlearned, unlearn, untrained_loss
from fastgda_core.teachers.needs import EXPECTED_ASCENT, MLP_GRADIENT_FORWARDS
from fastgda_core.teachers.scores import exact_scores
from fastgda_core.teachers.training_loss import SampleBlock
from storage_schemas.commit import Manifest, input_key
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.queries import Query, load_queries
from tasks.parts import Parts
from tasks.teaching.bad_samples import without_bad_samples
from tasks.teaching.base_losses import (
    BASE_LOSS_PART,
    BaseLossParts,
    base_losses_of,
    load_base_losses,
    without_base_loss,
)
from tasks.teaching.cost import KindCost, Size
from tasks.teaching.families import Artifacts, BlockScores
from tasks.teaching.latents import LatentParts, blocks_ahead, latents_of, load_block, unreadable_samples
from tasks.teaching.noise import noise_plan
from tasks.teaching.tensor_parts import QueryParts
from tasks.teaching.updates import QueryUpdates, update_tensors

RETAINED = 2048  # training images in memory, of which each step draws some
log = logging.getLogger("fastgda.mucs")


def ascents_of(context: Context, latents: Artifact, queries: Artifact) -> Artifact:
    """Return the artifact of the change of weights that forgets each query, which need not be made yet."""
    config = context.config.teacher
    read = "layers", "precision", "learning_rate", "forget_weight", "most_steps", "gradient_pairs", "seed"
    settings = config.model_dump(mode="json", include={*read, "update_rank"})
    key = input_key("mucs", latents.key, queries.key, settings, *context.taught_at)
    return AscentParts.together(context.workspace, key, queries.rows)


class AscentParts(QueryParts):
    """The change of weights that forgets a query, a part each: the whole way of it, from the model's own weights."""

    kind = title = "unlearning steps"

    def __init__(self, context: Context, latents: Artifact, queries: Artifact, ascents: Artifact) -> None:
        self.context, self.latents, self.queries, self.artifact = context, latents, queries, ascents

    def make(self, number: int) -> Manifest:
        """Unlearn one query and commit how far the weights went.

        Raises:
            UsageError: a loss is no number.
        """
        started, query = time.monotonic(), load_queries(self.queries)[number]
        found = self.unlearned(query)
        if not found.reached:
            log.warning(
                "query %s: its loss is at %.3g of the untrained model's %.3g after %d steps: raise teacher.most_steps "
                "or teacher.learning_rate",
                *(query.query_id, found.forget_loss, self._null_loss(), found.steps),
            )
        beside = {"/steps": found.steps, "/forget_loss": found.forget_loss, "/null_loss": self._null_loss()}
        stored = update_tensors(found.update, self.context.config.teacher.update_rank)
        stored |= {name: torch.tensor(value, dtype=torch.float64) for name, value in beside.items()}
        return self.keep(number, stored, started)

    def unlearned(self, query: Query) -> Unlearned:
        """Return a query's ascent, made anew."""
        context, config = self.context, self.context.config.teacher
        assert config.learning_rate is not None
        model = context.teacher_model()
        ascent = Ascent(
            learning_rate=config.learning_rate,
            forget_weight=config.forget_weight,
            null_loss=self._null_loss(),
            rows=config.gradient_pairs,
            most_steps=config.most_steps,
            seed=config.seed,
        )
        try:
            return unlearn(
                model,
                context.layers(model),
                self._retained(),
                model.encode_images([query.image])[0],
                model.encode_captions([query.caption]),
                ascent,
                owner=query.owner,
                micro_batch=context.micro_batch("gradients"),
            )
        except NonFiniteLoss as error:
            raise UsageError(
                f"query {query.query_id} cannot be unlearned, {error}; if it happens to all queries, lower "
                "teacher.learning_rate"
            ) from error

    def _null_loss(self) -> float:
        context, seed = self.context, self.context.config.teacher.seed

        def load() -> float:
            model = context.teacher_model()
            untrained = to_train(context.model(), seed=seed, continued=False)
            size = context.micro_batch("losses")
            return untrained_loss(model, untrained, self._retained(), seed=seed, micro_batch=size)

        return context.loaded.once("untrained loss", self.artifact, load)

    def _retained(self) -> SampleBlock:
        """Return the training images that are not to be forgotten: at most `RETAINED`, the same for all queries."""
        context, rows = self.context, self.latents.rows

        def load() -> SampleBlock:
            draw = torch.Generator().manual_seed(context.config.teacher.seed)
            chosen = torch.randperm(rows, generator=draw)[:RETAINED].sort().values.tolist()
            unreadable = unreadable_samples(self.latents, chosen)
            return load_block(context, self.latents, [number for number in chosen if number not in unreadable])

        return context.loaded.once("retained images", self.artifact, load)


class Mucs:
    """The family of MUCS; see `tasks.teaching.families.Family`."""

    def check(self, context: Context) -> None:
        """Raise UsageError where the noise plan does not fit the model's schedule."""
        noise_plan(context.config).timestep_values(train_timesteps(context.config.model.folder))

    def artifacts(self, context: Context, samples: Artifact, queries: Artifact) -> list[Artifact]:
        latents = latents_of(context, samples)
        return [latents, ascents_of(context, latents, queries), base_losses_of(context, latents)]

    def parts(self, context: Context, artifacts: Artifacts) -> list[Parts]:
        latents = artifacts["latents"]
        return [
            LatentParts(context, artifacts["samples"], latents),
            AscentParts(context, latents, artifacts["queries"], artifacts["unlearning steps"]),
            BaseLossParts(context, latents, artifacts["base losses"]),
        ]

    def key(self, context: Context, artifacts: Artifacts) -> str:
        return artifacts["unlearning steps"].key

    def shard_shape(self, config: PipelineConfig, queries: int) -> tuple[int, int | None]:
        """Return one query and all its candidates."""
        return 1, None

    def scores(
        self, context: Context, artifacts: Artifacts, query_numbers: list[int], train_ids: NDArray[np.int64]
    ) -> BlockScores:
        latents, base_losses = artifacts["latents"], artifacts["base losses"]
        model, plan = context.teacher_model(), noise_plan(context.config)
        known = unreadable_samples(latents, train_ids.tolist()) | without_base_loss(context, base_losses, train_ids)

        def of_samples(chosen: NDArray[np.int64]) -> Tensor:
            layers, size, found = context.layers(model), context.micro_batch("losses"), list[Tensor]()
            for block in blocks_ahead(context, latents, chosen.tolist()):
                base = load_base_losses(context, base_losses).of(block).to(context.device)
                updates = QueryUpdates(context, artifacts["unlearning steps"], query_numbers, 1)
                several = [
                    exact_scores(
                        model, layers, plan, block, base, {name: each[0] for name, each in update.items()}, size
                    )
                    for update in updates
                ]
                found.append(torch.stack(several).cpu())
            return torch.cat(found, dim=1)

        nothing = torch.empty(len(query_numbers), 0, dtype=torch.float64)
        good, values, left_out = without_bad_samples(train_ids, known, of_samples, nothing)
        return BlockScores(good, values, torch.full_like(values, torch.nan), left_out)

    def costs(self, config: PipelineConfig, size: Size) -> list[KindCost]:
        """Return the costs of ascents that end when those as published do, long before the last step they may take."""
        teacher, queries, pairs = config.teacher, size.queries, size.queries * size.candidates
        noises = teacher.timestep_count * teacher.draws * config.model.images * size.captions
        steps = min(teacher.most_steps, EXPECTED_ASCENT)
        ascent = NULL_ROWS + steps * 2 * teacher.gradient_pairs * MLP_GRADIENT_FORWARDS
        parts = -(-size.samples // BASE_LOSS_PART)
        return [
            KindCost("unlearning steps", queries, queries, queries * ascent),
            KindCost("base losses", parts, size.samples, size.samples * noises),
            KindCost("scores", queries, pairs, pairs * noises),
        ]


FAMILY = Mucs()
