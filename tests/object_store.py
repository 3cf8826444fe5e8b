"""A real S3 API on loopback, and what it is asked for."""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storage_schemas.files import AnyPath, any_path

_SENT: Counter[str] = Counter()  # bytes of answers, by method


@contextmanager
def s3_server() -> Iterator[str]:
    """Its URL.

    Requests that change something are answered one at a time: moto looks whether a name is free and takes it in two
    steps, so that of two conditional puts both could succeed. With S3 exactly one does.
    """
    from moto.moto_server.werkzeug_app import (  # takes seconds
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    application, changing = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def answer(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if request["REQUEST_METHOD"] in ("GET", "HEAD"):
            content = list(application(request, start))
            _SENT[request["REQUEST_METHOD"]] += sum(map(len, content))
            return content
        with changing:
            return application(request, start)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    host, port = server.server_address[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.shutdown()
        thread.join()


def empty_workspace(url: str, patch: pytest.MonkeyPatch) -> AnyPath:
    """In a bucket of its own, which this process and those that it starts can reach."""
    for variable, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        patch.setenv(variable, value)
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    found = any_path(f"s3://{name}/workspace")
    assert not isinstance(found, Path)
    type(found.fs).clear_instance_cache()
    found = any_path(f"s3://{name}/workspace")
    assert not isinstance(found, Path)
    found.fs.mkdir(name)
    return found


class _Count(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.requests: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if line := re.search(r'"(?:\x1b\[\d+m)*(\w+) (\S+) HTTP', record.getMessage()):
            method, place = line.groups()
            self.requests["LIST" if "list-type=" in place else method] += 1


@contextmanager
def requests_counted() -> Iterator[Counter[str]]:
    """How many requests of each method the servers of this process get in the block; a listing is a LIST."""
    count, server = _Count(), logging.getLogger("werkzeug")
    level = server.level
    server.addHandler(count)
    server.setLevel(logging.INFO)
    try:
        yield count.requests
    finally:
        server.setLevel(level)
        server.removeHandler(count)


@contextmanager
def bytes_sent() -> Iterator[Counter[str]]:
    """How many bytes, by method, the servers of this process send as answers in the block."""
    before, sent = _SENT.copy(), Counter[str]()
    yield sent
    sent.update(_SENT - before)
