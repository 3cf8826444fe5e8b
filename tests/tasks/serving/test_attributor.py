"""Answers of the one Attributor, compared with brute force over the head's vectors and the teacher's own scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgda_core.errors import UsageError
from storage_schemas.publishing.takedown import lift, take_down
from storage_schemas.sql.filters import RefusedFilter
from storage_schemas.sql.views import query as sql
from storage_schemas.tombstones import read_tombstones
from storage_schemas.workspace import Workspace
from tasks.distilling.answering import answering_head
from tasks.inputs.features import load_features
from tasks.serving.answers import Answer, Hit
from tasks.serving.attributor import Attributor
from tasks.serving.catalogue import RemovedSample, UnknownSample
from tasks.serving.fast import Caption, FastTier, Picture
from tests.tasks.serving.answered import COPIES, LICENCES, SHAPES, answered_run
from tests.tasks.whole_runs import WholeRun

SAMPLES = SHAPES + len(COPIES)
ASKED = "s0002"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> WholeRun:
    return answered_run(tmp_path_factory.mktemp("answered"), model_folder)


@pytest.fixture(scope="module")
def attributor(run: WholeRun) -> Attributor:
    return Attributor(run.workspace)


@pytest.fixture(scope="module")
def vectors(run: WholeRun) -> NDArray[np.float32]:
    """The head's vectors of the samples, without an index."""
    samples = run.run.artifacts["samples"]
    phi = load_features(run.context, samples, samples)
    found: NDArray[np.float32] = (
        answering_head(run.workspace, run.head.artifact.path).samples(torch.arange(SAMPLES), phi).numpy()
    )
    return found


def named(hits: list[Hit]) -> list[int]:
    return [hit.train_id for hit in hits]


def original(train_id: int) -> int:
    return COPIES.get(train_id, train_id)


def brute_force(similarity: NDArray[np.float32], allowed: set[int], k: int) -> list[list[int]]:
    """The first k groups of samples that look the same, best first, each best first."""
    groups: dict[int, list[int]] = {}
    for train_id in np.argsort(-similarity, kind="stable").tolist():
        if train_id in allowed:
            groups.setdefault(original(train_id), []).append(train_id)
    return list(groups.values())[:k]


@pytest.mark.parametrize(
    ("where", "exclude", "allowed"),
    [
        (None, [], set(range(SAMPLES))),
        ("licence = 'CC0'", [], {n for n in range(SAMPLES) if n % 3 == 0}),
        (
            "year < 2004 or (metadata->>'licence') = 'none'",
            [2],
            {n for n in range(SAMPLES) if n < 4 or n % 3 == 2} - {2},
        ),
        (None, [5, 24, 0], set(range(SAMPLES)) - {5, 24, 0}),
        ("licence = 'nobody''s'", [], set()),
    ],
)
def test_hits_are_the_nearest_that_are_allowed_with_copies_folded(
    attributor: Attributor, vectors: NDArray[np.float32], where: str | None, exclude: list[int], allowed: set[int]
) -> None:
    similarity = vectors @ attributor.query_vector(attributor.query(ASKED))
    for k in (1, 4, SAMPLES):
        answer = attributor.attribute_query(ASKED, k, where=where, exclude=exclude)
        expected = brute_force(similarity, allowed, k)
        assert [sorted([hit.train_id, *hit.duplicates]) for hit in answer.hits] == [sorted(each) for each in expected]
        assert [hit.rank for hit in answer.hits] == list(range(1, len(expected) + 1))
        for hit in answer.hits:
            assert hit.similarity == pytest.approx(similarity[hit.train_id], abs=5e-3 * float(np.abs(similarity).max()))
            assert hit.metadata == {"licence": LICENCES[hit.train_id % 3], "year": 2000 + hit.train_id}


def test_an_image_its_stored_query_its_vector_and_a_batch_have_one_answer(attributor: Attributor) -> None:
    query = attributor.query(ASKED)
    whole = attributor.attribute(query.image, query.caption, 6, around=3)
    others = [
        attributor.attribute_query(ASKED, 6, around=3),
        attributor.attribute_vector(attributor.query_vector(query), 6, around=3),
        attributor.attribute_many([query.image] * 3, [query.caption] * 3, 6, around=3)[2],
    ]
    for other in others:
        assert named(other.hits) == named(whole.hits) and named(other.lowering) == named(whole.lowering)
        assert other.agreement == whole.agreement and other.versions == whole.versions
    assert others[2].lineage == whole.lineage and others[0].similar == whole.similar
    assert json.loads(json.dumps(whole.as_json(), allow_nan=False)) == whole.as_json()


