"""Send a message to where people read it."""

from __future__ import annotations

import os

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from fastgda_core.errors import TransientError, UsageError
from fastgda_core.extras import require_extra

VARIABLE = "FASTGDA_ALERT_URLS"


def addresses() -> list[str]:
    """Return the Apprise URLs that alerts are sent to."""
    return os.environ.get(VARIABLE, "").split()


def _was_not_taken(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    return isinstance(state.result(raise_on_failure=False), TransientError)


@task(
    task_run_name="send",
    cache_policy=NO_CACHE,
    retries=3,
    retry_delay_seconds=[5, 30, 120],
    retry_condition_fn=_was_not_taken,
)
def send_alert(title: str, text: str) -> None:
    """Send a message to every address.

    Raises:
        TransientError: an address did not take it; it is then tried again.
        UsageError: an address is none, or the package that sends is not installed.
    """
    require_extra("alerts", "apprise", wanted_by=VARIABLE)
    import apprise

    sender = apprise.Apprise()
    for place, url in enumerate(addresses(), start=1):
        if not sender.add(url):  # the URL itself may hold a password
            raise UsageError(f"{VARIABLE}: URL number {place} is none that Apprise knows: see its list of services")
    if not sender.notify(title=title, body=text or title):
        raise TransientError(f"an address in {VARIABLE} did not take the alert {title!r}")
