"""The rehearsals, small: pictures of a package of icons up to answers, and made-up rows up to an index."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import benchmarks.rehearsal.__main__ as road
from benchmarks.rehearsal import icons, rows, thin
from benchmarks.rehearsal.measure import FASTGDA, Kept, run_measured
from fastgda_core.feature_spaces import SOURCES
from fastgda_core.features.encoders import ENCODERS
from storage_schemas import tables
from storage_schemas.workspace import Workspace
from tasks.config.files import load_config
from tasks.inputs import candidates, mapped_samples
from tests import warm
from tests.flows import pipeline_case
from tests.tasks.without_prefect import without_prefect

SQUARE = '<path fill="{}" d="M2 2h12v12H2z"/>'


def icon_set(prefix: str, licence: str, bodies: dict[str, str], **info: Any) -> tuple[str, bytes]:
    told = {"name": prefix.title(), "author": {"name": "Ann"}, "license": {"title": licence, "spdx": licence}, **info}
    found = {name: {"body": body} for name, body in bodies.items()}
    found["hidden-one"] = {"body": "", "hidden": True}
    document = {"prefix": prefix, "info": told, "icons": found, "width": 16, "height": 16}
    return f"package/json/{prefix}.json", json.dumps(document).encode()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package as npm packs it: coloured emoji, plain icons, and a set that may not be sold."""
    colours = {
        f"{word}-{number}": SQUARE.format(f"#{number:02x}8840") for word in ("cat", "dog") for number in range(40)
    }
    sets = [
        icon_set("emoji", "CC-BY-4.0", colours, palette=True, category="Emoji"),
        icon_set("plain", "MIT", {f"plain-{number}": SQUARE.format("currentColor") for number in range(70)}),
        icon_set("unsold", "CC-BY-NC-4.0", colours, palette=True),
        icon_set("broken", "MIT", {"broken": "<path"}),
    ]
    path = tmp_path_factory.mktemp("package") / "iconify-json.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in [("package/package.json", b"{}"), *sets]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_only_licences_that_allow_it_are_chosen_coloured_ones_first_and_queries_are_held_out(package: Path) -> None:
    every = list(icons.read_package(package))
    assert {icon.of.licence for icon in every} == {"CC-BY-4.0", "MIT"}
    assert len(every) == 151
    chosen, asked = icons.choose(iter(every), 75, 10)
    assert len({icon.key for icon in [*chosen, *asked]}) == 85
    assert {icon.of.prefix for icon in asked} == {"emoji"}
    assert sum(icon.of.prefix == "emoji" for icon in chosen) == 70
    assert [icon.key for icon in icons.choose(iter(every[::-1]), 75, 10)[0]] == [icon.key for icon in chosen]


def test_an_icon_without_colours_gets_one_and_lies_on_white(package: Path) -> None:
    plain = [icon for icon in icons.read_package(package) if icon.of.prefix == "plain"]
    pictures = [icons.picture(icon) for icon in plain[:8]]
    assert all(pictures)
    drawn = [np.asarray(Image.open(io.BytesIO(content or b"")).convert("RGB")) for content in pictures]
    assert all(each.shape == (icons.SIDE, icons.SIDE, 3) and (each[0, 0] == 255).all() for each in drawn)
    middles = {tuple(each[48, 48].tolist()) for each in drawn}
    assert len(middles) == 8 and (255, 255, 255) not in middles and (0, 0, 0) not in middles


