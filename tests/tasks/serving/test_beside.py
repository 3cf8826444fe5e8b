"""The same question answered in other ways, beside an answer: compared with brute force and with the tiers alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from storage_schemas.publishing.takedown import take_down
from storage_schemas.sql.views import query as sql
from storage_schemas.workspace import Workspace
from tasks.inputs.features import in_space, load_features
from tasks.serving.answers import Answer, Column
from tasks.serving.attributor import Attributor
from tests.tasks.serving.answered import COPIES, answered_run
from tests.tasks.whole_runs import WholeRun

ASKED, SPACE = "s0002", "pixel+caption_tokens"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    return answered_run(tmp_path_factory.mktemp("beside"), model_folder, features={"space": SPACE})


@pytest.fixture(scope="module")
def attributor(run: WholeRun) -> Attributor:
    return Attributor(run.workspace)


def columns(answer: Answer) -> dict[str, Column]:
    return {column.way: column for column in answer.beside}


def named(column: Column | Answer) -> list[int]:
    return [hit.train_id for hit in column.hits]


def firsts(values: np.ndarray, k: int) -> list[int]:
    """The first k samples in descending order, of copies the first alone."""
    seen: dict[int, int] = {}
    for train_id in np.argsort(-values, kind="stable").tolist():
        seen.setdefault(COPIES.get(train_id, train_id), train_id)
    return list(seen.values())[:k]


def test_columns_are_the_tiers_the_published_scores_and_the_nearest_untuned(
    attributor: Attributor, run: WholeRun
) -> None:
    answer = attributor.attribute_query(ASKED, 6, beside=True)
    found = columns(answer)
    assert list(found) == ["sketch", "exact", "images", "captions"]
    assert named(found["sketch"]) == named(attributor.attribute_query(ASKED, 6, "sketch"))
    assert found["sketch"].agreement == attributor.attribute_query(ASKED, 6, "sketch").agreement
    rows = sql(run.workspace.root, f"SELECT score FROM scores WHERE query_id = '{ASKED}' ORDER BY train_id")
    assert named(found["exact"]) == firsts(rows["score"].to_numpy(), 6)
    assert "published" in found["exact"].notes[0]

    samples, queries = run.run.artifacts["samples"], run.run.artifacts["queries"]
    for kind, encoder in zip(("images", "captions"), SPACE.split("+"), strict=True):
        space = in_space(run.context, space=encoder, centre=False)
        phi, asked = (load_features(space, items, samples).numpy() for items in (samples, queries))
        mean = phi.mean(axis=0) if run.context.config.features.centre else 0
        phi, mine = phi - mean, asked[attributor.query(ASKED).row] - mean
        cosine = phi @ mine / np.linalg.norm(phi, axis=1) / np.linalg.norm(mine)
        hits = found[kind].hits
        assert [hit.similarity for hit in hits] == pytest.approx([cosine[n] for n in firsts(cosine, 6)], abs=2e-3)
        assert (found[kind].space, {hit.predicted_rank for hit in hits}) == (encoder, {None})


def test_each_tier_has_the_others_beside_it(attributor: Attributor) -> None:
    query = attributor.query(ASKED)
    alone = attributor.attribute(query.image, query.caption, 4)
    sketch = attributor.attribute(query.image, query.caption, 4, "sketch", beside=True)
    assert list(columns(sketch)) == ["fast", "images", "captions"], (
        "of a picture that no teacher scored nothing is published"
    )
    assert named(columns(sketch)["fast"]) == named(alone) and alone.beside == []
    exact = attributor.attribute(query.image, query.caption, 4, "exact", first=5, beside=True)
    assert list(columns(exact)) == ["fast", "sketch", "images", "captions"]
    assert sketch.lineage != attributor.attribute(query.image, query.caption, 4, "sketch").lineage


def test_filters_and_take_downs_hold_for_every_column(run: WholeRun, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(run.workspace.root, workspace.root)
    attributor = Attributor(workspace)
    before = attributor.attribute_query(ASKED, 3, where="year >= 2002", beside=True)
    first = {column.hits[0].train_id for column in before.beside} | {before.hits[0].train_id}
    assert all(train_id >= 2 for column in before.beside for train_id in named(column))
    take_down(workspace, sorted(first), reason="asked for", by="a test")
    after = attributor.attribute_query(ASKED, 3, where="year >= 2002", beside=True)
    assert len(after.beside) == len(before.beside)
    assert not first & {train_id for column in after.beside for train_id in named(column)}