def test_what_lowers_an_image_is_most_opposed_to_it(attributor: Attributor, vectors: NDArray[np.float32]) -> None:
    similarity = vectors @ attributor.query_vector(attributor.query(ASKED))
    lowering = attributor.attribute_query(ASKED, 2, around=4).lowering
    expected = brute_force(-similarity, set(np.flatnonzero(similarity < 0).tolist()), 4)
    assert [original(hit.train_id) for hit in lowering] == [original(each[0]) for each in expected] != []


def test_similar_images_are_near_by_untuned_features_and_no_hits(attributor: Attributor, run: WholeRun) -> None:
    answer = attributor.attribute_query(ASKED, 3, around=5)
    samples, queries = run.run.artifacts["samples"], run.run.artifacts["queries"]
    phi, asked = (load_features(run.context, items, samples).numpy() for items in (samples, queries))
    mine = asked[attributor.query(ASKED).row]
    cosine = phi @ mine / np.linalg.norm(phi, axis=1) / np.linalg.norm(mine)
    hits = {train_id for hit in answer.hits for train_id in (hit.train_id, *hit.duplicates)}
    assert answer.similar and not hits & set(named(answer.similar))
    found = [hit.similarity or 0.0 for hit in answer.similar]
    assert found == sorted(found, reverse=True)
    assert found == pytest.approx([cosine[hit.train_id] for hit in answer.similar], abs=2e-3)
    assert all((hit.predicted_rank or 0) > 0.1 for hit in answer.similar)


def test_answers_are_the_same_from_eight_threads(attributor: Attributor) -> None:
    asked = [
        (name, k, where)
        for name in list(attributor.queries)[:4]
        for k in (2, 5)
        for where in (None, "licence = 'CC0'", "year > 2010")
    ]
    plain = [attributor.attribute_query(name, k, where=where, around=2) for name, k, where in asked]
    fresh = Attributor(attributor.workspace)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda each: fresh.attribute_query(each[0], each[1], where=each[2], around=2), asked * 5))
    for place, answer in enumerate(found):
        assert replace(answer, seconds=0.0) == replace(plain[place % len(asked)], seconds=0.0)


