"""What is written down of rank heads and indexes."""

from __future__ import annotations

import json
from typing import Any

from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, read_if_there
from storage_schemas.runs.ledger import read_run
from storage_schemas.workspace import Workspace


def index_samples(workspace: Workspace, head: AnyPath, index: AnyPath) -> str:
    """The table of samples that an index's train_ids number, relative to the workspace.

    Indexes of earlier releases do not say. They were built on the data of the snapshot that their head learned from.

    Raises:
        StoreError: such an index has a head that learned from no snapshot.
    """
    samples, learned = index_description(index).get("samples"), json.loads(read_if_there(head / "head.json") or b"{}")
    if samples is None and learned.get("snapshot"):
        samples = read_run(workspace, learned["run"]).samples
    if samples is None:
        raise StoreError(
            f"{index} does not say which training data it is of: `fastgda index CONFIG --head {head.name}` "
            "writes it down"
        )
    return str(samples)


def index_description(index: AnyPath) -> dict[str, Any]:
    """An index version's `index.json`; empty where there is none."""
    return dict(json.loads(read_if_there(index / "index.json") or b"{}"))
