"""Shares of a picture that no teacher scored, from the index or from sketches."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.predicted_shares import predicted_shares
from fastgda_core.evaluation.shares import Period, Sums, shares_of_groups
from fastgda_core.images import as_rgb
from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_influence
from storage_schemas.sql.shares import Payees, number_payees, payees_of_samples
from storage_schemas.sql.views import connect
from storage_schemas.tombstones import removed_ids, without
from tasks.serving.fast import FastTier
from tasks.serving.loaded import Loaded
from tasks.serving.shares import shares_answer
from tasks.serving.shares_answer import SharesAnswer

DEPTH = 200_000  # ranks of a head that are told apart; later samples are paid all the same
SCORED = 64  # queries by which predictions are calibrated, at most
Paid = tuple[NDArray[np.int64], NDArray[np.float64]]  # train_ids, shares
Calibration = tuple[NDArray[np.float64], NDArray[np.int64], list[Paid]]
FEWEST = 3  # fewer say nothing of how far predictions are off
CALIBRATES = "test"  # the split that neither trained nor chose the head


class OtherPublished(StoreError):
    """Another run was published since this was loaded."""


class PictureShares:
    """What answers for pictures, loaded when it is first needed; concurrent calls may share it."""

    def __init__(self, loaded: Loaded) -> None:
        self.workspace, self.loaded, self.published = loaded.workspace, loaded, loaded.published
        self._lock = threading.Lock()
        self._calibrated: tuple[int, Calibration] | None = None  # of the newest take-down that it honours

    def shares(self, image: Image.Image, caption: str, by: str, tier: Literal["fast", "sketch"]) -> SharesAnswer:
        """Return the shares of a picture.

        Raises:
            UsageError: the tier cannot answer here: without sketches, or with too few queries that the teacher scored.
            UnknownColumn: samples cannot be summed by this column.
            OtherPublished: its samples are no longer those that are published.
        """
        if read_published(self.workspace).samples != self.published.samples:
            raise OtherPublished("a run of other training samples was published meanwhile: ask again")
        with connect(self.workspace.root) as connection:
            payees = number_payees(connection, by)
            of_sample = payees_of_samples(connection, payees)
        if tier == "sketch":
            return self._of_sketches(as_rgb(image), caption, by, payees, of_sample)
        return self._of_order(as_rgb(image), caption, by, payees, of_sample)

    def _of_sketches(
        self, picture: Image.Image, caption: str, by: str, payees: Payees, of_sample: NDArray[np.int64]
    ) -> SharesAnswer:
        found = self.loaded.sketch.scores(picture, caption, None)
        kept = np.isin(found.train_ids, self._removed(), invert=True)
        sums, shares = shares_of_groups(found.by_group.numpy()[:, kept], of_sample[found.train_ids[kept]])
        period = Period(len(payees.names))
        period.add(sums, shares)
        return shares_answer(self.workspace, self.published, by, payees, period.shares(), "groups", "sketch")

    def _of_order(
        self, picture: Image.Image, caption: str, by: str, payees: Payees, of_sample: NDArray[np.int64]
    ) -> SharesAnswer:
        scored, ordered, paid = self._calibration()
        order = self._order(picture, caption)
        depth = min(len(order), scored.shape[1])
        scored, ordered, order = scored[:, :depth], ordered[:, :depth], order[:depth]
        truth = np.zeros((len(paid), len(payees.names)))
        for row, (train_ids, share) in zip(truth, paid, strict=True):
            np.add.at(row, of_sample[train_ids], share)
        run = self.loaded.catalogue(self._samples_path)
        known = np.arange(len(run)) if (mask := run.present().mask) is None else np.flatnonzero(mask)
        samples = np.bincount(of_sample[known], minlength=len(payees.names))  # of the view, those that were added, too
        shares = predicted_shares(scored, of_sample[ordered], truth, of_sample[order], samples)
        there = np.arange(len(payees.names))
        unknown = np.full(len(there), np.nan)
        period = Period(len(there))
        # A prediction has no unit: what a payee holds is told as a part of 1.
        period.add(Sums(there, samples, shares.share, unknown, unknown), shares)
        return shares_answer(self.workspace, self.published, by, payees, period.shares(), "calibration", "fast")

    @property
    def _samples_path(self) -> AnyPath:
        """The samples of the published run: those that have scores."""
        if self.published.samples is None:
            raise UsageError(f"{self.workspace.root} has no samples: what is published was imported without them")
        return self.workspace.file(self.published.samples)

    @cached_property
    def _fast(self) -> FastTier:
        fast = self.loaded.fast
        if not self.loaded.extends(fast.samples_path, self._samples_path):
            raise UsageError(
                "the served index is of other training samples than the published scores: index again with the "
                "published run's configuration"
            )
        return fast

    def _removed(self) -> NDArray[np.int64]:
        return removed_ids(self.workspace, self.published.samples)

    def _order(self, picture: Image.Image, caption: str) -> NDArray[np.int64]:
        """Return the train_ids of the head's first ranks, without those that are taken down."""
        vectors = self._fast.vectors(self._fast.features([picture], [caption]), [caption])
        run = self.loaded.catalogue(self._samples_path)
        _, train_ids = self._fast.search(vectors, DEPTH, self._fast.reaching(run.present().mask, len(run)))
        return train_ids[0][train_ids[0] >= 0]

    def _calibration(self) -> Calibration:
        """Return what predictions are calibrated by, computed anew after a take-down."""
        with self._lock:
            number = self.loaded.catalogue(self._samples_path).present().take_down
            if self._calibrated is None or self._calibrated[0] != number:
                self._calibrated = number, self._calibrate()
            return self._calibrated[1]

    def _calibrate(self) -> Calibration:
        """Return what share of each scored query the sample at each rank has, and its train_id, (queries, depth).

        And whom the teacher pays on each.
        """
        asked = [query for query in self.loaded.queries.values() if query.split == CALIBRATES][:SCORED]
        removed, samples = self._removed(), len(self.loaded.catalogue(self._samples_path))
        shares, orders, paid = [], [], []
        for query in asked:
            rows = read_influence(self.workspace, self.published.snapshot, [query.query_id])
            train_ids, share = _paid(without(rows, removed))
            if not len(train_ids):
                continue
            by_sample = np.zeros(samples)
            by_sample[train_ids] = share
            order = self._order(query.image, query.caption)
            shares.append(by_sample[order])
            orders.append(order)
            paid.append((train_ids, share))
        if len(shares) < FEWEST:
            raise UsageError(
                f"the teacher scored {len(shares)} queries of split {CALIBRATES}, by which an index is calibrated, and "
                f"{FEWEST} are needed: ask tier sketch, or score more queries"
            )
        depth = min(map(len, orders))  # an approximate index may find fewer for some
        return np.stack([each[:depth] for each in shares]), np.stack([each[:depth] for each in orders]), paid


def _paid(rows: pa.Table) -> Paid:
    """Return the train_ids that have a share in one query, and their shares."""
    train_ids, influence = rows["train_id"].to_numpy(), np.maximum(rows["score"].to_numpy(), 0)
    there = influence > 0
    return train_ids[there], influence[there] / influence[there].sum()
