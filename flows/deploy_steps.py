"""Steps of `prefect deploy`: what `deployments/prefect.yaml` cannot say by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks.config.files import load_config


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML file's configuration, checked, with absolute paths, as the parameter `config` of deployed flows.

    `partitioned` says whether its queries come day by day: without them nothing is scheduled, or missed.

    Raises:
        UsageError: a fault in the configuration; one line for each.
    """
    config = load_config(Path(path))
    return {
        "config": config.model_dump(mode="json"),
        "partitioned": "{partition}" in (config.queries.shards or ""),
    }
