"""Features of captions, and the mean that features are centred by: made once, made again when samples are mended."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastgda_core.features import Encoder, load_encoder
from storage_schemas.commit import manifest_path, read_manifest
from tasks.config.inputs import FeaturesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs import features
from tasks.inputs import samples as samples_module
from tasks.inputs.encoded_items import InBatches, encode_items
from tasks.inputs.features import (
    FeatureParts,
    extract_features,
    feature_mean,
    in_space,
    load_encoders,
    load_features,
    map_features,
)
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples
from tests import tiny
from tests.fastgda_core.test_encoders import save_dino
from tests.tasks.configs import document

SAMPLES, ROTTEN = 12, 7


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """A dozen samples in three parts, of which the last is not full."""
    monkeypatch.setattr(features, "PART_ITEMS", 5)
    tiny.write_tar(tmp_path / "shapes.tar", tiny.sample_members(range(SAMPLES)))
    changes = {"data__shards": str(tmp_path / "*.tar"), "features": {"space": "pixel"}}
    config = PipelineConfig.model_validate(document(workspace=str(tmp_path / "workspace"), **changes))
    return Context(config, "model")


def rows(context: Context) -> np.ndarray:
    """The encoder's outputs as they lie on disk, at length one."""
    parts = sorted((context.workspace.root / "features" / "pixel").rglob("part-*.parquet"))
    assert len(parts) == 3
    vectors = np.vstack([np.stack(pq.read_table(part)["feature"].to_numpy()) for part in parts]).astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def mean_files(context: Context) -> list[Path]:
    return sorted((context.workspace.root / "features" / "means").glob("*.safetensors"))


def test_the_mean_is_that_of_all_samples_and_is_made_once(context: Context) -> None:
    samples = ingest_samples.fn(context).artifact
    made = extract_features.fn(context, samples)
    (path,) = mean_files(context)
    expected = rows(context).mean(0)
    np.testing.assert_allclose(load_file(path)["mean"].numpy(), expected, atol=1e-7)
    np.testing.assert_allclose(load_features(context, samples, samples), rows(context) - expected, atol=1e-6)
    written = path.stat().st_mtime_ns
    again = extract_features.fn(context, samples)
    assert (made.reused, again.reused) == (False, True)
    assert path.stat().st_mtime_ns == written
    path.unlink()
    assert not extract_features.fn(context, samples).reused and mean_files(context) == [path]


