"""Trust in a run's teacher: what its checks found in few words, whether it can be believed, and what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from fastgda_core.diffusion.objective import Objective
from fastgda_core.evaluation.twins import TwinTest
from fastgda_core.teachers.registry import TEACHERS
from storage_schemas import tables
from storage_schemas.errors import StoreError
from storage_schemas.heads.records import check_tables, read_head_record
from storage_schemas.runs.ledger import read_run
from storage_schemas.runs.noise_plan import noise_plan_of
from storage_schemas.snapshots.published import read_published
from storage_schemas.tables import PSEUDO, TWIN
from storage_schemas.workspace import Workspace
from tasks.config import judging

KINDS = {TWIN: "generated from training captions", PSEUDO: "training images as queries"}
TEACHER, CAPTIONS = judging.TEACHER, judging.CAPTIONS
TWIN_SHARE, TWIN_RANK, WORST_TWIN = "twin share", "twin rank", "worst twin rank"
CONFIRMED_SHARE = "confirmed twin share"  # found, of the twins that models trained again say helped
OTHER_NOISE, OTHER_GRADIENT = "teacher with other noise", "teacher with other gradient"
OTHER_CURVATURE, OTHER_TEACHER = "teacher with other curvature", "another teacher"
CANDIDATE_RECALL, NEAREST = "candidate recall", "nearest"  # of the teacher's first, the share among the nearest
HEAD = "tuned"
JUDGED = "models trained again"  # the fact that says how true a teacher is
LDS, RETRAINED_AGAIN = "lds", "retraining again"  # the judge's score, and what retraining itself leaves of it

# Below it less than half of what orders the samples would come back if the teacher were drawn again.
LEAST_AGREEMENT = 0.5
LEAST_RECALL, WIDEST_ERROR = 0.9, 0.05  # of the candidates, and of that figure
log = logging.getLogger("fastgda.trust")
_RAISED = {
    OTHER_NOISE: "teacher.timesteps or teacher.draws",
    OTHER_GRADIENT: "teacher.gradient_pairs",
    OTHER_CURVATURE: "curvature.samples or teacher.damping",
}
_LOST_SIGN = (
    "on pictures that the model made itself the loss's gradient can lose its sign: set teacher.objective: output_norm, "
    "or take gradients at early checkpoints of the training (teacher.checkpoints)"
)
_OTHER_CHECKPOINTS = "take gradients at earlier checkpoints of the training (teacher.checkpoints), or at more of them"
_BY_JUDGES = "choose another teacher by docs/judges.md"
_OF_LOSS = {Objective.loss, Objective.ratio}
_OTHER_SPACE = "its features do not tell these images apart: choose another candidates.space"
_NOISY = (
    "see whether captions belong to their images, then raise curvature.samples, teacher.timesteps and "
    "teacher.gradient_pairs"
)


@dataclass(frozen=True)
class Trust:
    """The results of the checks of a run's teacher.

    twins: the twin test of each kind of query, where it was made.
    agreement: Spearman's between two whole teachers; None where it was not measured.
    objective: whose gradients the scores are made of; None where they are made of none.
    parts: Spearman's of the teacher with itself where one part alone is drawn again, by the name of that teacher.
    retrained: linear datamodelling score and its error over test queries, by method, where models were trained again.
    precision: mean of mAP(L) over L, of another whole teacher and of the head, where both were measured.
    confirmed: twins of each kind that models trained again say helped: how many the teacher found, and of how many.
    checkpoints: gradients are taken at checkpoints of the training.
    plan: the noise plan that the run's pilot chose, in words; empty where none did.
    candidates: the share of the teacher's first L that is among the nearest, and its error, by L; empty where that was
        not measured.
    """

    twins: dict[str, TwinTest]
    agreement: float | None
    objective: Objective | None
    parts: dict[str, float] = field(default_factory=dict)
    precision: tuple[float, float] | None = None
    retrained: dict[str, tuple[float, float]] = field(default_factory=dict)
    confirmed: dict[str, tuple[int, int]] = field(default_factory=dict)
    checkpoints: bool = False
    plan: str = ""
    candidates: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The results as (name, value)."""
        facts = [
            ("noise plan", self._chosen_plan()),
            ("twins found", "; ".join(self._found(kind) for kind in self.twins)),
        ]
        if self.agreement is not None:
            facts.append(("two teachers agree", f"Spearman {self.agreement:.3f}"))
        if TEACHER in self.retrained:
            facts.append((JUDGED, self._retrained()))
        facts.append((CANDIDATE_RECALL, self._recalled(self.candidates)))
        return [(name, value) for name, value in facts if value]

    def _chosen_plan(self) -> str:
        """Return the plan that a pilot chose, and how two such plans agreed when that was measured."""
        measured = self.parts.get(OTHER_NOISE)
        return self.plan + (f", measured {measured:.2f}" if self.plan and measured is not None else "")

    def _retrained(self) -> str:
        """Return how well the teacher, and captions beside it, predict the losses of models that were trained again."""
        words = "LDS {:.2f} ± {:.2f}".format(*self.retrained[TEACHER])
        if CAPTIONS in self.retrained:
            words += ", captions alone {:.2f} ± {:.2f}".format(*self.retrained[CAPTIONS])
        return words + (
            f", of at most {self.retrained[RETRAINED_AGAIN][0]:.2f}" if RETRAINED_AGAIN in self.retrained else ""
        )

    @property
    def warnings(self) -> list[str]:
        """A line for each test that failed: what, and how to mend it."""
        wrong = [
            f"the teacher names wrong images: it found {self._found(kind)}; {self._advice(kind)}"
            for kind, test in self.twins.items()
            if not test.passed and not self._true_all_the_same(kind)
        ]
        return [*wrong, *self._disagreement(), *self._untrue(), *self._left_out()]

    def _recalled(self, cutoffs: Iterable[int]) -> str:
        """Return which share of the teacher's first L is among the nearest, for each L of some."""
        figures = ["{1:.2f} ± {2:.2f} of its first {0:,}".format(each, *self.candidates[each]) for each in cutoffs]
        return ", ".join(figures)

    def _left_out(self) -> list[str]:
        """Return warnings where the nearest leave out what the teacher ranks first, or where that cannot be told."""
        low = [each for each, (value, _) in self.candidates.items() if value < LEAST_RECALL]
        wide = [each for each, (_, error) in self.candidates.items() if error > WIDEST_ERROR and each not in low]
        found = []
        if low:
            found.append(
                "candidates leave out what the teacher ranks first: the nearest hold "
                f"{self._recalled(low)}; raise candidates.k, choose another candidates.space, or score all samples"
            )
        if wide:
            found.append(
                f"whether candidates hold what the teacher ranks first cannot be told: {self._recalled(wide)}; raise "
                "candidates.check.random or candidates.check.queries"
            )
        return found

    def _found(self, kind: str) -> str:
        """Return how many twins of a kind the teacher found, and how many of those that retraining confirms."""
        test = self.twins[kind]
        words = (
            f"{test.found} of {len(test.ranks)} {KINDS[kind]} among the first {max(test.places)}, "
            f"the worst at rank {test.worst:,}"
        )
        return words + (
            ", and {} of the {} that retraining confirms".format(*self.confirmed[kind])
            if self.confirmed.get(kind)
            else ""
        )

    def _true_all_the_same(self, kind: str) -> bool:
        """Return whether retraining says that the twins which are not found did not help, and the teacher is true."""
        found, confirmed = self.confirmed.get(kind, (0, 0))
        return 0 < confirmed == found and TEACHER in self.retrained and not self._untrue()

    def _untrue(self) -> list[str]:
        """Return a warning where captions alone predict retraining as well as the teacher does."""
        if not {TEACHER, CAPTIONS} <= self.retrained.keys() or self.retrained[TEACHER][0] > self.retrained[CAPTIONS][0]:
            return []
        lost = self._lost_sign if self.objective in _OF_LOSS else _BY_JUDGES
        return [f"models that were trained again say that captions alone are as good: {self._retrained()}; {lost}"]

    def _advice(self, kind: str) -> str:
        """Return how to mend a teacher that does not find the twins of one kind of query."""
        if self.objective is None:
            return _OTHER_SPACE
        return self._lost_sign if kind == TWIN and self.objective in _OF_LOSS else _NOISY

    @property
    def _lost_sign(self) -> str:
        return _OTHER_CHECKPOINTS if self.checkpoints else _LOST_SIGN

    def _disagreement(self) -> list[str]:
        """Return a warning where the teacher, drawn again, is another one; empty where it is not."""
        if self.agreement is not None and self.agreement < LEAST_AGREEMENT:
            what = f"two teachers that differ in their draws alone agree at Spearman {self.agreement:.2f} only"
        elif self.precision is not None and self.precision[0] < self.precision[1]:
            another, head = self.precision
            what = f"its head agrees with it better (mAP {head:.3f}) than another such teacher does ({another:.3f})"
        else:
            return []
        noisiest = sorted(self.parts, key=self.parts.__getitem__)
        alone = ", ".join(f"{name.removeprefix('teacher with ')} {self.parts[name]:.2f}" for name in noisiest)
        settings = _RAISED | ({OTHER_NOISE: "teacher.agreement"} if self.plan else {})
        raised = (
            settings[noisiest[0]] if noisiest else "teacher.timesteps, teacher.gradient_pairs and curvature.samples"
        )
        return [
            f"the teacher is mostly noise, and so is any gain measured against it: {what}"
            + (f" (by itself: {alone})" if alone else "")
            + f"; raise {raised}"
        ]


