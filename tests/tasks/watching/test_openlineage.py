"""OpenLineage events of a tiny run, as a receiver gets them over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import pytest

from fastgda_core.errors import UsageError
from storage_schemas import tables
from tasks.config.packages import require_packages
from tasks.config.pipeline import PipelineConfig
from tasks.watching import openlineage, openlineage_events
from tests.prefect_processes import free_port

pytest.importorskip("openlineage.client")
CURATED = ["samples", "queries", "features_of_samples", "features_of_queries", "candidates", "teacher_scores"]


class Receiver(BaseHTTPRequestHandler):
    got: ClassVar[list[tuple[str, dict[str, str], dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Receiver.got.append((self.path, dict(self.headers), json.loads(body)))
        self.send_response(201)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for switch in (*openlineage_events.SWITCHES, openlineage_events.NAMESPACE):
        monkeypatch.delenv(switch, raising=False)
    Receiver.got = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def similar(folder: Path, model: Path, **execution: object) -> PipelineConfig:
    from tests.tasks.whole_runs import configuration

    return configuration(folder, model, teacher={"name": "similarity"}, execution=execution)


def run(config: PipelineConfig) -> None:
    from flows.pipeline import attribution_pipeline
    from tests.tasks.without_prefect import without_prefect

    with without_prefect():
        attribution_pipeline(config)


def named(dataset: dict[str, Any]) -> str:
    return str(dataset["name"].rpartition("/")[2])


def test_a_receiver_gets_a_pipeline_as_jobs_within_jobs_with_what_each_read_and_made(
    tmp_path: Path, model_folder: Path, receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "secret")
    config = similar(tmp_path, model_folder, openlineage={"url": receiver, "namespace": "lab"})
    run(config)
    paths, headers, events = zip(*Receiver.got, strict=True)
    assert set(paths) == {"/api/v1/lineage"} and headers[0]["Authorization"] == "Bearer secret"
    assert {event["job"]["namespace"] for event in events} == {"lab"}

    of_job: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        of_job.setdefault(event["job"]["name"], []).append(event)
    assert {n: len(e) for n, e in of_job.items() if len(e) != 2} == {}
    for each in of_job.values():  # a start and an end of each, in this order, under one id
        assert [event["eventType"] for event in each] == ["START", "COMPLETE"]
        assert len({UUID(event["run"]["runId"]) for event in each}) == 1
        assert datetime.fromisoformat(each[0]["eventTime"]) <= datetime.fromisoformat(each[1]["eventTime"])
    assert len({each[0]["run"]["runId"] for each in of_job.values()}) == len(of_job)

    whole = f"{config.name}.pipeline"
    flows = {f"{config.name}.{name}" for name in ("curate", "train", "index", "evaluate")}
    assert {name for name in of_job if name.count(".") == 1} == {whole, *flows}
    stages = {name for name in of_job if name.startswith(f"{config.name}.curate.")}
    assert {*(f"{config.name}.curate.{name}" for name in CURATED), f"{config.name}.curate.rank_labels"} <= stages
    for name, each in of_job.items():  # the parent of a stage is its flow, and the root of all is the pipeline
        parent = each[0]["run"]["facets"].get("parent")
        if name == whole:
            assert parent is None
            continue
        outer = whole if name in flows or name.count(".") == 1 else name.rpartition(".")[0]
        outer = outer if outer in of_job else whole
        assert (parent["job"]["namespace"], parent["job"]["name"]) == ("lab", outer)
        assert parent["run"]["runId"] == of_job[outer][0]["run"]["runId"]
        assert parent["root"]["run"]["runId"] == of_job[whole][0]["run"]["runId"]

    made = {named(out): out for each in of_job.values() for out in each[1]["outputs"]}
    samples, labels = made["samples"], made["rank_labels"]
    fields = samples["facets"]["schema"]["fields"]
    assert [field["name"] for field in fields] == tables.SAMPLES.schema.names
    assert fields[0]["type"] == "int64" and fields[0]["description"].startswith("row number of the training sample")
    assert samples["outputFacets"]["outputStatistics"]["rowCount"] == 24
    assert samples["namespace"] == "file" and samples["name"].startswith(str(tmp_path / "workspace"))
    assert Path(samples["facets"]["dataSource"]["uri"].removeprefix("file://")).exists()
    assert labels["facets"]["version"]["datasetVersion"].startswith(config.name)
    assert all("_schemaURL" in facet and "_producer" in facet for facet in samples["facets"].values())

    def read(stage: str) -> set[str]:
        return {named(each) for each in of_job[f"{config.name}.{stage}"][1]["inputs"]}

    assert read("curate.samples") == {"shapes.tar"}
    before = {"samples", "queries", "features_of_samples", "features_of_queries", "candidates"}
    assert read("curate.teacher_scores") >= before - {"features_of_samples", "features_of_queries"}
    assert read("curate.queries") == {"samples", "queries.tar", model_folder.name}, "the twins are drawn by the model"
    assert read("train.rank_head") == {"samples", "queries", "features_of_samples", "rank_labels"}
    assert read("index.index") == {"samples", "features_of_samples", "rank_head"}
    assert read("curate") == {"shapes.tar", "queries.tar"}

    Receiver.got = []
    run(config)
    again = {event["job"]["name"]: event for _, _, event in Receiver.got}
    assert not {name for name in again if "curate." in name}, "nothing was made again"
    assert again[f"{config.name}.curate"]["outputs"] == []


def test_the_environment_turns_it_on_and_off_and_a_failure_and_an_interruption_are_told(
    tmp_path: Path, receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.tasks.configs import document

    config = PipelineConfig.model_validate(document())

    @openlineage.told("curate")
    def fails(config: PipelineConfig, error: BaseException) -> None:
        raise error

    for error in (KeyError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fails(config, error)
    assert Receiver.got == [], "off by default"
    monkeypatch.setenv("OPENLINEAGE_URL", receiver)
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "team")
    for error in (KeyError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fails(config, error=error)
    ends = [event for _, _, event in Receiver.got if event["eventType"] != "START"]
    assert [event["eventType"] for event in ends] == ["FAIL", "ABORT"]
    assert ends[0]["run"]["facets"]["errorMessage"]["message"] == "KeyError: 'a bug'"
    assert ends[0]["job"]["namespace"] == "team"
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    assert not openlineage_events.wanted(config)


def test_a_receiver_that_is_down_costs_a_run_one_line(receiver: str, caplog: pytest.LogCaptureFixture) -> None:
    from tests.tasks.configs import document

    down = {"openlineage": {"url": f"http://127.0.0.1:{free_port()}"}}
    config = PipelineConfig.model_validate(document(execution=down))

    @openlineage.told("curate")
    def works(config: PipelineConfig) -> str:
        return "done"

    assert works(config) == "done" and works(config) == "done"
    lines = [record.message for record in caplog.records if "OpenLineage" in record.message]
    assert len(lines) == 2 and all("the run goes on" in line for line in lines), "one a run"


def test_what_is_asked_for_and_not_installed_is_told(
    tmp_path: Path, receiver: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.tasks.configs import document

    config = PipelineConfig.model_validate(document(execution={"openlineage": {}}, features={"space": "pixel"}))
    require_packages(config)
    monkeypatch.setattr("fastgda_core.extras.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"execution.openlineage: openlineage is not .*'fastgda\[lineage\]'"):
        require_packages(config)
    monkeypatch.setenv("OPENLINEAGE_URL", receiver)
    assert not openlineage_events.wanted(PipelineConfig.model_validate(document()))
    assert [record.message for record in caplog.records if "pip install 'fastgda[lineage]'" in record.message]
