"""`fastgda run` with other teachers, candidates, layers and inputs, through the real command."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage_schemas.sql.views import query
from tasks.config.files import load_config
from tasks.context import open_context
from tasks.inputs.samples import ingest_samples
from tests import tiny
from tests.flows.pipeline_case import QUERIES, SAMPLES, TWINS, fastgda, lay_out, sql

NEIGHBORS = {"candidates": {"policy": "top_k", "k": 20}}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"teacher__name": "abu", "exact_check": None, **NEIGHBORS}, marks=pytest.mark.slow),
        {
            "teacher__name": "abu_plus",
            "teacher__objective": "output_norm",
            "teacher__negatives": "tie",
            "teacher__update_rank": 4,
            "exact_check": None,
            "model__flips": True,
            "head": {"epochs": 2, "resident": False, "loss": "regression", "input_norm": True, "patience": 1},
            **NEIGHBORS,
        },
        pytest.param(
            {
                "teacher": {
                    "name": "abu_plus",
                    "alpha": 1e-4,
                    "objective": "ratio",
                    "agreement": 0.2,
                    "gradient_pairs": 8,
                },
                "exact_check": None,
                "model__flips": True,
                **NEIGHBORS,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"candidates": {"policy": "top_k", "k": 30, "scored": 20}, "teacher__shard_queries": 3},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"candidates": {"policy": "pooled", "k": 12}, "teacher__loaded_queries": 3}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "diagonal Fisher",
        "exact teacher of the output norm, mirrored images, low rank",
        "exact ratios of mirrored images under a plan by pilot",
        "M of K",
        "pooled",
    ],
)
def test_other_teachers_and_candidates_give_the_planned_rows(
    tmp_path: Path, model_folder: Path, home: Path, changes: dict[str, object]
) -> None:
    fastgda("run", lay_out(tmp_path, model_folder, **changes), home=home)
    workspace = tmp_path / "workspace"
    counted = query(
        workspace,
        "SELECT count(*) AS n, count(DISTINCT (query_id, train_id)) AS d, "
        "count(DISTINCT train_id) FILTER (query_id LIKE 'q%') AS pool, count(*) FILTER (query_id LIKE 'q%') AS own, "
        "(SELECT count(*) FROM scores JOIN candidates USING (query_id, train_id)) AS planned, "
        "(SELECT count(*) FROM scores JOIN twins USING (query_id, train_id)) AS twins FROM scores",
    ).to_pylist()[0]
    each = counted["pool"] if "pooled" in str(changes) else 20
    assert counted["n"] == counted["d"] == counted["planned"] and counted["own"] == QUERIES * each
    assert counted["pool"] > 5 and counted["twins"] == 2 * TWINS
    measured = query(workspace, "SELECT DISTINCT metric, space FROM metrics").to_pylist()
    assert {"metric": "mAP", "space": "teacher with other noise"} in measured
    assert ({"metric": "relative error", "space": "low-rank Delta theta"} in measured) == (
        "teacher__update_rank" in changes
    )


def test_all_layers_in_double_precision_on_a_plan_of_listed_antithetic_timesteps(
    tmp_path: Path, model_folder: Path, home: Path
) -> None:
    changes = {
        "teacher": {
            "name": "abu_plus_first_order",
            "alpha": 1e-4,
            "layers": "all",
            "precision": "float64",
            "timestep_list": [20, 70],
            "timestep_weights": [60, 40],
            "draws": 4,
            "antithetic": True,
            "gradient_pairs": 2,
        },
        "features": {"space": "pixel"},
        "curvature": {"samples": 16},
        "exact_check": {"queries": 1, "candidates": 6},
        "self_consistency": {"queries": 1, "samples": 16},
        "queries__twins": 0,
    }
    fastgda("run", lay_out(tmp_path, model_folder, samples=44, **changes), home=home)
    known = query(tmp_path / "workspace", "SELECT count(*) AS n, count(standard_error) AS known FROM ranks").to_pylist()
    assert known[0]["known"] == known[0]["n"] > 0  # two pairs at each timestep
    agreement = query(
        tmp_path / "workspace",
        "SELECT space, value FROM metrics WHERE metric = 'spearman' AND query_id = '' ORDER BY space",
    ).to_pylist()
    found = {row["space"]: row["value"] for row in agreement}
    assert found["exact vs first order"] > 0.9
    assert -1 <= found["teacher with other noise"] < 1
    assert -1 <= found["teacher with other gradient"] < 1


def test_bad_samples_are_named_skipped_and_counted(tmp_path: Path, model_folder: Path, home: Path) -> None:
    config = lay_out(tmp_path, model_folder)
    image, _ = tiny.draw(7)
    bad = [("torn.jpg", image[:100]), ("torn.txt", b"a torn one"), ("mute.jpg", image)]
    tiny.write_tar(tmp_path / "data" / "shapes-2.tar", [*bad, *tiny.sample_members(range(3, 4))])
    (tmp_path / "data" / "shapes-3.tar").write_bytes(b"")
    assert "4 skipped" in fastgda("plan", config, home=home).stderr
    ingest_samples.fn(open_context(load_config(config)))
    rejected = {row["key"]: row["reason"] for row in sql(tmp_path, "SELECT key, reason FROM rejected_samples", home)}
    assert rejected.keys() == {"torn", "mute", "s0003", ""}
    assert "does not decode" in rejected["torn"] and "no caption" in rejected["mute"]
    assert "duplicate key" in rejected["s0003"]
    assert sql(tmp_path, "SELECT count(*) AS n FROM samples", home) == [{"n": str(SAMPLES)}]


def test_wrong_input_gets_one_line_and_exit_code_2(tmp_path: Path, model_folder: Path, home: Path) -> None:
    cases = {
        "model folder": ({"model__folder": "nowhere"}, "nowhere does not exist"),
        "shards": ({"data__shards": "none/*.tar"}, "matches no file"),
        "typo": ({"teacher__nmae": "x"}, "teacher.nmae"),
        "cutoff": ({"evaluation__cutoffs": [10, 60]}, "evaluation.cutoffs"),
        "k": ({"candidates": {"policy": "top_k", "k": 61}}, "candidates.k"),
    }
    for number, (changes, message) in enumerate(cases.values()):
        folder = tmp_path / str(number)
        done = fastgda("run", lay_out(folder, model_folder, **changes), home=home, check=False)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and "Traceback" not in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
