"""A changed setting recomputes exactly what depends on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage_schemas import tables
from storage_schemas.commit import input_key
from tasks.artifact import Artifact
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.execution.plan import run_artifacts, run_name
from tasks.inputs.features import feature_folders, features_key, in_space
from tasks.teaching.score_plan import ScoreRun, ScoreShard
from tests.storage_schemas.workspaces import with_column, write_table
from tests.tasks.configs import document

SAMPLES = 12
EVERYTHING = {"latents", "curvature", "unlearning steps", "base losses", "run"}


def ingested(root: Path, key: str = "s", captions: int = 1) -> Artifact:
    """Samples, the last of which has so many captions."""
    path = root / f"samples-{captions}" / "samples.parquet"
    if not path.exists():
        where = {"key": "s", "shard": "a.tar", "offset": 512, "size": 9}
        image = {"width": 8, "height": 8, "image_sha256": "0" * 64}
        several = [["a cat"]] * (SAMPLES - 1) + [["a cat", "a dog"][:captions]]
        rows = [{"train_id": number, "captions": each, **where, **image} for number, each in enumerate(several)]
        path.parent.mkdir()
        write_table(path, tables.SAMPLES, rows)
    return Artifact("samples", key, path, SAMPLES)


def keys(root: Path, samples: str = "s", queries: str = "q", model: str = "m", **changes: object) -> dict[str, str]:
    """Key of each stage that leads to scores, and the run's name."""
    config = PipelineConfig.model_validate(document(workspace=str(root), **changes))
    context = Context(config, model)
    stages = run_artifacts(context, ingested(root, samples), Artifact("queries", queries, root / "queries", 3))
    found = {name: stage.key for name, stage in stages.items() if name not in ("samples", "queries")}
    return {**found, "run": run_name(context, stages)}


NEAR = {"policy": "pooled", "k": 5}
CASES: list[tuple[dict[str, object], set[str]]] = [
    ({"samples": "other"}, EVERYTHING),
    ({"model": "other"}, EVERYTHING),
    ({"model__flips": True}, EVERYTHING),
    ({"queries": "other"}, {"unlearning steps", "run"}),
    ({"curvature__samples": 7}, {"curvature", "unlearning steps", "run"}),
    ({"curvature__importance": False}, {"curvature", "unlearning steps", "run"}),
    ({"teacher__objective": "output_norm"}, {"unlearning steps", "base losses", "run"}),
    ({"teacher__objective": "ratio"}, {"unlearning steps", "base losses", "run"}),
    ({"teacher__layers": "attn"}, {"curvature", "unlearning steps", "run"}),
    ({"teacher__alpha": 1e-4}, {"unlearning steps", "run"}),
    ({"teacher__damping": 0.5}, {"unlearning steps", "run"}),
    ({"teacher__gradient_pairs": 7}, {"unlearning steps", "run"}),
    ({"teacher__training_size": 7}, {"unlearning steps", "run"}),
    ({"teacher__timesteps": 5}, {"base losses", "run"}),
    ({"teacher__draws": 2}, {"base losses", "run"}),
    ({"teacher__agreement": 0.9}, {"base losses", "run"}),
    ({"teacher__seed": 1}, {"unlearning steps", "base losses", "run"}),
    ({"teacher__precision": "float64"}, {"unlearning steps", "base losses", "run"}),
    ({"candidates__policy": "top_k", "candidates__k": 5}, {"run"}),
    ({"features__space": "pixel"}, set()),
    ({"features__centre": False}, set()),
    ({"candidates__space": "pixel"}, set()),
    ({"candidates": NEAR, "features__space": "pixel"}, {"run"}),
    ({"candidates": {**NEAR, "space": "minilm_text"}}, {"run"}),
    ({"teacher__loaded_queries": 7}, set()),
    ({"teacher__negatives": "tie"}, set()),
    ({"model__micro_batch": 7}, set()),
    ({"model__latents": "bf16"}, EVERYTHING),
    ({"model__captions_gb": 0.5}, set()),
    ({"device": "auto"}, set()),
    ({"execution__runner": "ray", "execution__workers": 3}, set()),
    ({"execution__forwards_per_second": 3.0}, set()),
    ({"head__epochs": 3}, set()),
    ({"evaluation__floor": 0.5}, set()),
    ({"publish": "add"}, set()),
]


