"""An answer's question answered in other ways, for columns beside it: by the other tiers, and by untuned features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath
from storage_schemas.snapshots.snapshots import read_influence
from tasks.serving.answers import Column, Hit, Way
from tasks.serving.catalogue import Catalogue
from tasks.serving.loaded import Loaded
from tasks.serving.nearest import nearest_of
from tasks.serving.ranked import Figures, Scored, hits_of, lists_of_scores
from tasks.serving.settings import Settings
from tasks.serving.untuned import Kind, space_of

Make = Callable[[], Column | None]
PUBLISHED = "the scores that the run published for this query, of {:,} training images"


class Whole(NamedTuple):
    """A question whose image and caption are at hand; one of both may be missing.

    query_id: of a stored query.
    """

    picture: Image.Image | None
    caption: str | None
    query_id: str | None = None


class Among(NamedTuple):
    """The samples that an answer may name: its table, and whether each of them may be named, (n,); None: all may."""

    catalogue: Catalogue
    allowed: NDArray[np.bool_] | None


def columns(
    loaded: Loaded, whole: Whole, vector: NDArray[np.float32], features: Tensor, among: Among, settings: Settings
) -> tuple[list[Column], list[str]]:
    """Return a question's columns, and why there is none of some ways, a line each.

    A tier is among these where it answers at once: sketch where the run keeps sketches, exact where the teacher scored
    this query. Ways that a workspace was never made for are passed over in silence.

    Args:
        vector: of the question, (1, width), by which tier fast searches.
        features: phi of the question, (d,).
    """
    beside = _Beside(loaded, whole, vector, features, among, settings)
    found: list[Column] = []
    notes: list[str] = []
    for way, make in beside.ways().items():
        if way == settings.tier:
            continue
        try:
            column = make()
        except (UsageError, StoreError) as error:
            notes.append(f"no column {way}: {error}")
        else:
            found += [column] if column else []
    return found, notes


class _Beside:
    """One question, and what its columns are made of."""

    def __init__(
        self,
        loaded: Loaded,
        whole: Whole,
        vector: NDArray[np.float32],
        features: Tensor,
        among: Among,
        settings: Settings,
    ) -> None:
        self._loaded, self._whole, self._vector, self._features = loaded, whole, vector, features
        self._catalogue, self._allowed = among
        self._settings = settings

    def ways(self) -> dict[Way, Make]:
        return {
            "fast": self._fast,
            "sketch": self._sketch,
            "exact": self._published,
            "images": lambda: self._untuned("images"),
            "captions": lambda: self._untuned("captions"),
        }

    def _fast(self) -> Column:
        fast = self._loaded.fast
        self._check(fast.samples_path)
        allowed = fast.reaching(self._allowed, len(self._catalogue))
        hits = nearest_of(fast, self._catalogue, self._vector, self._settings.k, allowed)
        return self._column("fast", hits, fast.samples_path, notes=fast.predictions.notes)

    def _sketch(self) -> Column | None:
        if not self._loaded.has_sketches or self._whole.picture is None or self._whole.caption is None:
            return None
        tier = self._loaded.sketch
        self._check(tier.samples_path)
        found = tier.scores(self._whole.picture, self._whole.caption, None)
        scored = Scored(found.train_ids, found.scores.numpy(), found.standard_errors.numpy())
        return self._column("sketch", self._by_scores(scored), tier.samples_path)

    def _published(self) -> Column | None:
        """Make the column of a stored query whose scores are published: what tier exact would compute anew."""
        loaded, published = self._loaded, self._loaded.published
        if self._whole.query_id is None or published.samples is None:
            return None
        rows = read_influence(loaded.workspace, published.snapshot, [self._whole.query_id]).sort_by("train_id")
        if not len(rows):
            return None
        self._check(loaded.workspace.file(published.samples))
        errors = rows["standard_error"].to_numpy(zero_copy_only=False).astype(np.float64)
        scored = Scored(rows["train_id"].to_numpy(), rows["score"].to_numpy().astype(np.float64), errors)
        path = loaded.workspace.file(published.samples)
        return self._column("exact", self._by_scores(scored), path, notes=[PUBLISHED.format(len(rows))])

    def _untuned(self, kind: Kind) -> Column | None:
        space = space_of(kind, self._loaded.fast.space.space)
        given = self._whole.picture if kind == "images" else self._whole.caption
        if not space or given is None:
            return None
        if isinstance(untuned := self._loaded.untuned(kind), str):
            raise UsageError(untuned)
        self._check(untuned.samples_path)

        def first(depth: int) -> tuple[NDArray[np.int64], Figures]:
            cosine, train_ids = untuned.nearest(self._features, depth, self._allowed)
            kept = train_ids >= 0
            return train_ids[kept], {"similarity": cosine[kept]}

        return self._column(kind, hits_of(self._catalogue, first, self._settings.k), untuned.samples_path, space)

    def _column(self, way: Way, hits: list[Hit], path: AnyPath, space: str = "", notes: Sequence[str] = ()) -> Column:
        left_out = self._loaded.left_out(path, "what the run made does not know them")
        return Column(way, space, hits, self._loaded.agreements[way], [*notes, *left_out])

    def _by_scores(self, found: Scored) -> list[Hit]:
        return lists_of_scores(
            self._catalogue, found, None, self._allowed, self._settings.k, 0, tied=self._loaded.tied
        ).hits

    def _check(self, path: AnyPath) -> None:
        """Raise UsageError where a way numbers other samples than the answer."""
        mine = self._catalogue.path
        if not (self._loaded.extends(mine, path) or self._loaded.extends(path, mine)):
            raise UsageError("it is of other training samples than the answer")
