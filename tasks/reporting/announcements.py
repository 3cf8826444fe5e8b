"""Announcements of a finished stage: an event that deployments wait for, an artifact that people look at."""

from __future__ import annotations

import logging
import shlex

from storage_schemas.files import read_if_there, read_whole
from storage_schemas.heads.metrics_history import metrics_history
from storage_schemas.snapshots.snapshots import read_snapshot
from storage_schemas.workspace import Workspace
from tasks import logs
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.distilling.labels import Labels
from tasks.distilling.loss_curve import LOSS_CURVE
from tasks.reporting.attribution_sheet import attribution_sheet
from tasks.serving.promotion import Evaluation
from tasks.teaching.run import Run
from tasks.watching import events
from tasks.watching.artifacts import publish_image, publish_markdown
from tasks.watching.trust import trust_in

log = logging.getLogger("fastgda.publishing")
SHOWN_QUERIES, SHOWN_SAMPLES = 5, 8


def announce_scores(run: Run, snapshot: str) -> None:
    """Announce published scores, with a picture of what the teacher says of five queries."""
    samples, queries = run.artifacts["samples"], run.artifacts["queries"]
    picture = attribution_sheet(run.workspace, snapshot, samples, queries, SHOWN_QUERIES, SHOWN_SAMPLES)
    publish_image(f"top attributions {run.name}", picture, "The most influential training images of five queries")
    rows = read_snapshot(run.workspace, snapshot)
    links = f"snapshot `{snapshot}`: runs {', '.join(f'`{run}`' for run in rows.runs)}, {rows.rows:,} rows"
    publish_markdown(f"published {snapshot}", f"{links}\n\n{_lineage(run.workspace, snapshot)}\n", "What was published")
    with logs.about(run=run.name):
        log.info("snapshot %s is published: %d rows of %d runs", snapshot, rows.rows, len(rows.runs))
    events.announce(events.SCORES_PUBLISHED, run.context, "snapshot", snapshot, run=run.name)


def announce_trust(run: Run) -> None:
    """Show what is known of the run's teacher, and what to do where it cannot be believed."""
    trust = trust_in(run.workspace, run.name)
    lines = [f"run `{run.name}`", "", *(f"- {name}: {value}" for name, value in trust.facts)]
    lines += [line for warning in trust.warnings for line in ("", f"**Warning** {warning}")]
    publish_markdown(f"teacher {run.name}", "\n".join(lines) + "\n", "Whether the teacher can be believed")


def announce_judges(run: Run) -> None:
    """Show the table of the judges of a run that was judged by retraining."""
    table = read_whole(run.workspace.judge_table(run.name, "md")).decode()
    publish_markdown(f"judges {run.name}", table, "What models that were trained again say")


def announce_head(context: Context, head: Artifact, labels: Labels) -> None:
    """Announce a trained head, with its loss curve."""
    if curve := read_if_there(head.path / LOSS_CURVE):
        publish_image(f"loss {head.key}", curve, f"Training of head {head.key}")
    publish_markdown(
        f"head {head.key}",
        f"head `{head.key}`, trained on snapshot `{labels.ranks.key}` of run `{labels.run}`\n\n"
        f"{_lineage(context.workspace, head.key)}\n",
        "Where the head comes from",
    )
    events.announce(events.HEAD_TRAINED, context, "head", head.key, snapshot=labels.ranks.key)


def announce_index(context: Context, index: Artifact, head: Artifact) -> None:
    """Announce an index that was built."""
    publish_markdown(
        f"index {index.key}",
        f"index `{index.key}` of head `{head.key}`: {index.rows:,} vectors\n\n"
        f"{_lineage(context.workspace, index.key)}\n",
        "Where the index comes from",
    )
    events.announce(events.INDEX_BUILT, context, "index", index.key, head=head.key)


def announce_metrics(context: Context, evaluation: Evaluation, head: Artifact, labels: Labels) -> None:
    """Announce that an index was measured and is served or not, with a history of all evaluations."""
    cutoff = context.config.evaluation.validation_cutoff
    event = events.PROMOTION_REFUSED if evaluation.refused else events.INDEX_PROMOTED
    lines = [
        f"index `{evaluation.index.key}` (head `{head.key}`, snapshot `{labels.ranks.key}`): "
        + (evaluation.refused or "promoted"),
        "",
        f"| metrics | mAP({cutoff}) tuned | untuned | queries | measured |",
        "| --- | ---: | ---: | ---: | --- |",
        *_history(context.workspace, cutoff),
    ]
    publish_markdown(f"map history {context.config.name}", "\n".join(lines) + "\n", f"mAP({cutoff}) over time")
    events.announce(
        event, context, "index", evaluation.index.key, head=head.key, tuned=evaluation.tuned, refused=evaluation.refused
    )


def _history(workspace: Workspace, cutoff: int) -> list[str]:
    """Return a row for every evaluation in the workspace, newest first."""
    return [
        f"| `{made.key}` | {made.tuned:.3f} | {made.untuned:.3f} | {made.queries} | {made.at:%Y-%m-%d %H:%M} |"
        for made in metrics_history(workspace, cutoff)
    ]


def _lineage(workspace: Workspace, version: str) -> str:
    """Return the command that tells more, for people in whatever folder."""
    return f"`fastgda lineage {version} --workspace {shlex.quote(str(workspace.root))}`"
