"""The error hierarchy: what a runner must do about a failure.

`UsageError`: tell the person and stop. `BadSample`: quarantine the sample and go on.
`TransientError`: retry with backoff. Anything else is a bug and fails at once.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from enum import StrEnum


class UsageError(ValueError):
    """The request cannot be carried out as given; the message says how to mend it."""


class BadSample(ValueError):
    """One sample from outside is unusable; it is named, skipped and counted."""


class NonFiniteLoss(BadSample):
    """The loss of some samples is no number.

    train_ids: the samples that one forward showed; there may be more.
    """

    def __init__(self, message: str, train_ids: Sequence[int]) -> None:
        super().__init__(message)
        self.train_ids = list(train_ids)


class TransientError(RuntimeError):
    """A failure that may pass by itself; the unit of work is tried again."""


class Stopped(BaseException):
    """A request to stop the work, not a failure. Like KeyboardInterrupt, no handler of errors may swallow it."""


class Remedy(StrEnum):
    """A runner's action after an error."""

    smaller = "out of memory"  # halve the batch and go on
    retry = "transient"  # try again later
    quarantine = "bad data"  # leave the sample out and go on
    stop = "bug"  # fail at once


_PASSING = {
    errno.EAGAIN,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
# By name, as the libraries that raise them need not be installed: botocore, aiohttp, fsspec, urllib3, httpx, azure.
_PASSING_CLASSES = {
    "ClientConnectionError",
    "ClientConnectorError",
    "ConnectError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "EndpointConnectionError",
    "FSTimeoutError",
    "HTTPClientError",
    "IncompleteReadError",
    "NetworkError",
    "ProtocolError",
    "ProxyError",
    "ReadError",
    "ReadTimeout",
    "ReadTimeoutError",
    "ServerDisconnectedError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TimeoutException",
    "WorkerCrashedError",
}
# After these the CUDA context may be lost: the process has to be replaced, which is a retry elsewhere.
_DEVICE_FAULTS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "NCCL error", "uncorrectable ECC")


def remedy(error: BaseException) -> Remedy:
    """Return what a runner does about an error, or about the cause that it was raised from."""
    if out_of_memory(error):
        return Remedy.smaller
    if isinstance(error, BadSample):
        return Remedy.quarantine
    if _is_transient(error):
        return Remedy.retry
    cause = error.__cause__  # a request may be refused because a network or a pipe failed under it
    return remedy(cause) if cause is not None and cause is not error else Remedy.stop


def out_of_memory(error: BaseException) -> bool:
    """Return whether the device, or the CPU's allocator, ran out of memory."""
    # By name, so that commands that compute nothing need not import torch.
    return _has_class(error, {"OutOfMemoryError"}) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, (TransientError, ConnectionError, TimeoutError)) or _has_class(error, _PASSING_CLASSES):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING:
        return True
    return _throttled(error) or device_lost(error)


def _has_class(error: BaseException, names: set[str]) -> bool:
    return not names.isdisjoint(kind.__name__ for kind in type(error).__mro__)


def device_lost(error: BaseException) -> bool:
    """Return whether this process can no longer use its device."""
    return isinstance(error, RuntimeError) and any(fault in str(error) for fault in _DEVICE_FAULTS)


def _throttled(error: BaseException) -> bool:
    """Return whether a server answered with a 5xx, or asks to slow down or to come again."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        statuses = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:  # Azure and httpx, aiohttp, Google and gcsfs
        statuses = [
            getattr(each, name, None) for each in (error, response) for name in ("status_code", "status", "code")
        ]
    return any(isinstance(status, int) and (500 <= status < 600 or status in (408, 429)) for status in statuses)
