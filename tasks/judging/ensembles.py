"""The run's ensembles: sums of the methods that are best on its validation queries, judged like the rest."""

from __future__ import annotations

from torch import Tensor

from fastgda_core.evaluation.ensembles import chosen_members, ensemble_sum
from tasks.artifact import Artifact
from tasks.inputs.queries import load_queries
from tasks.judging.methods import RANDOM, methods_key, own_methods
from tasks.judging.retrained_pool import RetrainedPool
from tasks.teaching.retrainings import RetrainingParts
from tasks.teaching.run import Run

CHOSEN_ON = "validation"


def members(run: Run, ranks: Artifact) -> dict[str, Tensor]:
    """Return those methods that an ensemble may be made of: all but chance and tiers, which stand for a teacher."""
    return {name: each for name, each in own_methods(run, ranks).items() if name != RANDOM}


def ensembles_of(run: Run, ranks: Artifact) -> dict[str, list[str]]:
    """Return the members of the run's ensembles, by name; chosen once for the same methods and models.

    Args:
        run: one whose pool of retrained models is complete.
        ranks: its rank labels.
    """

    def choose() -> dict[str, list[str]]:
        several = load_queries(run.artifacts["queries"])
        validation = [number for number, query in enumerate(several) if query.split == CHOSEN_ON]
        pool = RetrainedPool.of(run)
        return chosen_members(members(run, ranks), pool.kept, pool.losses, validation)

    return run.context.loaded.once("ensembles", (methods_key(run, ranks), pool_key(run)), choose)


def pool_key(run: Run) -> tuple[str, int, float, int]:
    """Return what the models depend on by which ensembles are chosen."""
    judge = run.config.judge
    assert judge is not None
    return run.artifacts[RetrainingParts.kind].key, judge.subsets, judge.share, judge.seed


def ensemble_scores(run: Run, ranks: Artifact) -> dict[str, Tensor]:
    """Return the scores of the run's ensembles, (queries, samples) float64 each; arguments as of `ensembles_of`."""
    known = members(run, ranks)
    return {name: ensemble_sum([known[each] for each in names]) for name, names in ensembles_of(run, ranks).items()}
