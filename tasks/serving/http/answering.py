"""The questions of a batch, answered by one version: encoded together, and searched together where they ask alike."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import UsageError
from tasks.serving.answers import Answer
from tasks.serving.attributor import Attributor, name_of
from tasks.serving.http.batching import Waiting
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.problems import Problem, one_line
from tasks.serving.http.questions import Question

Vector = NDArray[np.float32]


def answer_batch(attributor: Attributor, batch: Sequence[Waiting], metrics: ServiceMetrics) -> None:
    """Answer every question of a batch of tier fast, or say of it why not; the others are answered all the same."""
    vectors = _vectors(attributor, batch, metrics)
    alike: dict[Hashable, list[Waiting]] = defaultdict(list)
    for waiting in batch:
        if not waiting.answered.done():
            alike[_asks_for(waiting)].append(waiting)
    for together in alike.values():
        question = together[0].question
        try:
            answers = attributor.attribute_vectors(
                np.stack([vectors[id(waiting)] for waiting in together]),
                [_name(waiting) for waiting in together],
                question.k,
                question.where,
                question.exclude,
                question.around,
            )
        except Exception as error:
            for waiting in together:
                waiting.answered.set_exception(error)
        else:
            for waiting, answer in zip(together, answers, strict=True):
                waiting.answered.set_result(answer)


def answer_alone(attributor: Attributor, question: Question, picture: Image.Image | None) -> Answer:
    """Answer a question of tier sketch or exact, of a picture or of a stored query.

    Raises:
        UsageError: the tier is not there, or a vector is asked, which has no gradient.
    """
    options: dict[str, Any] = {
        "where": question.where,
        "exclude": question.exclude,
        "first": question.first,
        "relative": question.relative,
        "around": question.around,
    }
    if question.query_id is not None:
        return attributor.attribute_query(question.query_id, question.k, question.tier, **options)
    if picture is None:
        raise Problem(400, f"tier {question.tier} takes an image and its caption, or a query_id", "vector")
    return attributor.attribute(picture, question.caption, question.k, question.tier, **options)


def _vectors(attributor: Attributor, batch: Sequence[Waiting], metrics: ServiceMetrics) -> dict[int, Vector]:
    """Return the vectors by which questions are searched, by identity; a question without one has failed."""
    vectors: dict[int, Vector] = {}
    pictured = []
    for waiting in batch:
        question = waiting.question
        try:
            if waiting.picture is not None:
                pictured.append(waiting)
            elif question.query_id is not None:
                vectors[id(waiting)] = attributor.query_vector(attributor.query(question.query_id))
            else:
                vectors[id(waiting)] = attributor.checked_vector(np.asarray(question.vector, np.float32))
        except Exception as error:
            waiting.answered.set_exception(_about(question, error))
    if pictured:
        with metrics.encode_seconds.time():
            found = attributor.encode_many(
                [waiting.picture for waiting in pictured if waiting.picture is not None],
                [waiting.question.caption or "" for waiting in pictured],
            )
        vectors |= {id(waiting): vector for waiting, vector in zip(pictured, found, strict=True)}
    return vectors


def _about(question: Question, error: Exception) -> Exception:
    """Return an error, with the field that it is about where that is known."""
    if isinstance(error, UsageError):
        return Problem(400, one_line(error), "vector" if question.vector is not None else "query_id")
    return error


def _asks_for(waiting: Waiting) -> Hashable:
    question = waiting.question
    return question.k, question.where, tuple(question.exclude), question.around


def _name(waiting: Waiting) -> str:
    """Return what tells a question from others: the same as Python's and the command's, so that the lineage is, too."""
    question = waiting.question
    if waiting.picture is not None:
        return name_of(waiting.picture, question.caption or "")
    if question.query_id is not None:
        return f"query {question.query_id}"
    return hashlib.sha256(np.asarray(question.vector, np.float32).tobytes()).hexdigest()
