"""The training images that influenced an image: one object behind Python, the command line and HTTP."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.errors import UsageError
from fastgda_core.images import as_rgb
from storage_schemas.files import AnyPath
from storage_schemas.workspace import Workspace
from tasks.inputs.queries import Query
from tasks.serving.answers import Answer, Hit, Tier, Versions
from tasks.serving.beside import Among, Whole, columns
from tasks.serving.catalogue import Catalogue
from tasks.serving.exact import FIRST, Progress
from tasks.serving.fast import Caption, FastTier, Picture
from tasks.serving.loaded import Loaded
from tasks.serving.nearest import low_and_alike, nearest_of, with_lowering
from tasks.serving.picture_shares import PictureShares
from tasks.serving.question import check_caption
from tasks.serving.ranked import Lists, Scored, depth_for, lists_of_scores
from tasks.serving.settings import AROUND, Settings, name_of

VECTORS_KEPT = 100_000  # of stored queries: 300 MB of 768 numbers


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
        self._loaded = Loaded(workspace)
        for tier in load:
            self.prepare(tier)
        self._vectors: dict[str, NDArray[np.float32]] = {}

    @property
    def workspace(self) -> Workspace:
        return self._loaded.workspace

    @property
    def versions(self) -> Versions:
        """What answers are made of."""
        return self._loaded.versions

    @property
    def fast(self) -> FastTier:
        """Tier fast."""
        return self._loaded.fast

    @property
    def queries(self) -> dict[str, Query]:
        """The stored queries, by query_id."""
        return self._loaded.queries

    def prepare(self, tier: Tier) -> None:
        """Load what a tier answers from, and what its answers tell beside the hits, unless it is loaded.

        Raises:
            UsageError: it is not there.
        """
        self.catalogue(getattr(self._loaded, tier).samples_path)
        _ = self._loaded.agreements, self._loaded.tied  # else the first question reads them, from a later moment

    def catalogue(self, path: AnyPath | None = None) -> Catalogue:
        """Return a table of samples, unless told otherwise those that are published."""
        return self._loaded.catalogue(path)

    def attribute(
        self,
        image: Picture,
        caption: Caption,
        k: int = 20,
        tier: Tier = "fast",
        where: str | None = None,
        exclude: Sequence[int] = (),
        first: int | None = None,
        relative: bool = False,
        around: int = AROUND,
        progress: Progress | None = None,
        beside: bool = False,
    ) -> Answer:
        """Return the k training samples that influenced an image most.

        Args:
            image: the generated image. Of tier fast one of both may be None, where the head allows that.
            caption: that it was generated from.
            k: how many.
            tier: how the answer is made.
            where: an SQL expression over the columns of `samples` that a sample has to fulfil.
            exclude: train_ids that are not to be named.
            first: score the fast tier's first so many alone. Of tier sketch None: all samples, of tier exact: 400.
            relative: of tier sketch: divide a score by the length of the sample's gradient.
            around: how many samples of each list beside the hits; 0: no such lists.
            progress: of tier exact, see `Progress`; what it raises ends the work.
            beside: answer in the other ways, too, that take a moment: see `Column`.

        Raises:
            UsageError: the question makes no sense, or the tier is not there.
            RefusedFilter: `where` is no filter.
        """
        settings = Settings(k, tier, where, tuple(exclude), first, relative, around, beside)
        settings.check()
        if caption is not None:
            check_caption(caption, "caption")
        picture = None if image is None else as_rgb(image)
        if tier == "fast":
            return self._answer_fast([picture], [caption], settings)[0]
        if picture is None or caption is None:
            raise UsageError(f"tier {tier} takes a gradient of the model: give the image and its caption")
        return self._answer_slow(Whole(picture, caption), name_of(picture, caption), settings, None, progress)

    def attribute_many(
        self,
        pictures: Sequence[Picture],
        captions: Sequence[Caption],
        k: int = 20,
        where: str | None = None,
        exclude: Sequence[int] = (),
        around: int = 0,
    ) -> list[Answer]:
        """Return the fast tier's answers to several questions, which are encoded and searched together."""
        settings = Settings(k, "fast", where, tuple(exclude), around=around)
        settings.check()
        return self._answer_fast([None if each is None else as_rgb(each) for each in pictures], captions, settings)

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
        progress: Progress | None = None,
        beside: bool = False,
    ) -> Answer:
        """Answer for a stored query, whose vector is kept; of tier exact with the noise that its own scores have."""
        query, asked = self.query(query_id), f"query {query_id}"
        settings = Settings(k, tier, where, tuple(exclude), first, relative, around, beside)
        settings.check()
        whole = Whole(query.image, query.caption, query_id)
        if tier != "fast":
            return self._answer_slow(whole, asked, settings, query.owner, progress)
        features = self.fast.features([query.image], [query.caption]) if around or beside else None
        return self._by_vectors(self.query_vector(query, features)[None], [asked], settings, features, [whole])[0]

    def attribute_vector(
        self,
        vector: NDArray[np.float32],
        k: int = 20,
        where: str | None = None,
        exclude: Sequence[int] = (),
        around: int = 0,
    ) -> Answer:
        """Answer for a vector of the head, (width,), as `encode_many` makes it."""
        checked = self.checked_vector(vector)
        name = hashlib.sha256(checked.tobytes()).hexdigest()
        return self.attribute_vectors(checked[None], [name], k, where, exclude, around)[0]

    def attribute_vectors(
        self,
        vectors: NDArray[np.float32],
        asked: Sequence[str],
        k: int = 20,
        where: str | None = None,
        exclude: Sequence[int] = (),
        around: int = 0,
        features: Tensor | None = None,
    ) -> list[Answer]:
        """Return the fast tier's answers to several questions by their vectors, (questions, width), of one search.

        Args:
            asked: what tells each question from others, as `name_of` of its picture; it becomes part of the lineage.
            features: phi of the questions, as `encode_both` returns it, by which similar images are found.
        """
        settings = Settings(k, "fast", where, tuple(exclude), around=around)
        settings.check()
        return self._by_vectors(vectors, asked, settings, features)

    def checked_vector(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a vector as the index takes it; UsageError: it is none of this index."""
        asked = np.ascontiguousarray(vector, np.float32)
        width = self.fast.index.width
        if asked.shape != (width,) or not np.isfinite(asked).all():
            raise UsageError(f"a vector of this index is {width} finite numbers, not {asked.shape}")
        return asked

    def encode_many(self, pictures: Sequence[Picture], captions: Sequence[Caption]) -> NDArray[np.float32]:
        """Return the vectors of several questions, (questions, width), encoded together."""
        return self.encode_both(pictures, captions)[0]

    def encode_both(
        self, pictures: Sequence[Picture], captions: Sequence[Caption]
    ) -> tuple[NDArray[np.float32], Tensor]:
        """Return what `encode_many` does, and phi of the questions, (questions, d)."""
        for caption in captions:
            if caption is not None:
                check_caption(caption, "caption")
        features = self.fast.features(pictures, captions)
        return self.fast.vectors(features, captions), features

    def query(self, query_id: str) -> Query:
        """Return a stored query.

        Raises:
            UsageError: there is none of this name.
        """
        if query_id not in self.queries:
            raise UsageError(f"no query {query_id[:100]} is published: the table queries lists those that are")
        return self.queries[query_id]

    def query_vector(self, query: Query, features: Tensor | None = None) -> NDArray[np.float32]:
        """Return the vector of a stored query, (width,), which is kept; features: its phi, (1, d), where at hand."""
        found = self._vectors.get(query.query_id)
        if found is None:
            if features is None:
                found = self.encode_many([query.image], [query.caption])[0]
            else:
                found = self.fast.vectors(features, [query.caption])[0]
            if len(self._vectors) < VECTORS_KEPT:
                self._vectors[query.query_id] = found
        return found

    @property
    def pictures(self) -> PictureShares:
        """What tells the shares of pictures that no teacher scored."""
        return self._loaded.once("shares of pictures", lambda: PictureShares(self._loaded))

    def sample(self, train_id: int) -> Hit:
        """Return the facts of a training sample, with rank 0; UnknownSample, RemovedSample: there is none."""
        return self.catalogue().sample(train_id)

    def picture(self, train_id: int) -> tuple[bytes, str]:
        """Return a training sample's image as it lies in its tar, and its content type; errors as of `sample`."""
        return self.catalogue().picture(train_id)

    def _answer_fast(
        self, pictures: Sequence[Picture], captions: Sequence[Caption], settings: Settings
    ) -> list[Answer]:
        vectors, features = self.encode_both(pictures, captions)
        both = list(zip(pictures, captions, strict=True))
        wholes = [Whole(*each) for each in both]
        answers = self._by_vectors(vectors, [name_of(*each) for each in both], settings, features, wholes)
        return [_of_part(answer, *each) for answer, each in zip(answers, both, strict=True)]

    def _by_vectors(
        self,
        vectors: NDArray[np.float32],
        asked: Sequence[str],
        settings: Settings,
        features: Tensor | None,
        wholes: Sequence[Whole] = (),
    ) -> list[Answer]:
        """Answer several questions of tier fast, by one search."""
        started, fast = time.perf_counter(), self.fast
        catalogue = self.catalogue(fast.samples_path)
        present = catalogue.present()
        allowed = catalogue.allowed(present, settings.where, settings.exclude)
        found = fast.search(vectors, depth_for(settings.k), allowed)
        answers = []
        for number, question in enumerate(asked):
            mine = slice(number, number + 1)
            hits = nearest_of(fast, catalogue, vectors[mine], settings.k, allowed, (found[0][mine], found[1][mine]))
            lists = Lists(hits, notes=fast.predictions.notes)
            if settings.around:
                lists = with_lowering(fast, catalogue, vectors[mine], lists, allowed, settings, tied=self._loaded.tied)
                phi = None if features is None else features[number]
                lists = self._with_similar(lists, catalogue, vectors[mine], phi, allowed, settings)
            if settings.beside and features is not None:
                among = Among(catalogue, allowed)
                lists = self._with_beside(lists, wholes[number], vectors[mine], features[number], among, settings)
            answers.append(self._answer(settings, question, present.take_down, lists, started))
        return answers

    def _answer_slow(
        self, whole: Whole, asked: str, settings: Settings, owner: int | None, progress: Progress | None
    ) -> Answer:
        """Answer one question of tier sketch or exact."""
        started, (picture, caption, _) = time.perf_counter(), whole
        assert picture is not None and caption is not None
        tier = self._loaded.exact if settings.tier == "exact" else self._loaded.sketch
        catalogue = self.catalogue(tier.samples_path)
        present = catalogue.present()
        allowed = catalogue.allowed(present, settings.where, settings.exclude)
        around = self.encode_both([picture], [caption]) if self._asks_fast(settings) else None
        chosen = self._first(around, catalogue, settings, allowed)
        if settings.tier == "exact":
            of_whom = np.arange(len(catalogue)) if chosen is None else np.unique(chosen)
            block = self._loaded.exact.scores(picture, caption, of_whom, owner, progress or (lambda share: None))
            found = Scored(block.train_ids, block.scores[0].numpy(), block.errors[0].numpy())
        else:
            sketched = self._loaded.sketch.scores(picture, caption, chosen, relative=settings.relative)
            found = Scored(sketched.train_ids, sketched.scores.numpy(), sketched.standard_errors.numpy())
        lists = lists_of_scores(
            catalogue, found, present.mask, allowed, settings.k, settings.around, tied=self._loaded.tied
        )
        left_out = self._loaded.left_out(catalogue.path, f"tier {settings.tier} does not know them, tier fast does")
        lists = replace(lists, notes=[*left_out, *lists.notes])
        if around is not None and settings.around:
            lists = self._with_similar(lists, catalogue, around[0], around[1][0], allowed, settings)
        if around is not None and settings.beside:
            among = Among(catalogue, allowed)
            lists = self._with_beside(lists, whole, around[0], around[1][0], among, settings)
        return self._answer(settings, asked, present.take_down, lists, started)

    def _asks_fast(self, settings: Settings) -> bool:
        """Return whether a slower tier's answer has a part that the fast tier makes: the choice, or what is beside."""
        if settings.first is not None:
            return True
        wanted = settings.tier == "exact" or settings.around > 0 or settings.beside
        return wanted and self._loaded.has_fast

    def _first(
        self,
        around: tuple[NDArray[np.float32], Tensor] | None,
        catalogue: Catalogue,
        settings: Settings,
        allowed: NDArray[np.bool_] | None,
    ) -> NDArray[np.int64] | None:
        """Return the fast tier's first samples, which a slower tier scores; None: it scores all."""
        count = settings.first or (FIRST if settings.tier == "exact" else None)
        if count is None or around is None:
            return None
        if not self._loaded.extends(self.fast.samples_path, catalogue.path):
            raise UsageError(
                "the served index is of other training samples than the published run: `fastgda index build CONFIG` "
                "and `fastgda evaluate CONFIG` with the run's configuration serve one of these"
            )
        train_ids = self.fast.search(around[0], count, self.fast.reaching(allowed, len(catalogue)))[1][0]
        return train_ids[train_ids >= 0]

    def _with_similar(
        self,
        lists: Lists,
        catalogue: Catalogue,
        vector: NDArray[np.float32],
        features: Tensor | None,
        allowed: NDArray[np.bool_] | None,
        settings: Settings,
    ) -> Lists:
        """Return the lists with the images that look alike and influence little, or with why there are none."""
        why = "similar images are found by an image's features, and a vector has none"
        if features is not None:
            if not isinstance(untuned := self._loaded.untuned(), str):
                similar = low_and_alike(self.fast, untuned, catalogue, vector, features, lists.hits, allowed, settings)
                notes = list(lists.notes)
                if settings.tier == "fast":
                    notes += self._loaded.left_out(untuned.samples_path, "of the images that look alike alone")
                return replace(lists, similar=similar, notes=notes)
            why = f"similar images are not named: {untuned}"
        return replace(lists, notes=[*lists.notes, why])

    def _with_beside(
        self,
        lists: Lists,
        whole: Whole,
        vector: NDArray[np.float32],
        features: Tensor,
        among: Among,
        settings: Settings,
    ) -> Lists:
        """Return the lists with what other ways answer to the same question."""
        found, notes = columns(self._loaded, whole, vector, features, among, settings)
        return replace(lists, beside=found, notes=[*lists.notes, *notes])

    def _answer(self, settings: Settings, asked: str, take_down: int, lists: Lists, started: float) -> Answer:
        return Answer(
            tier=settings.tier,
            hits=lists.hits,
            lowering=lists.lowering,
            similar=lists.similar,
            agreement=self._loaded.agreements[settings.tier],
            versions=self.versions,
            lineage=settings.lineage(self.versions, asked, take_down),
            seconds=time.perf_counter() - started,
            influence=lists.influence,
            notes=lists.notes,
            beside=lists.beside,
        )


def _of_part(answer: Answer, picture: Picture, caption: Caption) -> Answer:
    """Return an answer to a question that may lack a part, without the predictions that were learned with both."""
    lacks = "image" if picture is None else "caption" if caption is None else ""
    if not lacks:
        return answer
    note = f"asked without the {lacks}: the agreement above was measured with both, and nothing is predicted"
    bare: dict[str, Any] = {"predicted_rank": None, "score": None, "standard_error": None}
    hits, lowering = ([replace(hit, **bare) for hit in each] for each in (answer.hits, answer.lowering))
    return replace(answer, hits=hits, lowering=lowering, notes=[note, *answer.notes])
