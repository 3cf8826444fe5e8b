"""What changes something: take-downs and the version that is served. Each call is written down, with who made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from storage_schemas.errors import StoreError
from storage_schemas.publishing.serving import promote_index, rollback_index
from storage_schemas.publishing.takedown import NoSuchSample, take_down
from tasks.serving.answers import Versions
from tasks.serving.http.problems import Problem, one_line, problem_of, responses
from tasks.serving.http.replies import reply
from tasks.serving.http.routes.samples import TrainId
from tasks.serving.http.service import Service, caller_of, service_of


def admin(request: Request) -> None:
    """Refuse whoever may only read; without keys nobody may more."""
    if caller_of(request).scope != "admin":
        raise Problem(
            403, "this changes what others see: use a key of scope admin (`fastgda keys add NAME --scope admin`)"
        )


router = APIRouter(tags=["administration"], dependencies=[Depends(admin)])
_REFUSALS = responses(400, 401, 403, 404, 409, 422, 503)


class Reason(BaseModel):
    """Why an image is taken down."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"reason": "the artist asked for it"}]})

    reason: str = Field(min_length=1, max_length=2000, pattern=r"\S", description="it is kept in the record")


class Promotion(BaseModel):
    """How an index is promoted."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"force": False}]})

    force: bool = Field(default=False, description="also where it is worse than what is served")


class Removed(BaseModel):
    """A take-down."""

    record: int | None = Field(description="number of the record; null where the image was taken down before")
    removed: list[int] = Field(description="train_ids of the published samples that are taken down now")
    already: dict[int, int] = Field(description="numbers of earlier records, by train_id")


class Serving(BaseModel):
    """What is served now."""

    published: int = Field(description="number of the published state")
    index: str
    versions: Versions


@router.post("/v1/samples/{train_id}:remove", responses={200: {"model": Removed}, **_REFUSALS})
async def remove(request: Request, train_id: TrainId, reason: Annotated[Reason, Body()]) -> Response:
    """Take an image down: when this returns, no answer names it any more, nor any image of the same bytes."""
    service, caller = service_of(request), caller_of(request)

    def work() -> dict[str, Any]:
        done = take_down(service.workspace, [train_id], reason=reason.reason, by=caller.name)
        samples = service.workspace.relative(service.engine.current.catalogue().path)
        removed = sorted(each.train_id for each in done.record.removed if each.samples == samples) if done.asked else []
        return {"record": done.record.number if done.asked else None, "removed": removed, "already": done.already}

    return reply(await _done(request, service, f"remove {train_id}", work, reason=reason.reason))


@router.post("/v1/indexes/{version}:promote", responses={200: {"model": Serving}, **_REFUSALS})
async def promote(
    request: Request,
    version: Annotated[str, Path(max_length=100, pattern=r"^[\w.-]+$", examples=["713ef097df6eebbc"])],
    promotion: Annotated[Promotion | None, Body()] = None,
) -> Response:
    """Serve an index, unless it is worse than what is served; this process answers by it when this returns."""
    service, force = service_of(request), promotion is not None and promotion.force
    work = lambda: _serving(service, lambda: promote_index(service.workspace, version, force=force))  # noqa: E731
    return reply(await _done(request, service, f"promote {version}", work, force=force))


@router.post("/v1/indexes:rollback", responses={200: {"model": Serving}, **_REFUSALS})
async def rollback(request: Request) -> Response:
    """Serve what was served before; this process answers by it when this returns."""
    service = service_of(request)
    return reply(
        await _done(
            request, service, "rollback", lambda: _serving(service, lambda: rollback_index(service.workspace)[0])
        )
    )


def _serving(service: Service, change: Callable[[], Any]) -> dict[str, Any]:
    published = change()
    service.engine.refresh()
    return {
        "published": published.version,
        "index": published.index_version,
        "versions": service.engine.current.versions,
    }


async def _done(request: Request, service: Service, action: str, work: Callable[[], Any], **details: Any) -> Any:
    """Do what an administrator asks, noted before and after."""
    who, identity = caller_of(request).name, request.state.request_id
    assert service.audit is not None  # without keys nobody is an administrator
    audit = service.audit
    await service.reading(lambda: audit.note(identity, who, action, "begun", **details))
    try:
        found = await service.reading(work)
    except Exception as error:
        problem = _problem(error)
        await service.reading(lambda: audit.note(identity, who, action, "refused", error=problem.error))
        raise problem from error
    await service.reading(lambda: audit.note(identity, who, action, "done"))
    return found


def _problem(error: Exception) -> Problem:
    if isinstance(error, NoSuchSample):
        return Problem(404, one_line(error), "train_id")
    if isinstance(error, StoreError):
        return Problem(409, one_line(error))
    if isinstance(error, OSError):
        return Problem(409, f"the workspace cannot be changed from here ({error.strerror}): use the commands")
    return problem_of(error)
