"""The demo and every command of the documentation, through the real command on OpenMoji."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml

from fastgda_core.ranking.head import RankHead
from flows.demo import prepare
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tasks.demo import openmoji
from tasks.demo.openmoji import CONFIG, list_openmoji
from tests import tiny, warm
from tests.flows.pipeline_case import environment, fastgda, lay_out
from tests.tasks.serving.http.running import running

ROOT = Path(__file__).parents[2]
SAMPLES, QUERIES, TWINS = 3953, 96, 16
FEW = 200  # samples


def documented(language: str) -> list[tuple[str, str]]:
    """(document, block) of each fenced block in `language`; shell blocks are split into commands."""
    found = []
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]:
        for block in re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL):
            found += [(document.name, part) for part in (block.splitlines() if language == "sh" else [block])]
    return found


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, home: Path) -> Path:
    """A folder in which `fastgda demo` ran on few samples and queries, with little noise; with `my_config.yaml`."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as few:
        few.setattr(openmoji, "list_openmoji", lambda: list_openmoji()[:FEW])
        path = prepare(folder / "demo")
    config = yaml.safe_load(path.read_text())
    captions = config["queries"]["captions"][::8]
    config["queries"].update(steps=10, captions=captions, split={"train": 6, "validation": 2, "test": 4}, twins=8)
    config["curvature"]["samples"] = 32
    config["evaluation"].update(cutoffs=[50, 100], gain_floor=None)
    config["teacher"].update(gradient_pairs=4)
    config["exact_check"] = {"queries": 1, "candidates": 8}
    config["self_consistency"] = {"queries": 2}
    config["head"] = {"epochs": 2}
    path.write_text(yaml.safe_dump(config))
    study = {
        "seeds": 1,
        "losses": ["bce"],
        "query_shares": [1.0],
        "candidate_shares": [1.0],
        "outside_probabilities": [0],
    }
    judge = {"retrain": {"steps": 2, "batch_size": 2}, "subsets": 3, "again": 0, "draws": 2}
    judge["leave_out"] = {"k": [2], "targets": 1}
    lay_out(folder, model_folder, study=study, judge=judge).rename(folder / "my_config.yaml")
    torch.save(RankHead(3072 + 384).state_dict(), folder / "dino+clip_text.pth")  # of that config's features instead
    tiny.write_tar(folder / "new.tar", tiny.sample_members(range(900, 903)))
    fastgda("demo", "--folder", folder / "demo", home=home)
    return folder


def run_in(folder: Path, command: str, home: Path) -> subprocess.CompletedProcess[str]:
    warm.write_command(folder)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = read_published(Workspace(folder / "demo" / "workspace")).run
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**environment(home), "PATH": path, "RUN": run, "FASTGDA_WORKSPACE": "demo/workspace"},  # there are two
        capture_output=True,
        text=True,
        check=False,
    )


SERVED = "http://127.0.0.1:8000"  # where documented clients find a service

# What cannot run inside the tests: this test run itself, and the full demo, which has a test of its own.
BY_HAND = ("make ", ". .venv/bin/activate", "fastgda demo", "python benchmarks/")
OWN_TESTS = ("import-release.md", "existing-index.md")  # tests of their own: they need the release, or an index
# What embeds the captions of the whole demo; tests/tasks/demo/test_model.py does the same with a few.
MINUTES = "fastgda train-demo-model"
COMMANDS = [
    (document, line.split("  #")[0].strip())
    for document, line in documented("sh")
    if line.strip() and not line.startswith(BY_HAND) and document not in OWN_TESTS
]


@pytest.mark.parametrize(
    ("document", "command"),
    [
        pytest.param(*found, id=found[1][:60], marks=pytest.mark.slow if found[1].startswith(MINUTES) else ())
        for found in COMMANDS
    ],
)
def test_documented_command_runs(small_demo: Path, home: Path, document: str, command: str) -> None:
    shortened = re.sub(r"--steps \d+", "--steps 2", command)
    done = run_in(small_demo, shortened, home)
    assert done.returncode == 0, f"{document}: {command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout


def test_documented_python_runs(small_demo: Path, home: Path) -> None:
    blocks = documented("python")
    assert blocks
    for document, block in blocks:
        with ExitStack() as stack:
            served = SERVED
            if SERVED in block:
                served = stack.enter_context(running(small_demo, "--workspace", "demo/workspace")).url
            (small_demo / "block.py").write_text(block.replace(SERVED, served))
            done = run_in(small_demo, f"PYTHONPATH={ROOT} python block.py", home)
        assert done.returncode == 0, f"{document}\n{done.stderr}"


