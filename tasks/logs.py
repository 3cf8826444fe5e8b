"""Log records: each says of which run, kind and part it is, and which process wrote it.

Loggers stand under one root, `fastgda`; `logging.getLogger("fastgda.execution")` is one. Records go to standard error,
and those of a flow run to its log in Prefect.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from fastgda_core.errors import UsageError
from tasks.printable import printable

ROOT = "fastgda"
LEVEL, FORMAT = "FASTGDA_LOG_LEVEL", "FASTGDA_LOG_FORMAT"  # in the environment, which worker processes inherit
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FIELDS = ("run", "kind", "part", "worker")

_about: ContextVar[dict[str, str]] = ContextVar("about")
_bare_record = logging.getLogRecordFactory()


@contextmanager
def about(*, run: str = "", kind: str = "", part: int | None = None) -> Iterator[None]:
    """Mark records that this thread writes in the block with run, kind and part; what is not given stays as it is."""
    given = {"run": run, "kind": kind, "part": "" if part is None else f"{part:05d}"}
    token = _about.set(_about.get({}) | {name: value for name, value in given.items() if value})
    try:
        yield
    finally:
        _about.reset(token)


def _record(name: str, *rest: object, **more: object) -> logging.LogRecord:
    """Make a record with our fields.

    Records of other libraries are left alone: their `extra` may not name a field that is there.
    """
    record = _bare_record(name, *rest, **more)
    if name == ROOT or str(name).startswith(f"{ROOT}."):
        from storage_schemas.commit import worker_name  # which needs Arrow

        known = _about.get({}) | {"worker": worker_name()}
        vars(record).update({field: known.get(field, "") for field in FIELDS})
    return record


class _Text(logging.Formatter):
    """`2026-11-26T02:10:19.123Z warning message [run=... kind=... part=... worker=...]`."""

    def format(self, record: logging.LogRecord) -> str:
        known = " ".join(f"{field}={value}" for field in FIELDS if (value := getattr(record, field, "")))
        line = f"{_stamp(record)} {record.levelname.lower()} {record.getMessage()} [{known}]"
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return printable(line) + printable(trace, lines=True)


class _Json(logging.Formatter):
    """One object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "ts": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{field: getattr(record, field, "") for field in FIELDS},
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


FORMATS = {"text": _Text, "json": _Json}


def _stamp(record: logging.LogRecord) -> str:
    at = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
    return f"{at.isoformat(timespec='milliseconds')}Z"


def print_line(line: str) -> None:
    sys.stderr.write(f"{line}\n")  # in one piece: other threads and processes write there, too
    sys.stderr.flush()


write: Callable[[str], None] = print_line  # while progress bars are shown, theirs, which puts a line above them


class _StandardError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            write(self.format(record))
        except Exception:
            self.handleError(record)


_standard_error = _StandardError()
_standard_error.setFormatter(_Text())


def as_line(text: str) -> str:
    """Return text that is shown whatever the level, as a line of the log."""
    return _standard_error.format(_record(f"{ROOT}.progress", logging.INFO, "", 0, "%s", (text,), None))


def set_up(level: str, form: str) -> None:
    """Write the records of this process from here on.

    A flow run's log in Prefect has those from `info` on, whatever the level of standard error.

    Raises:
        UsageError: there is no such level or format.
    """
    for given, known, option, variable in (
        (level, LEVELS, "--log-level", LEVEL),
        (form, FORMATS, "--log-format", FORMAT),
    ):
        if given not in known:
            raise UsageError(f"{option} (or {variable}) is {given!r}: choose one of {', '.join(known)}")
    logging.raiseExceptions = False  # a record that cannot be logged, as where a server is away, is not reported
    logging.setLogRecordFactory(_record)
    _standard_error.setLevel(LEVELS[level])
    _standard_error.setFormatter(FORMATS[form]())
    logger = logging.getLogger(ROOT)
    logger.setLevel(min(LEVELS[level], logging.INFO))
    logger.propagate = False  # Prefect writes what comes to the root logger to standard error, too
    logger.addHandler(_standard_error)
    if ROOT in os.environ.get("PREFECT_LOGGING_EXTRA_LOGGERS", "").split(","):
        # Prefect does this itself, except where a job's process imported Prefect before `flows` could ask for it.
        for handler in logging.getLogger("prefect.extra").handlers:
            logger.addHandler(handler)
    # Warnings of libraries to their developers: those of worker processes would stand between a command's lines.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Dynamo detected a call")  # diffusers under model.compile, harmless
    warnings.filterwarnings("ignore", message=f"Logger '{ROOT}")  # Prefect's, of records outside of a flow run


def shown(level: str) -> bool:
    """Return whether records of this level are written to standard error."""
    return _standard_error.level <= LEVELS[level] and logging.getLogger(ROOT).isEnabledFor(LEVELS[level])


def default_level() -> str:
    """Return `warning` at a terminal, where a person wants the result, else `info`, as a log is read later."""
    return "warning" if sys.stderr.isatty() else "info"


def set_up_once() -> None:
    """Set this process up by the environment, unless it is set up; an unknown level or format counts as none."""
    if _standard_error in logging.getLogger(ROOT).handlers:
        return
    level, form = os.environ.get(LEVEL, ""), os.environ.get(FORMAT, "")
    set_up(level if level in LEVELS else default_level(), form if form in FORMATS else "text")