@pytest.mark.integration
def test_a_hundred_pictures_go_all_the_way_to_answers_with_their_licences(
    package: Path, model_folder: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.write_command(tmp_path)
    monkeypatch.setattr(road, "FASTGDA", [str(tmp_path / "fastgda"), *FASTGDA[1:]])
    for name, value in pipeline_case.environment(home).items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "rehearsal"
    options = ["--pictures", "100", "--queries", "10", "--nearest", "20", "--processes", "1", "--space", "pixel"]
    road.main([str(folder), *options, "--package", str(package), "--model", str(model_folder)])

    stages = {(each["command"], each["stage"]) for each in json.loads((folder / "stages.json").read_text())}
    wanted = {("", "pictures"), ("curate", "candidates and plan"), ("curate", "teacher scores"), ("serve", road.SERVED)}
    assert wanted | {("train", "rank head"), ("index", "index")} <= stages
    assert "| curate | latents | 100 |" in (folder / "stages.md").read_text()
    with Image.open(folder / "answers.png") as sheet:
        assert sheet.height > 10 * 64 // 5 and (folder / "answers.png").stat().st_size < 300_000
    said = (folder / "answers.md").read_text()
    named = {line.split(" | ")[0] for line in said.splitlines() if "| Ann |" in line}
    assert named and named <= {"| emoji", "| plain"}


@pytest.fixture
def thin_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "thin", "")
    monkeypatch.setitem(ENCODERS, "thin", ENCODERS["pixel"])  # taken away after the test
    thin.register()


@pytest.mark.heavy
def test_made_up_rows_go_through_plan_scores_labels_and_index(
    thin_encoder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_samples, "MAPPED_FROM", 1000)  # as if these were many
    monkeypatch.setattr(candidates, "MAPPED_FROM", 1000)
    monkeypatch.setattr(candidates, "SAMPLES_AT_ONCE", 700)
    monkeypatch.setattr(candidates, "MOST_SIMILARITIES", 4000)
    given = argparse.Namespace(folder=tmp_path, samples=2000, queries=5, nearest=200)
    rows.lay_out(given)
    with without_prefect():
        from flows.curation import curate

        found = curate(load_config(tmp_path / "config.yaml"))
    rows.labels(given)
    rows.index(given)
    assert (tmp_path / "index" / "whole.faiss").stat().st_size > 2000

    captions = [each for piece in rows.made_up(2000, tmp_path) for (each,) in piece["captions"].to_pylist()]
    of_samples = thin.numbers_of(captions).numpy().astype(np.float64)
    of_samples /= np.linalg.norm(of_samples, axis=1, keepdims=True)
    mean = of_samples.mean(0)
    asked = thin.numbers_of(["a question, number 3"]).numpy().astype(np.float64)
    query = asked[0] / np.linalg.norm(asked[0]) - mean
    centred = of_samples - mean
    cosines = centred @ query / np.linalg.norm(centred, axis=1) / np.linalg.norm(query)
    nearest = np.argsort(-cosines)[:200]
    chosen = tables.read(Workspace.at(str(tmp_path / "workspace")).candidates(found.run.name), tables.CANDIDATES)
    mine = chosen.filter(np.array(chosen["query_id"]) == "q000003").sort_by("neighbor_rank")
    assert mine["train_id"].to_pylist() == nearest.tolist()
    np.testing.assert_allclose(mine["similarity"].to_numpy(), cosines[nearest], atol=1e-5)


def test_figures_are_those_of_the_command_and_of_all_that_it_starts(tmp_path: Path) -> None:
    line = json.dumps({"message": "pictures: 7/7, 3 s elapsed, 0 s left"})
    child = "import time; held = b'x' * 60_000_000; sum(range(30_000_000)); time.sleep(1.5)"
    work = (
        "import subprocess, sys\n"
        "held = b'x' * 90_000_000\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
        f"print({line!r}, file=sys.stderr)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", "import time; held = b'x' * 400_000_000; time.sleep(60)"])
    try:
        first, rest = run_measured([sys.executable, "-c", work], "command", "rest", tmp_path / "log.txt")
    finally:
        other.kill()
        other.wait()
    assert (first.stage, first.rows, rest.stage, rest.rows) == ("pictures", 7, "rest", 0)
    assert first.core_seconds > 0.2 and 150e6 < first.own < 250e6 and first.peak >= first.own
    with pytest.raises(SystemExit, match=r"log\.txt"):
        list(run_measured([sys.executable, "-c", "raise SystemExit(3)"], "command", "rest", tmp_path / "log.txt"))
    kept = Kept(tmp_path / "kept.json")
    kept.add(first)
    assert "| command | pictures | 7 |" in Kept(tmp_path / "kept.json").table()
