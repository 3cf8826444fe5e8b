"""`/v1/samples`: a training sample's facts and its image."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from tasks.serving.answers import Hit
from tasks.serving.http.problems import responses
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


@router.get("/v1/samples/{train_id}", responses={200: {"model": Hit}, **responses(404, 410, 422, 503)})
async def sample(request: Request, train_id: TrainId) -> Response:
    """What is known of a training sample."""
    _, facts = service_of(request).engine.sample(train_id)
    return reply(facts)


@router.get(
    "/v1/samples/{train_id}/image", response_class=Response, responses={**PICTURE, **responses(404, 410, 422, 503)}
)
async def image(request: Request, train_id: TrainId, size: Size = None) -> Response:
    """The image of a training sample, read from its tar."""
    service = service_of(request)
    check_size(service.limits, size)
    attributor, facts = service.engine.sample(train_id)
    tag = tag_of("sample", attributor.versions.run, facts.shard, facts.offset, train_id, size)
    if (answer := known(request, tag)) is not None:
        return answer
    if size is None:
        return picture_response(*await service.reading(lambda: attributor.picture(train_id)), tag)
    return await thumbnail(service, tag, lambda: attributor.picture(train_id)[0], size)
