"""Answers of a Prefect server that does not do what it is asked: it is away for a while, or it refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.settings import PREFECT_API_URL

from fastgda_core.errors import Remedy, UsageError, remedy

log = logging.getLogger("fastgda.prefect")
SHOWN = 500  # characters of what a server answered
_told: set[str] = set()


def away(error: BaseException) -> bool:
    """Return whether to ask again later: a transport error, a 5xx, a 429, or an error raised from one of these."""
    return remedy(error) is Remedy.retry


def refusal(error: BaseException, asked: str) -> UsageError:
    """Return the error that tells a person of a request that will be refused again.

    Args:
        asked: what was asked of the server, after "refuses to".

    Raises:
        the error itself, where it is neither Prefect's nor a server's.
    """
    answer: BaseException | None = error
    while answer is not None and not isinstance(answer, (PrefectException, httpx.HTTPError)):
        answer = answer.__cause__  # "Failed to reach API" is a plain RuntimeError
    if answer is None:
        raise error
    answer = answer.http_exc if isinstance(answer, ObjectNotFound) else answer
    said, mend = str(answer), "mend what it names"
    if isinstance(answer, httpx.HTTPStatusError):
        said = f"{answer.response.status_code} {answer.response.reason_phrase}: {answer.response.text}"
        if answer.response.status_code in (401, 403):
            mend = "check PREFECT_API_URL, PREFECT_API_KEY and PREFECT_API_AUTH_STRING (`prefect config view`)"
    url = httpx.URL(PREFECT_API_URL.value() or "").copy_with(userinfo=b"")
    return UsageError(f"the Prefect server at {url} refuses to {asked}: {' '.join(said.split())[:SHOWN]}; {mend}")


@contextmanager
def tolerated(asked: str) -> Iterator[None]:
    """Tolerate a failed request that a run can do without; log a refusal once, and nothing while the server is away."""
    try:
        yield
    except Exception as error:
        if away(error):
            return
        told = str(refusal(error, asked))
        if told not in _told:
            _told.add(told)
            log.warning("%s", told)
