"""Samples are added to an index: old ones stay as they are, new ones are found, and recall is measured again."""

from __future__ import annotations

import functools
import json
import multiprocessing
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgda_core.errors import UsageError
from fastgda_core.features import concatenate, load_encoder
from storage_schemas import tables
from storage_schemas.audit.verify import verify
from storage_schemas.heads.records import read_index_record
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.workspace import Workspace
from tasks.artifact import Made
from tasks.distilling.added_vectors import added_vectors
from tasks.distilling.index import read_index_mean
from tasks.distilling.index_add import add_to_search_index, read_parent
from tasks.distilling.opened_index import open_search_index
from tasks.distilling.vectors import read_vectors
from tasks.distilling.versions import load_trained_head
from tasks.inputs.added_samples import append_samples
from tasks.inputs.samples import sample_images, samples_table
from tests import tiny
from tests.storage_schemas.test_version_kills import crashes
from tests.tasks.whole_runs import AXES, SAMPLES, WholeRun

ADDED = 6


@pytest.fixture
def copied(similar: WholeRun, tmp_path: Path) -> Workspace:
    """A finished workspace of its own, which a test may add to; committed files are shared and never changed."""
    root = tmp_path / "workspace"
    shutil.copytree(similar.workspace.root, root)
    return Workspace.at(root)


def new_tar(folder: Path, numbers: range = range(100, 100 + ADDED)) -> Path:
    return tiny.write_tar(folder / "new.tar", tiny.sample_members(numbers))


@pytest.mark.heavy
def test_added_samples_are_found_by_the_vectors_that_head_and_features_give(copied: Workspace, tmp_path: Path) -> None:
    parent = read_parent(copied)
    added = add_to_search_index.fn(parent, [new_tar(tmp_path)])
    record = read_index_record(added.artifact.path)
    assert (record.parent, record.head, added.artifact.rows) == (parent.index.key, parent.head.key, SAMPLES + ADDED)
    old, new = samples_table(parent.samples.path), samples_table(copied.file(record.samples or ""))
    assert new.slice(0, SAMPLES) == old and new["train_id"].to_pylist() == list(range(SAMPLES + ADDED))

    encoder, mean = load_encoder("pixel", torch.device("cpu"), None), read_index_mean(parent.index.path)
    images = sample_images(copied.file(record.samples or ""), list(range(SAMPLES + ADDED)))
    phi = concatenate([encoder.encode(images)], mean=mean)
    vectors = load_trained_head(parent.head.path)(phi).detach().numpy()
    similarity, found = open_search_index(added.artifact.path, parent.head.key).search(vectors, SAMPLES + ADDED)
    expected = vectors @ vectors.T
    np.testing.assert_allclose(similarity, -np.sort(-expected, axis=1), atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, found, 1), similarity, atol=1e-5)
    assert record.recall_at_10 == record.recall_at_100 == 1.0
    assert read_index_record(parent.index.path).parent == "", "the version that it came from is as it was"


@pytest.mark.heavy
def test_adding_twice_names_the_parent_and_adding_again_finds_what_is_there(copied: Workspace, tmp_path: Path) -> None:
    parent, tar = read_parent(copied), new_tar(tmp_path)
    first = add_to_search_index.fn(parent, [tar])
    again = add_to_search_index.fn(parent, [tar])
    assert again.reused and again.artifact == first.artifact
    later = tiny.write_tar(tmp_path / "later.tar", tiny.sample_members(range(200, 203)))
    second = add_to_search_index.fn(read_parent(copied, first.artifact.key), [later])
    record = read_index_record(second.artifact.path)
    assert record.parent == first.artifact.key and len(record.vectors) == 3
    ids = tables.read(second.artifact.path / "ids.parquet", tables.INDEX_IDS)["train_id"].to_pylist()
    assert ids == list(range(SAMPLES + ADDED + 3))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["index.json", "ids.parquet", "mean.safetensors"])
def test_an_added_version_that_lost_a_file_is_made_again(copied: Workspace, tmp_path: Path, name: str) -> None:
    parent, tar = read_parent(copied), new_tar(tmp_path)
    first = add_to_search_index.fn(parent, [tar]).artifact
    lost = Path(str(first.path)) / name
    before = lost.read_bytes()
    lost.unlink()
    again = add_to_search_index.fn(parent, [tar])
    assert not again.reused and again.artifact == first and lost.read_bytes() == before


