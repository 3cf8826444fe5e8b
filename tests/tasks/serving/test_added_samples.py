"""Answers over samples that were added to the index: who names them, who says that they are left out, and what is
predicted for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from storage_schemas.publishing.serving import promote_index
from storage_schemas.publishing.takedown import take_down
from storage_schemas.workspace import Workspace
from tasks.distilling.index_add import add_to_search_index, read_parent
from tasks.serving import picture_shares
from tasks.serving.attributor import Attributor
from tasks.serving.shares import published_shares
from tests import tiny
from tests.tasks.whole_runs import SAMPLES, WholeRun

COPIED, NEW = 4, 101  # numbers of pictures that are added: one whose bytes are a sample's, and a new one
COPY, OTHER = SAMPLES, SAMPLES + 1  # their train_ids
ASKED = "s0002"


@pytest.fixture(scope="module")
def workspace(unlearned: WholeRun, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A finished workspace with two samples added, whose predictions are shown."""
    folder = tmp_path_factory.mktemp("added")
    workspace = Workspace(folder / "workspace")
    shutil.copytree(unlearned.workspace.root, workspace.root)
    for path in (folder / "workspace" / "calibrations").glob("*.json"):
        if "manifest" not in path.name:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_explained": 0.9, "score_explained": 0.9}))
    members = []
    for name, number in (("copy", COPIED), ("new", NEW)):
        image, caption = tiny.draw(number)
        members += [(f"{name}.jpg", image), (f"{name}.txt", caption.encode())]
    added = add_to_search_index.fn(read_parent(workspace), [tiny.write_tar(folder / "new.tar", members)])
    promote_index(workspace, added.artifact.key, force=True)
    return workspace


@pytest.fixture(scope="module")
def attributor(workspace: Workspace) -> Attributor:
    return Attributor(workspace)


def test_tier_fast_names_added_samples_and_predicts_for_a_copy_what_it_predicts_for_its_original(
    attributor: Attributor,
) -> None:
    query = attributor.query(ASKED)
    hits = attributor.attribute(query.image, query.caption, SAMPLES + 2).hits
    folded = {train_id: hit for hit in hits for train_id in (hit.train_id, *hit.duplicates)}
    assert set(folded) == set(range(SAMPLES + 2)) and folded[COPY] is folded[COPIED]
    first = folded[COPIED]
    (copy,) = (hit for hit in attributor.attribute_query(ASKED, SAMPLES, exclude=[COPIED]).hits if hit.train_id == COPY)
    for name in ("similarity", "predicted_rank", "score", "standard_error"):
        assert getattr(copy, name) is not None
        assert getattr(copy, name) == pytest.approx(getattr(first, name), rel=1e-5), name


@pytest.mark.parametrize("tier", ["sketch", "exact"])
def test_slower_tiers_say_that_added_samples_are_left_out(attributor: Attributor, tier: str) -> None:
    answer = attributor.attribute_query(ASKED, SAMPLES, tier, around=3)
    named = {train_id for hit in answer.hits for train_id in (hit.train_id, *hit.duplicates)}
    assert named and max(named) < SAMPLES
    assert answer.notes[0].startswith("2 training images were added to the index since the published run and left out")
    assert f"tier {tier} does not know them" in answer.notes[0]


def test_columns_say_that_added_samples_are_left_out(attributor: Attributor) -> None:
    answer = attributor.attribute_query(ASKED, SAMPLES + 2, beside=True)
    assert {column.way: len(column.notes) for column in answer.beside} == {"sketch": 1, "exact": 2, "images": 1}
    assert all("2 training images were added" in column.notes[-1] for column in answer.beside)
    slow = attributor.attribute_query(ASKED, SAMPLES, "sketch", beside=True)
    fast = next(column for column in slow.beside if column.way == "fast")
    assert max(hit.train_id for hit in fast.hits) < SAMPLES, "the same samples stand beside each other"


def test_shares_say_that_added_samples_are_left_out(
    attributor: Attributor, unlearned: WholeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = attributor.query(ASKED)
    monkeypatch.setattr(picture_shares, "CALIBRATES", "train")
    before = Attributor(unlearned.workspace).pictures
    for tier in ("sketch", "fast"):
        answer = attributor.pictures.shares(query.image, query.caption, "key", tier)  # type: ignore[arg-type]
        was = before.shares(query.image, query.caption, "key", tier)  # type: ignore[arg-type]
        assert "2 training images were added" in answer.warnings[-1]
        assert {row.payee: row.share for row in answer.rows} == pytest.approx({r.payee: r.share for r in was.rows})
    assert "2 training images were added" in published_shares(attributor.workspace).warnings[-1]
    assert published_shares(unlearned.workspace).warnings == published_shares(attributor.workspace).warnings[:-1]


def test_what_was_added_and_taken_down_again_is_not_missed(workspace: Workspace, tmp_path: Path) -> None:
    copied = Workspace(tmp_path / "workspace")
    shutil.copytree(workspace.root, copied.root)
    take_down(copied, [OTHER], reason="asked for", by="a test")
    note = Attributor(copied).attribute_query(ASKED, 3, "sketch").notes[0]
    assert note.startswith("1 training image was added")
    assert published_shares(copied).warnings[-1].startswith("1 training image was added")
