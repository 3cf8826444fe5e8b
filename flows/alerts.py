"""Alerts: what went wrong, or did not come in time, by webhook, chat or mail."""

from __future__ import annotations

from prefect import flow

from tasks.alert import send_alert


@flow(name="alert", flow_run_name="alert: {title}")
def alert(title: str, text: str = "") -> None:
    """Send a message to every address in `FASTGDA_ALERT_URLS`: Apprise URLs, as `json://`, `mailto://`, `slack://`."""
    send_alert(title, text)
