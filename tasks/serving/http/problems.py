"""Whatever cannot be answered: a status, one line that says what and how to mend it, and the field that is meant."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastgda_core.errors import BadSample, UsageError
from storage_schemas.errors import StoreError
from storage_schemas.sql.filters import RefusedFilter

log = logging.getLogger("fastgda.serving")


class ErrorBody(BaseModel):
    """The body of every response that is no answer."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"error": "k is 0: ask for 1 to 1000", "where": "k"}]})

    error: str = Field(description="one line: what is wrong, and how to mend it")
    where: str = Field(description="the field that is meant; empty where it is none")


class Problem(Exception):
    """A request that is not answered, with the status that says why."""

    def __init__(self, status: int, error: str, where: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error)
        self.status, self.error, self.where, self.headers = status, error, where, dict(headers or {})

    def body(self) -> dict[str, str]:
        return {"error": self.error, "where": self.where}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return, for OpenAPI, that a route may answer with these statuses."""
    return {status: {"model": ErrorBody, "description": _MEANING[status]} for status in statuses}


_MEANING = {
    400: "the question cannot be answered as it is",
    401: "a key is needed, or this key is unknown",
    403: "this key may not do that",
    404: "there is no such thing",
    408: "the request's bytes did not come in time",
    409: "refused, as things stand",
    410: "it was removed",
    413: "the request or its image is too large",
    415: "the body is of another type",
    422: "a parameter is out of range",
    429: "too many requests for this key",
    503: "not ready, or too many questions wait: try again later",
}


def problem_of(error: Exception) -> Problem:
    """Return an error of the product as a problem; one that is not known is a bug, and is logged."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RefusedFilter):
        return Problem(400, one_line(error), "where")
    if isinstance(error, (UsageError, BadSample)):
        return Problem(400, one_line(error), getattr(error, "where", ""))
    if isinstance(error, StoreError):
        return Problem(503, one_line(error), headers={"Retry-After": "5"})
    log.error("a request failed", exc_info=error)
    return Problem(500, "the service failed on this request: its log says why")


def one_line(error: Exception) -> str:
    """Return an error's message without line ends."""
    return " ".join(str(error).split())


def respond(problem: Problem) -> JSONResponse:
    """Return a problem as a response."""
    return JSONResponse(problem.body(), problem.status, problem.headers)


def install(app: FastAPI) -> None:
    """Make every error of an app a response of this form."""

    async def known(_: Request, error: Exception) -> Response:
        return respond(problem_of(error))

    async def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return respond(Problem(error.status_code, str(error.detail), headers=error.headers))

    async def of_parameters(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = [str(each) for each in first["loc"][1:]]
        return respond(Problem(422, f"{'.'.join(place)}: {first['msg']}", ".".join(place)))

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the access log shows that the client left

    for kind in (Problem, UsageError, BadSample, StoreError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_parameters)
    app.add_exception_handler(ClientDisconnect, gone)
