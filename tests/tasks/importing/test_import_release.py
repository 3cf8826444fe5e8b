"""A release's folder by the commands of its page: imported, measured, asked, trained on, indexed, gone on with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastgda_core.curvature.fisher import load_fisher
from fastgda_core.features import load_encoder
from storage_schemas import tables
from storage_schemas.snapshots.published import read_published
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests import tiny, warm
from tests.flows.pipeline_case import environment, fastgda
from tests.tasks.importing.release_world import (
    CANDIDATES,
    SAMPLES,
    TEST,
    TRAIN,
    World,
    forward,
    make_world,
    mean_average_precision,
    unit,
)

PAGE = Path(__file__).parents[3] / "docs" / "import-release.md"
COMMANDS = re.findall(r"^fastgda .*$", PAGE.read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> World:
    return make_world(tmp_path_factory.mktemp("release"), model_folder)


@pytest.fixture(scope="module")
def folder(world: World, home: Path) -> Path:
    """The folder in which the page's first two commands ran: import and evaluate."""
    place = world.root.parents[1]
    warm.write_command(place)
    for command in COMMANDS[:2]:
        assert run(place, command, home)
    return place


def run(place: Path, command: str, home: Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run a line of the page in a shell; return what it prints."""
    path = f"{place}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env={**environment(home), "PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode in codes, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def rows(place: Path, statement: str) -> list[dict[str, object]]:
    return query(place / "workspace", statement).to_pylist()


def test_the_page_has_the_commands_that_are_tested_here() -> None:
    words = [command.split()[1] for command in COMMANDS]
    assert words == ["import-release", "evaluate", "train", "index", "evaluate", "attribute", "sql", "plan", "curate"]


def test_evaluate_gives_the_map_of_the_releases_head(world: World, folder: Path) -> None:
    phi, samples = world.phi, forward(world.head, world.phi["data_feats"])
    spaces = {
        "tuned": forward(world.head, phi["test_query_feats"]) @ samples.T,
        "untuned": unit(phi["test_query_feats"]) @ unit(phi["data_feats"]).T,
    }
    cutoffs = yaml.safe_load((folder / "release.yaml").read_text())["evaluation"]["cutoffs"]
    for space, similarity in spaces.items():
        for cutoff in cutoffs:
            statement = f"SELECT value FROM metrics WHERE metric = 'mAP' AND space = '{space}' AND cutoff = {cutoff}"
            (found,) = rows(folder, statement)
            assert found["value"] == pytest.approx(mean_average_precision(world.test, similarity, cutoff), abs=1e-6)
    assert read_published(Workspace(folder / "workspace")).index


def test_rows_are_those_of_the_files(world: World, folder: Path) -> None:
    coco = json.loads((world.root / "trainset" / "annotations" / "captions_train2017.json").read_text())
    notes: dict[int, list[str]] = {}
    for note in coco["annotations"]:
        notes.setdefault(note["image_id"], []).append(" ".join(note["caption"].split()))
    expected = [(image["file_name"].split(".")[0], notes[image["id"]][:5]) for image in coco["images"]]
    found = rows(folder, "SELECT key, captions FROM samples ORDER BY train_id")
    assert [(row["key"], row["captions"]) for row in found] == expected
    scores = {
        (row["query_id"], row["train_id"]): row["score"]
        for row in rows(folder, "SELECT query_id, train_id, score FROM ranks")
    }
    whole = {(f"test-{q:05d}", i): float(world.test[q, i]) for q in range(TEST) for i in range(SAMPLES)}
    part = {
        (f"train-{q:05d}", int(world.candidates[q, k])): float(world.train[q, k])
        for q in range(TRAIN)
        for k in range(CANDIDATES)
    }
    assert scores == whole | part
    near = rows(folder, "SELECT train_id FROM candidates WHERE query_id = 'train-00010' ORDER BY neighbor_rank")
    assert [row["train_id"] for row in near] == world.candidates[10].tolist()
    queries = rows(folder, "SELECT query_id, split, caption, image FROM queries ORDER BY query_id")
    assert [row["split"] for row in queries] == ["test"] * TEST + ["train"] * (TRAIN - 1) + ["validation"]
    eleventh = queries[TEST + 10]
    assert eleventh["image"] == (world.root / "query_train" / "images" / "10.png").read_bytes()
    assert eleventh["caption"] == "a train query number 10"


def test_the_fishers_step_is_the_releases(world: World, folder: Path) -> None:
    (path,) = (folder / "workspace" / "curvature").glob("*/fisher.safetensors")
    fisher = load_fisher(path)
    alpha = yaml.safe_load((folder / "release.yaml").read_text())["teacher"]["alpha"]
    inward, outward = (
        load_file(world.root / "ekfac_fisher" / f"{side}_eigenvectors.safetensors")
        for side in ("activation", "gradient")
    )
    assert world.lambdas
    for name, sums in world.lambdas.items():
        gradient = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1))
        scaled = sums.double() * SAMPLES**2 / world.counts
        rotated = outward[name].T.double() @ gradient.double() @ inward[name].double()
        solved = rotated / (scaled + 0.1 * scaled.mean())
        expected = 0.01 * outward[name].double() @ solved @ inward[name].T.double()
        found = (alpha / SAMPLES * fisher.solve(name, gradient)).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_an_image_is_answered_by_the_releases_head(world: World, folder: Path, home: Path) -> None:
    answer = json.loads(run(folder, COMMANDS[5] + " --json", home))
    device = torch.device("cpu")
    picture = Image.open(world.root / "query_test" / "images" / "3.png").convert("RGB")
    dino = load_encoder("dino", device, str(folder / "encoders" / "dino")).encode([picture])
    text = load_encoder("clip_text", device, str(folder / "encoders" / "clip_text")).encode(["a photo of a cat"])
    phi = torch.cat([dino, text], dim=1).numpy()
    similarity = (forward(world.head, phi) @ forward(world.head, world.phi["data_feats"]).T)[0]
    found = [hit["train_id"] for hit in answer["hits"]]
    assert found == np.argsort(-similarity)[: len(found)].tolist()


def test_a_second_import_finds_everything(folder: Path, home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "workspace" / "scores").rglob("*.parquet")}
    before |= {path: path.stat().st_mtime_ns for path in (folder / "workspace" / "features").rglob("*.parquet")}
    config = (folder / "release.yaml").read_text()
    assert run(folder, COMMANDS[0], home)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "release.yaml").read_text() == config


def test_labels_are_trained_on_and_indexed_and_a_curation_goes_on(folder: Path, home: Path) -> None:
    for command in COMMANDS[2:4]:
        assert run(folder, command, home)
    assert "mAP" in run(folder, COMMANDS[4], home, codes=(0, 1)), "twelve queries need not make a good head"
    assert run(folder, COMMANDS[6], home)
    heads = rows(folder, "SELECT head FROM heads")
    assert len(heads) == 2
    tiny.write_tar(folder / "new_queries" / "today.tar", tiny.sample_members(range(900, 903)))
    document = yaml.safe_load((folder / "release.yaml").read_text())
    document["teacher"].update(gradient_pairs=2, timesteps=1)
    document["candidates"]["k"] = 12
    document["evaluation"].update(cutoffs=[3], validation_cutoff=3)
    header = (folder / "release.yaml").read_text().split("\n")[0]
    (folder / "release.yaml").write_text(f"{header}\n{yaml.safe_dump(document)}")
    assert run(folder, COMMANDS[7], home)
    workspace = Workspace(folder / "workspace")
    fishers = list((folder / "workspace" / "curvature").glob("*/*.safetensors"))
    assert run(folder, COMMANDS[8], home)
    assert list((folder / "workspace" / "curvature").glob("*/*.safetensors")) == fishers, "the Fisher was made anew"
    snapshot = read_snapshot(workspace, read_published(workspace).snapshot)
    assert len(snapshot.runs) == 3 and snapshot.queries == TRAIN + TEST + 3
    assert snapshot.rows == TRAIN * CANDIDATES + TEST * SAMPLES + 3 * 12


def test_scores_of_the_test_alone_are_imported(world: World, tmp_path: Path, home: Path) -> None:
    fastgda("import-release", world.root / "influence_test.pkl", "--workspace", tmp_path / "workspace", home=home)
    (shards,) = (tmp_path / "workspace" / "scores").iterdir()
    table = tables.read(shards / "part-00002.parquet", tables.SCORES)
    found = dict(zip(table["train_id"].to_pylist(), table["score"].to_pylist(), strict=True))
    assert found == dict(enumerate(world.test[2].astype(float).tolist()))
