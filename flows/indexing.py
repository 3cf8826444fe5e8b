"""The search index, built from a rank head."""

from __future__ import annotations

from prefect import flow

from flows.names import named
from tasks.artifact import Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import open_context
from tasks.distilling.index import build_search_index
from tasks.distilling.labels import read_labels
from tasks.distilling.versions import latest_head, read_head, space_of_head
from tasks.inputs.features import extract_features
from tasks.reporting.announcements import announce_index


@flow(name="rebuild index", flow_run_name=named("index", "head"))
def rebuild_index(config: PipelineConfig, head: str | None = None) -> Made:
    """Build an index from a head, by default the newest; the index is not served before it is promoted."""
    context = open_context(config)
    trained, record = read_head(context.workspace, head or latest_head(context.workspace))
    context = space_of_head(context, record)
    labels = read_labels(context.workspace, record.snapshot)
    features = extract_features(context, labels.samples).artifact
    index = build_search_index(context, labels.samples, features, trained)
    announce_index(context, index.artifact, trained)
    return index
