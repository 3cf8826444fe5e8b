"""Questions to the published index, and what is no question."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastgda_core.errors import UsageError
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.distilling.versions import load_trained_head
from tasks.inputs.features import load_features
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import sample_images, samples_table
from tasks.serving.attributor import Attributor
from tasks.serving.question import check_caption, read_picture
from tests.storage_schemas.workspaces import publish_run
from tests.tasks.whole_runs import WholeRun, configuration, whole_run


def test_an_image_is_answered_with_the_samples_that_its_vector_is_nearest_to(similar: WholeRun) -> None:
    service = Attributor(similar.workspace)
    samples = similar.run.artifacts["samples"]
    (image,) = sample_images(samples.path, [5])
    vectors = load_trained_head(similar.head.artifact.path)(load_features(similar.context, samples, samples)).numpy()
    (asked,) = service.encode_many([image], ["anything"])
    answers = service.attribute(image, "anything", 4).hits
    expected = np.argsort(-(vectors @ asked), kind="stable")[:4]
    assert [answer.train_id for answer in answers] == expected.tolist()
    assert [answer.rank for answer in answers] == [1, 2, 3, 4]
    for answer in answers:
        row = samples_table(samples.path).slice(answer.train_id, 1).to_pylist()[0]
        for name in ("key", "captions", "shard", "offset"):
            assert getattr(answer, name) == row[name]
        assert answer.similarity == pytest.approx(float(vectors[answer.train_id] @ asked), abs=1e-3)


def test_a_head_over_parts_of_the_model_is_served_from_the_models_folder(tmp_path: Path, model_folder: Path) -> None:
    asked = configuration(tmp_path, model_folder, teacher={"name": "similarity"}, candidates={"policy": "all"})
    spaced = asked.model_dump() | {"features": {"space": "caption_tokens+bottleneck"}}
    made = whole_run(PipelineConfig.model_validate(spaced))
    service = Attributor(made.workspace)
    samples, queries = made.run.artifacts["samples"], made.run.artifacts["queries"]
    head, phi = load_trained_head(made.head.artifact.path), load_features(made.context, queries, samples)
    for query, features in zip(load_queries(queries), phi, strict=True):
        found = torch.from_numpy(service.encode_many([query.image], [query.caption]))
        torch.testing.assert_close(found, head.queries(features[None]), rtol=1e-3, atol=1e-4)


def test_without_an_index_nothing_is_answered(tmp_path: Path) -> None:
    publish_run(tmp_path)
    with pytest.raises(UsageError, match="has scores but no index yet"):
        Attributor(Workspace(tmp_path))


def test_what_is_no_picture_and_no_caption_is_refused(tmp_path: Path) -> None:
    good, torn = tmp_path / "good.png", tmp_path / "torn.png"
    Image.new("RGB", (4, 4), "teal").save(good)
    torn.write_bytes(good.read_bytes()[:20])
    assert read_picture(good).size == (4, 4)
    for path, why in ((tmp_path, "is no file"), (tmp_path / "gone.png", "No such file"), (torn, "torn.png")):
        with pytest.raises(UsageError, match=why):
            read_picture(path)
    check_caption("a cat", "--caption")
    with pytest.raises(UsageError, match="--caption is empty"):
        check_caption(" \n", "--caption")
