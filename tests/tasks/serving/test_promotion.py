"""An index is served beside the data that it is of, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fastgda_core.ranking.head import RankHead, save_head
from storage_schemas import tables
from storage_schemas.commit import commit
from storage_schemas.errors import StoreError
from storage_schemas.heads.records import index_samples
from storage_schemas.snapshots.published import read_published
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.distilling.index import build_search_index
from tasks.inputs.features import extract_features
from tasks.inputs.samples import ingest_samples
from tasks.serving.attributor import Attributor
from tasks.serving.promotion import Evaluation, promote
from tests import tiny
from tests.storage_schemas.workspaces import finish_run, plan_run, publish_run, show, write_table
from tests.tasks.configs import document


def tiny_context(root: Path, **changes: object) -> Context:
    evaluation = {"cutoffs": [2], "validation_cutoff": 2}
    config = document(workspace=str(root), evaluation=evaluation, **changes)
    return Context(PipelineConfig.model_validate(config), "model")


def write_json(path: Path, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path.parent


def promoted(root: Path, index: Path) -> Evaluation:
    rows: list[dict[str, object]] = [
        {"metric": "mAP", "space": space, "split": "test", "cutoff": 2, "query_id": "", "queries": 1}
        | {"value": 0.5, "standard_error": 0.1}
        for space in ("tuned", "untuned")
    ]
    metrics = write_table(root / "metrics" / "m.parquet", tables.METRICS, rows)
    commit(index / "index.faiss", lambda path: path.write_bytes(b"x"), key=index.name, rows=1, started=0.0)
    built, measured = (Artifact(path.name, path.name, path, 1) for path in (index, metrics))
    context = tiny_context(root)
    return promote.fn(context.workspace, context.config.evaluation, built, Made(measured, 0.0, True))


@pytest.mark.heavy
def test_an_index_of_other_training_data_is_refused(tmp_path: Path) -> None:
    published = publish_run(tmp_path, "first")
    other = finish_run(tmp_path, "second", samples=3)
    write_json(tmp_path / "heads" / "h" / "head.json", feature_space="pixel", snapshot="s", run="first")
    index = write_json(tmp_path / "indexes" / "i" / "index.json", head="h", samples=other.samples)
    found = promoted(tmp_path, index)
    assert f"index i is of {other.samples}, what is published of {published.samples}" in found.refused
    assert read_published(Workspace(tmp_path)) == published
    write_json(index / "index.json", head="h", samples=published.samples)
    assert not promoted(tmp_path, index).refused
    now = read_published(Workspace(tmp_path))
    assert (now.index, now.index_samples, now.metrics) == ("indexes/i", published.samples, "metrics/m.parquet")


def test_the_data_of_an_index_of_an_earlier_release_is_that_of_its_heads_run(tmp_path: Path) -> None:
    publish_run(tmp_path, "first")
    other = finish_run(tmp_path, "second", samples=3)
    head = write_json(tmp_path / "heads" / "h" / "head.json", feature_space="pixel", snapshot="s", run="second")
    index = write_json(tmp_path / "indexes" / "i" / "index.json", head="h")
    assert index_samples(Workspace(tmp_path), head, index) == other.samples
    assert "where a train_id means another image" in promoted(tmp_path, index).refused
    write_json(head / "head.json", feature_space="pixel", imported_from="x.pth")
    with pytest.raises(StoreError, match=r"does not say which training data.*`fastgda index build CONFIG --head h`"):
        promoted(tmp_path, index)


def test_an_index_says_its_data_and_answers_with_it(tmp_path: Path) -> None:
    tiny.write_tar(tmp_path / "shapes.tar", tiny.sample_members(range(4)))
    root = tmp_path / "workspace"
    features = {"space": "pixel", "centre": False}
    context = tiny_context(root, data__shards=str(tmp_path / "*.tar"), features=features)
    samples = ingest_samples.fn(context).artifact
    extracted = extract_features.fn(context, samples).artifact
    width = len(tables.read_parts(next((root / "features" / "pixel").iterdir()), tables.FEATURES)["feature"][0])
    described = {"features": width, "feature_space": "pixel", "centre": False, "imported_from": "x"}
    head = write_json(root / "heads" / "h" / "head.json", **described)
    save_head(RankHead(width), head / "head.safetensors")
    stage = Artifact("rank head", "h", head, 0)
    built = build_search_index.fn(context, samples, extracted, stage).artifact
    assert index_samples(Workspace(root), head, built.path) == f"samples/{samples.path.parent.name}/samples.parquet"

    description = built.path / "index.json"  # as an earlier release wrote it
    description.write_text(json.dumps({"head": "h"}))
    again = build_search_index.fn(context, samples, extracted, stage)
    assert not again.reused and "samples" in json.loads(description.read_bytes())

    plan_run(root, "other", config=context.config.model_dump(mode="json"))
    publish_run(root, "other")  # of other data, by an earlier release that did not ask
    show(Workspace(root), head="heads/h", index=f"indexes/{built.key}")
    answers = Attributor(Workspace(root)).attribute(Image.new("RGB", (16, 16)), "a caption", 4)
    keys = tables.read(samples.path, tables.SAMPLES)["key"].to_pylist()
    assert {answer.train_id: answer.key for answer in answers.hits} == dict(enumerate(keys))
