"""The names of flow runs: `curate openmoji abu_plus_first_order 2026-11-23`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from prefect.runtime import flow_run


def named(verb: str, *parameters: str) -> Callable[[], str]:
    """Return a namer of runs of a flow with a parameter `config`, a `PipelineConfig`; `parameters` are named, too."""

    def name() -> str:
        arguments: dict[str, Any] = flow_run.get_parameters()
        config = arguments["config"]
        section = config if isinstance(config, dict) else config.model_dump(mode="json")
        started = flow_run.get_scheduled_start_time() or datetime.now(UTC)
        words = [verb, section["name"], section["teacher"]["name"], section["queries"].get("partition") or ""]
        words += [str(arguments[each]) for each in parameters if arguments.get(each)]
        return " ".join([*filter(None, words), f"{started:%Y-%m-%d}"])

    return name
