"""SQL of shares: the influence on queries, summed by payee, which is any column of the samples.

The view `shares` has the share of each tar of each query, the macro `shares_by(expression)` that of any payee. What
`fastgda shares` reads are sums alone, a block of queries at a time, so that memory does not grow with the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

import duckdb
import numpy as np
from numpy.typing import NDArray

from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.runs.ledger import read_run
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.sql.sample_columns import metadata_columns, metadata_text
from storage_schemas.workspace import Workspace

UNKNOWN = "unknown"  # the payee of samples without a value
METADATA = "metadata"  # the column of samples that holds what else is known of them, as JSON
BLOCK_ROWS = 4_000_000  # scored pairs whose sums are made at a time
_NO_PAYEES = (METADATA, "image_look")  # columns that name nobody
_FLOATS = ("influence", "variance", "noise")
_TESTS = (tables.TWIN, tables.PSEUDO)  # queries that nobody asked for

# See fastgda_core/evaluation/shares.py, whose sums these are, for the variance of a positive part.
_SUMS = """count(*) AS samples, sum(greatest(influence, 0)) AS influence,
    sum(CASE WHEN error IS NULL THEN 'NaN'::DOUBLE
        ELSE error ** 2 / (1 + exp(-1.702 * greatest(least(score / nullif(error, 0), 30), -30))) END) AS variance,
    sum(coalesce(error, 'NaN'::DOUBLE)) AS noise"""


class UnknownColumn(StoreError):
    """Samples have no such column, or none that can name a payee."""


class UnknownQuery(StoreError):
    """Nothing is published of such a query."""


class Payees(NamedTuple):
    """Names of payees by their numbers from 0, `UNKNOWN` the last, and how many samples each has."""

    names: list[str]
    samples: NDArray[np.int64]


class QuerySums(NamedTuple):
    """What the samples of one query add up to, each array over the payees that have some: see `Sums` of the core."""

    query_id: str
    payee: NDArray[np.int64]
    samples: NDArray[np.int64]
    influence: NDArray[np.float64]
    variance: NDArray[np.float64]
    noise: NDArray[np.float64]
    measured: NDArray[np.int64]  # scores that have a standard error of their own


def shares_macro() -> str:
    """Return SQL for the macro that has shares by any expression of the samples' columns."""
    return f"""CREATE MACRO shares_by(by_column) AS TABLE
        WITH payees AS (
            SELECT train_id AS sample, coalesce(CAST(by_column AS VARCHAR), '{UNKNOWN}') AS payee FROM samples),
        rows AS (SELECT query_id, coalesce(payees.payee, '{UNKNOWN}') AS payee, score, influence,
            CAST(standard_error AS DOUBLE) AS error
            FROM ranks LEFT JOIN payees ON train_id = sample),
        sums AS (SELECT query_id, rows.payee AS payee, {_SUMS} FROM rows GROUP BY query_id, rows.payee),
        totals AS (SELECT *, nullif(sum(influence) OVER of_query, 0) AS total, sum(samples) OVER of_query AS everyone,
            sum(variance) OVER of_query AS variances, influence / total AS share
            FROM sums WINDOW of_query AS (PARTITION BY query_id))
        SELECT query_id, payee, samples, influence, share,
            CASE WHEN NOT isnan(variances) THEN sqrt(greatest(
                (1 - share) ** 2 * variance + share ** 2 * (variances - variance), 0)) / total END AS standard_error,
            samples / everyone AS uniform
        FROM totals"""


def shares_view() -> str:
    """Return SQL for the shares of tars."""
    return "SELECT query_id, payee, samples, influence, share, standard_error, uniform FROM shares_by(shard)"


