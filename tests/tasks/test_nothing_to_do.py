"""What a pipeline costs that finds everything made."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.pipeline import attribution_pipeline
from tests.object_store import empty_workspace, requests_counted
from tests.tasks.whole_runs import WholeRun
from tests.tasks.without_prefect import without_prefect


@pytest.mark.integration
def test_a_pipeline_with_nothing_to_do_lists_an_object_store_twice_a_stage_at_most(
    similar: WholeRun, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = empty_workspace(s3, monkeypatch)
    assert not isinstance(root, Path)
    root.fs.put(str(similar.workspace.root), root.path, recursive=True)
    config = similar.config.model_copy(update={"workspace": str(root)})
    with without_prefect():
        attribution_pipeline(config)  # which the run that was made lacks a report of
        with requests_counted() as asked:
            again = attribution_pipeline(config)
    assert all(made.reused for made in again.made)
    assert 0 < asked["LIST"] <= 2 * len(again.made)
    assert asked.keys() <= {"GET", "HEAD", "LIST"}  # nothing is written
