"""A head of kind gradient: solved from samples as queries, built into an index, measured and served like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fastgda_core.errors import UsageError
from fastgda_core.ranking.query_tower import GradientHead
from storage_schemas import tables
from storage_schemas.heads.records import read_head_record
from storage_schemas.sql.views import query
from tasks.config.pipeline import PipelineConfig
from tasks.distilling.answering import ByGradients, answering_head
from tasks.inputs.features import load_features
from tasks.inputs.queries import load_queries
from tasks.serving.attributor import Attributor
from tests.tasks.configs import document
from tests.tasks.whole_runs import AXES, SAMPLES, WholeRun


def test_it_is_the_choice_with_the_best_validation_map(solved: WholeRun) -> None:
    record = read_head_record(solved.head.artifact.path)
    assert (record.kind, record.run) == ("gradient", solved.run.name)
    assert len(record.solved) == 12 and record.validation_map == max(record.solved.values())
    (row,) = query(solved.workspace.root, "SELECT feature_space, validation_map FROM heads").to_pylist()
    assert row == {"feature_space": "pixel", "validation_map": record.validation_map}


def test_samples_answer_by_their_sketches_and_queries_by_predicted_ones(solved: WholeRun) -> None:
    head, run = answering_head(solved.workspace, solved.head.artifact.path), solved.run
    assert isinstance(head, ByGradients)
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    phi = load_features(run.context, samples, samples)
    rows = torch.tensor([3, 17, 3])
    found = head.samples(rows, phi[rows])
    values, scales = head.stored._loaded[1:]
    size = found.shape[1] - AXES
    dense = (values[:, 0].double() * scales[:, 0].double().repeat_interleave(64, 1)[:, : values.shape[2]])[rows]
    torch.testing.assert_close(found[:, :size].double(), dense[:, :size], rtol=1e-5, atol=1e-7)
    left, values, _ = torch.linalg.svd(F.normalize(phi, dim=1).double(), full_matrices=False)
    nearest = (left * values)[:, :AXES] @ (left * values)[:, :AXES].T  # the best inner products of so many numbers
    near = (found[:, size:] @ found[:, size:].T).double()
    torch.testing.assert_close(near, nearest[rows][:, rows], rtol=1e-4, atol=1e-5)

    asked = load_features(run.context, queries, samples)[:2]
    captions = [each.caption for each in load_queries(queries)[:2]]
    both = head.queries(asked, captions)
    assert both.shape == (2, size + AXES)
    torch.testing.assert_close(both[:, :size].norm(dim=1), torch.ones(2))
    torch.testing.assert_close(head.queries(asked[1:], captions[1:]), both[1:], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(head.queries(asked[:1], ["something else"])[0, :size], both[0, :size], atol=1e-3)


def test_a_saved_head_is_loaded_as_it_was(solved: WholeRun, tmp_path: Path) -> None:
    head = GradientHead.load(solved.head.artifact.path / "head.safetensors", torch.device("cpu"))
    head.save(tmp_path / "again")
    again = GradientHead.load(tmp_path / "again", torch.device("cpu"))
    assert (again.cosine, again.tower.size) == (head.cosine, head.tower.size)
    assert torch.equal(again.axes, head.axes) and again.tower.layers.keys() == head.tower.layers.keys()
    for first, layers in head.tower.layers.items():
        for part, tensor in vars(layers).items():
            assert torch.equal(getattr(again.tower.layers[first], part), tensor)


def test_a_head_of_another_form_is_refused(tmp_path: Path) -> None:
    save_file({"axes": torch.zeros(2, 1)}, tmp_path / "old", {"head": '{"seen_by": {}, "cosine": 0.5, "size": 3}'})
    with pytest.raises(UsageError, match=r"old is no head of kind gradient, or one of before .*: train it again"):
        GradientHead.load(tmp_path / "old", torch.device("cpu"))


def test_it_is_measured_and_served_as_any_head(solved: WholeRun) -> None:
    rows = tables.read(solved.evaluation.metrics.artifact.path, tables.METRICS).to_pylist()
    assert {row["space"] for row in rows} >= {"untuned", "tuned", "sketch"}
    service = Attributor(solved.workspace)
    asked = load_queries(solved.run.artifacts["queries"])[0]
    answers = service.attribute(asked.image, asked.caption, SAMPLES).hits
    phi = load_features(solved.context, solved.run.artifacts["samples"], solved.run.artifacts["samples"])
    items = service.fast.head.samples(torch.arange(SAMPLES), phi)
    expected = torch.from_numpy(service.query_vector(asked)) @ items.T
    order = [each.train_id for each in answers]
    np.testing.assert_allclose(
        [each.similarity for each in answers], expected[order], rtol=5e-3, atol=5e-3 * float(expected.abs().max())
    )
    assert sorted(order) == list(range(SAMPLES))


def test_a_gradient_head_asks_for_sketches() -> None:
    with pytest.raises(ValueError, match=r"head\.kind gradient answers from sketches: add a section sketches"):
        PipelineConfig.model_validate(document(head={"kind": "gradient"}))
