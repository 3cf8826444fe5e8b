"""A study of what makes a rank head good: the questions of FastGDA's Figures 3-6 on a workspace's own scores."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from torch.nn import functional as F

from fastgda_core.evaluation.ranking_metrics import average_precision, expected_random_average_precision, top_mask
from fastgda_core.features import encoder_names
from fastgda_core.ranking.batches import RankPairs
from fastgda_core.ranking.head import RankHead
from fastgda_core.ranking.loss_names import LossName
from fastgda_core.ranking.losses import LOSSES
from fastgda_core.ranking.subsets import random_priority, some_queries, thin
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit, commit_table, committed, input_key
from storage_schemas.files import AnyPath
from storage_schemas.heads.metrics_history import mean_value
from storage_schemas.publishing.publish import update_published
from storage_schemas.snapshots.published import Published
from tasks.artifact import Artifact, Made, once
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.distilling.labels import Labels, extract_query_features
from tasks.distilling.ranks import candidate_scores, rank_pairs, rows_of_split, sample_features
from tasks.inputs.features import extract_features, features_key, in_space, load_query_features
from tasks.inputs.queries import joined_queries
from tasks.judging.head import tuned_cosines, untuned_cosines
from tasks.judging.kept_checks import read_checks
from tasks.judging.metric_rows import metric_rows
from tasks.judging.study_results import UNTUNED, answers, study_plot
from tasks.judging.tower_study import measure_towers
from tasks.progress import stage
from tasks.watching.trust import OTHER_TEACHER

PAIRS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Variant:
    """One head of a study: its question, its value there, how it differs from the configured head.

    nearest: share of each query's candidates that it learns from, those nearest in the untuned space; else a random
    share, `candidates`.
    """

    question: str
    value: str
    space: str
    loss: LossName
    queries: float = 1.0
    candidates: float = 1.0
    nearest: float | None = None
    outside: float | None = None
    seed: int = 0


def variants(config: PipelineConfig) -> list[Variant]:
    """Return all heads of a study, question by question."""
    study, space, loss = config.study, config.features.space, config.head.loss
    spaces = study.spaces or list(dict.fromkeys([*encoder_names(space), space]))
    least = min(study.query_shares)
    found = [Variant("feature space", each, each, loss) for each in spaces]
    found += [Variant("loss", each, space, each) for each in study.losses]
    found += [Variant("queries", f"{each:g}", space, loss, queries=each) for each in study.query_shares]
    found += [Variant("candidates", f"{each:g}", space, loss, candidates=each) for each in study.candidate_shares]
    found += [
        Variant("queries at a fixed budget", f"{each:g}", space, loss, queries=each, candidates=least / each)
        for each in study.query_shares
    ]
    found += [
        Variant("outside probability", f"{each:g}", space, loss, nearest=study.nearest, outside=each)
        for each in study.outside_probabilities
    ]
    return [dataclasses.replace(each, seed=seed) for each in found for seed in range(study.seeds)]


@task(task_run_name="study", cache_policy=NO_CACHE)
def compare_heads(context: Context, labels: Labels) -> Made:
    """Train every variant and measure it on the test queries; each variant is committed by itself, and made once.

    Variants are of the symmetric head; those of a configured gradient head come beside them.
    """
    config = context.config
    several = variants(config)
    measured = config.evaluation.cutoffs, config.evaluation.validation_cutoff
    key = input_key("study", labels.ranks.key, labels.samples.key, config.head.learned, measured)
    folder = context.workspace.study(key)
    features = {space: features_key(in_space(context, space=space), labels.samples) for space in _spaces(several)}
    keys = {
        each: input_key("variant 3", key, dataclasses.astuple(each), features[each.space], table=tables.STUDY)
        for each in several
    }
    paths = {variant: folder / f"{each}.parquet" for variant, each in keys.items()}
    missing = [variant for variant in several if committed(paths[variant], keys[variant]) is None]
    for space in _spaces(missing):  # before the study's own progress bar: only one is shown at a time
        extract_features(in_space(context, space=space), labels.samples)
        extract_query_features(in_space(context, space=space), labels)
    with stage("study", len(missing)) as advance:
        for space in _spaces(missing):
            laboratory = _Laboratory(in_space(context, space=space), labels)
            for variant in missing:
                if variant.space == space:
                    started = time.monotonic()
                    rows = pa.Table.from_pylist(list(laboratory.measure(variant)), schema=tables.STUDY.schema)
                    commit_table(paths[variant], rows, tables.STUDY, key=keys[variant], started=started)
                    advance(1)
    towers, of_towers, reused = measure_towers(context, labels, folder)
    whole = _publish(context, labels, key, [*paths.values(), *towers])
    manifests = [*(committed(paths[variant], keys[variant]) for variant in several), *of_towers]
    return Made(whole, sum(manifest.seconds for manifest in manifests if manifest), reused and not missing)


def _spaces(several: list[Variant]) -> list[str]:
    return list(dict.fromkeys(variant.space for variant in several))


class _Laboratory:
    """The data that the variants of one feature space share; the space's features have to be extracted before."""

    def __init__(self, context: Context, labels: Labels) -> None:
        self.context, self.labels = context, labels
        self.queries = load_query_features(context, labels.queries, labels.samples)
        self.samples = sample_features(context, labels.samples)
        self.query_ids = [query.query_id for query in joined_queries(labels.queries)]
        rows = {split: rows_of_split(labels.queries, split) for split in ("train", "validation", "test")}
        self.rows = rows
        self.scores = {
            split: candidate_scores(context.workspace, labels.ranks, self._names(split))
            for split in ("validation", "test")
        }
        self.pairs: dict[bool, RankPairs] = {}
        self.heads: dict[Variant, RankHead] = {}
        self.nearness: Tensor | None = None

    def _names(self, split: str) -> list[str]:
        return [self.query_ids[row] for row in self.rows[split].tolist()]

    def measure(self, variant: Variant) -> Iterator[dict[str, object]]:
        """Yield rows of the variant's head; of the untuned features too, where the question is the feature space."""
        scores, queries = self.scores["test"], self.queries[self.rows["test"]]
        cosines = {"tuned": tuned_cosines(scores, self._head(variant), queries, self.samples)}
        if variant.question == "feature space" and variant.seed == 0:
            cosines[UNTUNED] = untuned_cosines(scores, queries, self.samples)
        answered = {"question": variant.question, "choice": variant.value, "seed": variant.seed}
        for space, similarity in cosines.items():
            yield from (answered | row for row in self._precision(space, similarity))

    def _head(self, variant: Variant) -> RankHead:
        """Return the variant's head; the configured head, an answer to several questions, is trained once."""
        recipe = dataclasses.replace(variant, question="", value="")
        if recipe not in self.heads:
            self.heads[recipe] = self._train(variant)
        return self.heads[recipe]

    def _train(self, variant: Variant) -> RankHead:
        from fastgda_core.ranking.training import HeadTraining, RankData, train_head

        config, validation = self.context.config, self.scores["validation"]
        data = RankData(
            query_features=self.queries,
            sample_features=self.samples,
            train_pairs=self._pairs(variant),
            validation=self.rows["validation"],
            validation_scores=validation,
            relevant=top_mask(validation.scores, config.evaluation.validation_cutoff),
        )
        training = HeadTraining(**config.head.training, accelerator=self.context.device.type)
        training = dataclasses.replace(training, loss=variant.loss, seed=config.head.seed + variant.seed)
        if variant.outside is not None:
            training = dataclasses.replace(training, outside_probability=variant.outside)
        return train_head(data, training).head

    def _precision(self, space: str, similarity: Tensor) -> Iterator[dict[str, object]]:
        for cutoff in self.context.config.evaluation.cutoffs:
            precision = average_precision(similarity, top_mask(self.scores["test"].scores, cutoff))
            yield from metric_rows("mAP", space, precision, self._names("test"), cutoff=cutoff)

    def _pairs(self, variant: Variant) -> RankPairs:
        standardised = LOSSES[variant.loss].standardised_scores
        if standardised not in self.pairs:
            self.pairs[standardised] = rank_pairs(
                self.context.workspace,
                self.labels.ranks,
                self.query_ids,
                self.rows["train"],
                self.labels.samples.rows,
                standardised=standardised,
            )
        pairs = self.pairs[standardised]
        if variant.nearest is not None:
            return thin(pairs, self._nearness(pairs), variant.nearest, ranked=not standardised)
        queries = some_queries(self.rows["train"], variant.queries, variant.seed)
        return thin(pairs, random_priority(pairs, variant.seed), variant.candidates, queries, ranked=not standardised)

    def _nearness(self, pairs: RankPairs) -> Tensor:
        """Return the cosine of the untuned features of each pair, (pairs,); the same for labels of both kinds."""
        if self.nearness is None:
            queries, samples = F.normalize(self.queries, dim=1), F.normalize(self.samples, dim=1)
            found = [
                (queries[query] * samples[sample]).sum(1)
                for query, sample in zip(
                    pairs.query.split(PAIRS_AT_ONCE), pairs.sample.split(PAIRS_AT_ONCE), strict=True
                )
            ]
            self.nearness = torch.cat(found)
        return self.nearness


