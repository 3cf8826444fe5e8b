"""Runs whose parts fail however often they are tried, through the real command on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tests.flows.pipeline_case import QUERIES, SAMPLES, fastgda
from tests.orchestration.test_runs import SHARDS, small, the_run, with_faults


def test_a_bug_fails_its_shard_at_once_and_nothing_is_published_unless_asked(
    tmp_path: Path, model_folder: Path, home: Path
) -> None:
    bug = with_faults(tmp_path / "faults", bug=21)
    done = fastgda("curate", small(tmp_path, model_folder), home=home, check=False, extra=bug)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "scores 00005: KeyError: 'a bug'" in done.stderr
    workspace = tmp_path / "workspace"
    found = query(workspace, "SELECT state, max(attempts) AS tries, count(*) AS n FROM shards GROUP BY 1").to_pylist()
    assert {row["state"]: row["n"] for row in found} == {"done": SHARDS - 1, "failed": 1}
    assert {row["tries"] for row in found} == {1}, "a bug is not tried again"
    with pytest.raises(NotPublished):
        read_published(Workspace(workspace))
    config = small(tmp_path, model_folder, publish_incomplete=True)
    fastgda("curate", config, home=home, extra=bug)
    rows = query(workspace, "SELECT count(*) AS n, max(rank) AS worst, max(rank_label) AS label FROM ranks").to_pylist()
    assert rows == [{"n": QUERIES * (SAMPLES - 4), "worst": SAMPLES - 4, "label": 1.0}]
    unknown = fastgda("retry", the_run(tmp_path), "--shard", "99", "--workspace", workspace, home=home, check=False)
    assert unknown.returncode == 2 and "has no shard 99: it has 15" in unknown.stderr.replace("\n", " ")


def test_a_shard_of_one_bad_sample_is_empty_and_a_model_at_fault_is_told_from_its_samples(
    tmp_path: Path, model_folder: Path, home: Path
) -> None:
    config = small(tmp_path, model_folder)
    document = yaml.safe_load(config.read_text())
    document["teacher"]["shard_samples"] = 1
    config.write_text(yaml.safe_dump(document))
    fastgda("curate", config, home=home, extra=with_faults(tmp_path / "faults", nan=21))
    workspace = tmp_path / "workspace"
    empty = query(workspace, "SELECT shard, rows, state FROM shards WHERE rows = 0").to_pylist()
    assert empty == [{"shard": 21, "rows": 0, "state": "done"}]
    assert query(workspace, "SELECT count(*) AS n FROM scores").to_pylist() == [{"n": QUERIES * (SAMPLES - 1)}]
    broken = small(tmp_path / "broken", model_folder)
    document["workspace"] = "workspace"
    broken.write_text(yaml.safe_dump(document))
    done = fastgda(
        "curate", broken, home=home, check=False, extra=with_faults(tmp_path / "faults", nan=list(range(30)))
    )
    for again in (done, fastgda("curate", broken, home=home, check=False)):
        assert again.returncode == 1
        assert "30 of 60 samples had to be left out" in again.stderr.replace("\n", " ")
    with pytest.raises(NotPublished):
        read_published(Workspace(tmp_path / "broken" / "workspace"))
