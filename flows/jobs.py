"""A job: some parts of a run, made by one process of a work pool, with one device."""

from __future__ import annotations

import logging

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from tasks import logs
from tasks.config.execution import ExecutionConfig
from tasks.execution.fan_out import PartReference, WorkOrder, end_of_job, run_parts
from tasks.execution.number_ranges import from_ranges

log = logging.getLogger("fastgda.execution.jobs")


@flow(name="make parts", flow_run_name="{kind} {run} {numbers}")
def make_parts(
    location: str,
    run: str,
    assignment: str,
    kind: str,
    numbers: str,
    timeout: float | None,
    execution: ExecutionConfig,
) -> str:
    """Make these parts one after the other; a coordinator starts this flow, and reads in the workspace what it made.

    Args:
        location: folder or URL of the workspace.
        assignment: key of the run's assignment, as the coordinator wrote it.
        numbers: of the parts, as `0-2,5`.
        timeout: seconds that one part may take; no limit where that is not known.
    """
    order = WorkOrder(location, run, assignment, kind, execution)
    seconds = timeout / execution.timeout_factor if timeout is not None else None
    with logs.about(run=run, kind=kind), ThreadPoolTaskRunner[PartReference](max_workers=1) as runner:
        log.info("a job is begun: %s %s", kind, numbers)
        outcome = run_parts(order, from_ranges(numbers), runner, lambda: seconds)
        log.info(
            "the job is over: %s", "it was stopped" if outcome.stopped else f"{len(outcome.failures)} parts failed"
        )
    return end_of_job(order, outcome)
