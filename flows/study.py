"""The study of what makes a rank head good on a workspace."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow

from fastgda_core.extras import require_extra
from fastgda_core.feature_spaces import require_encoders
from flows.names import named
from tasks.artifact import Made
from tasks.config.pipeline import PipelineConfig
from tasks.context import open_context
from tasks.distilling.labels import read_labels
from tasks.judging.study import compare_heads, draw_study


@dataclass(frozen=True)
class Study:
    """Metrics of all variants, and their picture."""

    metrics: Made
    picture: Made


@flow(name="study", flow_run_name=named("study", "snapshot"))
def study(config: PipelineConfig, snapshot: str | None = None) -> Study:
    """Compare heads of other feature spaces, losses, queries and candidates, by default on the published snapshot."""
    require_extra("report", "matplotlib")  # before the heads are trained: the picture comes last
    for space in config.study.spaces:
        require_encoders(space, "study.spaces")
    context = open_context(config, model=False)
    labels = read_labels(context.workspace, snapshot)
    metrics = compare_heads(context, labels)
    return Study(metrics, draw_study(context, labels, metrics.artifact))
