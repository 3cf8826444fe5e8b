"""The page at `/`: files beside this package, read once, without any asset of another server."""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, Request
from fastapi.responses import Response

from tasks.serving.http.problems import Problem
from tasks.serving.http.thumbnails import known, tag_of

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}


def page_router() -> APIRouter:
    """Return the routes of the page's files; `/` is index.html."""
    router = APIRouter(include_in_schema=False)
    assets = _assets()

    @router.get("/")
    @router.get("/{name}")
    async def asset(request: Request, name: str = "index.html") -> Response:
        if name not in assets:
            raise Problem(404, f"there is no {name[:100]} here: see /docs")
        content, kind, tag = assets[name]
        headers = {"Content-Security-Policy": POLICY, "ETag": tag, "Cache-Control": "no-cache"}
        if known(request, tag) is not None:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return router


def _assets() -> dict[str, tuple[bytes, str, str]]:
    """Return content, type and ETag of the page's files, by name."""
    folder = files("tasks.serving").joinpath("page")
    found = {}
    for each in folder.iterdir() if folder.is_dir() else ():
        if (kind := KINDS.get(PurePath(each.name).suffix)) is not None:
            content = each.read_bytes()
            found[each.name] = content, kind, tag_of(each.name, content)
    return found
