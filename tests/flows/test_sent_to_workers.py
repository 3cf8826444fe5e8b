"""What a flow refers to is sent to worker processes with each part: nothing of it may hold a lock or an open file."""

from __future__ import annotations

import importlib
import pkgutil

import cloudpickle
import pytest
from prefect import Flow

import flows

FLOWS = {
    f"{module.name}.{name}": value
    for module in pkgutil.iter_modules(flows.__path__)
    if module.name not in ("main", "operations")
    for name, value in vars(importlib.import_module(f"flows.{module.name}")).items()
    if isinstance(value, Flow)
}


@pytest.mark.parametrize("name", sorted(FLOWS))
def test_a_flow_can_be_sent_to_another_process(name: str) -> None:
    assert cloudpickle.dumps(FLOWS[name])