def test_a_stored_query_is_encoded_once_for_its_vector_and_its_similar_images(
    attributor: Attributor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Attributor(attributor.workspace)
    features, encoded = fresh.fast.features, []

    def counted(pictures: Sequence[Picture], captions: Sequence[Caption]) -> Tensor:
        encoded.extend(captions)
        return features(pictures, captions)

    monkeypatch.setattr(fresh.fast, "features", counted)
    answer = fresh.attribute_query(ASKED, 3, around=2)
    assert encoded == [fresh.query(ASKED).caption] and answer.similar
    assert replace(answer, seconds=0.0) == replace(attributor.attribute_query(ASKED, 3, around=2), seconds=0.0)


def test_a_lineage_names_versions_question_and_settings(attributor: Attributor) -> None:
    def of(**settings: object) -> str:
        return attributor.attribute_query(ASKED, **settings).lineage  # type: ignore[arg-type]

    one = of(k=3)
    others = [of(k=4), of(k=3, where="true"), of(k=3, exclude=[1]), of(k=3, around=1), of(k=3, tier="sketch")]
    assert one == of(k=3) and len({one, *others}) == 6
    assert of(k=3, exclude=[2, 1]) == of(k=3, exclude=[1, 2, 2])


def test_what_is_taken_down_is_named_no_more_from_then_on(run: WholeRun, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(run.workspace.root, root)
    workspace = Workspace(root)
    attributor = Attributor(workspace)
    before = attributor.attribute_query(ASKED, 3, around=3)
    first = before.hits[0].train_id
    take_down(workspace, [first], reason="asked for", by="a test")
    for tier in ("fast", "sketch"):
        after = attributor.attribute_query(ASKED, SAMPLES, tier, around=SAMPLES)  # type: ignore[arg-type]
        assert first not in {
            n for hit in (*after.hits, *after.lowering, *after.similar) for n in (hit.train_id, *hit.duplicates)
        }
    assert after.influence is not None and after.influence.scored == SAMPLES - 1
    assert attributor.attribute_query(ASKED, 3, around=3).lineage != before.lineage
    for look in (attributor.sample, attributor.picture):
        with pytest.raises(RemovedSample, match=f"training sample {first} is taken down"):
            look(first)
    lift(workspace, 1, reason="a mistake", by="a test")
    assert attributor.attribute_query(ASKED, 3).hits[0].train_id == first


def test_a_lineage_names_the_take_downs_that_its_answer_honoured(
    run: WholeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another question saw a newer take-down while this one was being answered."""
    root = tmp_path / "workspace"
    shutil.copytree(run.workspace.root, root)
    workspace = Workspace(root)
    attributor = Attributor(workspace)
    before = attributor.attribute_query(ASKED, 3)
    search = FastTier.search

    def overtaken(self: FastTier, *asked: Any) -> Any:
        if not read_tombstones(workspace).number:
            take_down(workspace, [before.hits[0].train_id], reason="asked for", by="a test")
            attributor.catalogue().present()
        return search(self, *asked)

    monkeypatch.setattr(FastTier, "search", overtaken)
    during, after = (attributor.attribute_query(ASKED, 3) for _ in range(2))
    assert (during.hits, during.lineage) == (before.hits, before.lineage)
    assert after.hits != before.hits and after.lineage != before.lineage


def test_a_samples_facts_and_its_image_as_it_lies_in_the_tar(attributor: Attributor) -> None:
    hit, (content, kind) = attributor.sample(25), attributor.picture(25)
    assert (hit.rank, hit.key, hit.metadata["year"]) == (0, "s0025", 2025) and kind == "image/png"
    with Path(hit.shard).open("rb") as file:
        file.seek(hit.offset)
        assert file.read(len(content)) == content and content.startswith(b"\x89PNG")
    assert attributor.picture(3)[1] == "image/jpeg"
    for train_id in (-1, SAMPLES):
        with pytest.raises(UnknownSample, match=rf"no training sample {train_id}: .* go from 0 to {SAMPLES - 1}"):
            attributor.sample(train_id)


def test_tier_exact_gives_a_stored_query_the_scores_that_the_run_gave_it(attributor: Attributor) -> None:
    truth = {
        row["train_id"]: row["score"]
        for row in sql(attributor.workspace.root, f"SELECT * FROM scores WHERE query_id = '{ASKED}'").to_pylist()
    }
    shares: list[float] = []
    answer = attributor.attribute_query(ASKED, 5, "exact", first=SAMPLES, around=3, progress=shares.append)
    order = brute_force(np.array([truth[n] for n in range(SAMPLES)]), set(truth), 5)
    assert named(answer.hits) == [each[0] for each in order]
    assert [hit.score for hit in answer.hits] == pytest.approx([truth[n] for n in named(answer.hits)], rel=1e-4)
    assert [hit.score for hit in answer.lowering] == pytest.approx([truth[n] for n in named(answer.lowering)], rel=1e-3)
    assert shares[-1] == 1.0 and answer.influence is not None and answer.influence.scored == SAMPLES
    some = attributor.attribute_query(ASKED, 5, "exact", first=6)
    near = {n for hit in attributor.attribute_query(ASKED, 6).hits for n in (hit.train_id, *hit.duplicates)}
    assert some.influence is not None and some.influence.scored == 6 and set(named(some.hits)) <= near


def test_tier_exact_answers_about_any_image_and_can_be_ended(attributor: Attributor) -> None:
    query = attributor.query(ASKED)
    once = attributor.attribute(query.image, "a red circle", 4, "exact", first=8)
    again = attributor.attribute(query.image, "a red circle", 4, "exact", first=8)
    assert once.hits == again.hits and once.tier == "exact" and once.lineage == again.lineage

    def end(share: float) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        attributor.attribute(query.image, "a red circle", 4, "exact", progress=end)


def test_answers_say_how_far_their_tier_agrees_with_the_teacher(attributor: Attributor) -> None:
    rows = sql(attributor.workspace.root, "SELECT * FROM metrics WHERE query_id = '' AND split = 'test'").to_pylist()
    for tier, space in (("fast", "tuned"), ("sketch", "sketch")):
        agreement = attributor.attribute_query(ASKED, 1, tier).agreement  # type: ignore[arg-type]
        measured = {
            f"{row['metric']}({row['cutoff']})" if row["cutoff"] else row["metric"]: row["value"]
            for row in rows
            if row["space"] == space and row["metric"] in ("mAP", "recall", "spearman")
        }
        assert agreement.measure == "mAP(4)" and agreement.value == measured["mAP(4)"]
        assert {each.name: each.value for each in agreement.measures} == measured


def test_an_answer_is_of_the_moment_at_which_its_attributor_was_loaded(run: WholeRun, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(run.workspace.root, workspace.root)
    before, after = (Attributor(workspace) for _ in range(2))
    asked = {"k": 3, "around": 3}
    expected = before.attribute_query(ASKED, **asked)  # type: ignore[arg-type]
    for folder in ("metrics", "snapshots"):
        shutil.rmtree(workspace.root / folder)
    found = after.attribute_query(ASKED, **asked)  # type: ignore[arg-type]
    assert found.agreement == expected.agreement and found.agreement.measures
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)


def test_predictions_come_with_a_calibration_and_are_none_without_one(run: WholeRun, tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    shutil.copytree(run.workspace.root, root)
    (path,) = (path for path in (root / "calibrations").glob("*.json") if "manifest" not in path.name)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"rank_explained": 0.9, "score_explained": 0.9}))
    answer = Attributor(Workspace(root)).attribute_query(ASKED, 6)
    ranks, scores = ([getattr(hit, name) for hit in answer.hits] for name in ("predicted_rank", "score"))
    assert ranks == sorted(ranks) and scores == sorted(scores, reverse=True) and answer.notes == []
    similarity = [hit.similarity or 0.0 for hit in answer.hits]
    assert scores == pytest.approx(np.interp(similarity, record["score"]["x"], record["score"]["y"]))
    path.write_text(json.dumps(record | {"rank_explained": 0.1, "score_explained": 0.9}))
    answer = Attributor(Workspace(root)).attribute_query(ASKED, 6)
    assert {hit.predicted_rank for hit in answer.hits} == {None} and "rank is not predicted: on 2 test" in answer.notes[
        0
    ]
    path.unlink()
    answer = Attributor(Workspace(root)).attribute_query(ASKED, 6)
    assert {(hit.predicted_rank, hit.score, hit.standard_error) for hit in answer.hits} == {(None, None, None)}
    assert "never calibrated" in answer.notes[0]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"k": 0}, "k is 0"),
        ({"around": -1}, "around is -1"),
        ({"first": 5}, "first is of tiers sketch and exact"),
        ({"first": 0, "tier": "sketch"}, "first is 0"),
        ({"relative": True}, "relative is of tier sketch"),
        ({"relative": True, "tier": "exact"}, "relative is of tier sketch"),
        ({"exclude": [SAMPLES]}, f"no training sample {SAMPLES}"),
        ({"where": "nothing = 1"}, "nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(attributor: Attributor, settings: dict[str, object], why: str) -> None:
    with pytest.raises((UsageError, RefusedFilter), match=why):
        attributor.attribute_query(ASKED, **settings)  # type: ignore[arg-type]


def test_questions_that_lack_a_part(attributor: Attributor, similar: WholeRun) -> None:
    image = attributor.query(ASKED).image
    for asked, why in (
        ((None, None), "needs an image, a caption, or best both"),
        ((None, "a cat"), "cannot answer without the image: it looks at nothing else"),
        ((image, None), "give the caption, too"),
        ((image, " "), "^caption is empty"),
    ):
        with pytest.raises(UsageError, match=why):
            attributor.attribute(*asked, 3)
    with pytest.raises(UsageError, match="give the image and its caption"):
        attributor.attribute(image, None, 3, "sketch")
    alone: Answer = Attributor(similar.workspace).attribute(image, None, 3)
    assert named(alone.hits) == named(Attributor(similar.workspace).attribute(image, "anything", 3).hits)
