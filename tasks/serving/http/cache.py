"""What is kept in memory: encoded pictures, and answers to stored queries."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

from tasks.serving.answers import Answer
from tasks.serving.attributor import Attributor
from tasks.serving.http.questions import Question

ANSWERS = 4096  # of 20 hits: 40 MB


class Pictures:
    """A cache of encoded pictures, bounded by their bytes; the one that was asked for longest ago goes first."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tag: str) -> bytes | None:
        with self._lock:
            if tag in self._kept:
                self._kept.move_to_end(tag)
            return self._kept.get(tag)

    def put(self, tag: str, content: bytes) -> None:
        with self._lock:
            self._bytes += len(content) - len(self._kept.pop(tag, b""))
            self._kept[tag] = content
            while self._bytes > self._most:
                _, gone = self._kept.popitem(last=False)
                self._bytes -= len(gone)


class Answers:
    """The latest answers to stored queries: the same question to the same versions has the same answer.

    A key holds the published state and the newest take-down, which is looked for each time: what was taken down is not
    named from then on.
    """

    def __init__(self, most: int = ANSWERS) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[Hashable, Answer] = OrderedDict()

    @staticmethod
    def keeps(question: Question) -> bool:
        """Return whether answers to such questions are kept."""
        return question.query_id is not None and question.tier == "fast"

    @staticmethod
    def key(attributor: Attributor, question: Question) -> Hashable | None:
        """Return what an answer depends on; None where it is not kept."""
        if not Answers.keeps(question):
            return None
        take_down = attributor.catalogue(attributor.fast.samples_path).present().take_down
        asked = (
            question.query_id,
            question.k,
            question.where,
            tuple(question.exclude),
            question.around,
            question.beside,
        )
        return attributor.versions.published, take_down, asked

    def get(self, key: Hashable, started: float) -> Answer | None:
        """Return an answer that is kept, with the seconds that it took this time."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
        return replace(found, seconds=time.perf_counter() - started)

    def put(self, key: Hashable, answer: Answer) -> None:
        with self._lock:
            self._kept[key] = answer
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
