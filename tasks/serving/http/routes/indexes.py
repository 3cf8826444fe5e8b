"""`/v1/indexes`: which versions there are, how good each is, and which one answers."""

from __future__ import annotations

import math
import statistics
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from storage_schemas.heads.evaluations import Precision
from storage_schemas.publishing.index_versions import IndexVersion, cutoff_of, index_versions
from storage_schemas.snapshots.published import published_or_none
from storage_schemas.workspace import Workspace
from tasks.serving.answers import Versions
from tasks.serving.http.problems import responses
from tasks.serving.http.replies import reply
from tasks.serving.http.service import service_of

router = APIRouter(tags=["indexes"])


class IndexRow(BaseModel):
    """One index that was built."""

    version: str
    served: bool = Field(description="whether it is published; `served` beside the list says what this process serves")
    kind: str = Field(description="FAISS's name of it; empty of an earlier release's, which is exact")
    reason: str = Field(description="why this kind")
    head: str
    vectors: int
    size: int = Field(description="bytes of its files")
    created_at: str | None
    recall_at_10: float | None = Field(description="against exact search")
    recall_at_100: float | None
    map: float | None = Field(description="mAP of its head on the test queries")
    map_error: float | None = Field(description="standard error over these queries")
    stale: bool = Field(description="whether it holds vectors of samples that were taken down since")
    rollbacks: int | None = Field(description="how many rollbacks lead to it")


class Indexes(BaseModel):
    """All versions, the one built last first."""

    served: Versions
    cutoff: int = Field(description="L of mAP(L)")
    indexes: list[IndexRow]


@router.get("/v1/indexes", responses={200: {"model": Indexes}, **responses(401, 503)})
async def indexes(request: Request) -> Response:
    """The versions of the index, and which one is served."""
    service = service_of(request)
    served = service.engine.current.versions
    return reply({"served": served, **await service.slowly(lambda: _listed(service.workspace))})


def _listed(workspace: Workspace) -> dict[str, Any]:
    published = published_or_none(workspace)
    snapshot = published.snapshot if published else ""
    rows = [_row(each, snapshot) for each in index_versions(workspace, published)]
    return {"cutoff": cutoff_of(published), "indexes": rows}


def _row(each: IndexVersion, snapshot: str) -> dict[str, Any]:
    precision = each.precision_on(snapshot)
    return {
        "version": each.version,
        "served": each.served,
        "kind": each.kind,
        "reason": each.reason,
        "head": each.head,
        "vectors": each.vectors,
        "size": each.size,
        "created_at": each.built_at.isoformat() if each.built_at else None,
        "recall_at_10": each.recall_at_10,
        "recall_at_100": each.recall_at_100,
        "map": precision.mean if precision else None,
        "map_error": _error(precision),
        "stale": each.stale,
        "rollbacks": each.rollbacks,
    }


def _error(precision: Precision | None) -> float | None:
    values = list(precision.queries.values()) if precision else []
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
