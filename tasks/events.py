"""Events that others wait for: deployments start on them (`deployments/prefect.yaml`), alerts go out."""

from __future__ import annotations

from prefect.events import emit_event
from prefect.runtime import flow_run

from tasks.context import Context

SCORES_PUBLISHED = "fastgda.scores.published"
HEAD_TRAINED = "fastgda.head.trained"
INDEX_BUILT = "fastgda.index.built"
INDEX_PROMOTED = "fastgda.index.promoted"
PROMOTION_REFUSED = "fastgda.promotion.refused"
RUN_INCOMPLETE = "fastgda.run.incomplete"


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