@pytest.mark.parametrize("target", ["demo", "test", "slow", "lint", "lock"])
def test_documented_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_query_caption_is_a_training_caption() -> None:
    known = {caption for image in list_openmoji() for caption in image.captions}
    captions = yaml.safe_load(CONFIG.read_text())["queries"]["captions"]
    assert len(known) > 3000 and len(captions) == QUERIES and not known & set(captions)


def test_demo_model_is_small_and_carries_no_machine_path() -> None:
    model = ROOT / "deployments" / "openmoji" / "model"
    assert (model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size <= 10e6
    assert "_name_or_path" not in (model / "unet" / "config.json").read_text()


def test_the_demos_teacher_finds_its_twins_on_few_samples(small_demo: Path, home: Path) -> None:
    rows = figures(small_demo / "demo" / "workspace", "twin share", "worst twin rank")
    assert rows["twin share", "twin"] == rows["twin share", "pseudo"] == 1.0
    said = run_in(small_demo, 'fastgda status "$RUN"', home).stdout
    assert "8 of 8 generated from training captions" in said and "warning" not in said


def figures(workspace: Path, *metrics: str) -> dict[tuple[str, str], float]:
    """Means of some metrics by (metric, split)."""
    rows = query(workspace, "SELECT metric, split, value FROM metrics WHERE query_id = ''").to_pylist()
    return {(row["metric"], row["split"]): row["value"] for row in rows if row["metric"] in metrics}


def mean_precision(workspace: Path) -> dict[str, float]:
    """mAP(100) by what is compared with the teacher."""
    rows = query(workspace, "SELECT space, value FROM metrics WHERE metric = 'mAP' AND query_id = '' AND cutoff = 100")
    return dict(zip(rows["space"].to_pylist(), rows["value"].to_pylist(), strict=True))


@pytest.mark.slow
def test_full_demo_finds_its_twins_and_its_head_comes_close_to_the_teacher(tmp_path: Path, home: Path) -> None:
    fastgda("demo", "--folder", tmp_path / "demo", home=home)
    workspace = tmp_path / "demo" / "workspace"
    counted = query(workspace, "SELECT count(*) AS n, count(DISTINCT (query_id, train_id)) AS d FROM scores")
    pairs = (QUERIES + 2 * TWINS) * SAMPLES
    assert counted.to_pylist() == [{"n": pairs, "d": pairs}]
    twins = figures(workspace, "twin share", "worst twin rank")
    assert twins["twin share", "twin"] == twins["twin share", "pseudo"] == 1.0
    first = query(workspace, "SELECT avg((value = 1)::INT) AS first FROM metrics WHERE metric = 'twin rank'")
    assert first.to_pylist()[0]["first"] > 0.5
    whole = "SELECT value FROM metrics WHERE metric = 'spearman' AND query_id = '' AND space = '{}'"
    assert query(workspace, whole.format("another teacher")).to_pylist()[0]["value"] >= 0.9
    assert query(workspace, whole.format("exact vs first order")).to_pylist()[0]["value"] >= 0.99
    precision = mean_precision(workspace)
    ceiling = precision["another teacher"]
    assert precision["untuned"] >= 0.5 and precision["tuned"] >= 0.9 * ceiling and precision["sketch"] >= 0.98 * ceiling
    before = read_published(Workspace(workspace))
    again = fastgda("demo", "--folder", tmp_path / "demo", home=home)
    assert " new " not in again.stdout
    assert read_published(Workspace(workspace)).run == before.run


@pytest.mark.slow
def test_the_published_settings_fail_the_twin_test_and_say_so(tmp_path: Path, home: Path) -> None:
    done = fastgda("demo", "--published", "--folder", tmp_path / "demo", home=home)
    workspace = tmp_path / "demo" / "workspace"
    twins = figures(workspace, "twin share", "worst twin rank")
    assert twins["twin share", "twin"] < 0.9 and twins["worst twin rank", "twin"] > SAMPLES / 2
    assert twins["twin share", "pseudo"] == 1.0
    assert "set teacher.objective: output_norm" in done.stdout
    precision = mean_precision(workspace)
    assert (round(precision["untuned"], 2), round(precision["tuned"], 2)) == (0.14, 0.21)