def payee_columns(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """Return what samples can be summed by, with its type: columns that hold one value, then keys of their metadata."""
    columns = _columns(connection)
    found = {name: kind for name, kind in columns.items() if _names_one(name, kind)}
    if METADATA not in columns:
        return found
    found |= {column.name: column.type for column in metadata_columns(connection, "samples")}
    rows = connection.execute(f"SELECT DISTINCT unnest(json_keys({METADATA})) AS key FROM samples ORDER BY key")
    taken = {name.lower() for name in columns}
    return found | {key: "VARCHAR" for (key,) in rows.fetchall() if key not in found and key.lower() not in taken}


def payee_expression(connection: duckdb.DuckDBPyConnection, by: str) -> str:
    """Return SQL for a sample's payee: a column's value, or that of a key of the samples' metadata.

    A name is read as filters read it: see `sample_columns`.

    Raises:
        UnknownColumn: there is neither, or the column holds several values.
    """
    columns = {name.lower(): (name, kind) for name, kind in _columns(connection).items()}
    name, kind = columns.get(by.lower(), ("", ""))
    if name and _names_one(name, kind):
        return f'CAST("{name}" AS VARCHAR)'
    if METADATA in columns and not name:
        value = metadata_text(by)
        if connection.execute(f"SELECT 1 FROM samples WHERE {value} IS NOT NULL LIMIT 1").fetchall():
            return value
    there = ", ".join(payee_columns(connection))
    raise UnknownColumn(f"samples cannot be summed by {by!r}: take one of {there}")


def _names_one(column: str, kind: str) -> bool:
    """Return whether a column of samples has one value, which can name a payee."""
    return column not in _NO_PAYEES and not kind.endswith("]")


def _columns(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    rows = connection.execute("SELECT column_name, column_type FROM (DESCRIBE samples)").fetchall()
    return dict(rows)


def number_payees(connection: duckdb.DuckDBPyConnection, by: str) -> Payees:
    """Give every payee a number, in the order of names, and keep each sample's in a table of the connection.

    Raises:
        UnknownColumn: see `payee_expression`.
    """
    payee = f"nullif({payee_expression(connection, by)}, '{UNKNOWN}')"
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE payees AS SELECT payee, row_number() OVER (ORDER BY payee) - 1 AS number, "
        f"samples FROM (SELECT {payee} AS payee, count(*) AS samples FROM samples GROUP BY ALL) WHERE payee IS NOT NULL"
    )
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE payee_numbers AS SELECT train_id AS sample, number "
        f"FROM (SELECT train_id, {payee} AS payee FROM samples) JOIN payees USING (payee)"
    )
    rows = connection.execute("SELECT payee, samples FROM payees ORDER BY number").fetchall()
    (everyone,) = connection.execute("SELECT count(*) FROM samples").fetchall()[0]
    counts = [count for _, count in rows]
    return Payees([*(name for name, _ in rows), UNKNOWN], np.array([*counts, everyone - sum(counts)], np.int64))


def payees_of_samples(connection: duckdb.DuckDBPyConnection, payees: Payees) -> NDArray[np.int64]:
    """Return the number of each sample's payee by train_id, after `number_payees`; of samples that are gone, too."""
    found = connection.execute("SELECT sample, number FROM payee_numbers").fetchnumpy()
    (last,) = connection.execute("SELECT coalesce(max(train_id), -1) FROM samples").fetchall()[0]
    numbers = np.full(last + 1, len(payees.names) - 1, np.int64)
    numbers[found["sample"]] = found["number"]
    return numbers


def shared_queries(
    connection: duckdb.DuckDBPyConnection,
    query_ids: Sequence[str] | None = None,
    split: str | None = None,
) -> dict[str, int]:
    """Return published queries in order with how many samples were scored for each.

    Args:
        query_ids: these alone; None: all but those of the twin test.
        split: of this split alone.

    Raises:
        UnknownQuery: nothing is published of one that is named, or of the split.
    """
    rows = connection.execute("SELECT query_id, count(*) FROM ranks GROUP BY query_id ORDER BY query_id").fetchall()
    scored = dict(rows)
    splits = dict(connection.execute("SELECT query_id, split FROM queries").fetchall())
    if query_ids is not None:
        if missing := [query for query in query_ids if query not in scored]:
            raise UnknownQuery(f"{missing[0]!r} is no query with published scores: the view queries has them all")
        wanted = set(query_ids)
        scored = {query: count for query, count in scored.items() if query in wanted}
    if split is not None:
        if split not in splits.values():
            there = ", ".join(sorted(set(splits.values())))
            raise UnknownQuery(f"no published query is of split {split!r}: there are {there or 'none with a split'}")
        return {query: count for query, count in scored.items() if splits.get(query) == split}
    if query_ids is not None:
        return scored
    return {query: count for query, count in scored.items() if splits.get(query) not in _TESTS}


