"""Whether the service lives, whether it can answer, and its figures."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from tasks.serving.http.problems import responses
from tasks.serving.http.replies import reply
from tasks.serving.http.service import service_of

router = APIRouter(tags=["operation"])


@router.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> Response:
    """`ok` while the process answers at all."""
    return PlainTextResponse("ok\n")


@router.get("/readyz", responses={200: {"content": {"application/json": {}}}, **responses(503)})
async def readyz(request: Request) -> Response:
    """The served versions; 503 and what is missing while nothing can be answered."""
    return reply({"ready": True, "versions": service_of(request).engine.current.versions})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(service_of(request).metrics.exposition(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
