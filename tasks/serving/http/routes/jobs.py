"""`/v1/jobs`: answers that take minutes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from tasks.serving.http.jobs import Job
from tasks.serving.http.problems import responses
from tasks.serving.http.service import caller_of, service_of

router = APIRouter(tags=["answers"])
JobId = Annotated[str, Path(max_length=64, description="as POST /v1/attribute gave it")]


@router.get("/v1/jobs/{job}", responses={200: {"model": Job}, **responses(404)})
async def job(request: Request, job: JobId) -> Response:
    """How far a job is, and its answer when it is done."""
    content = service_of(request).jobs.read(caller_of(request).name, job)
    return Response(content, media_type="application/json")


@router.delete("/v1/jobs/{job}", status_code=202, responses={202: {"model": Job}, **responses(404)})
async def cancel(request: Request, job: JobId) -> Response:
    """Stop a job: at its next step it ends."""
    service, caller = service_of(request), caller_of(request)
    service.jobs.cancel(caller.name, job)
    return Response(service.jobs.read(caller.name, job), 202, media_type="application/json")
