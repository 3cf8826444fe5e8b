"""Answers as bytes: what Python gives is what the wire has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import Response
from pydantic_core import to_json


def reply(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return dataclasses, records and plain values as JSON; a number that JSON has none for is null."""
    return Response(encoded(content), status, headers, media_type="application/json")


def encoded(content: Any) -> bytes:
    return to_json(content, inf_nan_mode="null", serialize_unknown=True)
