"""`/v1/attribute`: a question and its answer, and many of them."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from tasks.serving.answers import Answer
from tasks.serving.http.batching import Full
from tasks.serving.http.jobs import Job
from tasks.serving.http.problems import Problem, problem_of, responses
from tasks.serving.http.questions import (
    EXAMPLE,
    JSON,
    LINES,
    Question,
    body_of,
    json_schema,
    read_question,
    read_questions,
)
from tasks.serving.http.replies import encoded, reply
from tasks.serving.http.service import Service, caller_of, service_of

FULL_SECONDS = 0.05  # until a batch looks for room again

router = APIRouter(tags=["answers"])


class BatchLine(BaseModel):
    """A line of a batch: an answer, or why there is none."""

    index: int = Field(description="place of the question, from 0")
    answer: Answer | None = None
    error: str | None = None
    where: str | None = None


@router.post(
    "/v1/attribute",
    responses={
        200: {"model": Answer},
        202: {"model": Job, "description": "tier exact: a job, whose answer comes at /v1/jobs/{job}"},
        **responses(400, 401, 404, 413, 415, 429, 503),
    },
    openapi_extra=body_of(Question, EXAMPLE, json_only=["vector"]),
)
async def attribute(request: Request) -> Response:
    """Which training images made this image: of an image with its caption, of a stored query, or of a vector."""
    service = service_of(request)
    service.engine.check()  # nothing is read for a service that cannot answer
    with service.batcher.admit() as ticket:
        question = await read_question(request, service.limits)
        if question.tier != "exact":
            return reply(await service.answer(question, ticket))
    job = await service.begin(question, caller_of(request))
    return reply(job, 202, {"Location": f"/v1/jobs/{job.job}"})


@router.post(
    "/v1/attribute:batch",
    responses={
        200: {"content": {LINES: {"schema": BatchLine.model_json_schema()}}, "description": "a line a question"},
        **responses(400, 401, 413, 415, 429, 503),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {
                    "schema": {
                        "type": "object",
                        "required": ["questions"],
                        "properties": {"questions": {"type": "array", "items": json_schema(Question)}},
                    },
                    "example": {"questions": [EXAMPLE]},
                }
            },
        }
    },
)
async def batch(request: Request) -> Response:
    """Many questions: a line for each answer, in their order, as soon as it is there."""
    service = service_of(request)
    service.engine.check()
    questions = await read_questions(request, service.limits)
    return StreamingResponse(_lines(service, questions), media_type=LINES)


async def _lines(service: Service, questions: Sequence[Question | Problem]) -> AsyncIterator[bytes]:
    """Yield the lines of a batch; as many questions are at work at a time as are encoded together."""
    at_work: deque[asyncio.Task[bytes]] = deque()
    coming = iter(enumerate(questions))
    try:
        while True:
            for number, question in itertools.islice(coming, service.limits.batch_size - len(at_work)):
                at_work.append(asyncio.create_task(_line(service, number, question)))
            if not at_work:
                return
            yield await at_work[0]
            at_work.popleft()
    finally:
        for task in at_work:
            task.cancel()


async def _line(service: Service, number: int, question: Question | Problem) -> bytes:
    try:
        if isinstance(question, Problem):
            raise question
        return encoded({"index": number, "answer": await _patiently(service, question)}) + b"\n"
    except Exception as error:
        return encoded({"index": number, **problem_of(error).body()}) + b"\n"


async def _patiently(service: Service, question: Question) -> Answer:
    """Answer a question of a batch, which waits for room in the queue where others are turned away."""
    while True:
        try:
            with service.batcher.admit() as ticket:
                return await service.answer(question, ticket)
        except Full:
            await asyncio.sleep(FULL_SECONDS)