def test_queries_go_through_their_own_map_where_one_was_learned(
    context: Context, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    pixel = load_encoder("pixel", torch.device("cpu"))
    twice = Encoder("image", pixel.encode, lambda images: 1 - 2 * pixel.encode(images))
    monkeypatch.setattr(features, "load_encoder", lambda *_: twice)
    context = in_space(context, centre=False, unit_length=False)
    samples = ingest_samples.fn(context).artifact
    asked = tiny.write_tar(context.workspace.root.parent / "asked" / "queries.tar", tiny.sample_members(range(4, 7)))
    shards = {"shards": str(asked), "captions": None, "twins": 0}
    config = context.config.model_copy(update={"queries": context.config.queries.model_copy(update=shards)})
    config = config.model_copy(update={"model": config.model.model_copy(update={"folder": model_folder})})
    queries = make_queries.fn(dataclasses.replace(context, config=config), samples).artifact
    for items in (samples, queries):
        extract_features.fn(context, items)
    of_samples, of_queries = (load_features(context, items, samples) for items in (samples, queries))
    rows = [int(query.query_id.removeprefix("s")) for query in load_queries(queries)]
    torch.testing.assert_close(of_queries, 1 - 2 * of_samples[rows])


def test_encoders_are_shared_while_somebody_holds_them_and_loaded_anew_when_their_weights_change(
    tmp_path: Path,
) -> None:
    folder, picture, cpu = tmp_path / "dino", Image.new("RGB", (32, 32), "teal"), torch.device("cpu")
    save_dino(folder)
    config = FeaturesConfig(space="dino+pixel", weights={"dino": str(folder)})
    first, same = load_encoders(config, cpu), load_encoders(config.model_copy(update={"unit_length": False}), cpu)
    assert [one is other for one, other in zip(first, same, strict=True)] == [True, True]
    before = first[0].encode([picture])
    save_dino(folder)  # other random weights
    other = load_encoders(config, cpu)
    assert other[0] is not first[0] and other[1] is first[1]
    assert not torch.equal(other[0].encode([picture]), before)
    assert torch.equal(first[0].encode([picture]), before)
    held = weakref.ref(first[0])
    del first, same
    gc.collect()
    assert held() is None


def test_features_that_are_not_centred_have_no_mean_and_are_the_encoders_own(context: Context) -> None:
    context = in_space(context, centre=False)
    samples = ingest_samples.fn(context).artifact
    extract_features.fn(context, samples)
    assert not mean_files(context) and feature_mean(context, samples) is None
    found = load_features(context, samples, samples)
    np.testing.assert_allclose(found.numpy(), rows(context), atol=1e-6)
    assert torch.equal(map_features(context, samples), found)


def test_a_sample_that_cannot_be_read_counts_once_it_is_restored(context: Context, tmp_path: Path) -> None:
    samples, tar = ingest_samples.fn(context).artifact, tmp_path / "shapes.tar"
    whole, image = tar.read_bytes(), tiny.draw(ROTTEN)[0]
    middle = whole.index(image) + len(image) // 2
    tar.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    extract_features.fn(context, samples)
    (path,) = mean_files(context)
    manifest = read_manifest(path)
    assert manifest is not None and manifest.rows == SAMPLES - 1 and manifest.quarantined.keys() == {ROTTEN}
    others = np.arange(SAMPLES) != ROTTEN
    np.testing.assert_allclose(load_file(path)["mean"].numpy(), rows(context)[others].mean(0), atol=1e-7)
    mapped = map_features(context, samples)

    tar.write_bytes(whole)
    (short,) = (context.workspace.root / "features" / "pixel").rglob("part-00001.parquet")
    short.unlink()
    manifest_path(short).unlink()
    assert not extract_features.fn(context, samples).reused
    np.testing.assert_allclose(load_file(path)["mean"].numpy(), rows(context).mean(0), atol=1e-7)
    assert torch.equal(map_features(context, samples), load_features(context, samples, samples))
    assert not torch.equal(map_features(context, samples), mapped)


def test_equal_captions_are_encoded_once(tmp_path: Path) -> None:
    captions = ["a cat", "a dog", "a cat", "a bird", "a cat", "a dog"]
    images = tiny.sample_members(range(len(captions)))[::2]
    texts = [(name.replace("jpg", "txt"), text.encode()) for (name, _), text in zip(images, captions, strict=True)]
    tiny.write_tar(tmp_path / "data.tar", [*images, *texts])
    where = {"workspace": str(tmp_path / "workspace"), "data__shards": str(tmp_path / "*.tar")}
    samples = ingest_samples.fn(Context(PipelineConfig.model_validate(document(**where)), "model")).artifact
    asked: list[str] = []
    done: list[float] = []

    def encode(batch: list[str]) -> torch.Tensor:
        asked.extend(batch)
        return torch.tensor([[float(len(text)), float(ord(text[2]))] for text in batch])

    done_all = encode_items({"letters": InBatches(Encoder("text", encode), 2)}, samples, list(range(6)), done.append)
    found = done_all.encoded["letters"].features
    assert asked == ["a cat", "a dog", "a bird"]
    assert found.tolist() == [[len(text), ord(text[2])] for text in captions]
    assert sum(done) == len(captions)


@pytest.mark.parametrize("unit_length", [True, False])
def test_a_sample_of_several_captions_has_the_mean_of_their_outputs(tmp_path: Path, unit_length: bool) -> None:
    captions = [["a cat"], ["a dog", "a cat", "three birds in a tree"], ["a bird", "a dog"]]
    members = tiny.sample_members(range(3))[::2]
    texts = [json.dumps({"captions": many}).encode() for many in captions]
    members += [(name.replace("jpg", "json"), text) for (name, _), text in zip(members, texts, strict=True)]
    tiny.write_tar(tmp_path / "data.tar", members)
    changes = {"data__shards": str(tmp_path / "*.tar"), "features": {"space": "minilm_text", "centre": False}}
    config = PipelineConfig.model_validate(document(workspace=str(tmp_path / "workspace"), **changes))
    context = in_space(Context(config, "model"), unit_length=unit_length)
    samples = ingest_samples.fn(context).artifact
    extract_features.fn(context, samples)
    encode = load_encoder("minilm_text", torch.device("cpu")).encode
    alone = [np.vstack([encode([caption]).numpy() for caption in many]).mean(0) for many in captions]
    expected = [mean / np.linalg.norm(mean) if unit_length else mean for mean in alone]
    np.testing.assert_allclose(load_features(context, samples, samples).numpy(), expected, atol=1e-5)


def test_an_image_is_decoded_once_for_all_encoders_and_each_has_what_it_would_have_alone(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dino(tmp_path / "dino")
    read: list[int] = []
    decode = samples_module.read_image
    monkeypatch.setattr(samples_module, "read_image", lambda *place: read.append(place[1]) or decode(*place))
    weights = {"dino": str(tmp_path / "dino")}
    context = in_space(context, space="minilm_text+dino", weights=weights, batch_size=2, centre=False)
    samples = ingest_samples.fn(context).artifact
    extract_features.fn(context, samples)
    assert sorted(read) == sorted(set(read)) and len(read) == SAMPLES
    # A second image encoder, of which one part is there: the first one's files stay, and images are read once more.
    both = in_space(context, space="pixel+dino")
    files = {path: path.read_bytes() for path in (context.workspace.root / "features" / "dino").rglob("*.parquet")}
    read.clear()
    parts = FeatureParts.of(both, samples, [both])
    assert list(parts.folders) == ["dino", "pixel"] and parts.missing() == [0, 1, 2]
    assert parts.make(2).rows == SAMPLES % 5 and parts.missing() == [0, 1] and len(read) == SAMPLES % 5
    parts.make_missing()
    assert len(read) == SAMPLES and all(path.read_bytes() == content for path, content in files.items())
    assert parts.standing().seconds == pytest.approx(
        sum(each.seconds for path in files for each in [read_manifest(path)] if each)
        + sum(each.seconds for number in range(3) for each in [read_manifest(parts.path(number))] if each)
    )
    encoders = {name: load_encoder(name, torch.device("cpu"), weights.get(name)) for name in ("pixel", "dino")}
    images = [Image.open(io.BytesIO(tiny.draw(number)[0])).convert("RGB") for number in range(SAMPLES)]
    for name, encoder in encoders.items():
        # Twos of a part of five, each alone: what an encoder gives may hang on what is in its batch.
        batches = [range(0, 2), range(2, 4), range(4, 5), range(5, 7), range(7, 9), range(9, 10), range(10, 12)]
        expected = torch.cat([encoder.encode([images[number] for number in batch]) for batch in batches])
        alone = in_space(both, space=name, unit_length=False)
        assert torch.equal(load_features(alone, samples, samples), expected)