def _publish(context: Context, labels: Labels, key: str, paths: Sequence[AnyPath]) -> Artifact:
    """Write all rows in one file, which SQL shows as `study`."""
    workspace = context.workspace
    rows = pa.concat_tables([tables.read(path, tables.STUDY) for path in paths])
    whole = input_key("study", key, [path.name for path in paths], table=tables.STUDY)
    path = workspace.study(key) / f"study-{whole}.parquet"
    if committed(path, whole) is None:
        commit_table(path, rows, tables.STUDY, key=whole, started=time.monotonic())

    def with_study(before: Published | None) -> Published | None:
        if before is None or before.snapshot != labels.ranks.key:
            return before
        return before.model_copy(update={"study": None, "compared_heads": workspace.relative(path)})

    update_published(workspace, with_study)
    return Artifact("study", whole, path, rows.num_rows)


@task(task_run_name="picture of the study", cache_policy=NO_CACHE)
def draw_study(context: Context, labels: Labels, study: Artifact) -> Made:
    """Draw `study.png` beside the report of the run: a panel for each question."""
    cutoff = context.config.evaluation.validation_cutoff
    path = context.workspace.report(labels.run).with_name("study.png")
    key = input_key("study picture", study.key, cutoff)

    def make(started: float) -> Manifest:
        several = joined_queries(labels.queries)
        names = [several[row].query_id for row in rows_of_split(labels.queries, "test").tolist()]
        scores = candidate_scores(context.workspace, labels.ranks, names)
        relevant = top_mask(scores.scores, cutoff).sum(1)
        counts = zip(scores.known.sum(1).tolist(), relevant.tolist(), strict=True)
        floor = statistics.fmean(expected_random_average_precision(known, relevant) for known, relevant in counts)
        found = answers(tables.read(study.path, tables.STUDY), cutoff)
        picture = study_plot(found, cutoff, floor, _ceiling(context, labels.run, cutoff))
        return commit(path, lambda temporary: temporary.write_bytes(picture), key=key, rows=1, started=started)

    return once(Artifact("picture of the study", key, path, 1), path, make)


def _ceiling(context: Context, run: str, cutoff: int) -> float | None:
    """Return mAP(L) of two whole teachers; None where the run was not judged."""
    checks = [check for check in read_checks(context.workspace, run) if check.name == "self-consistency"]
    return mean_value(checks[0].path, "mAP", OTHER_TEACHER, cutoff) if checks else None
