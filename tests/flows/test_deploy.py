"""What is scheduled and what an alert does, by Prefect's own reading of `deployments/prefect.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._schedules import _construct_schedules
from prefect.utilities.templating import apply_values
from rich.console import Console

from flows.alerts import alert
from flows.deploy_steps import read_config
from tests.tasks.configs import ABSENT, document

DECLARED = yaml.safe_load((Path(__file__).parents[2] / "deployments" / "prefect.yaml").read_text())["deployments"]


def declared(name: str) -> dict[str, Any]:
    (found,) = [deployment for deployment in DECLARED if deployment["name"] == name]
    return found


@pytest.mark.parametrize("partitioned", [True, False])
def test_only_queries_that_come_day_by_day_are_scheduled_and_missed(tmp_path: Path, partitioned: bool) -> None:
    changes: dict[str, object] = {}
    if partitioned:
        split = {"validation_share": 0.2, "test_share": 0.2}
        changes = {"queries__shards": "new/{partition}/*.tar", "queries__captions": ABSENT, "queries__split": split}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document(**changes)))
    outputs = {"read": read_config(str(path))}
    nightly, alerts = declared("nightly"), declared("alert")
    assert nightly["build"] == alerts["build"], "both read the configuration"
    (schedule,) = _construct_schedules(nightly, outputs, console=Console(), is_interactive=lambda: False)
    assert schedule["active"] is partitioned
    (freshness,) = [trigger for trigger in alerts["triggers"] if trigger.get("posture") == "Proactive"]
    assert apply_values(freshness["enabled"], outputs) is partitioned


def test_an_alert_that_nobody_waits_for_says_so_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTGDA_ALERT_URLS", raising=False)
    state = alert.fn("the title")
    assert state is not None and state.is_completed() and state.name == "Skipped"
    assert "FASTGDA_ALERT_URLS" in (state.message or "")
