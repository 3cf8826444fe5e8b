"""`/docs`: the OpenAPI document as a page, without a script and without an asset of another server."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

router = APIRouter(include_in_schema=False)
# The page's only style stands in it: nothing else may be loaded, and nothing may run.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
_STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}pre{overflow:auto;padding:.5rem;border:1px solid}h2{margin-top:2.5rem}code{font-size:.95em}"
    "td,th{text-align:left;vertical-align:top;padding:.2rem .8rem .2rem 0}"
)


@router.get("/docs")
async def docs(request: Request) -> Response:
    return HTMLResponse(_page(request.app.openapi()), headers=HEADERS)


def _page(document: dict[str, Any]) -> str:
    models = document["components"]["schemas"]
    routes = [
        _route(models, path, method, route)
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    ]
    title = html.escape(f"{document['info']['title']}: HTTP interface")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f'<p>{html.escape(document["info"]["description"])} <a href="openapi.json">openapi.json</a></p>'
        + "".join(routes)
    )


def _route(models: dict[str, Any], path: str, method: str, route: dict[str, Any]) -> str:
    parameters = "".join(
        f"<tr><td><code>{html.escape(each['name'])}</code><td>{each['in']}"
        f"<td>{html.escape(each.get('description', ''))}"
        for each in route.get("parameters", [])
    )
    answers = "".join(
        f"<tr><td>{status}<td>{html.escape(each.get('description', ''))}"
        for status, each in route.get("responses", {}).items()
    )
    bodies = "".join(
        f"<p>Body: <code>{html.escape(kind)}</code></p>{_example(models, body)}"
        f"{_fields(_model(models, body['schema']))}"
        for kind, body in route.get("requestBody", {}).get("content", {}).items()
    )
    return (
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(route.get('description', ''))}</p>"
        f"<table>{parameters}</table>{bodies}<table>{answers}</table>"
    )


def _model(models: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return a body's schema, looked up where it stands among the models."""
    named = schema.get("$ref") or next((each["$ref"] for each in schema.get("anyOf", []) if "$ref" in each), "")
    found: dict[str, Any] = models.get(named.rsplit("/", 1)[-1], schema)
    return found


def _example(models: dict[str, Any], body: dict[str, Any]) -> str:
    examples = [body["example"]] if "example" in body else _model(models, body["schema"]).get("examples", [])
    return "".join(f"<pre>{html.escape(json.dumps(each, indent=2))}</pre>" for each in examples[:1])


def _fields(schema: dict[str, Any]) -> str:
    rows = (
        f"<tr><td><code>{html.escape(name)}</code><td>{html.escape(field.get('description', ''))}"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table>{''.join(rows)}</table>"
