"""Shares: who is owed what part of the influence on queries, from published scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np

from fastgda_core.evaluation.shares import LEVEL, Period, Shares, Sums
from storage_schemas.snapshots.published import Published, read_published
from storage_schemas.sql.shares import (
    Payees,
    measured,
    number_payees,
    queries_scored,
    query_sums,
    shared_queries,
)
from storage_schemas.sql.views import connect
from storage_schemas.tombstones import read_tombstones
from storage_schemas.workspace import Workspace
from tasks.serving.added import left_out, samples_added
from tasks.serving.answers import Tier
from tasks.serving.shares_answer import Beyond, Share, SharesAnswer, Source
from tasks.watching.trust import JUDGED, OTHER_TEACHER, trust_in


def published_shares(
    workspace: Workspace,
    by: str = "shard",
    *,
    query_ids: Sequence[str] | None = None,
    split: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    advance: Callable[[int], None] = lambda queries: None,
    begin: Callable[[int], None] = lambda queries: None,
) -> SharesAnswer:
    """Return the shares of published queries, all but those of the twin test unless they are named.

    Args:
        by: column of the view `samples`, or key of its metadata.
        query_ids, split, since, until: these queries, those of a split, those that a run planned in [since, until)
            scored (UTC unless they say otherwise); what is given together has to hold together.
        begin, advance: called with the number of queries there are, and with how many more are done.

    Raises:
        UsageError: no query is left, or none has any positive influence.
        StoreError: nothing is published; there is no such column, query or split.
    """
    if since is not None or until is not None:
        scored = queries_scored(workspace, _utc(since), _utc(until))
        query_ids = scored if query_ids is None else [query for query in query_ids if query in set(scored)]
    with connect(workspace.root) as connection:
        payees = number_payees(connection, by)
        queries = shared_queries(connection, query_ids, split)
        begin(len(queries))
        agreement = measured(connection, "spearman", OTHER_TEACHER)
        period, of_pairs = Period(len(payees.names)), True
        for sums in query_sums(connection, queries, agreement):
            of_pairs &= bool((sums.measured == sums.samples).all())
            period.add(Sums(sums.payee, sums.samples, sums.influence, sums.variance, sums.noise))
            advance(1)
    found = period.shares()
    source: Source = "unknown" if np.isnan(found.noise_error).any() else "pairs" if of_pairs else "agreement"
    return shares_answer(workspace, read_published(workspace), by, payees, found, source, "exact")


def shares_answer(
    workspace: Workspace, published: Published, by: str, payees: Payees, found: Shares, source: Source, tier: Tier
) -> SharesAnswer:
    """Return shares as rows, with what is to be said beside them of the published state that they were made of."""
    trust = trust_in(workspace, published.run)
    return SharesAnswer(
        by=by,
        rows=_rows(payees, found),
        queries=found.queries,
        silent=found.silent,
        level=LEVEL,
        noise=source,
        snapshot=published.snapshot,
        tombstone=read_tombstones(workspace).number,
        tier=tier,
        judged=dict(trust.facts).get(JUDGED, ""),
        warnings=[*trust.warnings, *left_out(samples_added(workspace, published), "the run gave them no scores")],
    )


def _rows(payees: Payees, found: Shares) -> list[Share]:
    """Return the payees that have a scored sample, largest share first."""
    there = np.flatnonzero(found.uniform > 0)
    order = there[np.argsort(-found.share[there], kind="stable")]
    signal, proven, lift = found.signal_to_noise, found.proven, found.lift
    rows = []
    for at in order.tolist():
        low, high, uniform = (float(values[at]) for values in (found.low, found.high, found.uniform))
        beyond: Beyond = "more" if low > uniform else "less" if high < uniform else ""
        rows.append(
            Share(
                payee=payees.names[at],
                share=float(found.share[at]),
                standard_error=_known(found.standard_error[at]),
                low=_known(low),
                high=_known(high),
                signal_to_noise=_known(signal[at]),
                proven=bool(proven[at]),
                samples=int(payees.samples[at]),
                queries=int(found.paid[at]),
                uniform=uniform,
                lift=float(lift[at]),
                beyond_uniform=beyond,
                noise_error=_known(found.noise_error[at]),
                query_error=_known(found.query_error[at]),
                influence=float(found.influence[at]),
            )
        )
    return rows


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
