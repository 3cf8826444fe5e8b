"""Parts that are files of tensors, and those of one query each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

from safetensors.torch import save_file
from torch import Tensor

from fastgda_core.errors import UsageError
from storage_schemas.commit import Manifest, commit
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.inputs.queries import Query
from tasks.parts import Parts


class TensorParts(Parts):
    """Parts that hold tensors by name, as safetensors."""

    suffix: ClassVar[str] = "safetensors"
    context: Context

    def keep(
        self,
        number: int,
        tensors: dict[str, Tensor],
        started: float,
        *,
        rows: int | None = None,
        device: str | None = None,
        quarantined: Mapping[int, str] | None = None,
    ) -> Manifest:
        """Commit the tensors of a part, contiguous and on the CPU.

        Args:
            number: of the part.
            tensors: by name.
            started: `time.monotonic()` at which the work behind them began.
            rows: that it has; default: those planned.
            device: that made them; default: the context's.
            quarantined: samples that it lacks, and why.
        """
        return commit(
            self.path(number),
            functools.partial(save_file, tensors),
            key=self.key(number),
            rows=self.rows(number) if rows is None else rows,
            started=started,
            device=device or str(self.context.device),
            quarantined=quarantined,
        )


class QueryParts(TensorParts):
    """Parts of one query each."""

    of_queries = True
    queries: Artifact

    @property
    def count(self) -> int:
        return self.queries.rows

    def rows(self, number: int) -> int:
        return 1


def without_a_number(query: Query) -> UsageError:
    """Return what a person is told of a query whose loss is no number: no other sample could stand in for it."""
    return UsageError(
        f"the loss of query {query.query_id} is no number: look at its image and caption, then take it out of the "
        "query set or mend it"
    )
