"""`/v1/shares`: who is owed what part of the influence; `/v1/columns`: by what it can be summed and filtered."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from storage_schemas.errors import StoreError
from storage_schemas.snapshots.published import NotPublished
from storage_schemas.sql.shares import payee_columns
from storage_schemas.sql.views import connect
from tasks.serving.http.problems import Problem, one_line, responses
from tasks.serving.http.replies import reply
from tasks.serving.http.service import service_of
from tasks.serving.shares import SharesAnswer, published_shares

router = APIRouter(tags=["shares"])


class Asked(BaseModel):
    """Whose shares, of which queries; what is given together has to hold together."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"by": "shard", "split": "test"}]})

    by: str = Field(
        default="shard", min_length=1, max_length=200, description="column of samples, or key of their metadata"
    )
    query_ids: list[str] | None = Field(default=None, min_length=1, max_length=10_000, description="of these alone")
    split: str | None = Field(default=None, max_length=20, description="of this split alone")
    since: datetime | None = Field(default=None, description="queries that a run planned from then on scored")
    until: datetime | None = Field(default=None, description="queries that a run planned before then scored")


class Column(BaseModel):
    """A column of samples, or a key of their metadata."""

    name: str
    type: str = Field(description="DuckDB's name of it")


class Columns(BaseModel):
    """By what samples can be filtered, and influence summed."""

    columns: list[Column]


@router.post("/v1/shares", responses={200: {"model": SharesAnswer}, **responses(400, 401, 415, 422, 429, 503)})
async def shares(request: Request, asked: Annotated[Asked, Body()]) -> Response:
    """The share of each creator, tar or other group in the influence on queries, with how sure that is."""
    service = service_of(request)
    service.engine.check()
    try:
        return reply(
            await service.slowly(
                lambda: published_shares(
                    service.workspace,
                    asked.by,
                    query_ids=asked.query_ids,
                    split=asked.split,
                    since=_utc(asked.since),
                    until=_utc(asked.until),
                )
            )
        )
    except NotPublished:
        raise
    except StoreError as error:  # there is no such column, query or split
        raise Problem(400, one_line(error), "by") from None


@router.get("/v1/columns", responses={200: {"model": Columns}, **responses(401, 503)})
async def columns(request: Request) -> Response:
    """The columns of samples, and the keys of their metadata."""
    service = service_of(request)
    service.engine.check()

    def read() -> list[dict[str, str]]:
        with connect(service.workspace.root, threads=1) as connection:
            return [{"name": name, "type": kind} for name, kind in payee_columns(connection).items()]

    return reply({"columns": await service.slowly(read)})


def _utc(given: datetime | None) -> datetime | None:
    return given.replace(tzinfo=UTC) if given is not None and given.tzinfo is None else given
