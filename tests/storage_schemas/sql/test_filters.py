"""A filter is one harmless SQL expression over the columns of samples, whoever wrote it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from storage_schemas import tables
from storage_schemas.sql import filters
from storage_schemas.sql.filters import RefusedFilter, SampleFilters

METADATA = (
    '{"licence":"CC0","year":2001,"ok":true}',
    '{"licence":"MIT","year":2.5}',
    '{"licence":"it\'s mine","key":"hidden","Licence":"other","a b":"spaced","select":"word"}',
    "{}",
)


@pytest.fixture(scope="module")
def samples() -> SampleFilters:
    number = range(40)
    return SampleFilters(
        tables.SAMPLES.rows(
            train_id=number,
            key=[f"folder/{n:03d}" for n in number],
            shard=[f"{n % 3}.tar" for n in number],
            offset=[512 * n for n in number],
            size=list(number),
            captions=[[f"a cat {n}", "a pet"] if n % 2 else [f"100% dog_{n}"] for n in number],
            width=[64 + n for n in number],
            height=[64] * len(number),
            image_sha256=["0" * 64] * len(number),
            metadata=[METADATA[n % 4] for n in number],
        )
    )


@pytest.mark.parametrize(
    "where",
    [
        "width > 80 and shard = '1.tar'",
        "key like 'folder/00%' or list_contains(captions, 'a pet')",
        "captions[1] ilike '%DOG%' and train_id % 4 <> 0",
        "not (width between 70 and 90) -- a comment",
        "len(captions) > 1 and key in ('folder/001', 'folder/002')",
        "case when width > 90 then height = 64 else false end",
        "captions[1] like '100!% dog!_%' escape '!'",
        "regexp_matches(key, '0[12]$')",
        '"offset" // 512 = size and size::DOUBLE < 7.5',
        "coalesce(metadata->>'licence', 'none') = 'none'",
        "metadata->>'a b' = 'spaced'",
    ],
)
def test_a_filter_chooses_what_duckdb_chooses(samples: SampleFilters, where: str) -> None:
    stored = samples._samples
    with duckdb.connect() as connection:
        connection.register("samples", stored)
        expected = connection.execute(f"SELECT train_id FROM samples WHERE {where}\n").fetchnumpy()["train_id"]
    found = samples.bitmap(where)
    assert np.flatnonzero(found).tolist() == sorted(expected.tolist())
    assert 0 < found.sum() < len(found)


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        ("licence = 'CC0'", {0}),
        ("year >= 2001", {0}),
        ("year < 3 or ok", {0, 1}),
        ("licence is null", {3}),
        ("licence = 'it''s mine'", {2}),
        ("\"select\" = 'word'", {2}),
        ("key = 'hidden'", set()),  # a field cannot take the place of a column of samples
    ],
)
def test_fields_of_metadata_are_columns(samples: SampleFilters, where: str, chosen: set[int]) -> None:
    assert {int(n) % 4 for n in np.flatnonzero(samples.bitmap(where))} == chosen


def test_the_columns_are_told_with_their_types(samples: SampleFilters) -> None:
    told = {column.name: (column.type, column.comes_with) for column in samples.columns}
    assert told["width"] == ("INTEGER", None) and told["captions"] == ("VARCHAR[]", None)
    assert told["licence"] == ("VARCHAR", 30) and told["year"] == ("DOUBLE", 20) and told["ok"] == ("BOOLEAN", 10)
    assert "Licence" not in told and "a b" not in told and "image_look" not in told


HOSTILE = [
    "1) FROM read_csv('/etc/passwd') --",
    "1), (2",
    "true) UNION SELECT (true",
    "true); DROP TABLE samples; SELECT (1",
    "true); COPY samples TO '/tmp/x'; SELECT (1",
    "(SELECT count(*) FROM samples) > 1",
    "exists(FROM glob('/**'))",
    "train_id IN (SELECT 1)",
    "read_text('/etc/passwd') IS NULL",
    "getenv('HOME') = ''",
    "current_setting('memory_limit') = ''",
    "repeat('x', 1000000000) = 'x'",
    "list_sum(range(1000000000)) > 1",
    "len(list_transform(captions, lambda x: x)) > 0",
    "replace(key, '', key) = ''",
    "count(*) > 1",
    "row_number() OVER () > 2",
    "random() < 0.5",
    "now() > DATE '2020-01-01'",
    "nextval('x') > 1",
    "error('x')",
    "COLUMNS('.*') = 1",
    "*",
    "? = 1",
    "$1",
    "key::INTEGER[1000000] IS NULL",
    "other = 1",
    "samples.other.deeper = 1",
    "key LIKE 'a",
    "'not a truth value'",
    "train_id = 'x'",
    "(" * 1000 + "1" + ")" * 1000,
    "1 = 1 OR " * 300 + "true",
    "key = '\0'",
    "key = '\ud800'",
    "",
    "   ",
    ";",
    "/*",
    "true WINDOW w AS ()",
    "true ORDER BY 1",
    "true LIMIT 1",
    "true FROM samples",
]


@pytest.mark.parametrize("where", HOSTILE)
def test_what_is_no_filter_is_refused_in_one_line(samples: SampleFilters, where: str) -> None:
    with pytest.raises(RefusedFilter) as caught:
        samples.bitmap(where)
    said = str(caught.value)
    assert said.startswith("where ") and "\n" not in said and said.isprintable() and len(said) < 1000


def test_an_arrow_that_binds_too_loosely_is_explained(samples: SampleFilters) -> None:
    with pytest.raises(RefusedFilter, match=r"write \(metadata->>'name'\) in brackets"):
        samples.bitmap("width > 70 and metadata->>'licence' = 'CC0'")
    assert samples.bitmap("width > 70 and (metadata->>'licence') = 'CC0'").sum() == 8


def test_nothing_was_written_or_changed(samples: SampleFilters, tmp_path: Path) -> None:
    with pytest.raises(RefusedFilter):
        samples.bitmap(f"true); COPY stored TO '{tmp_path}/x.csv'; SELECT (1")
    assert list(tmp_path.iterdir()) == [] and samples.bitmap("true").all()


def test_a_filter_that_takes_too_long_is_ended(samples: SampleFilters, monkeypatch: pytest.MonkeyPatch) -> None:
    many = 400_000
    columns = {name: pa.repeat(samples._samples[name][0], many) for name in samples._samples.schema.names}
    large = SampleFilters(pa.table({**columns, "train_id": pa.array(range(many))}))
    monkeypatch.setattr(filters, "SECONDS", 0.1)
    with pytest.raises(RefusedFilter, match="takes more than"):
        large.bitmap(" or ".join(f"regexp_matches(key, '[a-f]+{n}.*x')" for n in range(40)))
    monkeypatch.undo()
    assert large.bitmap("train_id < 7").sum() == 7


def test_threads_share_the_filters(samples: SampleFilters) -> None:
    asked = [f"train_id % {n} = 0" for n in (2, 3, 5, 7)] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(samples.bitmap, asked))
    for where, bitmap in zip(asked, found, strict=True):
        divisor = int(where.split()[2])
        assert np.flatnonzero(bitmap).tolist() == list(range(0, 40, divisor))
    with pytest.raises(ValueError, match="read-only"):
        found[0][0] = False
