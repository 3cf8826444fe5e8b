"""Cancellation of this flow run in Prefect, where no Prefect worker is there to end its process."""

from __future__ import annotations

import time
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL

from tasks.watching.prefect_answers import tolerated

LOOK_SECONDS = 5.0
_looked: dict[str, tuple[float, bool]] = {}


def requested() -> bool:
    """Return whether somebody cancelled this flow run, by a look at most some seconds old.

    A Prefect server that this process has for itself is not asked: nobody else can reach it.
    """
    own = flow_run.get_id()
    if own is None or not PREFECT_API_URL.value():
        return False
    at, cancelled = _looked.get(own, (0.0, False))
    if not cancelled and time.monotonic() - at > LOOK_SECONDS:
        # While the server is away nobody can have asked; what it says later counts.
        with tolerated("say whether the run was cancelled"), get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(own)).state
            cancelled = state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)
        _looked[own] = (time.monotonic(), cancelled)
    return cancelled
