"""What administrators asked for and what came of it: a line each in a file that only grows."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tasks.serving.http.problems import Problem


class Audit:
    """A file of JSON lines. Whatever cannot be written down is not done."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def note(self, request_id: str, caller: str, action: str, outcome: str, **details: Any) -> None:
        """Add a line, durably.

        Raises:
            Problem: it cannot be written.
        """
        fields = {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "caller": caller,
            "action": action,
            "outcome": outcome,
            **details,
        }
        line = json.dumps(fields).encode() + b"\n"
        try:
            with self._lock:
                handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    os.write(handle, line)  # in one piece: other workers append, too
                    os.fsync(handle)
                finally:
                    os.close(handle)
        except OSError as error:
            raise Problem(503, f"the audit log cannot be written ({error.strerror}), so nothing is changed") from None
