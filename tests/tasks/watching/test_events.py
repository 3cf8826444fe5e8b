"""Which events start deployments, by the triggers in `deployments/prefect.yaml` and Prefect's own matching."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events import Event
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import ReceivedEvent

from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.watching import events
from tests.tasks.configs import document

DECLARED = yaml.safe_load((Path(__file__).parents[3] / "deployments" / "prefect.yaml").read_text())["deployments"]


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[ReceivedEvent]:
    """Events as a server receives them."""
    found: list[ReceivedEvent] = []

    def emit(**fields: Any) -> None:
        event = Event(occurred=datetime.now(UTC), **fields)
        found.append(ReceivedEvent.model_validate(event.model_dump() | {"received": datetime.now(UTC)}))

    monkeypatch.setattr(events, "emit_event", emit)
    for name, value in (("get_id", "7e6ed6a8-4a5d-4d5e-8f3a-0c1a2b3c4d5e"), ("get_name", "a run")):
        monkeypatch.setattr(events.flow_run, name, lambda value=value: value)
    return found


def triggered(event: ReceivedEvent, posture: str = "Reactive") -> set[str]:
    """Deployments with a trigger on an event; a proactive one fires where the event does not come."""
    return {
        deployment["name"]
        for deployment in DECLARED
        for trigger in deployment.get("triggers", [])
        if trigger["enabled"] and trigger.get("posture", "Reactive") == posture and _trigger(trigger).covers(event)
    }


def _trigger(fields: dict[str, Any]) -> EventTrigger:
    kept = {name: value for name, value in fields.items() if name not in ("enabled", "parameters")}
    return EventTrigger.model_validate({"posture": "Reactive", **kept})


CHAIN = [
    (events.SCORES_PUBLISHED, "snapshot", {"train"}),
    (events.HEAD_TRAINED, "head", {"index"}),
    (events.INDEX_BUILT, "index", {"evaluate"}),
    (events.PROMOTION_REFUSED, "index", {"alert"}),
    (events.RUN_INCOMPLETE, "run", {"alert"}),
]


@pytest.mark.parametrize(("event", "kind", "next_ones"), CHAIN)
def test_what_a_pipeline_does_itself_is_not_started_again_and_alerts_still_go_out(
    emitted: list[ReceivedEvent], event: str, kind: str, next_ones: set[str]
) -> None:
    context = Context(PipelineConfig.model_validate(document()), "model")
    events.announce(event, context, kind, "a")
    with events.followed():
        events.announce(event, context, kind, "a")
    alone, in_pipeline = emitted
    assert triggered(alone) == next_ones
    assert triggered(in_pipeline) == next_ones & {"alert"}
    if event == events.SCORES_PUBLISHED:
        assert triggered(alone, "Proactive") == triggered(in_pipeline, "Proactive") == {"alert"}, "either is fresh"
