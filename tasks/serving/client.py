"""A client of the HTTP service, with the same answers as Python gives: `Client("http://127.0.0.1:8000")`.

It is made of Python's own library, pydantic, and its neighbours `answers.py` and `shares_answer.py`: no torch is
imported.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPResponse
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlencode

from pydantic import TypeAdapter

from tasks.serving.answers import Answer, Tier
from tasks.serving.shares_answer import SharesAnswer

POLL_SECONDS = 0.5
_ANSWER, _SHARES = TypeAdapter(Answer), TypeAdapter(SharesAnswer)


class ServiceError(RuntimeError):
    """The service refused a request: status, the field that is meant, and the seconds after which to ask again."""

    def __init__(self, status: int, error: str, where: str = "", retry_after: float | None = None) -> None:
        super().__init__(error)
        self.status, self.where, self.retry_after = status, where, retry_after


@dataclass(frozen=True)
class Asked:
    """A question: an image with its caption, or a stored query, or a vector.

    image: content of a PNG, JPEG or WebP file, or its path.
    around: samples of each list beside the hits; None: as many as the service gives; 0, which is quicker: none.
    beside: whether other tiers and untuned features answer, too.
    """

    image: bytes | Path | None = None
    caption: str | None = None
    query_id: str | None = None
    vector: Sequence[float] | None = None
    k: int = 20
    tier: Tier = "fast"
    where: str | None = None
    exclude: Sequence[int] = ()
    first: int | None = None
    relative: bool = False
    around: int | None = None
    beside: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the question as the service reads it."""
        known = {name: value for name, value in vars(self).items() if value not in (None, ())}
        if self.image is not None:
            known["image"] = _base64(self.image)
        for name in ("exclude", "vector"):
            if name in known:
                known[name] = list(known[name])
        return known


@dataclass(frozen=True)
class AskedShares:
    """Whose shares, of which queries, or of which picture.

    by: column of samples, or key of their metadata.
    query_ids, split, since, until: of these queries alone; what is given together has to hold together.
    image, caption, tier: in their place a picture that no teacher scored; tier fast unless given, or sketch.
    """

    by: str = "shard"
    query_ids: Sequence[str] | None = None
    split: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    image: bytes | Path | None = None
    caption: str | None = None
    tier: Tier | None = None

    def fields(self) -> dict[str, Any]:
        """Return the question as the service reads it."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        if self.image is not None:
            known["image"] = _base64(self.image)
        if self.query_ids is not None:
            known["query_ids"] = list(self.query_ids)
        return known | {name: known[name].isoformat() for name in ("since", "until") if name in known}


class Client:
    """A service at a URL.

    Args:
        key: an API key, where the service asks for one.
        patience: seconds to go on asking while the service says that it is busy.
        timeout: seconds to wait for a response.
    """

    def __init__(self, url: str, key: str | None = None, *, patience: float = 30.0, timeout: float = 120.0) -> None:
        self._url, self._patience, self._timeout = url.rstrip("/"), patience, timeout
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def attribute(self, asked: Asked) -> Answer:
        """Return the training samples that influenced an image most; of tier exact, after minutes.

        Raises:
            ServiceError: the service refuses the question, or the job failed.
        """
        told = self._json("POST", "/v1/attribute", asked.fields())
        while "job" in told:
            if told.get("answer"):
                return answer_of(told["answer"])
            if told["state"] in ("failed", "cancelled"):
                raise ServiceError(200, told["error"], told.get("where") or "")
            time.sleep(POLL_SECONDS)
            told = self._json("GET", f"/v1/jobs/{told['job']}")
        return answer_of(told)

    def attribute_many(self, asked: Iterable[Asked]) -> Iterator[Answer | ServiceError]:
        """Yield an answer to each question, in order, as they come; in the place of one that is refused, why."""
        body = {"questions": [each.fields() for each in asked]}
        with self._request("POST", "/v1/attribute:batch", body) as response:
            for line in response:
                told = json.loads(line)
                if told.get("answer"):
                    yield answer_of(told["answer"])
                else:
                    yield ServiceError(200, told["error"], told.get("where") or "")

    def shares(self, asked: AskedShares) -> SharesAnswer:
        """Return whose images the influence came from; ServiceError: the service refuses the question."""
        return _SHARES.validate_python(self._json("POST", "/v1/shares", asked.fields()))

    def sample(self, train_id: int) -> dict[str, Any]:
        """Return what is known of a training sample."""
        return self._json("GET", f"/v1/samples/{train_id}")

    def sample_image(self, train_id: int, size: int | None = None) -> bytes:
        """Return a training image: its file, or a picture whose longer side has `size` pixels at most."""
        return self._bytes(f"/v1/samples/{train_id}/image", {"size": size})

    def queries(self, split: str | None = None, offset: int = 0, limit: int = 100) -> list[dict[str, Any]]:
        """Return some of the stored queries, in order."""
        search = _search({"split": split, "offset": offset, "limit": limit})
        return cast(list[dict[str, Any]], self._json("GET", f"/v1/queries{search}")["queries"])

    def query_image(self, query_id: str, size: int | None = None) -> bytes:
        """Return the image of a stored query."""
        return self._bytes(f"/v1/queries/{quote(query_id, safe='')}/image", {"size": size})

    def indexes(self) -> dict[str, Any]:
        """Return the versions of the index, and which one is served."""
        return self._json("GET", "/v1/indexes")

    def ready(self) -> bool:
        """Return whether the service can answer."""
        try:
            return bool(self._json("GET", "/readyz", patience=0.0)["ready"])
        except (ServiceError, urllib.error.URLError):
            return False

    def _json(self, method: str, path: str, body: Any = None, patience: float | None = None) -> dict[str, Any]:
        with self._request(method, path, body, patience) as response:
            return cast(dict[str, Any], json.loads(response.read()))

    def _bytes(self, path: str, search: Mapping[str, object]) -> bytes:
        with self._request("GET", path + _search(search)) as response:
            return response.read()

    @contextmanager
    def _request(
        self, method: str, path: str, body: Any = None, patience: float | None = None
    ) -> Iterator[HTTPResponse]:
        """Ask, and ask again while the service is busy and patience lasts."""
        until = time.monotonic() + (self._patience if patience is None else patience)
        content = None if body is None else json.dumps(body).encode()
        headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
        while True:
            request = urllib.request.Request(self._url + path, content, headers, method=method)
            try:
                response = urllib.request.urlopen(request, timeout=self._timeout)
            except urllib.error.HTTPError as error:
                refusal = _refusal(error)
                wait = refusal.retry_after
                if wait is None or time.monotonic() + wait > until:
                    raise refusal from None
                time.sleep(wait)
            else:
                with response:
                    yield response
                return


def _base64(image: bytes | Path) -> str:
    return base64.b64encode(image.read_bytes() if isinstance(image, Path) else image).decode()


def _refusal(error: urllib.error.HTTPError) -> ServiceError:
    wait = error.headers.get("Retry-After", "")
    try:
        told = json.loads(error.read())
    except ValueError:
        told = {}
    return ServiceError(
        error.code, told.get("error", error.reason), told.get("where", ""), float(wait) if wait.isdigit() else None
    )


def _search(fields: Mapping[str, object]) -> str:
    given = {name: value for name, value in fields.items() if value is not None}
    return f"?{urlencode(given)}" if given else ""


def answer_of(told: Mapping[str, Any]) -> Answer:
    """Return an answer from its JSON, the inverse of `Answer.as_json`; ValidationError: it is none."""
    return _ANSWER.validate_python(told)
