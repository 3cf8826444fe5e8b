"""Retrainings: models trained again without some samples, and their losses on every query."""

from __future__ import annotations

import functools
import io
import json
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fastgda_core.diffusion.folder import read_index
from fastgda_core.diffusion.training import CaptionedLatents, DenoiserTrainer, DenoiserTraining
from fastgda_core.errors import UsageError
from fastgda_core.evaluation.retraining import query_losses, to_train
from fastgda_core.interruption import checkpoint
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, committed, input_key, read_manifest, write_atomically
from storage_schemas.files import (
    AnyPath,
    is_there,
    private_folder,
    read_whole,
    remove,
    write_changed,
)
from storage_schemas.listings import committed_parts, list_folder
from storage_schemas.which_workspace import command
from storage_schemas.workspace import beside_retrained, recipe, regenerated, retrained
from tasks.artifact import Artifact
from tasks.config.judging import JudgeConfig, RetrainConfig, TrainerConfig
from tasks.context import Context
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import rows_of_samples
from tasks.parts import Parts
from tasks.teaching.kept_models import KeptModel, pictures_key
from tasks.teaching.latents import load_block, unreadable_samples
from tasks.teaching.pool import Reason, Retraining, pool_of
from tasks.teaching.trainer import Trainer

STATE_SECONDS = 60.0  # between two states from which a training goes on
REMOVAL_PLAN = "removal plan"


def judged_by(
    context: Context, config: JudgeConfig, latents: Artifact, queries: Artifact, run: str
) -> dict[str, Artifact]:
    """Return the artifacts of the judge by kind, which need not be made yet.

    Their key is the recipe's, and what models are taught and asked: whoever asks for the same model gets it.
    """
    begun_with = context.model_hash if _continued(config) else "fresh"
    key = input_key("retrainings", latents.key, queries.key, begun_with, config.recipe, table=tables.RETRAINED_LOSSES)
    rows, folder = queries.rows * config.draws, context.workspace.retrainings(key)
    found = [Artifact(RetrainingParts.kind, key, folder, len(pool_of(config)) * rows)]
    if config.leave_out is not None:
        found.append(Artifact(RemovalParts.kind, key, folder, config.leave_out.models * rows))
        found.append(Artifact(REMOVAL_PLAN, run, context.workspace.removals(run), 0))
    return {artifact.name: artifact for artifact in found}


