from __future__ import annotations

import pytest

from fastgda_core.errors import UsageError
from tasks.config.pipeline import PipelineConfig
from tasks.judging.dense import check_judged
from tests.tasks.configs import document


def test_a_judge_of_more_pairs_than_memory_holds_is_refused_before_any_score() -> None:
    judged = PipelineConfig.model_validate(document(judge={"retrain": {"steps": 3}, "subsets": 4, "again": 0}))
    check_judged(judged, samples=118_287, queries=300)
    with pytest.raises(UsageError, match=r"10,000,000 samples, which take 1,600,000 GB or more"):
        check_judged(judged, samples=10_000_000, queries=5_000_000)
    check_judged(PipelineConfig.model_validate(document()), samples=10_000_000, queries=5_000_000)
