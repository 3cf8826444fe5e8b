"""`/v1/shares`: who is owed what part of the influence; `/v1/columns`: by what it can be summed and filtered."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from storage_schemas.errors import StoreError
from storage_schemas.snapshots.published import NotPublished
from storage_schemas.sql.shares import payee_columns
from storage_schemas.sql.views import connect
from tasks.serving.http.problems import Problem, one_line, responses
from tasks.serving.http.questions import body_of, checked, read_fields
from tasks.serving.http.replies import reply
from tasks.serving.http.service import Service, service_of
from tasks.serving.http.settings import Limits
from tasks.serving.http.uploads import decoded
from tasks.serving.picture_shares import OtherPublished
from tasks.serving.shares import published_shares
from tasks.serving.shares_answer import SharesAnswer

EXAMPLE: dict[str, Any] = {"by": "shard", "split": "test"}

router = APIRouter(tags=["shares"])


class Asked(BaseModel):
    """Whose shares, of which queries, or of which picture; what is given together has to hold together."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    by: str = Field(
        default="shard", min_length=1, max_length=200, description="column of samples, or key of their metadata"
    )
    query_ids: list[str] | None = Field(default=None, min_length=1, max_length=10_000, description="of these alone")
    split: str | None = Field(default=None, max_length=20, description="of this split alone")
    since: datetime | None = Field(default=None, description="queries that a run planned from then on scored")
    until: datetime | None = Field(default=None, description="queries that a run planned before then scored")
    image: bytes | None = Field(
        default=None, description="of a picture that no teacher scored: PNG, JPEG or WebP, base64 in JSON; never a URL"
    )
    caption: str | None = Field(default=None, description="the caption that the image was generated from")
    tier: Literal["fast", "sketch"] | None = Field(
        default=None, description="of an image; fast, which it is unless given: from the index; sketch: its gradient"
    )

    def check(self, limits: Limits) -> None:
        """Raise Problem where a limit is passed, or where a picture is asked about together with queries."""
        if self.image is None and self.caption is None and self.tier is None:
            return
        if not self.image or self.caption is None:
            lacks = "image" if not self.image else "caption"
            raise Problem(400, "image, caption and tier go together: give the picture and its caption", lacks)
        if not self.caption.strip():
            raise Problem(400, "caption is blank: give the caption that the image was generated from", "caption")
        if len(self.caption) > limits.caption:
            raise Problem(400, f"caption has {len(self.caption)} characters: {limits.caption} at most", "caption")
        for name in ("query_ids", "split", "since", "until"):
            if getattr(self, name) is not None:
                raise Problem(400, f"an image asks for one picture: leave out {name}", name)


class Column(BaseModel):
    """A column of samples, or a key of their metadata."""

    name: str
    type: str = Field(description="DuckDB's name of it")


class Columns(BaseModel):
    """By what samples can be filtered, and influence summed."""

    columns: list[Column]


@router.post(
    "/v1/shares",
    responses={200: {"model": SharesAnswer}, **responses(400, 401, 413, 415, 429, 503)},
    openapi_extra=body_of(Asked, EXAMPLE, json_only=["query_ids"]),
)
async def shares(request: Request) -> Response:
    """The share of each creator, tar or other group in the influence on queries or on a picture, and how sure it is."""
    service = service_of(request)
    service.engine.check()
    with service.batcher.admit() as ticket:
        ticket.step_aside()
        asked = checked(Asked, await read_fields(request))
        asked.check(service.limits)
        try:
            return reply(await _answer(service, asked))
        except (NotPublished, OtherPublished):
            raise
        except StoreError as error:  # there is no such column, query or split
            raise Problem(400, one_line(error), "by") from None


async def _answer(service: Service, asked: Asked) -> SharesAnswer:
    if asked.image is None or asked.caption is None:
        return await service.slowly(
            lambda: published_shares(
                service.workspace,
                asked.by,
                query_ids=asked.query_ids,
                split=asked.split,
                since=_utc(asked.since),
                until=_utc(asked.until),
            )
        )
    attributor, content, caption = service.engine.current, asked.image, asked.caption
    picture = await service.reading(lambda: decoded(content, service.limits))
    return await service.slowly(lambda: attributor.pictures.shares(picture, caption, asked.by, asked.tier or "fast"))


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