class TrainedAgain(Parts):
    """Models that are trained again, a part each: its losses on every query."""

    after_scores = when_judged = True

    def __init__(
        self, context: Context, samples: Artifact, latents: Artifact, queries: Artifact, models: Artifact
    ) -> None:
        assert context.config.judge is not None
        self.context, self.samples, self.latents, self.queries = context, samples, latents, queries
        self.artifact = models
        self.config = context.config.judge
        self._known: dict[str, Retraining] = {}

    @property
    def _by_id(self) -> dict[str, Retraining]:
        if not self._known:  # what is removed is known when the scores are
            self._known = {each.id(self.config, self.latents.rows): each for each in self._pool()}
        return self._known

    @property
    def pool(self) -> list[Retraining]:
        """The models, in order, each once."""
        return list(self._by_id.values())

    @property
    def ids(self) -> list[str]:
        return list(self._by_id)

    @abstractmethod
    def _pool(self) -> list[Retraining]:
        """Return the models; none as long as they are not known."""

    @abstractmethod
    def reasons(self) -> list[tuple[Retraining, Reason]]:
        """Return the models, each with why it is trained without what; one may have several reasons."""

    @property
    def count(self) -> int:
        return len(self.pool)

    def path(self, number: int) -> AnyPath:
        return retrained(self.artifact.path, self.ids[number])

    def rows(self, number: int) -> int:
        return self.queries.rows * self.config.draws

    def made(self, number: int) -> Manifest | None:
        kept = self._kept(number)
        there = (not self.config.keep_weights or kept.has_weights()) and (
            not self._draws_again(number) or kept.has_pictures()
        )
        return super().made(number) if there else None

    def committed(self) -> dict[int, Manifest]:
        there = super().committed()
        if self.config.keep_weights:
            there = {number: manifest for number, manifest in there.items() if self._kept(number).has_weights()}
        if self.config.regenerate:
            pictures = committed_parts(regenerated(self.artifact.path, "").parent, pictures_key(self.artifact.key))
            drawn = {
                number for number, name in enumerate(self.ids) if regenerated(self.artifact.path, name).name in pictures
            }
            there = {number: there[number] for number in there if number in drawn or not self._draws_again(number)}
        return there

    def _kept(self, number: int) -> KeptModel:
        return KeptModel(self.artifact.path, self.artifact.key, self.ids[number], self._part)

    @functools.cached_property
    def _part(self) -> str:
        return read_index(self.context.config.model.folder).denoiser_part

    def _draws_again(self, number: int) -> bool:
        return self.config.regenerate and self.pool[number].draws_again

    def make(self, number: int) -> Manifest:
        """Train one model, from where another start left it, and commit what is kept of it."""
        started = time.monotonic()
        if self.config.keep_weights and self._kept(number).has_weights():
            denoiser = to_train(self.context.model(), seed=0, continued=_continued(self.config))
            return self._keep(number, self._kept(number).load_into(denoiser), started)
        if isinstance(self.config.retrain, RetrainConfig):
            made = self._keep(number, self._train(number, self.config.retrain), started)
            remove(self._beside(number, "state"))
            return made
        trainer = self._trainer(number, self.config.retrain)
        with trainer.alone() as lock:
            manifest = self.made(number)  # by a process that this one waited for
            if manifest is None:
                manifest = self._keep(number, self._train_by_command(number, trainer, lock), started)
            trainer.clear()
        return manifest

    def _beside(self, number: int, what: str) -> AnyPath:
        return beside_retrained(self.artifact.path, self.ids[number], what)

    def _train(self, number: int, recipe: RetrainConfig) -> torch.nn.Module:
        """Train one model by the built-in recipe, from its last state where one was kept."""
        retraining = self.pool[number]
        kept = retraining.kept(self.config, self.latents.rows)
        model, data = self.context.model(), self.data()
        denoiser = to_train(model, seed=retraining.seed, continued=recipe.continued)
        training = DenoiserTraining(**recipe.hyperparameters, seed=retraining.seed)
        trainer = DenoiserTrainer(denoiser, model.schedule, data.without((~kept).nonzero().flatten()), training)
        state = self._beside(number, "state")
        if is_there(state):
            trainer.restore(torch.load(io.BytesIO(read_whole(state)), weights_only=True, map_location="cpu"))
        written = time.monotonic()

        def look(step: int, loss: float, ema: torch.nn.Module) -> None:
            nonlocal written
            checkpoint()
            if time.monotonic() - written > STATE_SECONDS:
                write_atomically(state, _packed(trainer.state()))
                written = time.monotonic()

        return trainer.run(on_step=look)

    def _trainer(self, number: int, config: TrainerConfig) -> Trainer:
        """Return the training of one model by the user's command, whose folder is on this machine's disk."""
        folder, log = self._beside(number, "begun"), self._beside(number, "log")
        if isinstance(folder, Path) and isinstance(log, Path):
            return Trainer(config, folder, log)
        here = private_folder("trainings") / self.artifact.key / self.ids[number]
        return Trainer(config, here, here.with_suffix(".log"))

    def _train_by_command(self, number: int, trainer: Trainer, lock: int) -> torch.nn.Module:
        retraining = self.pool[number]
        removed = (~retraining.kept(self.config, self.latents.rows)).nonzero().flatten()
        named = rows_of_samples(self.samples.path, removed.tolist(), ["train_id", "key", "shard"])
        try:
            trainer.train(named, retraining.seed, str(self.context.device), lock)
            trained: torch.nn.Module = trainer.load(self.context.model())
            return trained
        finally:
            log = self._beside(number, "log")
            if trainer.log != log and trainer.log.exists():
                write_atomically(log, trainer.log.read_bytes())

    def _keep(self, number: int, trained: torch.nn.Module, started: float) -> Manifest:
        """Commit what is kept of a trained model and is not there yet: its losses last, by which it counts as made."""
        described = json.dumps(self.config.recipe, indent=2, sort_keys=True) + "\n"
        write_changed(recipe(self.artifact.path), described.encode())
        kept = self._kept(number)
        if self.config.keep_weights and not kept.has_weights():
            kept.keep_weights(trained)
        if self._draws_again(number) and not kept.has_pictures():
            model = replace(self.context.model(), denoiser=trained)
            kept.keep_pictures(model, self.context.config.queries, self.queries)
        if (manifest := committed(self.path(number), self.key(number))) is not None:
            return manifest
        rows = pa.Table.from_batches(self._losses(number, trained), schema=tables.RETRAINED_LOSSES.schema)
        return commit_table(
            self.path(number),
            rows,
            tables.RETRAINED_LOSSES,
            key=self.key(number),
            started=started,
            device=str(self.context.device),
        )

    def check(self) -> None:
        """Delete what is left of trainings whose process died after it had committed what is kept of the model."""
        there = list_folder(self.artifact.path)
        for number in range(self.count):
            state, begun = self._beside(number, "state"), self._beside(number, "begun")
            if state.name in there:
                remove(state)
            if begun.name in there and isinstance(self.config.retrain, TrainerConfig):
                self._trainer(number, self.config.retrain).clear()

    def data(self) -> CaptionedLatents:
        """All readable samples, on the CPU; loaded once a process."""

        def load() -> CaptionedLatents:
            bad = unreadable_samples(self.latents, range(self.latents.rows))
            if bad:
                train_id, reason = next(iter(bad.items()))
                raise UsageError(
                    f"{len(bad)} samples cannot be trained on, first {train_id} ({reason}): mend them, then "
                    f"{command(self.context.workspace, 'retry RUN')}"
                )
            block = load_block(self.context, self.latents, list(range(self.latents.rows)))
            empty = self.context.model().encode_captions([""])
            return CaptionedLatents.on_cpu(block.latents[:, 0], block.condition, block.owner, empty)

        return self.context.loaded.once("training data", self.latents, load)

    def _losses(self, number: int, denoiser: torch.nn.Module) -> Iterator[pa.RecordBatch]:
        model, draws = self.context.model(), self.config.draws
        for query in load_queries(self.queries):
            losses, timesteps = query_losses(
                model,
                denoiser,
                model.encode_images([query.image])[0],
                model.encode_captions([query.caption]),
                owner=query.owner,
                seed=self.config.seed,
                pairs=draws,
                micro_batch=self.context.micro_batch("judge"),
            )
            yield from tables.RETRAINED_LOSSES.rows(
                retraining=[self.ids[number]] * draws,
                query_id=[query.query_id] * draws,
                draw=np.arange(draws, dtype=np.int32),
                timestep=timesteps.to(torch.int32).numpy(),
                loss=losses.numpy(),
            ).to_batches()

    def losses_of(self, retraining: Retraining) -> Tensor:
        """Read the losses of one of the models; see `losses`."""
        return self.losses(self.ids.index(retraining.id(self.config, self.latents.rows)))

    def losses(self, number: int) -> Tensor:
        """Read the losses of one model, (draws, queries) float64, in the order of the query set."""
        table = tables.read(self.path(number), tables.RETRAINED_LOSSES)
        place = {query.query_id: row for row, query in enumerate(load_queries(self.queries))}
        found = torch.empty(self.config.draws, len(place), dtype=torch.float64)
        column = torch.tensor([place[name] for name in table["query_id"].to_pylist()])
        draw = torch.from_numpy(table["draw"].to_numpy().copy()).long()
        found[draw, column] = torch.from_numpy(table["loss"].to_numpy().copy())
        return found