@pytest.mark.parametrize(("changes", "expected"), CASES, ids=[str(changes) for changes, _ in CASES])
def test_a_setting_changes_the_keys_of_what_depends_on_it_and_no_others(
    tmp_path: Path, changes: dict[str, object], expected: set[str]
) -> None:
    sections = {"curvature": {}, "features": {"space": "pixel+minilm_text"}, "execution": {}, "head": {}}
    before = keys(tmp_path, **sections)
    after = keys(tmp_path, **sections, **changes)  # type: ignore[arg-type]
    assert {name for name in before if before[name] != after[name]} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"samples": "other"}, {"patch pictures", "patch posteriors", "run"}),
        ({"queries": "other"}, {"patch posteriors", "run"}),
        ({"model__flips": True}, {"patch posteriors", "run"}),
        ({"teacher__patch_pixels": 8}, {"patch pictures", "patch posteriors", "run"}),
        ({"teacher__patch_sizes": [3]}, {"patch posteriors", "run"}),
        ({"teacher__timestep_list": [3]}, {"patch posteriors", "run"}),
        ({"teacher__draws": 2}, {"patch posteriors", "run"}),
        ({"teacher__seed": 2}, {"patch posteriors", "run"}),
        ({"teacher__patch_matches": None}, {"run"}),
        ({"teacher__negatives": "tie"}, set()),
    ],
)
def test_a_setting_of_nda_changes_what_depends_on_it(
    tmp_path: Path, changes: dict[str, object], expected: set[str]
) -> None:
    before, after = (keys(tmp_path, teacher={"name": "nda"}, **each) for each in ({}, changes))  # type: ignore[arg-type]
    assert {name for name in before if before[name] != after[name]} == expected


def test_other_weights_of_an_encoder_are_other_features(tmp_path: Path) -> None:
    found = set()
    for content in ("old", "new"):
        (tmp_path / content).mkdir()
        (tmp_path / content / "model.safetensors").write_text(content)
    for source in (None, "a/hub-id", str(tmp_path / "old"), str(tmp_path / "new")):
        features = {"space": "pixel+clip", "weights": {"clip": source} if source else {}}
        found.add(keys(tmp_path, curvature={}, features=features, candidates=NEAR)["run"])
    assert len(found) == 4
    (tmp_path / "old" / "model.safetensors").write_text("new")
    again = {"space": "pixel+clip", "weights": {"clip": str(tmp_path / "old")}}
    here = keys(tmp_path, curvature={}, features=again, candidates=NEAR)["run"]
    assert here in found, "where they lie does not matter"


def test_encoders_of_the_model_are_keyed_by_its_files(tmp_path: Path) -> None:
    found = []
    for content in ("old", "new", "old"):
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet" / "weights.safetensors").write_text(content)
        features = {"space": "pixel", "centre": False}
        sections = {"features": features, "candidates": {**NEAR, "space": "bottleneck"}, "curvature": {}}
        found.append(keys(tmp_path, model__folder=str(tmp_path), **sections)["run"])
    assert found[0] != found[1] and found[0] == found[2]


def test_features_that_are_not_centred_keep_the_key_of_earlier_releases(tmp_path: Path) -> None:
    samples = ingested(tmp_path)
    found = {}
    for centre in (True, False):
        features = {"space": "pixel+minilm_text", "centre": centre}
        config = PipelineConfig.model_validate(document(workspace=str(tmp_path), features=features))
        found[centre] = features_key(Context(config, "m"), samples)
    assert found[False] == input_key("pixel+minilm_text", "s") != found[True]


