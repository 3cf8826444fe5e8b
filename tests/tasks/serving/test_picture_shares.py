"""Shares of a picture: what its tiers say, and whom a take-down leaves out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from pytest import MonkeyPatch

from fastgda_core.errors import UsageError
from storage_schemas.publishing.takedown import take_down
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tasks.inputs.queries import load_queries
from tasks.serving import picture_shares
from tasks.serving.attributor import Attributor
from tasks.serving.loaded import Loaded
from tasks.serving.picture_shares import PictureShares
from tasks.serving.shares import published_shares
from tests.tasks.whole_runs import SAMPLES, WholeRun

CAPTION = "a red circle"


@pytest.fixture
def service(unlearned: WholeRun) -> PictureShares:
    return PictureShares(Loaded(unlearned.workspace))


@pytest.fixture
def image(unlearned: WholeRun) -> Image.Image:
    return load_queries(unlearned.run.artifacts["queries"])[2].image


def test_sketches_pay_by_their_scores_with_the_error_of_their_groups(
    service: PictureShares, image: Image.Image
) -> None:
    answer = service.shares(image, CAPTION, "key", "sketch")
    stored = service.loaded.sketch.stored
    groups = stored.scores(stored.ask(image, CAPTION)).by_group.numpy()
    paid = np.maximum(groups.mean(0), 0)
    keys = service.loaded.catalogue().table["key"].to_pylist()
    found = {row.payee: row for row in answer.rows}
    assert set(found) == set(keys) and math.isclose(sum(row.share for row in answer.rows), 1)
    without = np.maximum((groups.sum(0) - groups) / (len(groups) - 1), 0)
    jackknife = without / without.sum(1, keepdims=True)
    errors = np.sqrt((len(groups) - 1) * jackknife.var(0))
    for place, key in enumerate(keys):
        assert found[key].share == pytest.approx(paid[place] / paid.sum())
        assert found[key].standard_error == pytest.approx(errors[place])
    assert (answer.tier, answer.noise, answer.queries) == ("sketch", "groups", 1)


def test_the_index_pays_by_ranks_as_scored_queries_were_paid(
    service: PictureShares, image: Image.Image, unlearned: WholeRun, monkeypatch: MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="2 queries of split test, by which an index is calibrated, and 3 are needed"):
        service.shares(image, CAPTION, "key", "fast")
    monkeypatch.setattr(picture_shares, "CALIBRATES", "train")
    answer = service.shares(image, CAPTION, "key", "fast")
    assert math.isclose(sum(row.share for row in answer.rows), 1) and len(answer.rows) == SAMPLES
    assert (answer.tier, answer.noise) == ("fast", "calibration")
    attributor = Attributor(unlearned.workspace)
    best = attributor.attribute(image, CAPTION, 1).hits[0]
    influence = "sum(greatest(influence, 0))"
    by_query = (
        f"SELECT query_id, train_id, greatest(influence, 0) / (SELECT {influence} FROM ranks i "
        "WHERE i.query_id = ranks.query_id) AS part FROM ranks"
    )
    firsts = []
    for asked in load_queries(unlearned.run.artifacts["queries"]):
        if asked.split == "train":
            first = attributor.attribute(asked.image, asked.caption, 1).hits[0].train_id
            rows = query(
                unlearned.workspace.root,
                f"SELECT part FROM ({by_query}) WHERE query_id = '{asked.query_id}' AND train_id = {first}",
            )
            firsts.append(rows["part"][0].as_py())
    assert {row.payee: row.share for row in answer.rows}[best.key] == pytest.approx(np.mean(firsts))


@pytest.mark.parametrize("tier", ["sketch", "fast"])
def test_what_is_taken_down_has_no_share(
    unlearned: WholeRun, image: Image.Image, tmp_path: Path, tier: Literal["fast", "sketch"], monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_shares, "CALIBRATES", "train")
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(unlearned.workspace.root, workspace.root)
    service = PictureShares(Loaded(workspace))
    before = service.shares(image, CAPTION, "key", tier)
    first = before.rows[0].payee
    keys = PictureShares(Loaded(workspace)).loaded.catalogue().table["key"].to_pylist()
    take_down(workspace, [keys.index(first)], reason="asked for", by="a test")
    after = service.shares(image, CAPTION, "key", tier)
    anew = PictureShares(Loaded(workspace)).shares(image, CAPTION, "key", tier)
    assert after == anew, "what was loaded before a take-down honours it"
    assert {row.payee for row in after.rows} == {row.payee for row in before.rows} - {first}
    assert math.isclose(sum(row.share for row in after.rows), 1) and after.tombstone == 1


def test_published_shares_are_those_of_sql(unlearned: WholeRun) -> None:
    answer = published_shares(unlearned.workspace, "key", split="test")
    rows = query(
        unlearned.workspace.root,
        "SELECT payee, avg(share) AS share FROM shares_by(key) JOIN queries USING (query_id) "
        "WHERE split = 'test' GROUP BY payee",
    ).to_pylist()
    assert {row.payee: row.share for row in answer.rows} == pytest.approx({row["payee"]: row["share"] for row in rows})
