"""Events: deployments start on them (`deployments/prefect.yaml`), and alerts go out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prefect.events import emit_event
from prefect.runtime import flow_run

from tasks.context import Context

SCORES_PUBLISHED = "fastgda.scores.published"
HEAD_TRAINED = "fastgda.head.trained"
INDEX_BUILT = "fastgda.index.built"
INDEX_PROMOTED = "fastgda.index.promoted"
PROMOTION_REFUSED = "fastgda.promotion.refused"
RUN_INCOMPLETE = "fastgda.run.incomplete"
FOLLOWED = "fastgda.followed"  # label of every event: "true" where the flow that emits it does itself what follows

_followed: ContextVar[bool] = ContextVar("followed", default=False)


@contextmanager
def followed() -> Iterator[None]:
    """Label the events in the block as followed: the block does what follows, and no deployment need start."""
    token = _followed.set(True)
    try:
        yield
    finally:
        _followed.reset(token)


def announce(event: str, context: Context, kind: str, name: str, **payload: object) -> None:
    """Tell the Prefect server that something is there, or wrong.

    Args:
        kind: snapshot, head, index or run; with `name`, the event's resource.
        payload: what a trigger may hand on.
    """
    if flow_run.get_id() is None:
        return
    emit_event(
        event=event,
        resource={
            "prefect.resource.id": f"fastgda.{kind}.{name}",
            "prefect.resource.name": name,
            "fastgda.name": context.config.name,
            "fastgda.workspace": context.config.workspace,
            FOLLOWED: "true" if _followed.get() else "false",  # on all: Prefect matches no label that is absent
        },
        related=[
            {
                "prefect.resource.id": f"prefect.flow-run.{flow_run.get_id()}",
                "prefect.resource.role": "flow-run",
                "prefect.resource.name": flow_run.get_name() or "",
            }
        ],
        payload={kind: name, "workspace": context.config.workspace, **payload},
    )
