"""The methods that stand beside the teacher: each is judged by the scores with which it answers."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from storage_schemas.commit import commit
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.distilling.versions import heads_of_run
from tasks.inputs.features import extract_features, in_space, load_features
from tasks.inputs.queries import load_queries
from tasks.judging.methods import RANDOM, UNTUNED, every_method
from tasks.judging.sketches import SKETCH
from tasks.judging.tiers import HEADS, Tiers, again, by_head
from tasks.serving.attributor import Attributor
from tasks.watching.trust import TEACHER, trust_in
from tests.tasks.whole_runs import CUTOFFS, SAMPLES, WholeRun

FIRST = max(CUTOFFS)


@pytest.mark.parametrize("name", ["unlearned", "solved"])
def test_a_head_is_judged_by_what_its_index_answers(name: str, request: pytest.FixtureRequest) -> None:
    """An index of a gradient head has its vectors in half precision, and encodes the query anew."""
    run: WholeRun = request.getfixturevalue(name)
    queries = load_queries(run.run.artifacts["queries"])
    scores = by_head(run.run, run.head.artifact, queries)
    service = Attributor(run.workspace)
    for query, mine in zip(queries, scores, strict=True):
        similarity, train_ids = service.fast.search(service.query_vector(query)[None], SAMPLES, None)
        expected = torch.empty(SAMPLES, dtype=torch.float64)
        expected[torch.from_numpy(train_ids[0])] = torch.from_numpy(similarity[0]).double()
        assert torch.allclose(mine, expected, atol=2e-3 * expected.abs().max().item())


def test_sketches_and_two_stages_are_judged_by_what_their_tiers_answer(unlearned: WholeRun) -> None:
    assert unlearned.config.teacher.negatives == "keep"
    tiers = Tiers.of(unlearned.run)
    scores, service = tiers.scores(unlearned.run), Attributor(unlearned.workspace)
    assert list(scores) == [HEADS["symmetric"], SKETCH, f"two stages, first {FIRST}"]
    for number, query in enumerate(load_queries(unlearned.run.artifacts["queries"])[:3]):
        for method, first, count in ((SKETCH, None, SAMPLES), (f"two stages, first {FIRST}", FIRST, FIRST)):
            answer = service.attribute_query(query.query_id, SAMPLES, "sketch", first=first)
            expected = torch.zeros(SAMPLES, dtype=torch.float64)
            for each in answer.hits:
                expected[each.train_id] = each.score
            assert len(answer.hits) == count
            assert torch.allclose(scores[method][number], expected, rtol=1e-4, atol=1e-9)


def test_two_stages_leave_all_but_the_first_at_nought() -> None:
    fast = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    slow = torch.tensor([[9.0, -1.0, 5.0, 3.0], [0.5, 1.5, 2.5, 3.5]])
    assert again(fast, slow, 2).tolist() == [[0, -1, 0, 3], [0.5, 1.5, 0, 0]]


def test_negative_scores_are_nought_where_the_labels_tie_them(unlearned: WholeRun) -> None:
    run = unlearned.run
    raw = Tiers.of(run).scores(run)[SKETCH]
    assert (raw < 0).any()
    config = run.config.model_copy(update={"teacher": run.config.teacher.model_copy(update={"negatives": "tie"})})
    tied = type(run)(type(run.context)(config, run.context.model_hash), run.artifacts)
    assert torch.equal(Tiers.of(tied).scores(tied)[SKETCH], raw.clamp_min(0))


def test_heads_of_a_run_are_the_newest_of_each_kind(unlearned: WholeRun, solved: WholeRun) -> None:
    assert heads_of_run(unlearned.workspace, unlearned.run.name) == {"symmetric": unlearned.head.artifact}
    assert heads_of_run(solved.workspace, solved.run.name) == {"gradient": solved.head.artifact}
    assert heads_of_run(unlearned.workspace, "another-run") == {}


def test_a_head_of_an_earlier_release_is_named_and_left_out(
    solved: WholeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "workspace"
    shutil.copytree(solved.workspace.root, folder)
    workspace = Workspace(folder)
    run = replace(solved.run, context=replace(solved.context, config=in_workspace(solved.config, folder)))
    assert list(Tiers.of(run).heads) == ["gradient"]
    (head,) = workspace.root.glob("heads/*/head.safetensors")
    before = {"tower.weight": torch.zeros(2, 2)}
    head.unlink()
    commit(head, lambda path: save_file(before, path), key=head.parent.name, rows=1, started=time.monotonic())
    with caplog.at_level("WARNING"):
        assert Tiers.of(run).heads == {}
    assert f"head {head.parent.name} is not judged: " in caplog.text and "train it again" in caplog.text
    (head.parent / "head.json").unlink()
    with caplog.at_level("WARNING"):
        assert heads_of_run(workspace, run.name) == {}
        assert trust_in(workspace, run.name).twins
    assert f"head {head.parent.name} is left out: " in caplog.text
    assert "what the published head agrees with is left out: " in caplog.text


def in_workspace(config: PipelineConfig, folder: Path) -> PipelineConfig:
    return config.model_copy(update={"workspace": str(folder)})


def test_features_are_judged_centred_and_not(unlearned: WholeRun) -> None:
    run = unlearned.run
    scores = every_method(run, unlearned.curation.ranks, Tiers({}, False, 0))
    assert list(scores) == [TEACHER, UNTUNED, RANDOM, "pixel"]
    there = in_space(run.context, space="pixel", centre=False)
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    for items in (samples, queries):
        extract_features.fn(there, items)
    phi, asked = (load_features(there, items, samples).double().numpy() for items in (samples, queries))
    for name, mean in (("pixel", np.zeros(phi.shape[1])), (UNTUNED, phi.mean(0))):
        left, right = asked - mean, phi - mean
        lengths = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)[None]
        assert np.allclose(scores[name].numpy(), left @ right.T / lengths, atol=1e-5)
