"""The rank head, trained on published rank labels."""

from __future__ import annotations

from prefect import flow

from flows.names import named
from tasks.artifact import Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import open_context
from tasks.distilling.gradient_heads import fit_gradient_head
from tasks.distilling.heads import fit_rank_head
from tasks.distilling.labels import extract_query_features, read_labels
from tasks.execution.preparing import make_features
from tasks.reporting.announcements import announce_head
from tasks.watching import openlineage


@flow(name="train rank head", flow_run_name=named("train", "snapshot"))
@openlineage.told("train")
def train_rank_head(config: PipelineConfig, snapshot: str | None = None) -> Made:
    """Train a head on the rank labels of a snapshot, by default the published one."""
    context = open_context(config, model=False)
    labels = read_labels(context.workspace, snapshot)
    features = make_features(context, labels.samples).artifact
    extract_query_features(context, labels)
    openlineage.uses(context, labels.samples, *labels.queries, features, labels.ranks)
    if config.head.kind == "gradient":
        head = fit_gradient_head(context, labels, features)
    else:
        head = fit_rank_head(context, labels.samples, labels.queries, features, labels.ranks)
    announce_head(context, head.artifact, labels)
    return head
