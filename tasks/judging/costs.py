"""What each method costs: to prepare, to keep, and to ask a new query."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from statistics import median

import pyarrow as pa
import torch
from PIL.Image import Image
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage_schemas import tables
from storage_schemas.commit import Manifest, commit_table, input_key, read_manifest
from storage_schemas.listings import committed_parts
from storage_schemas.runs.ledger import read_ledger
from tasks.artifact import Artifact, Made, once
from tasks.context import Context
from tasks.inputs.candidates import candidate_space
from tasks.inputs.features import extract_features, feature_folders
from tasks.inputs.queries import Query, load_queries
from tasks.judging.ensembles import ensembles_of, pool_key
from tasks.judging.latency import Answer, Latency, by_features, by_head, measured, scored_anew
from tasks.judging.methods import named_spaces, spaces_key
from tasks.judging.metric_rows import metric_row
from tasks.judging.rivals import Rivals
from tasks.judging.sketches import SKETCH
from tasks.judging.tiers import HEADS, TWO_STAGES, Tiers
from tasks.parts import Parts
from tasks.progress import stage
from tasks.teaching.cost import Size, scores_of
from tasks.teaching.families import family_of
from tasks.teaching.run import Run, read_run_anew
from tasks.teaching.sketch_scores import StoredSketches
from tasks.watching.trust import TEACHER

COSTS = "costs"  # name of the artifact
LATENCY, WHOLE_PASS = "latency", "latency of a whole pass"
PREPARED, STORED = "seconds to prepare", "stored bytes a sample"
MOST_SECONDS = 60.0  # of a query's scores: where the run took longer for them, they are not made once more
OF_SKETCHES = ("sketch basis", "sketches")  # kinds of parts that the teacher itself answers without


@dataclass(frozen=True)
class Cost:
    """The cost of a method; two that share work or files share it here, too.

    seconds: of the devices, by what was made before a new query can be asked.
    kept: bytes on disk that an answer is made of, by what is kept.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    latency: Latency | None = None

    def and_then(self, other: Cost) -> Cost:
        """Return the cost of asking both."""
        both = self.latency and other.latency and self.latency.and_then(other.latency)
        return Cost({**self.seconds, **other.seconds}, {**self.kept, **other.kept}, both)


@task(task_run_name="costs", cache_policy=NO_CACHE)
def measure_costs(run: Run, ranks: Artifact) -> Made:
    """Measure what each method that judges compare costs, on this machine; once for the same methods.

    Args:
        run: one whose pool of retrained models is complete.
        ranks: its rank labels.
    """
    tiers, rivals, samples = Tiers.of(run), Rivals.of(run), run.artifacts["samples"]
    methods = [pool_key(run), tiers.key(run), rivals.key, spaces_key(run)]  # the pool chooses ensembles
    key = input_key("costs 1", ranks.key, *methods, table=tables.METRICS)
    path = run.workspace.teacher_check(key)

    def make(started: float) -> Manifest:
        found = _costs(run, tiers, rivals)
        for name, several in ensembles_of(run, ranks).items():
            found[name] = reduce(Cost.and_then, [found[each] for each in several])
        rows = [row for name, cost in found.items() for row in _rows(name, cost, samples.rows)]
        table = pa.Table.from_pylist(rows, schema=tables.METRICS.schema)
        return commit_table(path, table, tables.METRICS, key=key, started=started, device=_machine(run.context))

    return once(Artifact(COSTS, key, path, 0), path, make)


def _machine(context: Context) -> str:
    device = context.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"


def _costs(run: Run, tiers: Tiers, rivals: Rivals) -> dict[str, Cost]:
    """Return the cost of each method but chance."""
    every = load_queries(run.artifacts["queries"])
    queries = [query for query in every if query.split == "test"] or every
    spaces, found = named_spaces(run), {TEACHER: _of_teacher(run, queries)}
    with stage("costs of methods", len(rivals.scored) + len(spaces) + len(tiers.names)) as advance:
        for name, record in rivals.scored.items():
            found[name] = _of_teacher(read_run_anew(str(run.workspace.root), record.run), queries)
            advance(1)
        for name, several in spaces.items():
            found[name] = _of_features(several, run.artifacts["samples"], queries)
            advance(1)
        found |= _of_tiers(run, tiers, queries)
        advance(len(tiers.names))
    return found


def _of_features(spaces: Sequence[Context], samples: Artifact, queries: Sequence[Query]) -> Cost:
    """Return the cost of cosines: features of all samples, then encoders and one product."""
    kept = reduce(Cost.and_then, [_features(space, samples) for space in spaces])
    return Cost(kept.seconds, kept.kept, measured(by_features(spaces, samples), queries, spaces[0].device))


def _features(space: Context, samples: Artifact) -> Cost:
    extract_features.fn(space, samples)
    folders = feature_folders(space, samples).items()
    return reduce(
        Cost.and_then,
        [_made(f"{name} {key}", committed_parts(folder, key).values()) for name, (folder, key) in folders],
    )


def _made(name: str, manifests: Iterable[Manifest]) -> Cost:
    several = list(manifests)
    return Cost({name: sum(each.seconds for each in several)}, {name: sum(each.size for each in several)})


