"""Alerts: what went wrong, or did not come in time, by webhook, chat or mail."""

from __future__ import annotations

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from tasks.watching.alerts import VARIABLE, addresses, send_alert


@flow(name="alert", flow_run_name="alert: {title}")
def alert(title: str, text: str = "") -> State[None] | None:
    """Send a message to every address in `FASTGDA_ALERT_URLS`: Apprise URLs, as `json://`, `mailto://`, `slack://`."""
    if not addresses():
        message = f"nobody was told: set {VARIABLE}, for the worker that runs alerts, to Apprise URLs"
        return Completed(name="Skipped", message=message)
    return send_alert(title, text)
