"""What SQL leaves out: the rows about training samples that are taken down."""

from __future__ import annotations

import functools

import numpy as np

from storage_schemas import tables
from storage_schemas.files import AnyPath
from storage_schemas.heads.records import holds_any
from storage_schemas.table import Table
from storage_schemas.tombstones import read_tombstones, removed_ids
from storage_schemas.workspace import Workspace


class Mask:
    """What is left out of the rows that are about one table of samples."""

    def __init__(self, train_ids: list[int]) -> None:
        self.train_ids = train_ids

    def rows(self, table: Table) -> str:
        """Return an SQL condition that leaves rows about removed samples out; empty where there are none."""
        if not self.train_ids or "train_id" not in table.schema.names:
            return ""
        return f" WHERE train_id NOT IN ({self._listed()})"

    def queries(self, twins: str | None) -> str:
        """As `rows`, for queries: one of the twin test may be a training image itself.

        Args:
            twins: SQL of the files that say of which sample; None where there is no twin test.
        """
        if not self.train_ids or twins is None:
            return ""
        removed = f"SELECT query_id FROM read_parquet({twins}) WHERE train_id IN ({self._listed()})"
        return f" WHERE split <> '{tables.PSEUDO}' OR query_id NOT IN ({removed})"

    def _listed(self) -> str:
        return ", ".join(map(str, self.train_ids))


class Masks:
    """The masks of a workspace at one moment."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.tombstones = read_tombstones(workspace)
        self._mask = functools.cache(lambda samples: Mask(removed_ids(workspace, samples, self.tombstones).tolist()))

    def of(self, samples: str | None) -> Mask:
        """Return what is left out of rows about this table of samples."""
        mask: Mask = self._mask(samples)
        return mask

    def stale(self, samples: str | None) -> bool:
        """Return whether samples of a table are taken down."""
        return bool(self.of(samples or None).train_ids)

    def stale_index(self, index: AnyPath, samples: str | None) -> bool:
        """Return whether an index of a table holds vectors of samples that are taken down."""
        return holds_any(index, np.array(self.of(samples or None).train_ids, np.int64))