def queries_scored(workspace: Workspace, since: datetime | None, until: datetime | None) -> list[str]:
    """Return the published queries whose scores a run planned in [since, until) made."""
    chosen: dict[str, bool] = {}
    for run in read_snapshot(workspace, read_published(workspace).snapshot).runs:
        planned = read_run(workspace, run).created_at
        inside = (since is None or planned >= since) and (until is None or planned < until)
        rows = tables.read(workspace.plan_queries(run), tables.PLAN_QUERIES, columns=["query_id"])
        # Of a query that several runs scored, the last one's rows are published.
        chosen |= dict.fromkeys(rows["query_id"].to_pylist(), inside)
    return [query for query, inside in chosen.items() if inside]


def measured(connection: duckdb.DuckDBPyConnection, metric: str, space: str) -> float | None:
    """Return a mean over queries from the published figures; None where there is none."""
    statement = (
        "SELECT value FROM metrics WHERE query_id = '' AND metric = ? AND space = ? ORDER BY queries DESC LIMIT 1"
    )
    rows = connection.execute(statement, [metric, space]).fetchall()
    return float(rows[0][0]) if rows else None


def query_sums(
    connection: duckdb.DuckDBPyConnection, queries: dict[str, int], agreement: float | None
) -> Iterator[QuerySums]:
    """Yield the sums of queries, one after the other, by the payees that `number_payees` numbered.

    Args:
        queries: with how many samples were scored for each, in order.
        agreement: correlation of the scores with another teacher's, by which those without a standard error get one;
            None: they have none.
    """
    block: list[str] = []
    rows = 0
    for query, count in queries.items():
        block.append(query)
        rows += count
        if rows >= BLOCK_ROWS:
            yield from _block_sums(connection, block, agreement)
            block, rows = [], 0
    if block:
        yield from _block_sums(connection, block, agreement)


def _block_sums(
    connection: duckdb.DuckDBPyConnection, block: Sequence[str], agreement: float | None
) -> Iterator[QuerySums]:
    # Of two noisy measurements with correlation r, the noise has the share 1 - r of the variance of each.
    assumed = "NULL" if agreement is None else f"sqrt({1 - min(max(agreement, 0.0), 1.0)!r} * var_pop(score))"
    found = connection.execute(
        f"""WITH chosen AS (SELECT query_id, train_id, score, influence, CAST(standard_error AS DOUBLE) AS own
            FROM ranks WHERE query_id BETWEEN $first AND $last AND query_id IN (SELECT unnest($block))),
        spread AS (SELECT query_id, {assumed} AS assumed FROM chosen GROUP BY query_id),
        rows AS (SELECT query_id, coalesce(number, (SELECT count(*) FROM payees)) AS payee, score, influence, own,
            coalesce(own, assumed) AS error
            FROM chosen JOIN spread USING (query_id) LEFT JOIN payee_numbers ON train_id = sample)
        SELECT query_id, payee, {_SUMS}, count(own) AS measured
        FROM rows GROUP BY query_id, payee ORDER BY query_id, payee""",
        {"first": block[0], "last": block[-1], "block": list(block)},
    ).fetchnumpy()
    names = found["query_id"]
    starts = np.flatnonzero(np.r_[True, names[1:] != names[:-1]]) if len(names) else np.array([], np.int64)
    for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
        mine = slice(start, end)
        influence, variance, noise = (np.asarray(found[name][mine], np.float64) for name in _FLOATS)
        payee, samples, known = (found[name][mine].astype(np.int64) for name in ("payee", "samples", "measured"))
        yield QuerySums(str(names[start]), payee, samples, influence, variance, noise, known)