class RetrainingParts(TrainedAgain):
    """The judge's pool of random subsets."""

    kind, title = "retrainings", "models trained again"

    def _pool(self) -> list[Retraining]:
        return pool_of(self.config)

    def reasons(self) -> list[tuple[Retraining, Reason]]:
        return [(each, Reason("" if each.subset is None else "subset")) for each in self.pool]


class RemovalParts(TrainedAgain):
    """Models without the samples that methods named for some queries, by the run's plan of removals."""

    kind, title = "removals", "models without what was named"

    def __init__(
        self,
        context: Context,
        samples: Artifact,
        latents: Artifact,
        queries: Artifact,
        models: Artifact,
        plan: Artifact,
    ) -> None:
        super().__init__(context, samples, latents, queries, models)
        self.plan = plan
        self._planned: Manifest | None = None

    @property
    def count(self) -> int:
        self._look_at_the_plan()
        return super().count

    def made(self, number: int) -> Manifest | None:
        self._look_at_the_plan()
        return super().made(number)

    def _look_at_the_plan(self) -> None:
        """Forget the models of an earlier plan: settings and labels may change under a run."""
        manifest = read_manifest(self.plan.path)
        if manifest != self._planned:
            self._planned, self._known = manifest, {}

    def _pool(self) -> list[Retraining]:
        return [each for each, _ in self.reasons()]

    def reasons(self) -> list[tuple[Retraining, Reason]]:
        found: list[tuple[Retraining, Reason]] = []
        for seed in self.seeds if self.removals() else ():
            found.append((Retraining(seed), Reason()))
            for row in self.removals():
                only = "" if row["pooled"] else row["targets"][0]
                found.append((Retraining(seed, removed=tuple(row["removed"])), Reason(row["method"], row["k"], only)))
        return found

    @property
    def seeds(self) -> range:
        """From which each removal is trained."""
        assert self.config.leave_out is not None
        return range(self.config.seed, self.config.seed + self.config.leave_out.seeds)

    def removals(self) -> list[dict[str, Any]]:
        """Read the run's plan of removals; empty as long as there is none."""
        return tables.read(self.plan.path, tables.REMOVALS).to_pylist() if is_there(self.plan.path) else []


def _continued(config: JudgeConfig) -> bool:
    return isinstance(config.retrain, RetrainConfig) and config.retrain.continued


def _packed(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
