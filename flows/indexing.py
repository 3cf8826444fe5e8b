"""The search index, built from a rank head."""

from __future__ import annotations

from prefect import flow

from flows.names import named
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, open_context
from tasks.distilling.index import build_search_index, make_index_parts
from tasks.distilling.labels import Labels, read_labels
from tasks.distilling.versions import latest_head, read_head, space_of_head
from tasks.execution.number_ranges import from_ranges
from tasks.inputs.features import extract_features
from tasks.reporting.announcements import announce_index


@flow(name="build index parts", flow_run_name=named("index parts", "part"))
def build_index_parts(config: PipelineConfig, part: str, head: str | None = None) -> int:
    """Make some parts of an index, as one worker of several; `rebuild index` merges them. Return how many there are."""
    context, labels, trained = _behind(config, head)
    features = extract_features(context, labels.samples).artifact
    return make_index_parts(context, labels.samples, features, trained, from_ranges(part), queries=labels.queries)


@flow(name="rebuild index", flow_run_name=named("index", "head"))
def rebuild_index(config: PipelineConfig, head: str | None = None) -> Made:
    """Build an index from a head, by default the newest; the index is not served before it is promoted."""
    context, labels, trained = _behind(config, head)
    features = extract_features(context, labels.samples).artifact
    index = build_search_index(context, labels.samples, features, trained, labels.queries)
    announce_index(context, index.artifact, trained)
    return index


def _behind(config: PipelineConfig, head: str | None) -> tuple[Context, Labels, Artifact]:
    """Return a context in the head's feature space, what the head learned from, and the head."""
    context = open_context(config)
    trained, record = read_head(context.workspace, head or latest_head(context.workspace))
    return space_of_head(context, record), read_labels(context.workspace, record.snapshot), trained
