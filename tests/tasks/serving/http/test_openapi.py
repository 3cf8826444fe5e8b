"""The OpenAPI document is the truth: whatever it allows is answered, and as it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from tests.tasks.serving.http.conftest import serving, settings_of
from tests.tasks.whole_runs import WholeRun


@pytest.fixture(scope="module")
def api(similar: WholeRun) -> Iterator[Any]:
    with serving(settings_of(similar, hosts=[])) as client:

        async def started(scope: Scope, receive: Receive, send: Send) -> None:
            """The app, which is not started again for every case."""
            if scope["type"] == "http":
                await client.app(scope, receive, send)
            for kind in ("startup", "shutdown") if scope["type"] == "lifespan" else ():
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})

        yield schemathesis.openapi.from_asgi("/openapi.json", started)


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ORDER = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.heavy
def test_whatever_the_document_allows_or_not_is_answered_as_it_says(api: Any) -> None:
    asked = []
    for operation in (found.ok() for found in api.get_all_operations()):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @ORDER
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                case.call_and_validate(checks=CHECKS)

            try:
                ask()
                asked.append(operation.label)
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # a route that takes nothing: nothing is wrong about it
    assert len(set(asked)) > 10


def test_every_route_is_explained_and_has_an_example_where_it_takes_a_body(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    page = client.get("/docs").text
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            assert route["description"], path
            assert f"{method.upper()} {path}" in page
            shown = page.split(f"<code>{method.upper()} {path}</code>")[1].split("<h2>")[0]
            assert ("<pre>" in shown) == ("requestBody" in route), path
    assert "<script" not in page and "http://" not in page and "https://" not in page
