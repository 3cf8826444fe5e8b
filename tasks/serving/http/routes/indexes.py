"""`/v1/indexes`: which versions there are, and which one answers."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from storage_schemas.files import matching
from storage_schemas.heads.records import INDEX_FILE, read_index_record
from tasks.serving.http.problems import responses
from tasks.serving.http.replies import reply
from tasks.serving.http.service import service_of

router = APIRouter(tags=["indexes"])


@router.get("/v1/indexes", responses={200: {"content": {"application/json": {}}}, **responses(503)})
async def indexes(request: Request) -> Response:
    """The versions of the index, and which one is served."""
    service = service_of(request)
    served = service.engine.current.versions
    folder = service.workspace.root / "indexes"
    found = await service.reading(
        lambda: [
            {"version": path.parent.name, "served": path.parent.name == served.index}
            | read_index_record(path.parent).model_dump(mode="json")
            for path in matching(folder, f"*/{INDEX_FILE}")
        ]
    )
    return reply({"served": served, "indexes": found})
