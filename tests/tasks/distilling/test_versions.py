"""Versions of heads and indexes: made once, found again, described by what they came from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tasks.distilling.heads import fit_rank_head
from tasks.distilling.index import build_search_index, read_index_mean
from tasks.distilling.labels import read_labels
from tasks.distilling.opened_index import open_search_index
from tasks.distilling.publish import publish_scores
from tasks.distilling.ranks import run_behind
from tasks.distilling.versions import (
    latest_head,
    latest_index,
    load_trained_head,
    read_head,
    space_of_head,
)
from tasks.distilling.versions import (
    read_index as read_index_version,
)
from tasks.inputs.features import extract_features, feature_mean, in_space, load_features
from tests.storage_schemas.workspaces import publish_run
from tests.tasks.whole_runs import SAMPLES, WholeRun


@pytest.mark.heavy
def test_a_head_and_an_index_are_found_by_version_and_as_the_newest(similar: WholeRun) -> None:
    head, index = similar.head.artifact, similar.index.artifact
    found, record = read_head(similar.workspace, head.key)
    assert (found.path, found.rows) == (head.path, head.rows)
    assert record.run == similar.run.name and record.snapshot == similar.curation.ranks.key
    assert len(record.history) == similar.config.head.epochs
    lines = (head.path / "training.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,validation_map" and len(lines) == 1 + similar.config.head.epochs
    built, about = read_index_version(similar.workspace, index.key)
    assert (built, about.head) == (index, head.key)
    assert (latest_head(similar.workspace), latest_index(similar.workspace)) == (head.key, index.key)
    assert not (head.path / "checkpoints").exists(), "they are for a training that was cut short"


@pytest.mark.heavy
def test_a_version_that_is_not_there_is_named_with_where_to_look(similar: WholeRun, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"no rank head 'h': .*SELECT head FROM heads"):
        read_head(similar.workspace, "h")
    with pytest.raises(UsageError, match="no index 'i'"):
        read_index_version(similar.workspace, "i")
    with pytest.raises(UsageError, match="no rank head yet: `fastgda train CONFIG` makes one"):
        latest_head(Workspace(tmp_path))
    with pytest.raises(UsageError, match="no index yet: `fastgda index build CONFIG` makes one"):
        latest_index(Workspace(tmp_path))


def test_what_is_there_is_not_made_again(similar: WholeRun) -> None:
    context, labels = similar.context, read_labels(similar.workspace, None)
    features = extract_features.fn(context, labels.samples)
    assert features.reused
    head = fit_rank_head.fn(context, labels.samples, labels.queries, features.artifact, labels.ranks)
    index = build_search_index.fn(context, labels.samples, features.artifact, head.artifact, labels.queries)
    assert (head.reused, head.artifact) == (True, similar.head.artifact)
    assert (index.reused, index.artifact) == (True, similar.index.artifact)
    assert head.seconds == pytest.approx(similar.head.seconds)
    ranks = publish_scores.fn(similar.run, incomplete=False)
    assert ranks.reused and ranks.artifact == similar.curation.ranks


def test_the_index_holds_the_heads_vector_of_every_sample(similar: WholeRun) -> None:
    context, samples = similar.context, similar.run.artifacts["samples"]
    vectors = load_trained_head(similar.head.artifact.path)(load_features(context, samples, samples)).numpy()
    similarity, nearest = open_search_index(similar.index.artifact.path).search(vectors, 1)
    assert similar.index.artifact.rows == SAMPLES
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-5)
    np.testing.assert_allclose(vectors[nearest[:, 0]], vectors, atol=1e-3)
    mean = read_index_mean(similar.index.artifact.path)
    expected = feature_mean(context, samples)
    assert expected is not None and torch.equal(mean, expected)
    with pytest.raises(UsageError, match=r"lacks mean\.safetensors"):
        read_index_mean(similar.head.artifact.path)


def test_the_space_of_a_head_is_its_own_whatever_is_configured_since(similar: WholeRun) -> None:
    _, record = read_head(similar.workspace, similar.head.artifact.key)
    other = in_space(similar.context, space="minilm_text", centre=False)
    assert space_of_head(other, record).config.features == similar.config.features


def test_labels_are_those_of_the_snapshot(similar: WholeRun) -> None:
    labels = read_labels(similar.workspace, None)
    run = similar.run
    assert labels == read_labels(similar.workspace, similar.curation.ranks.key)
    assert labels.run == run.name == run_behind(similar.workspace, labels.ranks)
    assert (labels.samples, labels.queries) == (run.artifacts["samples"], (run.artifacts["queries"],))
    snapshot = read_snapshot(similar.workspace, read_published(similar.workspace).snapshot)
    assert labels.ranks.rows == snapshot.rows == run.artifacts["candidates"].rows
    with pytest.raises(NotPublished):
        read_labels(similar.workspace, "never")


def test_a_run_without_images_cannot_be_trained_on(similar: WholeRun, tmp_path) -> None:
    publish_run(tmp_path)
    record = tmp_path / "runs" / "run-1" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "queries": None}))
    config = similar.config.model_copy(update={"workspace": str(tmp_path)})
    context = type(similar.context)(config, "model")
    with pytest.raises(UsageError, match="run run-1 was imported: it has no images to train on"):
        read_labels(context.workspace, None)


def test_the_ids_beside_an_index_are_those_of_the_samples(similar: WholeRun) -> None:
    ids = tables.read(similar.index.artifact.path / "ids.parquet", tables.INDEX_IDS)
    assert ids["train_id"].to_pylist() == list(range(SAMPLES))