def test_samples_of_several_captions_have_other_features_of_text_and_of_nothing_else(tmp_path: Path) -> None:
    config = PipelineConfig.model_validate(document(features={"space": "pixel+minilm_text", "centre": False}))
    context = Context(config.model_copy(update={"workspace": str(tmp_path)}), "m")
    one, several = (feature_folders(context, ingested(tmp_path, captions=captions)) for captions in (1, 2))
    assert {name: key for name, (_, key) in one.items()} == {
        name: input_key("features", name, "s", table=tables.FEATURES) for name in ("pixel", "minilm_text")
    }, "the keys of earlier releases"
    assert one["pixel"] == several["pixel"] and one["minilm_text"] != several["minilm_text"]
    spaces = [in_space(context, space=space) for space in ("pixel", "pixel+minilm_text")]
    several_keys = [features_key(each, ingested(tmp_path, captions=2)) for each in spaces]
    assert several_keys[0] == features_key(spaces[0], ingested(tmp_path)) == input_key("pixel", "s")
    assert several_keys[1] != features_key(spaces[1], ingested(tmp_path)) == input_key("pixel+minilm_text", "s")


def test_no_two_of_these_configurations_share_a_key(tmp_path: Path) -> None:
    sections = {"curvature": {}, "features": {"space": "pixel+minilm_text"}, "execution": {}, "head": {}}
    changing = [keys(tmp_path, **sections, **changes) for changes, expected in CASES if "run" in expected]  # type: ignore[arg-type]
    assert len({found["run"] for found in changing}) == len(changing)


def every_key(root: Path) -> dict[str, str]:
    """As `keys`, with the keys of encoders and of a score shard."""
    sections = {
        "curvature": {},
        "features": {"space": "pixel+minilm_text"},
        "execution": {},
        "head": {},
        "candidates": NEAR,
    }
    found = keys(root, **sections)
    samples = ingested(root)
    config = PipelineConfig.model_validate(document(workspace=str(root), **sections))
    folders = feature_folders(Context(config, "m"), samples)
    shard = ScoreRun("run-1", ["q"], [], []).shard_key(ScoreShard(0, 0, [0], np.arange(3)))
    return found | {f"features {name}": key for name, (_, key) in folders.items()} | {"score shard": shard}


@pytest.mark.parametrize("name", ["METRICS", "SAMPLES", "QUERIES", "FEATURES", "BASE_LOSSES", "SCORES", "RANKS"])
def test_a_column_more_in_a_table_changes_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = every_key(tmp_path)
    monkeypatch.setattr(tables, name, with_column(getattr(tables, name), "new", pa.int32(), 7))
    assert every_key(tmp_path) == before


CHANGED = [
    ("METRICS", set()),
    ("SCORES", {"run", "score shard"}),
    ("BASE_LOSSES", {"base losses"}),
    ("FEATURES", {"features pixel", "features minilm_text", "run"}),
]


@pytest.mark.parametrize(("name", "expected"), CHANGED)
def test_a_table_whose_files_are_no_longer_read_is_made_again_with_what_rests_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: set[str]
) -> None:
    before = every_key(tmp_path)
    monkeypatch.setattr(tables, name, dataclasses.replace(getattr(tables, name), version=3, oldest=3))
    after = every_key(tmp_path)
    assert {key for key in before if before[key] != after[key]} == expected


def test_candidates_with_a_space_of_their_own_do_not_depend_on_the_heads(tmp_path: Path) -> None:
    own = {**NEAR, "space": "pixel+minilm_text"}
    runs = [
        keys(tmp_path, candidates=candidates, features={"space": space})["run"]
        for candidates, space in ((own, "pixel"), (own, "minilm_text"), (NEAR, "pixel+minilm_text"), (NEAR, "pixel"))
    ]
    assert runs[0] == runs[1] == runs[2], "named or by default, it is the same space"
    assert runs[3] != runs[0]