def trust_in(workspace: Workspace, run: str) -> Trust:
    """Read what the checks of a run have found so far; nothing of a run that was never judged."""
    rows = _of_the_head(workspace, run)
    for path in check_tables(workspace, run):
        rows += tables.read(path, tables.METRICS).to_pylist()
    plan = noise_plan_of(workspace, run)
    teacher = _teacher(workspace, run)
    trust = trust_of(rows, _objective(teacher), checkpoints=bool(teacher and teacher.get("checkpoints")))
    return replace(trust, plan="" if plan is None else str(plan))


def trust_of(rows: list[dict[str, Any]], objective: Objective | None, *, checkpoints: bool = False) -> Trust:
    """Return what rows of `metrics` tell of a teacher; `checkpoints`: its gradients are taken at some."""
    twins = {}
    for kind in KINDS:
        of_kind = [row for row in rows if row["metric"] == TWIN_RANK and row["split"] == kind]
        if of_kind:
            ranks, places = zip(*((int(row["value"]), row["cutoff"]) for row in of_kind), strict=True)
            twins[kind] = TwinTest(ranks, places)
    means = {(row["metric"], row["space"], row["cutoff"]): row["value"] for row in rows if not row["query_id"]}
    parts = {name: means["spearman", name, 0] for name in _RAISED if ("spearman", name, 0) in means}
    precision = [
        [value for (metric, name, _), value in means.items() if (metric, name) == ("mAP", space)]
        for space in (OTHER_TEACHER, HEAD)
    ]
    return Trust(
        twins,
        means.get(("spearman", OTHER_TEACHER, 0)),
        objective,
        parts,
        (fmean(precision[0]), fmean(precision[1])) if all(precision) else None,
        {
            row["space"]: (row["value"], row["standard_error"])
            for row in rows
            if (row["metric"], row["split"], row["query_id"]) == (LDS, "test", "")
        },
        {
            row["split"]: (round(row["value"] * row["queries"]), row["queries"])
            for row in rows
            if (row["metric"], row["space"]) == (CONFIRMED_SHARE, TEACHER)
        },
        checkpoints,
        candidates={
            row["cutoff"]: (row["value"], row["standard_error"])
            for row in rows
            if row["metric"] == CANDIDATE_RECALL and not row["query_id"]
        },
    )