def test_a_new_sample_that_is_gone_again_is_not_indexed_as_a_grey_picture(copied: Workspace, tmp_path: Path) -> None:
    parent, tar = read_parent(copied), new_tar(tmp_path)
    samples = append_samples(copied, parent.samples, [tar])
    tar.write_bytes(bytes(tar.stat().st_size))
    mean = read_index_mean(parent.index.path)
    vectors = added_vectors(parent.context, samples, parent.head, SAMPLES, mean)
    with pytest.raises(UsageError, match=rf"sample {SAMPLES} cannot be read any more \(.*\): mend it or leave its tar"):
        vectors.made()


def test_what_cannot_be_added_is_refused_in_one_line(copied: Workspace, tmp_path: Path) -> None:
    parent = read_parent(copied)
    with pytest.raises(UsageError, match="is no file: name WebDataset tars"):
        add_to_search_index.fn(parent, [tmp_path / "missing.tar"])
    same = tiny.write_tar(tmp_path / "same.tar", tiny.sample_members(range(3)))
    with pytest.raises(UsageError, match=r"no usable new sample; the first fault: .*duplicate key, first seen in"):
        add_to_search_index.fn(parent, [same])
    with pytest.raises(UsageError, match="no index 'i'"):
        read_parent(copied, "i")
    described = parent.index.path / "index.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "vectors": []}))
    with pytest.raises(UsageError, match="of an earlier release, which kept no vectors"):
        read_parent(copied)


def test_without_the_vectors_of_its_parent_an_index_is_not_added_to(copied: Workspace, tmp_path: Path) -> None:
    parent = read_parent(copied)
    shutil.rmtree(copied.vectors(parent.record.vectors[0]))  # type: ignore[arg-type]  # on disk
    with pytest.raises(UsageError, match=r"the vectors of index .* are gone: `fastgda index build CONFIG`"):
        add_to_search_index.fn(parent, [new_tar(tmp_path)])
    gone = replace(parent, record=parent.record.model_copy(update={"vectors": []}))
    assert gone.vector_paths == []


@pytest.mark.heavy
def test_a_gradient_head_sketches_what_is_added(solved: WholeRun, tmp_path: Path) -> None:
    """Copies of old samples under other names: their features are the same, their sketches are under other noise."""
    root = tmp_path / "workspace"
    shutil.copytree(solved.workspace.root, root)
    members = [(f"copy-{name}", content) for name, content in tiny.sample_members(range(3))]
    tar = tiny.write_tar(tmp_path / "copies.tar", members)
    parent = read_parent(Workspace.at(root))
    added = add_to_search_index.fn(parent, [tar])
    record = read_index_record(added.artifact.path)
    assert record.kind == "SQfp16" and open_search_index(added.artifact.path).vectors == SAMPLES + 3
    old, new = (read_vectors(root / "vectors" / key / "part-00000.parquet") for key in record.vectors)
    assert new.train_ids.tolist() == [SAMPLES, SAMPLES + 1, SAMPLES + 2]
    np.testing.assert_allclose(new.vectors[:, -AXES:], old.vectors[:3, -AXES:], atol=1e-5)
    assert (np.abs(new.vectors[:, :-AXES]).sum(axis=1) > 0).all(), "zeros stand for a sample without a gradient"


def added(workspace: Workspace, tar: Path) -> Made:
    return add_to_search_index.fn(read_parent(workspace), [tar])


@pytest.mark.parametrize(
    "stride", [pytest.param(9, marks=pytest.mark.integration), pytest.param(1, marks=pytest.mark.slow)]
)
def test_an_addition_that_dies_at_any_instant_is_completed_by_the_next(
    similar: WholeRun, tmp_path: Path, stride: int
) -> None:
    """Processes are forked from one that computed nothing: FAISS hangs in a fork of one whose OpenMP ran."""
    begun, tar = Path(str(similar.workspace.root)), new_tar(tmp_path)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    versions = {path.parent.name for path in begun.glob("indexes/*/index.faiss")}
    seen = set()
    for workspace in crashes(begun, tmp_path, functools.partial(added, tar=tar), stride, processes):
        assert verify(workspace) == []
        was_there = {path.parent.name for path in Path(str(workspace.root)).glob("indexes/*/index.faiss")} - versions
        index = added(workspace, tar)
        assert was_there <= {index.artifact.key}
        seen.add(index.reused)
        assert open_search_index(index.artifact.path).vectors == index.artifact.rows == SAMPLES + ADDED
        assert samples_table(workspace.file(read_index_record(index.artifact.path).samples or "")).num_rows == (
            SAMPLES + ADDED
        )
        vacuum(workspace, older_than=timedelta(0))
        assert not [path for path in Path(str(workspace.root)).rglob("*") if path.name.startswith(".fastgda")]
        assert verify(workspace) == []
    assert seen == {True, False}
