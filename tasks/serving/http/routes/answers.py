"""`/v1/attribute`: a question and its answer, and many of them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tasks.serving.answers import Answer
from tasks.serving.http.problems import responses
from tasks.serving.http.questions import EXAMPLE, FORM, JSON, Question, read_question
from tasks.serving.http.replies import reply
from tasks.serving.http.service import service_of

router = APIRouter(tags=["answers"])


def _body() -> dict[str, Any]:
    """Return, for OpenAPI, the two forms in which a question comes."""
    plain = Question.model_json_schema()
    form = {**plain, "properties": {**plain["properties"], "image": {"type": "string", "format": "binary"}}}
    form["properties"].pop("vector")
    plain["properties"]["image"] = {"anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "null"}]}
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": plain, "example": EXAMPLE}, FORM: {"schema": form}},
        }
    }


@router.post(
    "/v1/attribute",
    responses={200: {"model": Answer}, **responses(400, 401, 413, 415, 429, 503)},
    openapi_extra=_body(),
)
async def attribute(request: Request) -> Response:
    """Which training images made this image: of an image with its caption, of a stored query, or of a vector."""
    service = service_of(request)
    service.engine.current  # noqa: B018  # nothing is read for a service that cannot answer
    with service.batcher.admit() as ticket:
        question = await read_question(request, service.limits)
        return reply(await service.answer(question, ticket))
