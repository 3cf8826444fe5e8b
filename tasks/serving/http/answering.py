"""The questions of a batch, answered by one version: encoded together, and searched together where they ask alike."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.errors import UsageError
from tasks.serving.answers import Answer
from tasks.serving.attributor import Attributor
from tasks.serving.exact import Progress
from tasks.serving.fast import Caption, Picture
from tasks.serving.http.batching import Waiting
from tasks.serving.http.metrics import ServiceMetrics
from tasks.serving.http.problems import Problem, one_line
from tasks.serving.http.questions import Question
from tasks.serving.settings import name_of


@dataclass(frozen=True)
class Encoded:
    """What a question is searched by: its vector, (width,), and phi, (d,), by which similar images are found."""

    vector: NDArray[np.float32]
    features: Tensor | None = None


def answer_batch(attributor: Attributor, batch: Sequence[Waiting], metrics: ServiceMetrics) -> None:
    """Answer every question of a batch of tier fast, or say of it why not; the others are answered all the same."""
    encoded = _encoded(attributor, batch, metrics)
    alike: dict[Hashable, list[Waiting]] = defaultdict(list)
    for waiting in batch:
        if not waiting.answered.done():
            alike[_asks_for(waiting, encoded[id(waiting)])].append(waiting)
    for together in alike.values():
        question, found = together[0].question, [encoded[id(waiting)] for waiting in together]
        features = [each.features for each in found if each.features is not None]
        try:
            answers = attributor.attribute_vectors(
                np.stack([each.vector for each in found]),
                [_name(waiting) for waiting in together],
                question.k,
                question.where,
                question.exclude,
                question.around,
                torch.stack(features) if features else None,
            )
        except Exception as error:
            for waiting in together:
                waiting.answered.set_exception(error)
        else:
            for waiting, answer in zip(together, answers, strict=True):
                waiting.answered.set_result(answer)


def answer_alone(
    attributor: Attributor, question: Question, picture: Picture, progress: Progress | None = None
) -> Answer:
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
        "beside": question.beside,
        "progress": progress,
    }
    if question.query_id is not None:
        return attributor.attribute_query(question.query_id, question.k, question.tier, **options)
    if question.vector is not None:
        raise Problem(400, f"tier {question.tier} takes an image and its caption, or a query_id", "vector")
    return attributor.attribute(picture, question.caption, question.k, question.tier, **options)


def _encoded(attributor: Attributor, batch: Sequence[Waiting], metrics: ServiceMetrics) -> dict[int, Encoded]:
    """Return what questions are searched by, by identity; a question without it has failed."""
    encoded: dict[int, Encoded] = {}
    shown: list[tuple[Waiting, Picture, Caption]] = []
    for waiting in batch:
        question = waiting.question
        try:
            if question.vector is not None:
                vector = attributor.checked_vector(np.asarray(question.vector, np.float32))
                encoded[id(waiting)] = Encoded(vector)
            elif question.query_id is None:
                shown.append((waiting, waiting.picture, question.caption))
            elif question.around:  # similar images are found by features, which are not kept
                query = attributor.query(question.query_id)
                shown.append((waiting, query.image, query.caption))
            else:
                encoded[id(waiting)] = Encoded(attributor.query_vector(attributor.query(question.query_id)))
        except Exception as error:
            waiting.answered.set_exception(_about(question, error))
    if shown:
        with metrics.encode_seconds.time():
            encoded |= _encode(attributor, shown)
    return encoded


def _encode(attributor: Attributor, shown: Sequence[tuple[Waiting, Picture, Caption]]) -> dict[int, Encoded]:
    """Encode questions together; where one of them cannot be, each by itself."""
    try:
        vectors, features = attributor.encode_both([each[1] for each in shown], [each[2] for each in shown])
    except Exception as error:
        if len(shown) == 1:
            shown[0][0].answered.set_exception(_about(shown[0][0].question, error))
            return {}
        alone = [_encode(attributor, [each]) for each in shown]
        return {name: found for each in alone for name, found in each.items()}
    return {
        id(each[0]): Encoded(*found) for each, found in zip(shown, zip(vectors, features, strict=True), strict=True)
    }


def _about(question: Question, error: Exception) -> Exception:
    """Return an error, with the field that it is about where that is known."""
    if isinstance(error, UsageError):
        asked = [name for name in ("vector", "query_id") if getattr(question, name) is not None]
        return Problem(400, one_line(error), asked[0] if asked else "image")
    return error


def _asks_for(waiting: Waiting, encoded: Encoded) -> Hashable:
    """Return what questions that are searched together have in common."""
    question = waiting.question
    return question.k, question.where, tuple(question.exclude), question.around, encoded.features is None


def _name(waiting: Waiting) -> str:
    """Return what tells a question from others: the same as Python's and the command's, so that the lineage is, too."""
    question = waiting.question
    if question.query_id is not None:
        return f"query {question.query_id}"
    if question.vector is not None:
        return hashlib.sha256(np.asarray(question.vector, np.float32).tobytes()).hexdigest()
    return name_of(waiting.picture, question.caption)
