"""The pickles of scores and neighbours of the FastGDA release, read without running them and checked row by row.

`influence_train.pkl` has scores of some samples of each query, `influence_test.pkl` of all: the module `release` beside
this one describes the first; the second is `{split: {"influence", "rank"}}`, both (queries, samples): the scores in
the order of the train_ids, and the train_ids, the most influential first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage_schemas.commit import file_sha256
from storage_schemas.publishing.plain_pickle import BadRelease, PlainArray, unpickle

SCORES, ORDER, TRAIN_IDS = "influence_subset", "rank_influence_subset", "rank"
ALL_SCORES = "influence"  # of all samples
_MERGED = "merge_train.py or merge_test.py"


@dataclass(frozen=True)
class ScoredPairs:
    """The content of a file; all arrays are (queries, candidates).

    scores: in an order of the file's own; order: the places in it, the highest score first; train_ids: the training
    samples in that order.
    """

    split: str
    scores: NDArray[np.floating[Any]]
    order: NDArray[np.integer[Any]]
    train_ids: NDArray[np.integer[Any]]


def read_scores(path: Path) -> tuple[ScoredPairs, str]:
    """Read a file, check it, and return its content and its sha256.

    Raises:
        BadRelease: the file is no such pickle, names anything but numeric numpy arrays, is damaged or contradicts
            itself.
    """
    try:
        sha256 = file_sha256(path)
        with path.open("rb") as file:
            content = unpickle(path, file)
    except OSError as error:
        raise BadRelease(f"{path} cannot be read: {error.strerror or error}") from None
    release, names = _arranged(path, content)
    for row in range(len(release.scores)):
        fault = _fault(release.scores[row], release.order[row], release.train_ids[row], names)
        if fault:
            raise BadRelease(f"{path}: row {row} {fault}: write the file again with {_MERGED} of the release")
    return release, sha256


def read_neighbors(path: Path) -> NDArray[np.integer[Any]]:
    """Read `nn_dino.pkl`, `{"fixed": {"rank"}}`: the train_ids near each query, (queries, neighbours), nearest first.

    Raises:
        BadRelease: as of `read_scores`.
    """
    try:
        with path.open("rb") as file:
            content = unpickle(path, file)
    except OSError as error:
        raise BadRelease(f"{path} cannot be read: {error.strerror or error}") from None
    split = next(iter(content.values())) if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(split, dict) or TRAIN_IDS not in split:
        raise BadRelease(f"{path} holds {_outline(content)}, not a split and its {TRAIN_IDS}: fetch it again")
    found = _values(path, TRAIN_IDS, split[TRAIN_IDS], "iu")
    if found.ndim != 2 or not found.size:
        raise BadRelease(f"{path}: {TRAIN_IDS} is of shape {found.shape}, not (queries, neighbours): fetch it again")
    return found


def _arranged(path: Path, content: object) -> tuple[ScoredPairs, tuple[str, ...]]:
    """Return the arrays of the file, of one shape and of the right kinds, and their names."""
    split, arrays = next(iter(content.items())) if isinstance(content, dict) and len(content) == 1 else ("", None)
    if not isinstance(split, str) or not split.isprintable() or not isinstance(arrays, dict):
        raise BadRelease(
            f"{path} holds {_outline(content)}, not a split and its arrays: merge the files of single queries with "
            f"{_MERGED} of the release"
        )
    wanted = (ALL_SCORES, TRAIN_IDS) if ALL_SCORES in arrays else (SCORES, ORDER, TRAIN_IDS)
    if arrays.keys() != set(wanted):
        raise BadRelease(
            f"{path}: {split!r} holds {_outline(arrays)}, not {SCORES}, {ORDER} and {TRAIN_IDS}, nor {ALL_SCORES} and "
            f"{TRAIN_IDS}: it is not what {_MERGED} of the release writes"
        )
    found = {name: _values(path, name, arrays[name], "f" if name == wanted[0] else "iu") for name in wanted}
    shapes = {name: values.shape for name, values in found.items()}
    if len(set(shapes.values())) != 1 or len(shapes[wanted[0]]) != 2 or not found[wanted[0]].size:
        raise BadRelease(f"{path}: shapes {shapes} are not one (queries, candidates): write the file again")
    # Where all samples are scored, a sample's place among the scores is its train_id.
    return ScoredPairs(split, found[wanted[0]], found[wanted[1]], found[TRAIN_IDS]), wanted


def _values(path: Path, name: str, stand_in: object, kinds: str) -> NDArray[Any]:
    values = getattr(stand_in, "values", None) if isinstance(stand_in, PlainArray) else None
    if values is None or values.dtype.kind not in kinds:
        found = "no array" if values is None else f"of {values.dtype}"
        wanted = "floats" if kinds == "f" else "integers"
        raise BadRelease(f"{path}: {name} is {found}, it must be a numpy array of {wanted}: write the file again")
    return values


def _outline(content: object) -> str:
    """Describe an object in a few words for a message."""
    if not isinstance(content, dict):
        return type(content).__name__.lstrip("_").lower()
    keys = ", ".join(repr(key)[:40] for key in list(content)[:5])
    return f"a dict of {len(content)} ({keys})"


def _fault(scores: NDArray[Any], order: NDArray[Any], train_ids: NDArray[Any], names: tuple[str, ...]) -> str | None:
    """Return what is wrong with the three rows of a query, (candidates,) each; None where nothing is."""
    if not np.isfinite(scores).all():
        return f"of {names[0]} has values that are not finite"
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        return f"of {names[1]} is no permutation of its {len(order)} places"
    ranked = scores[order]
    if (ranked[:-1] < ranked[1:]).any():
        return f"of {names[1]} does not sort the scores from high to low"
    if train_ids.min() < 0 or train_ids.max() > np.iinfo(np.int64).max:
        return f"of {TRAIN_IDS} has negative or too large numbers"
    if len(np.unique(train_ids)) != len(train_ids):
        return f"of {TRAIN_IDS} names a training sample twice"
    return None
