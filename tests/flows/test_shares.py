"""`fastgda shares` as a person and as a script uses it."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from flows.commands.main import app
from flows.commands.shares import BAR, bar
from storage_schemas.errors import StoreError
from tests.storage_schemas.workspaces import publish_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four samples with the scores 0, 1, 2, 0 in each of three queries."""
    folder = tmp_path_factory.mktemp("shares") / "workspace"
    publish_run(folder)
    return folder


def said(root: Path, *arguments: str) -> str:
    done = CliRunner().invoke(app, ["shares", "--workspace", str(root), *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_table_has_the_largest_shares_first_with_bars_and_says_what_nobody_judged(root: Path) -> None:
    lines = said(root, "--by", "key", "--limit", "2").splitlines()
    rows = [line for line in lines if line.startswith("│")]
    assert ["s2" in rows[0], "66.7%" in rows[0], "2.67" in rows[0], bar(1.0) in rows[0]] == [True] * 4
    assert ["s1" in rows[1], "33.3%" in rows[1], bar(0.5) in rows[1]] == [True] * 3 and len(rows) == 2
    assert lines[-2].startswith("the first 2 of 4; 2 of 4 unproven; mean over 3 queries; intervals of 95% for all")
    assert "noise of scores is not known" in lines[-2] and "no model was trained again" in lines[-1]
    assert (len(bar(1.0)), len(bar(0.5)), bar(0.0)) == (BAR, BAR // 2, "")


def test_json_and_csv_have_every_payee_and_every_figure(root: Path) -> None:
    answer = json.loads(said(root, "--by", "key", "--query", "q1", "--json"))
    assert (answer["by"], answer["queries"], answer["silent"], answer["noise"]) == ("key", 1, 0, "unknown")
    first = answer["rows"][0]
    assert (first["payee"], first["share"], first["proven"], first["standard_error"]) == ("s2", 2 / 3, False, None)
    assert (first["samples"], first["queries"], first["uniform"], first["influence"]) == (1, 1, 0.25, 2.0)
    rows = list(csv.DictReader(io.StringIO(said(root, "--by", "key", "--split", "test", "--csv"))))
    assert [row["payee"] for row in rows] == ["s2", "s1", "s0", "s3"] and set(rows[0]) == set(first)
    assert float(rows[0]["share"]) == pytest.approx(2 / 3) and float(rows[0]["influence"]) == 6


def test_a_period_has_the_queries_that_were_scored_in_it(root: Path) -> None:
    whole = json.loads(said(root, "--since", "2026-01-01", "--until", "2026-01-02", "--json"))
    assert whole["queries"] == 3 and whole["rows"][0]["payee"] == "a.tar" and whole["rows"][0]["share"] == 1
    with pytest.raises(UsageError, match="no query is asked for"):
        said(root, "--until", "2026-01-01")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--by", "artist"], "cannot be summed by 'artist': take one of train_id, key, shard"),
        (["--query", "q9"], "'q9' is no query"),
        (["--split", "night"], "no published query is of split 'night': there are test"),
        (["--csv", "--json"], "give one of them"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(root: Path, arguments: list[str], why: str) -> None:
    with pytest.raises((UsageError, StoreError), match=why):
        said(root, *arguments)
