"""`/v1/queries`: the published queries and their images."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from tasks.inputs import queries as stored
from tasks.serving.http.problems import responses
from tasks.serving.http.replies import reply
from tasks.serving.http.routes.samples import PICTURE, Size
from tasks.serving.http.service import service_of
from tasks.serving.http.thumbnails import check_size, known, picture_response, tag_of, thumbnail

router = APIRouter(tags=["queries"])
QueryId = Annotated[str, Path(max_length=200, examples=["q0000"])]


class QueryRow(BaseModel):
    """A stored query."""

    query_id: str
    split: str
    caption: str


class QueryPage(BaseModel):
    """Some of the stored queries, in order."""

    total: int = Field(description="how many there are of this split")
    offset: int
    queries: list[QueryRow]


@router.get("/v1/queries", responses={200: {"model": QueryPage}, **responses(422, 503)})
async def queries(
    request: Request,
    split: Annotated[str | None, Query(max_length=20, description="train, validation, test, twin or pseudo")] = None,
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The queries that are published, in order."""
    found = [query for query in service_of(request).engine.current.queries.values() if split in (None, query.split)]
    rows = [_row(query) for query in found[offset : offset + limit]]
    return reply({"total": len(found), "offset": offset, "queries": rows})


@router.get("/v1/queries/{query_id}", responses={200: {"model": QueryRow}, **responses(404, 422, 503)})
async def query(request: Request, query_id: QueryId) -> Response:
    """One stored query."""
    return reply(_row(service_of(request).engine.query(query_id)))


@router.get("/v1/queries/{query_id}/image", response_class=Response, responses={**PICTURE, **responses(404, 422, 503)})
async def image(request: Request, query_id: QueryId, size: Size = None) -> Response:
    """The image of a stored query, as it was generated: PNG."""
    service = service_of(request)
    check_size(service.limits, size)
    asked = service.engine.query(query_id)
    tag = tag_of("query", str(asked.path), query_id, size)
    if (answer := known(request, tag)) is not None:
        return answer
    if size is None:
        return picture_response(await service.reading(lambda: asked.encoded), "image/png", tag)
    return await thumbnail(service, tag, lambda: asked.encoded, size)


def _row(query: stored.Query) -> dict[str, Any]:
    return {"query_id": query.query_id, "split": query.split, "caption": query.caption}
