"""What models without the samples that methods named lost, and how far their pictures are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fastgda_core.evaluation.counterfactual import lead, loss_changes
from storage_schemas import tables
from tasks.judging.methods import UNTUNED
from tasks.judging.metric_rows import metric_row
from tasks.teaching.pool import Retraining
from tasks.teaching.retrainings import RemovalParts
from tasks.teaching.run import Run
from tasks.watching.trust import CAPTIONS

NOTHING = "nothing removed"  # the method of a model of all samples, whose pictures differ, too
MSE, SIMILARITY = "mse", "similarity"


@dataclass(frozen=True, eq=False)
class Removals:
    """The models of a run that were trained without named samples, averaged over the seeds.

    plan: rows of `tables.REMOVALS`; before: losses of the models of all samples, by seed; far: mse and similarity by
    model and query, empty where no picture was generated.
    """

    parts: RemovalParts
    plan: list[dict[str, Any]]
    before: dict[int, Tensor]
    far: dict[tuple[str, str], tuple[float, float | None]]

    @classmethod
    def of(cls, run: Run) -> Self:
        parts = run.parts[RemovalParts.kind]
        assert isinstance(parts, RemovalParts)
        far = {}
        if parts.config.regenerate:
            path = run.workspace.regeneration_distances(run.name)
            for row in tables.read(path, tables.REGENERATION_DISTANCES).to_pylist():
                far[row["retraining"], row["query_id"]] = row["mse"], row["similarity"]
        return cls(parts, parts.removals(), {seed: parts.losses_of(Retraining(seed)) for seed in parts.seeds}, far)

    def changes(self, removed: tuple[int, ...]) -> Tensor:
        """Return the change of each query's loss, as a share of what it was: (queries,) float64."""
        after = {seed: self.parts.losses_of(Retraining(seed, removed=removed)) for seed in self.parts.seeds}
        return torch.stack([loss_changes(after[seed], self.before[seed]) for seed in after]).mean(0)

    def distances(self, removed: tuple[int, ...], query_ids: list[str]) -> dict[str, Tensor]:
        """Return mse and similarity of the queries' pictures, (queries,) float64 each; none that was not measured."""
        if not self.far:
            return {}
        several = [Retraining(seed, removed=removed) for seed in self.parts.seeds]
        models = [each.id(self.parts.config, self.parts.samples.rows) for each in several]
        found = {}
        for place, name in enumerate((MSE, SIMILARITY)):
            values = [[self.far[model, query][place] for query in query_ids] for model in models]
            if all(value is not None for row in values for value in row):
                found[name] = torch.tensor(values, dtype=torch.float64).mean(0)
        return found


def ahead_rows(removal: str, changes: Mapping[tuple[str, int], Tensor]) -> Iterator[dict[str, object]]:
    """Yield how far each method is ahead of the cheap one, captions or else features, query by query.

    Queries differ more than methods do. Where models are trained without what neither of the two names, nothing is
    yielded.

    Args:
        removal: what the rows are named after.
        changes: of the queries' losses, (queries,), by method and K.
    """
    for (method, k), mine in changes.items():
        cheap = next((name for name in (CAPTIONS, UNTUNED) if (name, k) in changes), None)
        if cheap is not None and method != cheap:
            yield metric_row(f"{removal} ahead of {cheap}", method, lead(mine, changes[cheap, k]), cutoff=k)