def _of_teacher(run: Run, queries: Sequence[Query]) -> Cost:
    """Return the cost of a teacher's scores, by what its run's parts took; of features where it only compares these."""
    config, samples = run.config, run.artifacts["samples"]
    if config.teacher.name == "similarity":
        return _of_features([candidate_space(run.context)], samples, queries)
    before = _before_scores(run)
    cost = reduce(Cost.and_then, [_parts(each) for each in before if not each.of_queries], Cost())
    if config.candidates.policy != "all" and config.candidates.index is None:
        cost = cost.and_then(_features(candidate_space(run.context), samples))
    size = Size(samples.rows, 1.0, run.artifacts["queries"].rows, samples.rows)
    runs_the_model = scores_of(family_of(config).costs(config, size)).forwards > 0
    own = sum(_median_seconds(each) for each in before if each.of_queries)
    seconds = _seconds_of_a_query(run)
    answer = scored_anew(run, most=MOST_SECONDS) if seconds < MOST_SECONDS else Latency(seconds)
    return Cost(cost.seconds, cost.kept, Latency(own + answer.seconds, answer.error, runs_the_model))


def _before_scores(run: Run) -> list[Parts]:
    """Return the parts that lead to a run's scores, without those from which sketches answer."""
    made = family_of(run.config).parts(run.context, run.artifacts)
    return [each for each in made if each.kind not in OF_SKETCHES]


def _parts(parts: Parts) -> Cost:
    return _made(f"{parts.kind} {parts.artifact.key}", parts.committed().values())


def _median_seconds(parts: Parts) -> float:
    """Return what a row of these parts takes; the first of a process loads what all need."""
    seconds = [manifest.seconds / max(1, manifest.rows) for manifest in parts.committed().values()]
    return median(seconds) if seconds else 0.0


def _seconds_of_a_query(run: Run) -> float:
    """Return the seconds of the score shards that a query is in, the mean over queries.

    A shard of many queries is taken as a whole: to ask one of them takes as long, but for products.
    """
    ledger = read_ledger(run.workspace, run.name)
    seconds = dict(zip(ledger["shard"].to_pylist(), ledger["seconds"].to_pylist(), strict=True))
    plan = run.score_run
    total = sum(seconds[shard.number] * len(shard.query_numbers) for shard in plan.shards)
    return float(total / max(1, len(plan.query_ids)))


def _of_tiers(run: Run, tiers: Tiers, queries: Sequence[Query]) -> dict[str, Cost]:
    """Return the costs of what answers in the teacher's place, which was taught by it or keeps its gradients."""
    found: dict[str, Cost] = {}
    device, fast = run.context.device, None
    taught = reduce(Cost.and_then, [_parts(each) for each in _before_scores(run)], Cost())
    shards = float(sum(read_ledger(run.workspace, run.name)["seconds"].to_pylist()))
    taught = Cost({**taught.seconds, f"scores {run.name}": shards})
    sketched = taught
    if tiers.sketched:
        mine = [each for each in family_of(run.config).parts(run.context, run.artifacts) if each.kind in OF_SKETCHES]
        curvature = [_parts(each) for each in _before_scores(run) if each.kind == "curvature"]
        sketched = reduce(Cost.and_then, [taught, *map(_parts, mine), *curvature])
    for kind, head in tiers.heads.items():
        answer, size = by_head(run, head)
        manifest = read_manifest(head.path / "head.safetensors")
        assert manifest is not None
        learned = {**(sketched if kind == "gradient" else taught).seconds, f"head {head.key}": manifest.seconds}
        kept = {f"head {head.key}": manifest.size + size}
        found[HEADS[kind]] = Cost(learned, kept, measured(answer, queries, device))
        fast = fast or (HEADS[kind], answer)
    if tiers.sketched:
        stored = StoredSketches(run.context, run.artifacts, run.name)
        found[SKETCH] = Cost(sketched.seconds, sketched.kept, measured(_asked(stored, None, 0), queries, device))
        if fast is not None:
            name, answer = fast
            latency = measured(_asked(stored, answer, tiers.first), queries, device)
            both = found[name].and_then(found[SKETCH])
            found[f"{TWO_STAGES}, first {tiers.first}"] = Cost(both.seconds, both.kept, latency)
    return found


def _asked(stored: StoredSketches, fast: Answer | None, first: int) -> Answer:
    """Return what answers by sketches: of all samples, or of the first ones that a fast tier names."""

    def answer(image: Image, caption: str) -> torch.Tensor:
        chosen = None if fast is None else fast(image, caption).topk(first).indices.numpy()
        with torch.enable_grad():
            asked = stored.ask(image, caption)
        return stored.scores(asked, chosen).scores

    return answer


def _rows(name: str, cost: Cost, samples: int) -> list[dict[str, object]]:
    def one(metric: str, value: float) -> dict[str, object]:
        return metric_row(metric, name, torch.tensor([value], dtype=torch.float64), split="")

    rows = [one(PREPARED, sum(cost.seconds.values())), one(STORED, sum(cost.kept.values()) / samples)]
    if cost.latency is not None:
        rows.append(one(LATENCY, cost.latency.seconds) | {"standard_error": cost.latency.error})
        rows.append(one(WHOLE_PASS, float(cost.latency.whole_pass)))
    return rows
