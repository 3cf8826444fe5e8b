"""The scores of a run's rivals, as far as they have any."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from storage_schemas import tables
from storage_schemas.runs.rivals import RivalRecord, read_rivals
from storage_schemas.snapshots.snapshots import read_influence
from tasks.inputs.queries import load_queries
from tasks.teaching.run import Run


@dataclass(frozen=True)
class Rivals:
    """The rivals of a run that were scored, and those that could not be, by name in the order of its configuration."""

    run: Run
    scored: Mapping[str, RivalRecord]
    failed: Mapping[str, str]

    @classmethod
    def of(cls, run: Run) -> Rivals:
        known = read_rivals(run.workspace, run.name)
        wanted = {name: known[name] for name in (run.config.judge.rivals if run.config.judge else ()) if name in known}
        scored = {name: record for name, record in wanted.items() if record.snapshot}
        return cls(run, scored, {name: record.failed for name, record in wanted.items() if not record.snapshot})

    @property
    def key(self) -> list[tuple[str, str, int | None]]:
        """What the scores depend on."""
        return [(name, record.snapshot, self._nearest(name)) for name, record in self.scored.items()]

    def scores(self, names: Collection[str] | None = None, *, left_out: float) -> dict[str, Tensor]:
        """Return scores of all samples for all queries by rival, (queries, samples) float64.

        Args:
            names: these rivals alone; None: all.
            left_out: of samples that are no candidates of a query, or not among its nearest.
        """
        wanted = [name for name in self.scored if names is None or name in names]
        return {name: each.masked_fill(each.isnan(), left_out) for name in wanted for each in [self._kept(name)]}

    def _kept(self, name: str) -> Tensor:
        """Return a rival's scores, NaN of what was left out; kept with the run, as several checks ask for them."""
        key = name, self.scored[name].snapshot, self._nearest(name)
        return self.run.context.loaded.once("rivals", key, lambda: self._scores(name), most=len(self.scored))

    def _nearest(self, name: str) -> int | None:
        assert self.run.config.judge is not None
        return self.run.config.judge.rivals[name].nearest

    def _scores(self, name: str) -> Tensor:
        record, workspace = self.scored[name], self.run.workspace
        query_ids = [query.query_id for query in load_queries(self.run.artifacts["queries"])]
        found = torch.full((len(query_ids), self.run.artifacts["samples"].rows), torch.nan, dtype=torch.float64)
        place = {query_id: row for row, query_id in enumerate(query_ids)}
        rows = read_influence(workspace, record.snapshot, query_ids)
        at = [place[query_id] for query_id in rows["query_id"].to_pylist()], rows["train_id"].to_pylist()
        found[at] = torch.from_numpy(rows["score"].to_numpy().copy()).double()
        if (nearest := self._nearest(name)) is not None:
            # A query of the twin test is scored against its twin in any case, which the judges are not to see.
            near = tables.read(workspace.candidates(record.run), tables.CANDIDATES).to_pydict()
            for query_id, train_id, rank in zip(near["query_id"], near["train_id"], near["neighbor_rank"], strict=True):
                if not 0 < rank <= nearest:
                    found[place[query_id], train_id] = torch.nan
        return found