def _of_the_head(workspace: Workspace, run: str) -> list[dict[str, Any]]:
    """Return the metrics of the head that is published with a run; none of a gradient head, see `by_itself`."""
    try:
        published = read_published(workspace)
    except StoreError:
        return []
    if published.run != run or published.metrics is None:
        return []
    try:
        kind = read_head_record(workspace.file(published.head)).kind if published.head else ""
    except StoreError as error:  # nothing else of the run rests on its head
        log.warning("what the published head agrees with is left out: %s", error)
        return []
    rows = tables.read(workspace.file(published.metrics), tables.METRICS).to_pylist()
    return [row for row in by_itself(rows, kind) if row["space"] == HEAD]


def by_itself(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the rows of `metrics` from which trust is read: without those of a head that shares the teacher's draws.

    An index of gradients holds the teacher's own curvature and noise of the samples. It may agree with the teacher
    better than another teacher does, and that says nothing of noise.
    """
    return [row for row in rows if kind != "gradient" or row["space"] != HEAD]


def _teacher(workspace: Workspace, run: str) -> dict[str, Any] | None:
    """Return the section `teacher` of a run's configuration; None of a run that has none."""
    try:
        teacher = read_run(workspace, run).config.get("teacher")
    except StoreError:
        return None
    return teacher if isinstance(teacher, dict) else None


def _objective(teacher: dict[str, Any] | None) -> Objective | None:
    if teacher is None:
        return Objective.loss
    return compared(teacher.get("name"), Objective(teacher.get("objective", Objective.loss)))


def compared(teacher: object, objective: Objective) -> Objective | None:
    """Return the objective whose gradients a teacher of this name compares; None where it compares none."""
    known = TEACHERS.get(teacher) if isinstance(teacher, str) else None  # a run may be another release's
    return None if known is not None and "objective" not in known.settings else objective
