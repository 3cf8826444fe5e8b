"""`/v1/samples`: a training sample's facts and its image."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field

from fastgda_core.errors import UsageError
from tasks.serving.attributor import Attributor
from tasks.serving.http.influenced import first_ranks
from tasks.serving.http.problems import Problem, one_line, responses
from tasks.serving.http.replies import reply
from tasks.serving.http.service import service_of
from tasks.serving.http.thumbnails import check_size, known, picture_response, tag_of, thumbnail

router = APIRouter(tags=["samples"])
TrainId = Annotated[int, Path(ge=0, lt=2**62, description="number of the training sample", examples=[0])]
Size = Annotated[
    int | None,
    Query(ge=16, le=4096, description="longer side in pixels; without it, the file as it is", examples=[256]),
]
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/jpeg": {}, "image/png": {}, "image/webp": {}}},
    304: {"description": "unchanged"},
}


class InfluencedQuery(BaseModel):
    """A published query among whose first ranks the sample is."""

    query_id: str
    split: str
    caption: str
    rank: int = Field(description="by the teacher; 1: nothing influenced it more")


class Sample(BaseModel):
    """What is known of a training sample."""

    train_id: int
    key: str
    captions: list[str]
    shard: str = Field(description="tar that holds its image")
    offset: int = Field(description="first byte of the image in the tar")
    width: int
    height: int
    metadata: dict[str, Any] = Field(description="further fields of its .json in the tar")
    influenced: list[InfluencedQuery] = Field(description="queries in whose first 100 ranks it is")


@router.get("/v1/samples/{train_id}", responses={200: {"model": Sample}, **responses(401, 404, 410, 422, 503)})
async def sample(request: Request, train_id: TrainId) -> Response:
    """What is known of a training sample, and which queries it influenced."""
    service = service_of(request)
    attributor, hit = await service.reading(lambda: service.engine.sample(train_id))
    width, height = await service.reading(lambda: attributor.catalogue().size_of(train_id))
    influenced = await service.slowly(
        lambda: first_ranks(service.workspace, attributor.versions.snapshot).of(train_id, attributor.queries)
    )
    known = {name: getattr(hit, name) for name in ("train_id", "key", "captions", "shard", "offset", "metadata")}
    return reply({**known, "width": width, "height": height, "influenced": influenced})


@router.get(
    "/v1/samples/{train_id}/image", response_class=Response, responses={**PICTURE, **responses(401, 404, 410, 422, 503)}
)
async def image(request: Request, train_id: TrainId, size: Size = None) -> Response:
    """The image of a training sample, read from its tar."""
    service = service_of(request)
    check_size(service.limits, size)
    attributor, facts = await service.reading(lambda: service.engine.sample(train_id))
    tag = tag_of("sample", str(attributor.catalogue().path), train_id, facts.offset, size)
    if (answer := known(request, tag)) is not None:
        return answer
    if size is None:
        return picture_response(*await service.reading(lambda: _picture(attributor, train_id)), tag)
    return await thumbnail(service, tag, lambda: _picture(attributor, train_id)[0], size)


def _picture(attributor: Attributor, train_id: int) -> tuple[bytes, str]:
    try:
        return attributor.picture(train_id)
    except UsageError as error:  # the tar is gone, or is another one
        raise Problem(503, one_line(error)) from None
