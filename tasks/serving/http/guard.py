"""What every request passes before its route, and every response after it: one layer around the app.

Names by which the service may be asked (against DNS rebinding), where a page's request comes from (against forged
requests), the key, its rate, the bytes of the body as they come, headers of security, one line of log, and figures.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks import logs
from tasks.serving.http.keys import Caller
from tasks.serving.http.problems import Problem, problem_of, respond
from tasks.serving.http.rates import Buckets
from tasks.serving.http.service import Service

OPEN = re.compile(r"/(healthz|readyz|metrics|openapi\.json|docs|[\w.-]*\.(js|css|svg|png|ico|html|webmanifest))?")
BATCH = "/v1/attribute:batch"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass
class Passage:
    """One request on its way through."""

    scope: Scope
    headers: Headers
    request_id: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    received: int = 0
    sent: int = 0
    caller: str = "-"
    refused: str = ""

    @property
    def path(self) -> str:
        return str(self.scope["path"])

    @property
    def route(self) -> str:
        """The route's template, which names no image, no query and no version."""
        return getattr(self.scope.get("route"), "path", "other")


class Guard:
    """The layer; `app` is what lies below."""

    def __init__(self, app: ASGIApp, service: Service, *, access_log: bool) -> None:
        self._app, self._service, self._log = app, service, access_log
        limits = service.limits
        share = None if limits.rate is None else limits.rate / service.settings.workers
        self._buckets = Buckets(share, limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        passage = Passage(scope, headers, given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8))
        metrics = self._service.metrics
        metrics.in_flight.inc()
        try:
            await self._pass(passage, receive, self._sending(passage, send))
        finally:
            metrics.in_flight.dec()
            seconds = time.perf_counter() - passage.started
            metrics.seconds.labels(passage.route, str(passage.status)).observe(seconds)
            if passage.status in (408, 413, 415, 429, 503) or passage.refused:
                metrics.rejections.labels(passage.refused or str(passage.status)).inc()
            if self._log:
                logs.write(_line(passage, seconds))

    async def _pass(self, passage: Passage, receive: Receive, send: Send) -> None:
        try:
            self._check_host(passage)
            self._check_origin(passage)
            self._check_caller(passage)
            bounded = self._bounded(passage, receive)
        except Problem as problem:
            passage.refused = problem.where or str(problem.status)
            await respond(problem)(passage.scope, receive, send)
            return
        try:
            await self._app(passage.scope, bounded, send)
        except Exception as error:  # a bug: its trace is logged, and the client gets the usual form
            if passage.status:
                raise
            await respond(problem_of(error))(passage.scope, receive, send)

    def _check_host(self, passage: Passage) -> None:
        """Refuse a name that is not the service's: a page of another name, led here by its DNS, asks with its own."""
        allowed = self._service.settings.hosts
        name = _without_port(passage.headers.get("host", ""))
        if allowed and name not in allowed:
            raise Problem(421, f"asked as {name[:100]!r}: this service is {', '.join(allowed)}", "host")

    def _check_origin(self, passage: Passage) -> None:
        """Refuse what a page of another origin sends, whose reader may not know that it was sent."""
        origin = passage.headers.get("origin")
        if origin is None or passage.scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return
        ours = origin.split("://")[-1] == passage.headers.get("host")
        if not ours and origin not in self._service.settings.cors:
            raise Problem(403, f"a page of {origin[:100]} may not ask here: `--cors ORIGIN` lets it", "origin")

    def _check_caller(self, passage: Passage) -> None:
        scope, keys = passage.scope, self._service.keys
        address = (scope.get("client") or ("unknown", 0))[0]
        if keys is None:
            caller = Caller(address, "read")
        elif OPEN.fullmatch(passage.path) or scope["method"] == "OPTIONS":
            caller = Caller("-", "read")
        else:
            token = _token(passage.headers)
            found = keys.caller(token) if token else None
            if found is None:
                what = "this key is unknown or revoked" if token else "a key is needed: `Authorization: Bearer KEY`"
                raise Problem(401, what, "authorization", {"WWW-Authenticate": "Bearer"})
            caller = found
        passage.caller = caller.name
        scope.setdefault("state", {})["caller"] = caller
        scope["state"]["request_id"] = passage.request_id
        if passage.path.startswith("/v1/") and (wait := self._buckets.take(caller.name)):
            raise Problem(
                429, f"more than {self._buckets.rate:g} requests a second", "rate", {"Retry-After": str(wait)}
            )

    def _bounded(self, passage: Passage, receive: Receive) -> Receive:
        """Return `receive` with bounds on the bytes and the time of a body, counted as they come."""
        limits = self._service.limits
        most = limits.batch_bytes if passage.path == BATCH else limits.body_bytes
        refusal = Problem(413, f"the request has more than {most} bytes: send less", "body", {"Connection": "close"})
        told = passage.headers.get("content-length", "0")
        if told.isdigit() and int(told) > most:
            raise refusal
        until = asyncio.get_running_loop().time() + limits.body_seconds
        complete = False

        async def bounded() -> Message:
            nonlocal complete
            if complete:  # from here on it only waits for the client to leave
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Problem(
                    408,
                    f"the request's bytes did not come in {limits.body_seconds:g} s",
                    "body",
                    {"Connection": "close"},
                ) from None
            passage.received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if passage.received > most:
                raise refusal
            return message

        return bounded

    def _sending(self, passage: Passage, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                passage.status = message["status"]
                _add_headers(message, passage.request_id)
            passage.sent += len(message.get("body", b""))
            await send(message)

        return sending


def _add_headers(message: MutableMapping[str, Any], request_id: str) -> None:
    headers: list[tuple[bytes, bytes]] = list(message.get("headers", []))
    there = {name.lower() for name, _ in headers}
    more: Iterable[tuple[str, str]] = (*HEADERS.items(), ("X-Request-Id", request_id))
    headers += [(name.encode(), value.encode()) for name, value in more if name.lower().encode() not in there]
    message["headers"] = headers


def _token(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host).lower().rstrip(".")


def _line(passage: Passage, seconds: float) -> str:
    """Return what the access log says: never a caption, a filter, a query or an image."""
    return json.dumps(
        {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "logger": "fastgda.access",
            "request_id": passage.request_id,
            "method": passage.scope["method"],
            "route": passage.route,
            "status": passage.status,
            "milliseconds": round(1000 * seconds, 2),
            "received": passage.received,
            "sent": passage.sent,
            "caller": passage.caller,
            "client": (passage.scope.get("client") or ("-",))[0],
        }
    )
