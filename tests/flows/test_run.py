"""`fastgda run` on a second data set and model, through the real command."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from fastgda_core.errors import UsageError
from fastgda_core.images import decode_image
from fastgda_core.ranking.head import load_head
from fastgda_core.search.build import add, new_index, write_index
from storage_schemas.commit import commit
from storage_schemas.snapshots.published import read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tasks.config.files import load_config
from tasks.config.stored import config_of
from tasks.context import open_context
from tasks.distilling.index import build_search_index
from tasks.distilling.labels import read_labels
from tasks.distilling.versions import latest_head, read_head
from tasks.inputs.features import (
    extract_features,
    feature_folders,
    in_space,
    load_features,
    load_query_features,
    map_features,
)
from tasks.serving.attributor import Attributor
from tasks.watching.trust import LEAST_AGREEMENT
from tests import tiny
from tests.flows.pipeline_case import SAMPLES, SCORED, TWINS, environment, fastgda, lay_out, sql

SCORES = "SELECT query_id, train_id, score FROM scores ORDER BY ALL"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, home: Path) -> Path:
    """The folder of a pipeline that ran to its end."""
    folder = tmp_path_factory.mktemp("shapes")
    fastgda("run", lay_out(folder, model_folder), home=home)
    return folder


def test_every_pair_is_scored_exactly_once(finished: Path, home: Path) -> None:
    counted = sql(
        finished, "SELECT count(*) AS pairs, count(DISTINCT (query_id, train_id)) AS distinct FROM scores", home
    )
    assert counted == [{"pairs": str(SCORED * SAMPLES), "distinct": str(SCORED * SAMPLES)}]


def test_metrics_stand_in_sql_for_every_cutoff_before_and_after_tuning(finished: Path) -> None:
    table = query(
        finished / "workspace", "SELECT space, cutoff, value FROM metrics WHERE metric = 'mAP' AND query_id = ''"
    )
    found = {(row["space"], row["cutoff"]) for row in table.to_pylist()}
    again = ("teacher with other noise", "teacher with other gradient", "teacher with other curvature")
    spaces = ("untuned", "tuned", "captions alone", "chance", "another teacher", *again)
    assert found == {(space, cutoff) for space in spaces for cutoff in (5, 10)}
    assert all(0 < row["value"] <= 1 for row in table.to_pylist())


def test_first_order_scores_rank_as_the_exact_teacher_does(finished: Path) -> None:
    statement = "SELECT value FROM metrics WHERE space = 'exact vs first order' AND query_id = ''"
    assert query(finished / "workspace", statement).to_pylist()[0]["value"] > 0.9


def test_report_is_one_file_that_shows_every_test_query(finished: Path) -> None:
    published = read_published(Workspace(finished / "workspace"))
    page = (finished / "workspace" / "reports" / published.run / "report.html").read_text()
    captions = query(finished / "workspace", "SELECT caption FROM queries WHERE split = 'test'").to_pylist()
    assert len(captions) == 2
    assert all(row["caption"] in page for row in captions)
    images = re.findall(r'src="([^"]*)"', page)
    assert len(images) == 2 * (1 + 3 * 4)
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_the_twin_test_is_in_sql_status_and_report(finished: Path, home: Path) -> None:
    workspace = finished / "workspace"
    rows = query(
        workspace,
        "SELECT split, caption, captions[1] AS own, image, twins.train_id, (SELECT count(*) FROM scores AS other "
        "WHERE other.query_id = twins.query_id AND other.score >= scores.score) AS rank FROM twins "
        "JOIN queries USING (query_id) JOIN samples USING (train_id) JOIN scores USING (query_id, train_id)",
    ).to_pylist()
    assert [row["split"] for row in rows].count("twin") == [row["split"] for row in rows].count("pseudo") == TWINS
    assert all(row["caption"] == row["own"] for row in rows)
    for row in rows:
        drawn, own = (decode_image(content).tobytes() for content in (row["image"], tiny.draw(row["train_id"])[0]))
        assert (drawn == own) == (row["split"] == "pseudo")
    status = json.loads(fastgda("status", "--json", "--workspace", workspace, home=home).stdout)
    said = fastgda("status", "--workspace", workspace, home=home).stdout
    page = next((workspace / "reports").rglob("report.html")).read_text()
    failed = 0
    for kind in ("twin", "pseudo"):
        ranks = [row["rank"] for row in rows if row["split"] == kind]
        share, worst = sum(rank == 1 for rank in ranks) / TWINS, max(ranks)  # 1 % of 60 samples is one place
        measured = query(
            workspace,
            "SELECT max(value) FILTER (metric = 'twin share') AS share, max(value) FILTER (metric = 'worst twin rank') "
            f"AS worst FROM metrics WHERE split = '{kind}'",
        ).to_pylist()
        assert measured == [{"share": share, "worst": worst}]
        assert sorted(status["trust"]["twins"][kind]["ranks"]) == sorted(ranks)
        failed += share < 0.9
    failed += status["trust"]["agreement"] < LEAST_AGREEMENT
    assert "twins found" in said and page.count("Twins found") == 2
    assert len(status["warnings"]) == failed == page.count("Do not trust this run") == said.count("warning: ")


def test_attribute_answers_from_the_index(finished: Path, home: Path) -> None:
    image = next((finished / "workspace" / "queries").rglob("q0000.png"))
    workspace = finished / "workspace"
    done = fastgda(
        "attribute", image, "--caption", "a red shape", "-k", "5", "--workspace", workspace, "--json", home=home
    )
    answer = json.loads(done.stdout)
    answers = answer["hits"]
    published = read_published(Workspace(workspace))
    assert answer["tier"] == "fast" and answer["versions"]["index"] == Path(published.index or "").name
    assert [answer["rank"] for answer in answers] == [1, 2, 3, 4, 5]
    assert sorted((answer["similarity"] for answer in answers), reverse=True) == [a["similarity"] for a in answers]
    known = query(workspace, "SELECT train_id, key FROM samples").to_pylist()
    assert all({"train_id": answer["train_id"], "key": answer["key"]} in known for answer in answers)


def test_a_second_run_reuses_everything(finished: Path, home: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "workspace").rglob("*.manifest.json")}
    done = fastgda("run", finished / "config.yaml", home=home)
    assert " new " not in done.stdout and "reused" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "workspace").rglob("*.manifest.json")}
    # Without a server to show it to, it is not begun.
    again = fastgda("run", finished / "config.yaml", home=tmp_path)
    assert again.stdout == f"{done.stdout}nothing to do: it was finished before, and no input has changed since\n"


def test_a_head_comes_with_the_log_of_its_training(finished: Path) -> None:
    (folder,) = (finished / "workspace" / "heads").iterdir()
    assert not (folder / "checkpoints").exists()
    log = list(csv.DictReader((folder / "training.csv").open()))
    history = json.loads((folder / "head.json").read_text())["history"]
    assert [(float(row["loss"]), float(row["validation_map"])) for row in log] == [
        (epoch["loss"], epoch["validation_map"]) for epoch in history
    ]
    with Image.open(folder / "training.png") as picture:
        assert picture.width > 500


def test_mapped_features_are_those_in_memory(finished: Path) -> None:
    context = open_context(load_config(finished / "config.yaml"))
    samples = read_labels(context.workspace, None).samples
    several = [in_space(context, centre=False, unit_length=unit) for unit in (True, False)]
    for _ in range(2):  # the second time the file is there
        found = [map_features(each, samples) for each in (context, *several)]
        for each, mapped in zip((context, *several), found, strict=True):
            assert torch.equal(mapped, load_features(each, samples, samples))
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
        assert torch.equal(map_features(in_space(several[1], centre=True, unit_length=True), samples), found[0])
    left = {path.name for path in (finished / "workspace" / "features").iterdir() if not path.name.endswith(".arrow")}
    assert left == {"pixel", "minilm_text", "means"}


@pytest.fixture(scope="session")
def phi(finished: Path) -> dict[str, NDArray[np.float64]]:
    """Features of samples and of queries from the Parquet files, laid end to end at length one, not centred."""
    context = open_context(load_config(finished / "config.yaml"))
    labels = read_labels(context.workspace, None)
    found = {}
    for name, items in {"samples": labels.samples, "queries": labels.queries[0]}.items():
        parts = []
        for folder, _ in feature_folders(context, items).values():
            vectors = np.stack(pq.read_table(folder / "part-00000.parquet")["feature"].to_numpy()).astype(np.float64)
            parts.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        found[name] = np.hstack(parts)
    return found


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_features_of_samples_and_queries_are_less_the_samples_mean(
    finished: Path, phi: dict[str, NDArray[np.float64]]
) -> None:
    context = open_context(load_config(finished / "config.yaml"))
    labels = read_labels(context.workspace, None)
    mean = phi["samples"].mean(0)
    places = [*finished.glob("workspace/features/means/*.safetensors"), *finished.glob("workspace/indexes/*/mean.*")]
    vectors = [load_file(path)["mean"] for path in places if path.suffix == ".safetensors"]
    kept = [vector for vector in vectors if len(vector) == len(mean)]  # a study has other spaces
    assert len(kept) == 2, "with the features and with the index"
    for each in kept:
        np.testing.assert_allclose(each.numpy(), mean, atol=1e-7)
    for centre, off in ((True, mean), (False, 0)):
        space = in_space(context, centre=centre)
        queries = load_query_features(space, labels.queries, labels.samples)
        np.testing.assert_allclose(queries.numpy(), phi["queries"] - off, atol=1e-6)
        samples = load_features(space, labels.samples, labels.samples)
        np.testing.assert_allclose(samples.numpy(), phi["samples"] - off, atol=1e-6)


def test_candidates_are_the_nearest_by_the_cosine_of_centred_features(
    finished: Path, phi: dict[str, NDArray[np.float64]]
) -> None:
    mean = phi["samples"].mean(0)
    cosine = unit(phi["queries"] - mean) @ unit(phi["samples"] - mean).T
    query_ids = query(finished / "workspace", "SELECT query_id FROM queries")["query_id"].to_pylist()
    columns = "query_id, train_id, neighbor_rank, similarity"
    rows = query(finished / "workspace", f"SELECT {columns} FROM candidates ORDER BY query_id, train_id")
    assert rows["train_id"].to_pylist() == list(range(SAMPLES)) * SCORED
    found = rows["similarity"].to_numpy().reshape(SCORED, SAMPLES)
    np.testing.assert_allclose(found, cosine[np.argsort(query_ids)], atol=1e-5)
    ranks = rows["neighbor_rank"].to_numpy().reshape(SCORED, SAMPLES)
    assert (np.diff(np.take_along_axis(found, np.argsort(ranks, 1), 1)) <= 0).all()


def brute_force(head: Path, query_phi: NDArray[np.float64], sample_phi: NDArray[np.float64]) -> list[tuple[int, float]]:
    """(train_id, cosine of the head's vectors), best first, without an index."""
    network = load_head(head)
    vectors = [network(torch.from_numpy(each).float()).double() for each in (query_phi[None], sample_phi)]
    cosine = torch.nn.functional.cosine_similarity(*vectors)
    return [(place, cosine[place].item()) for place in cosine.argsort(descending=True).tolist()]


def answered(workspace: Path, k: int) -> list[tuple[int, float]]:
    """(train_id, similarity) of the service's answer to the first query, best first."""
    first = query(workspace, "SELECT image, caption FROM queries WHERE query_id = 'q0000'").to_pylist()[0]
    image = Image.open(io.BytesIO(first["image"])).convert("RGB")
    answers = Attributor(Workspace(workspace)).attribute(image, first["caption"], k).hits
    return [(answer.train_id, answer.similarity) for answer in answers]


def assert_same_answer(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    assert [train_id for train_id, _ in found] == [train_id for train_id, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=1e-4)


def test_an_answer_is_the_brute_force_cosine_of_the_heads_view_of_centred_features(
    finished: Path, phi: dict[str, NDArray[np.float64]]
) -> None:
    (head,) = (finished / "workspace" / "heads").iterdir()
    assert json.loads((head / "head.json").read_text())["centre"] is True
    mean = phi["samples"].mean(0)
    expected = brute_force(head, phi["queries"][0] - mean, phi["samples"] - mean)
    assert_same_answer(answered(finished / "workspace", 5), expected[:5])


def test_an_index_of_an_earlier_release_has_no_mean_and_answers_by_the_features_as_they_are(
    finished: Path, tmp_path: Path, phi: dict[str, NDArray[np.float64]]
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(finished / "workspace", workspace)
    (head,), (index,) = ((workspace / name).iterdir() for name in ("heads", "indexes"))
    (index / "mean.safetensors").unlink()
    with pytest.raises(UsageError, match=r"lacks mean\.safetensors.*fastgda index build"):
        Attributor(Workspace(workspace))
    described = json.loads((head / "head.json").read_text())
    del described["centre"]
    (head / "head.json").write_text(json.dumps(described))
    vectors = load_head(head)(torch.from_numpy(phi["samples"]).float()).numpy()
    flat = new_index("Flat", vectors.shape[1])
    add(flat, vectors, np.arange(len(vectors)))
    write = functools.partial(write_index, flat)
    commit(index / "index.faiss", write, key=index.name, rows=len(vectors), started=time.monotonic())
    (index / "index.json").write_text(json.dumps({"head": head.name}))
    assert_same_answer(answered(workspace, 5), brute_force(head, phi["queries"][0], phi["samples"])[:5])


def test_an_index_that_lost_its_mean_gets_it_back(finished: Path, tmp_path: Path) -> None:
    context = open_context(load_config(finished / "config.yaml"))
    shutil.copytree(finished / "workspace", tmp_path / "workspace")
    config = context.config.model_copy(update={"workspace": str(tmp_path / "workspace")})
    context = dataclasses.replace(context, config=config)
    labels = read_labels(context.workspace, None)
    samples, queries = labels.samples, labels.queries
    head, _ = read_head(context.workspace, latest_head(context.workspace))
    (path,) = (tmp_path / "workspace" / "indexes").glob("*/mean.safetensors")
    before = path.read_bytes()
    path.unlink()
    features = extract_features.fn(context, samples).artifact
    built = build_search_index.fn(context, samples, features, head, queries)
    assert not built.reused and built.artifact.path == path.parent and path.read_bytes() == before
    assert build_search_index.fn(context, samples, features, head, queries).reused


def test_a_retry_of_a_run_of_an_earlier_release_is_still_that_run(finished: Path, tmp_path: Path) -> None:
    published = read_published(Workspace(finished / "workspace"))
    shutil.copytree(finished / "workspace" / "runs", tmp_path / "runs")
    assert config_of(str(tmp_path), published.run).features.centre
    assignment = tmp_path / "runs" / published.run / "assignment.json"
    document = json.loads(assignment.read_text())
    del document["config"]["features"]["centre"]
    assignment.write_text(json.dumps(document))
    assert not config_of(str(tmp_path), published.run).features.centre


def test_a_releases_checkpoint_is_imported_indexed_measured_and_served(
    finished: Path, tmp_path: Path, home: Path, phi: dict[str, NDArray[np.float64]]
) -> None:
    config, workspace = tmp_path / "config.yaml", tmp_path / "workspace"
    document = yaml.safe_load((finished / "config.yaml").read_text())
    document["data"]["shards"] = str(finished / document["data"]["shards"])
    config.write_text(yaml.safe_dump(document))
    shutil.copytree(finished / "workspace", workspace)
    (own,) = (finished / "workspace" / "heads").iterdir()
    weights = load_file(own / "head.safetensors")
    # The release's features are not centred: what its own first layer does with them centres them.
    mean = torch.from_numpy(phi["samples"].mean(0))
    shift = weights["mlp.layers.0.weight"].double() @ mean
    weights["mlp.layers.0.bias"] = (weights["mlp.layers.0.bias"] - shift).float()
    torch.save(weights, tmp_path / "release.pth")
    for _ in range(2):
        said = fastgda("import-head", tmp_path / "release.pth", config, home=home).stdout
    assert "(was there)" in said
    (version,) = {path.name for path in (workspace / "heads").iterdir()} - {own.name}
    assert document["features"].get("centre", True)
    assert json.loads((workspace / "heads" / version / "head.json").read_text())["centre"] is False
    document["features"] = {"space": "pixel"}  # what is configured since is not what the head was made for
    config.write_text(yaml.safe_dump(document))
    refused = fastgda("import-head", tmp_path / "release.pth", config, home=home, check=False)
    assert refused.returncode == 2 and "takes 3456 features, pixel has 3072" in refused.stderr
    fastgda("index", config, home=home)
    measured = fastgda("evaluate", config, home=home).stdout
    tuned = "SELECT value FROM metrics WHERE metric = 'mAP' AND space = 'tuned' ORDER BY ALL"
    expected = query(finished / "workspace", tuned)["value"].to_pylist()
    assert query(workspace, tuned)["value"].to_pylist() == pytest.approx(expected, abs=0.01), "it is the same network"
    assert "promoted" in measured
    assert not (workspace / read_published(Workspace(workspace)).index / "mean.safetensors").exists()
    assert_same_answer(answered(workspace, 5), answered(finished / "workspace", 5))
    heads = query(workspace, "SELECT head, run, validation_map FROM heads WHERE served").to_pylist()
    assert heads == [{"head": version, "run": "", "validation_map": None}]
    assert "release.pth" in fastgda("lineage", version, "--workspace", workspace, home=home).stdout


def test_a_study_answers_every_question_and_trains_only_what_is_missing(finished: Path, home: Path) -> None:
    document = yaml.safe_load((finished / "config.yaml").read_text())
    path, workspace = finished / "study.yaml", finished / "workspace"
    tuned = "SELECT value FROM metrics WHERE space = 'tuned' ORDER BY ALL"
    before = query(workspace, tuned)

    def study(losses: list[str]) -> dict[str, list[dict[str, Any]]]:
        document["study"] = {
            "losses": losses,
            "query_shares": [0.5, 1.0],
            "candidate_shares": [0.5],
            "outside_probabilities": [0.0, 0.2],
            "seeds": 2,
        }
        path.write_text(yaml.safe_dump(document))
        found: dict[str, list[dict[str, Any]]] = {}
        for row in json.loads(fastgda("study", path, "--json", home=home).stdout):
            found.setdefault(row["question"], []).append(row)
        return found

    found = study(["bce", "regression"])
    values = {question: [row["value"] for row in rows] for question, rows in found.items()}
    spaces = ["pixel", "minilm_text", "pixel+minilm_text"]
    assert values == {
        "feature space": spaces,
        "untuned": spaces,
        "loss": ["bce", "regression"],
        "queries": ["0.5", "1"],
        "candidates": ["0.5"],
        "queries at a fixed budget": ["0.5", "1"],
        "outside probability": ["0", "0.2"],
    }
    rows = [row for several in found.values() for row in several]
    assert all(0 < row["mean"] <= 1 for row in rows)
    assert {row["seeds"] for row in rows if row["question"] != "untuned"} == {2}
    # The same head by three ways: the configured one.
    assert found["loss"][0]["mean"] == found["feature space"][2]["mean"] == found["queries"][1]["mean"]
    with Image.open(next((workspace / "reports").rglob("study.png"))) as picture:
        assert picture.width > 1000
    heads = {file: file.stat().st_mtime_ns for file in (workspace / "studies").rglob("*.parquet")}
    assert study(["bce", "regression", "listwise"])["loss"][:2] == found["loss"]
    assert (
        heads.items() <= {file: file.stat().st_mtime_ns for file in (workspace / "studies").rglob("*.parquet")}.items()
    )
    listwise = "SELECT count(DISTINCT seed) AS n FROM study WHERE question = 'loss' AND choice = 'listwise'"
    assert query(workspace, listwise).to_pylist() == [{"n": 2}]
    assert query(workspace, tuned).equals(before), "the metrics of the published head stay"


@pytest.mark.slow  # smaller ones: tests/storage_schemas/test_kills.py, tests/orchestration/test_interrupts.py
def test_killed_at_any_stage_and_started_again_it_finishes_with_the_same_scores(
    tmp_path: Path, model_folder: Path, home: Path, finished: Path
) -> None:
    config = lay_out(tmp_path, model_folder)
    workspace = tmp_path / "workspace"
    command = [str(Path(sys.executable).with_name("fastgda")), "run", str(config)]
    moments = (
        "latents/*/part-*.safetensors",
        "scores/*/part-00001.parquet",
        "heads/*/head.json",
    )
    for moment in moments:
        process = subprocess.Popen(
            command,
            env=environment(home),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, so that its Prefect server dies with it
        )
        deadline = time.monotonic() + 240
        while not any(workspace.glob(moment)):
            assert process.poll() is None, f"the run ended before {moment} was there"
            assert time.monotonic() < deadline, f"{moment} never came"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    fastgda("run", config, home=home)
    assert query(workspace, SCORES).equals(query(finished / "workspace", SCORES))


def test_sql_that_writes_or_is_wrong_gets_one_line_and_exit_code_2(finished: Path, home: Path) -> None:
    for statement in ("DROP VIEW scores", "SELECT nothing FROM nowhere", "SELECT 1; SELECT 2"):
        done = fastgda("sql", statement, "--workspace", finished / "workspace", home=home, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error:") and "Traceback" not in done.stderr


def test_a_flipped_byte_is_found_and_retry_scores_that_shard_again(
    tmp_path: Path, model_folder: Path, home: Path, finished: Path
) -> None:
    config = lay_out(tmp_path, model_folder)
    workspace = tmp_path / "workspace"
    shutil.copytree(finished / "workspace", workspace)
    fastgda("run", config, home=home)
    run = read_published(Workspace(workspace)).run
    shard = Workspace(workspace).score_shard(run, 1)
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    others = {path: path.stat().st_mtime_ns for path in shard.parent.glob("part-*") if path.name[:10] != "part-00001"}

    done = fastgda("verify", "--workspace", workspace, home=home, check=False)
    assert done.returncode == 1 and "sha256" in " ".join(done.stdout.split())
    assert not shard.exists() and list((workspace / "quarantine").rglob(shard.name))
    quarantined = sql(tmp_path, "SELECT shard, error_class FROM shards WHERE state = 'quarantined'", home)
    assert quarantined == [{"shard": "1", "error_class": "DamagedFile"}]

    fastgda("retry", run, "--workspace", workspace, home=home)
    assert shard.read_bytes() == good
    assert others == {path: path.stat().st_mtime_ns for path in others}
    assert sql(tmp_path, "SELECT state, count(*) AS n FROM shards GROUP BY state", home) == [
        {"state": "done", "n": "4"}
    ]
    assert query(workspace, SCORES).equals(query(finished / "workspace", SCORES))
    assert fastgda("verify", "--workspace", workspace, home=home).returncode == 0


def test_commands_of_the_store_say_what_is_wrong_in_one_line(finished: Path, home: Path) -> None:
    workspace = finished / "workspace"
    for arguments in (
        ["retry", "no-such-run"],
        ["publish", "no-such-run"],
        ["retract", "no-such-run"],
        ["compact", "no-such-run"],
        ["sql", "@no-such-file.sql"],
    ):
        done = fastgda(*arguments, "--workspace", workspace, home=home, check=False)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("error:") and "Traceback" not in done.stderr
        assert "no-such" in done.stderr
