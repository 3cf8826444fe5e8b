"""The search index, built from a rank head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import flow

from flows.names import named
from storage_schemas.tombstones import removed_ids
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, open_context
from tasks.distilling.index import build_search_index, make_index_parts
from tasks.distilling.index_add import add_to_search_index, read_parent
from tasks.distilling.labels import Labels, read_labels
from tasks.distilling.versions import latest_head, read_head, space_of_head
from tasks.execution.number_ranges import from_ranges
from tasks.execution.preparing import make_features
from tasks.reporting.announcements import announce_index
from tasks.watching import openlineage


@flow(name="build index parts", flow_run_name=named("index parts", "part"))
def build_index_parts(config: PipelineConfig, part: str, head: str | None = None) -> int:
    """Make some parts of an index, as one worker of several; `rebuild index` merges them. Return how many there are."""
    context, labels, trained = _behind(config, head)
    features = make_features(context, labels.samples).artifact
    removed = removed_ids(context.workspace, labels.samples.path).tolist()
    numbers = from_ranges(part)
    return make_index_parts(
        context, labels.samples, features, trained, numbers, queries=labels.queries, removed=removed
    )


@flow(name="rebuild index", flow_run_name=named("index", "head"))
@openlineage.told("index")
def rebuild_index(config: PipelineConfig, head: str | None = None) -> Made:
    """Build an index from a head, by default the newest; the index is not served before it is promoted."""
    context, labels, trained = _behind(config, head)
    features = make_features(context, labels.samples).artifact
    openlineage.uses(context, labels.samples, features, trained)
    removed = removed_ids(context.workspace, labels.samples.path).tolist()
    index = build_search_index(context, labels.samples, features, trained, labels.queries, removed)
    announce_index(context, index.artifact, trained)
    return index


def _behind(config: PipelineConfig, head: str | None) -> tuple[Context, Labels, Artifact]:
    """Return a context in the head's feature space, what the head learned from, and the head."""
    context = open_context(config, model=False)
    trained, record = read_head(context.workspace, head or latest_head(context.workspace))
    return space_of_head(context, record), read_labels(context.workspace, record.snapshot), trained


@flow(name="add to index", flow_run_name="add to index")
def add_to_index(workspace: str, tars: Sequence[str], index: str | None = None) -> Made:
    """Add the samples of some tars to an index, by default the served one, as a new version that is not served yet."""
    parent = read_parent(Workspace.at(workspace), index)
    made = add_to_search_index(parent, [Path(tar) for tar in tars])
    announce_index(parent.context, made.artifact, parent.head)
    return made
