"""The training images that influenced an image: one object behind Python, the command line and HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import UsageError
from fastgda_core.images import as_rgb
from storage_schemas.files import AnyPath
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tasks.inputs.queries import Query, load_queries, queries_artifact
from tasks.serving.agreement import agreements
from tasks.serving.answers import Answer, Hit, Influence, Tier, Versions
from tasks.serving.catalogue import Catalogue
from tasks.serving.fast import FastTier
from tasks.serving.question import check_caption
from tasks.serving.sketched import SketchTier
from tasks.serving.versions import served_versions

AROUND = 8  # of each list beside the hits
VECTORS_KEPT = 100_000  # of stored queries: 300 MB of 768 numbers
_DEEPER = 40  # places below the hits, at least, that are looked at for images that look the same

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class _Settings:
    """What a question asks for beside its image and caption."""

    k: int
    tier: Tier
    where: str | None
    exclude: tuple[int, ...]
    first: int | None
    relative: bool
    around: int


class Attributor:
    """What is published at one moment, loaded once: answers never mix versions. Concurrent calls may share it.

    Images that are taken down are left out from the moment that their record is there.
    """

    def __init__(self, workspace: Workspace, *, load: Sequence[Tier] = ("fast",)) -> None:
        """Load what is published.

        Args:
            workspace: where.
            load: the tiers that are loaded now; others are when they are first asked.

        Raises:
            NotPublished: nothing is published.
            UsageError: a tier that is to be loaded is not there.
        """
        self.workspace, self.published = workspace, read_published(workspace)
        self._lock = threading.RLock()
        self._loaded: dict[str, object] = {}
        for tier in load:
            self.prepare(tier)
        self.versions: Versions = served_versions(workspace, self.published)
        kind = self.fast.kind if "fast" in load else ""
        self.agreements = agreements(workspace, self.published, kind)
        parts = read_snapshot(workspace, self.published.snapshot).parts
        self.tied = any(part.negatives == "tie" for part in parts)
        self.queries: dict[str, Query] = {
            query.query_id: query
            for path in self.published.queries
            for query in load_queries(queries_artifact(workspace.file(path)))
        }
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def prepare(self, tier: Tier) -> None:
        """Load what a tier answers from, unless it is loaded.

        Raises:
            UsageError: it is not there.
        """
        if tier == "fast":
            self.catalogue(self.fast.samples_path)
        else:
            self.catalogue(self.sketch.samples_path)

    @property
    def fast(self) -> FastTier:
        """Tier fast, loaded at the first call."""
        return self._once("fast", lambda: FastTier(self.workspace, self.published))

    @property
    def sketch(self) -> SketchTier:
        """Tier sketch, loaded at the first call."""
        return self._once("sketch", lambda: SketchTier(self.workspace, self.published.run))

    def catalogue(self, path: AnyPath | None = None) -> Catalogue:
        """Return a table of samples, unless told otherwise those that are published."""
        if path is None:
            relative = self.published.index_samples or self.published.samples
            if relative is None:
                raise UsageError(f"{self.workspace.root} has no samples: what is published was imported without them")
            path = self.workspace.file(relative)
        return self._once(f"samples {path}", lambda: Catalogue(self.workspace, path))

    def _once(self, name: str, load: Callable[[], Loaded]) -> Loaded:
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load()
            found: Loaded = self._loaded[name]  # type: ignore[assignment]  # of the kind that `load` gives
            return found

    def attribute(
        self,
        image: Image.Image | None,
        caption: str | None,
        k: int = 20,
        tier: Tier = "fast",
        where: str | None = None,
        exclude: Sequence[int] = (),
        first: int | None = None,
        relative: bool = False,
        around: int = AROUND,
    ) -> Answer:
        """Return the k training samples that influenced an image most.

        Args:
            image: the generated image.
            caption: that it was generated from.
            k: how many.
            tier: how the answer is made.
            where: an SQL expression over the columns of `samples` that a sample has to fulfil.
            exclude: train_ids that are not to be named.
            first: of tier sketch: score the fast tier's first so many alone; None: all samples.
            relative: of tier sketch: divide a score by the length of the sample's gradient.
            around: how many samples of each list beside the hits; 0: no such lists.

        Raises:
            UsageError: the question makes no sense, or the tier is not there.
            RefusedFilter: `where` is no filter.
        """
        settings = _Settings(k, tier, where, tuple(exclude), first, relative, around)
        self._check(settings)
        if image is None or caption is None:
            raise UsageError("a question has an image and the caption that it was generated from")
        check_caption(caption)
        picture = as_rgb(image)
        asked = name_of(picture, caption)
        if tier == "fast":
            return self._by_vectors(self.encode_many([picture], [caption]), [asked], settings)[0]
        return self._by_sketches(picture, caption, asked, settings)

    def attribute_many(
        self,
        pictures: Sequence[Image.Image],
        captions: Sequence[str],
        k: int = 20,
        where: str | None = None,
        exclude: Sequence[int] = (),
        around: int = 0,
    ) -> list[Answer]:
        """Return the fast tier's answers to several questions, which are encoded and searched together."""
        settings = _Settings(k, "fast", where, tuple(exclude), None, False, around)
        self._check(settings)
        vectors = self.encode_many(pictures, captions)
        return self._by_vectors(vectors, [hashlib.sha256(each.tobytes()).hexdigest() for each in vectors], settings)

    def attribute_vectors(
        self,
        vectors: NDArray[np.float32],
        asked: Sequence[str],
        k: int = 20,
        where: str | None = None,
        exclude: Sequence[int] = (),
        around: int = 0,
    ) -> list[Answer]:
        """Return the fast tier's answers to several questions by their vectors, (questions, width), of one search.

        Args:
            asked: what tells each question from others, as `name_of` of its picture; it becomes part of the lineage.
        """
        settings = _Settings(k, "fast", where, tuple(exclude), None, False, around)
        self._check(settings)
        return self._by_vectors(vectors, asked, settings)

    def attribute_query(
        self,
        query_id: str,
        k: int = 20,
        tier: Tier = "fast",
        where: str | None = None,
        exclude: Sequence[int] = (),
        first: int | None = None,
        relative: bool = False,
        around: int = 0,
    ) -> Answer:
        """Answer for a stored query, whose vector is kept: as `attribute` of its image and caption."""
        query = self.query(query_id)
        if tier != "fast":
            return self.attribute(query.image, query.caption, k, tier, where, exclude, first, relative, around)
        settings = _Settings(k, tier, where, tuple(exclude), first, relative, around)
        self._check(settings)
        return self._by_vectors(self.query_vector(query)[None], [f"query {query_id}"], settings)[0]

    def attribute_vector(
        self,
        vector: NDArray[np.float32],
        k: int = 20,
        where: str | None = None,
        exclude: Sequence[int] = (),
        around: int = 0,
    ) -> Answer:
        """Answer for a vector of the head, (width,), as `encode_many` makes it."""
        settings = _Settings(k, "fast", where, tuple(exclude), None, False, around)
        self._check(settings)
        asked = self.checked_vector(vector)
        return self._by_vectors(asked[None], [hashlib.sha256(asked.tobytes()).hexdigest()], settings)[0]

    def checked_vector(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a vector as the index takes it; UsageError: it is none of this index."""
        asked = np.ascontiguousarray(vector, np.float32)
        width = self.fast.index.d
        if asked.shape != (width,) or not np.isfinite(asked).all():
            raise UsageError(f"a vector of this index is {width} finite numbers, not {asked.shape}")
        return asked

    def encode_many(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of several questions, (questions, width), encoded together."""
        for caption in captions:
            check_caption(caption)
        return self.fast.vectors(pictures, captions)

    def query(self, query_id: str) -> Query:
        """Return a stored query.

        Raises:
            UsageError: there is none of this name.
        """
        if query_id not in self.queries:
            raise UsageError(f"no query {query_id[:100]} is published: the table queries lists those that are")
        return self.queries[query_id]

    def query_vector(self, query: Query) -> NDArray[np.float32]:
        """Return the vector of a stored query, (width,), which is kept."""
        found = self._vectors.get(query.query_id)
        if found is None:
            found = self.fast.vectors([query.image], [query.caption])[0]
            if len(self._vectors) < VECTORS_KEPT:
                self._vectors[query.query_id] = found
        return found

    def sample(self, train_id: int) -> Hit:
        """Return the facts of a training sample, with rank 0; UnknownSample, RemovedSample: there is none."""
        return self.catalogue().sample(train_id)

    def picture(self, train_id: int) -> tuple[bytes, str]:
        """Return a training sample's image as it lies in its tar, and its content type; errors as of `sample`."""
        return self.catalogue().picture(train_id)

    def _check(self, settings: _Settings) -> None:
        if settings.k < 1:
            raise UsageError(f"k is {settings.k}: ask for 1 or more")
        if settings.tier == "fast" and (settings.first is not None or settings.relative):
            raise UsageError("first and relative are of tier sketch: ask tier sketch")

    def _by_vectors(self, vectors: NDArray[np.float32], asked: Sequence[str], settings: _Settings) -> list[Answer]:
        """Answer several questions of tier fast, by one search."""
        started = time.perf_counter()
        catalogue = self.catalogue(self.fast.samples_path)
        allowed = catalogue.allowed(settings.where, settings.exclude)
        found = self.fast.search(vectors, _depth(settings.k), allowed)
        answers = []
        for number, question in enumerate(asked):
            mine = slice(number, number + 1)
            hits = self._nearest(catalogue, vectors[mine], settings.k, allowed, (found[0][mine], found[1][mine]))
            lowering, notes = self._lowering_by_vector(catalogue, vectors[mine], allowed, settings)
            answers.append(self._answer(settings, question, hits, lowering, [], started, notes))
        return answers

    def _nearest(
        self,
        catalogue: Catalogue,
        vector: NDArray[np.float32],
        k: int,
        allowed: NDArray[np.bool_] | None,
        found: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
        *,
        lowering: bool = False,
    ) -> list[Hit]:
        """Return the k samples nearest to one vector, (1, width), or those of most negative similarity.

        Args:
            found: what a search to the usual depth found already.
        """
        depth, sign = _depth(k), -1 if lowering else 1
        while True:
            similarity, train_ids = found or self.fast.search(sign * vector, depth, allowed)
            kept = similarity[0] > 0 if lowering else slice(None)
            hits = self._hits(catalogue, train_ids[0][kept], k, similarity=sign * similarity[0][kept])
            if len(hits) == k or train_ids.shape[1] < depth:
                return hits
            depth, found = 4 * depth, None  # copies of one picture took all places

    def _lowering_by_vector(
        self, catalogue: Catalogue, vector: NDArray[np.float32], allowed: NDArray[np.bool_] | None, settings: _Settings
    ) -> tuple[list[Hit], list[str]]:
        if not settings.around:
            return [], []
        if self.tied:
            return [], [_TIED]
        if not self.fast.can_lower:
            return [], [_SYMMETRIC]
        return self._nearest(catalogue, vector, settings.around, allowed, lowering=True), []

    def _by_sketches(self, picture: Image.Image, caption: str, asked: str, settings: _Settings) -> Answer:
        started, sketch = time.perf_counter(), self.sketch
        catalogue = self.catalogue(sketch.samples_path)
        allowed = catalogue.allowed(settings.where, settings.exclude)
        of_whom = None if settings.first is None else self._first(picture, caption, settings.first, allowed)
        found = sketch.scores(picture, caption, of_whom, relative=settings.relative)
        scores, errors = found.scores.numpy(), found.standard_errors.numpy()
        present = catalogue.allowed()
        counted = scores if present is None else scores[present[found.train_ids]]
        chosen = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed[found.train_ids])
        order = chosen[np.argsort(-scores[chosen], kind="stable")]

        def hits(order: NDArray[np.int64], k: int) -> list[Hit]:
            depth = _depth(k)
            while True:
                some = order[:depth]
                found_hits = self._hits(
                    catalogue, found.train_ids[some], k, score=scores[some], standard_error=errors[some]
                )
                if len(found_hits) == k or depth >= len(order):
                    return found_hits
                depth *= 4

        best, notes, lowering = hits(order, settings.k), [], list[Hit]()
        if settings.around and self.tied:
            notes.append(_TIED)
        elif settings.around:
            lowering = hits(order[::-1][scores[order[::-1]] < 0], settings.around)
        return self._answer(settings, asked, best, lowering, [], started, notes, _influence(counted, best))

    def _first(
        self, image: Image.Image, caption: str, count: int, allowed: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        """Return the fast tier's first samples, which a slower tier scores."""
        if self.fast.samples_path != self.sketch.samples_path:
            raise UsageError(
                "the served index is of other training samples than the published run: `fastgda index CONFIG` and "
                "`fastgda evaluate CONFIG` with the run's configuration serve one of these"
            )
        _, train_ids = self.fast.search(self.fast.vectors([image], [caption]), count, allowed)
        return train_ids[0]

    def _hits(
        self, catalogue: Catalogue, train_ids: NDArray[np.int64], k: int, **figures: NDArray[np.floating]
    ) -> list[Hit]:
        """Return the first k of an order of samples, those that look the same folded under the first of them."""
        folded = catalogue.looks.fold(train_ids, k)
        places = [each.place for each in folded]
        return catalogue.hits(
            train_ids[places].tolist(),
            duplicates=[each.duplicates for each in folded],
            **{name: [_number(value) for value in values[places].tolist()] for name, values in figures.items()},
        )

    def _answer(
        self,
        settings: _Settings,
        asked: str,
        hits: list[Hit],
        lowering: list[Hit],
        similar: list[Hit],
        started: float,
        notes: list[str],
        influence: Influence | None = None,
    ) -> Answer:
        return Answer(
            tier=settings.tier,
            hits=hits,
            lowering=lowering,
            similar=similar,
            agreement=self.agreements[settings.tier],
            versions=self.versions,
            lineage=_lineage(self.versions, asked, settings),
            seconds=time.perf_counter() - started,
            influence=influence,
            notes=notes,
        )


_TIED = "this teacher's negative scores carry nothing (teacher.negatives: tie), so what lowers the image is not named"
_SYMMETRIC = "this head learned an order alone, so what lowers the image is not named: tier sketch or exact may name it"


def name_of(picture: Image.Image, caption: str) -> str:
    """Return what tells the question about an RGB picture and its caption from any other."""
    return hashlib.sha256(repr((picture.size, caption)).encode() + picture.tobytes()).hexdigest()


def _depth(k: int) -> int:
    """Return how many places are looked at for k hits after those that look the same are folded."""
    return k + max(k, _DEEPER)


def _number(value: float) -> float | None:
    """Return a figure, None where it is not known: JSON has no NaN."""
    return value if np.isfinite(value) else None


def _influence(scores: NDArray[np.float64], hits: list[Hit]) -> Influence:
    positive, negative = float(scores[scores > 0].sum()), float(scores[scores < 0].sum())
    held = sum(max(hit.score or 0.0, 0.0) for hit in hits)
    return Influence(len(scores), positive, negative, held / positive if positive else 0.0)


def _lineage(versions: Versions, asked: str, settings: _Settings) -> str:
    document = json.dumps([asdict(versions), asked, asdict(settings)], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest()[:16]
