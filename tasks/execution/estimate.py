"""Estimate what a run will take, before it is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import prod

from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from fastgda_core.curvature.layers import matrix_shape
from fastgda_core.teachers.needs import Needs, Work
from fastgda_core.teachers.registry import TEACHERS
from storage_schemas.runs.noise_plan import NOISE_PLAN
from tasks.artifact import Artifact
from tasks.config.inputs import CandidatesConfig
from tasks.config.pipeline import PipelineConfig, check_sizes
from tasks.context import Context, open_context
from tasks.execution.cost import Rate, mean_captions, rate, run_costs
from tasks.execution.plan import run_artifacts, run_name
from tasks.execution.rivals import check_rivals
from tasks.inputs.queries import count_queries
from tasks.inputs.samples import ingest_samples
from tasks.teaching.cost import KindCost, Size, scores_of
from tasks.teaching.families import family_of
from tasks.teaching.noise import planned
from tasks.teaching.noise_pilot import CHEAPEST, DEAREST
from tasks.watching.status_text import duration

CHEAP_SECONDS, LONG_SECONDS = 2.0, 3600.0  # of one shard: below, overhead shows; above, a failure costs much


@dataclass(frozen=True)
class Estimate:
    """Parts, rows and forward passes of a run, and what they take at a rate.

    needs: of the teacher, of the whole training set.
    layers: which of the model's a query's step moves, and how many; empty where the teacher moves none.
    least: the same under the cheapest noise plan, where a pilot of the run will choose among cheaper and dearer ones.
    """

    size: Size
    kinds: list[KindCost]
    rate: Rate
    price: float | None
    currency: str
    needs: Needs
    least: list[KindCost] | None = None
    layers: str = ""

    @property
    def device_hours(self) -> float:
        return self._hours(self.kinds)

    def _hours(self, kinds: list[KindCost]) -> float:
        return sum(kind.seconds(self.rate.forwards_per_second) for kind in kinds) / 3600

    def _money(self, hours: float) -> str:
        return f", {hours * self.price:,.2f} {self.currency}" if self.price is not None else ""

    def as_json(self) -> dict[str, object]:
        cost = self.device_hours * self.price if self.price is not None else None
        return {**asdict(self), "device_hours": self.device_hours, "cost": cost}

    def shown(self) -> Iterator[RenderableType]:
        """Yield the estimate for a terminal: lines and a table."""
        size = self.size
        yield (
            f"{size.samples:,} training samples ({size.captions:.1f} captions each), {size.queries:,} queries, "
            f"{size.candidates:,} candidates each"
        )
        table = Table("stage", "parts", "rows", "forward passes", "device time", "one part")
        for column in table.columns[1:]:
            column.justify = "right"
        for kind in self.kinds:
            seconds = kind.seconds(self.rate.forwards_per_second)
            one = duration(seconds / kind.parts) if seconds / kind.parts >= 1 else f"{seconds / kind.parts:.2f} s"
            rows, whole = f"{kind.rows:,}", duration(seconds)
            if kind.unknown:
                whole = one = "?"
            table.add_row(kind.kind, f"{kind.parts:,}", rows, f"{kind.forwards:,.0f}", whole, one)
        yield table
        if other := [kind.kind for kind in self.kinds if kind.unknown and not kind.forwards]:
            yield f"the time of {' and of '.join(other)} is not among the device-hours: they run no model"
        if unknown := [kind for kind in self.kinds if kind.unknown and kind.forwards]:
            models = sum(kind.parts for kind in unknown)
            yield (
                f"{models:,} models by judge.retrain.command, which are not among the device-hours: how long one takes "
                "is known when the first was made in this workspace"
            )
        for kind in self.kinds:
            if kind.kept_bytes:
                yield f"{kind.kind} take {decimal(kind.kept_bytes)}, {kind.kept_bytes // kind.rows:,} bytes a sample"
        if self.layers:
            yield f"the teacher's layers are {self.layers}"
        yield self._needs()
        hours, per_second = self.device_hours, self.rate.forwards_per_second
        yield (
            f"{hours:.2f} device-hours{self._money(hours)}, at {per_second:,.1f} forward passes a second "
            f"({self.rate.source})"
        )
        if self.least is not None:
            hours = self._hours(self.least)
            yield (
                f"a pilot chooses the noise plan by teacher.agreement: these are with the dearest plan, and "
                f"{hours:.2f} device-hours{self._money(hours)} with the cheapest; `fastgda status` tells which it is"
            )
        yield from self.advice()

    def _needs(self) -> str:
        """Return in one line what answers by this teacher need, for a query that comes later, too."""
        needs = self.needs
        words = [
            f"fits {needs.fits}" if needs.fits else "fits nothing",
            f"keeps {needs.stored_bytes:,.0f} bytes a sample for its scores",
            f"takes {needs.query_forwards:,.0f} forward passes for one more query against all samples",
            f"and at most {decimal(round(needs.memory_bytes))} beside the model and a micro-batch",
        ]
        return f"the teacher {', '.join(words)}"

    def advice(self) -> Iterator[str]:
        """Yield advice on the size of score shards."""
        scores = scores_of(self.kinds)
        if scores.unknown:
            return
        seconds = scores.seconds(self.rate.forwards_per_second) / scores.parts
        if seconds < CHEAP_SECONDS and scores.parts > 100:
            yield "score shards are short: a larger teacher.shard_samples would spend less on their overhead"
        if seconds > LONG_SECONDS:
            yield "score shards take over an hour: a smaller teacher.shard_samples would lose less when one fails"


def estimate(config: PipelineConfig) -> Estimate:
    """Estimate a run from its configuration and tars; a model of unknown speed is run for a second.

    Raises:
        UsageError: the configuration asks for more than there is.
    """
    context = open_context(config)
    family_of(config).check(context)
    samples = ingest_samples.fn(context).artifact
    queries = count_queries(config.queries)
    candidates = _candidates(config.candidates, samples.rows, queries)
    check_sizes(config, samples.rows, candidates)
    size = Size(samples.rows, mean_captions(samples.path), queries, candidates)
    execution = config.execution
    costs = run_costs(context, size)
    rivals = list(_rival_costs(context, samples, size))
    least = None
    if config.teacher.agreement is not None:
        pilot = [cost for cost in costs if cost.kind == NOISE_PLAN]
        cheapest = replace(context, config=planned(config, *CHEAPEST))
        least = [*run_costs(cheapest, size), *pilot, *rivals]
    price, currency = execution.price_per_device_hour, execution.currency
    needs, layers = _needs(context, size), _layers(context)
    return Estimate(size, [*costs, *rivals], rate(context), price, currency, needs, least, layers)


def _layers(context: Context) -> str:
    """Return the selection of layers that the teacher moves, as chosen or by default, in words."""
    if "layers" not in TEACHERS[context.config.teacher.name].settings:
        return ""
    at = context.at_checkpoints()[0]
    model = at.teacher_model()
    shapes = [matrix_shape(layer) for layer in at.layers(model).values()]
    weights = sum(prod(shape) for shape in shapes)
    return f"{at.config.teacher.layers}: {len(shapes):,} of {type(model.denoiser).__name__}, {weights:,} weights"


def _needs(context: Context, size: Size) -> Needs:
    """Return what the configured teacher needs; of a noise plan that a pilot will choose, the dearest counts."""
    config = context.config
    teacher = (planned(config, *DEAREST) if config.teacher.agreement is not None else config).teacher
    method, weights = TEACHERS[teacher.name], 0
    if "layers" in method.settings:
        at = context.at_checkpoints()[0]
        weights = sum(prod(matrix_shape(layer)) for layer in at.layers(at.teacher_model()).values())
    images = config.model.images
    work = Work(
        weights=weights,
        samples=size.samples,
        noises=teacher.timestep_count * teacher.draws * images * size.captions,
        pairs=teacher.gradient_pairs,
        timesteps=teacher.timestep_count,
        images=images,
        dimensions=teacher.projection,
        sampler_steps=config.queries.steps,
        ascent_steps=teacher.most_steps,
    )
    return method.needs(work)


def _rival_costs(context: Context, samples: Artifact, size: Size) -> Iterator[KindCost]:
    """Yield what each rival takes beyond the run and the rivals before it, which share what has the same key.

    Of a rival whose noise plan a pilot chooses it is the dearest plan.
    """
    queries = Artifact("queries", "", samples.path, size.queries)  # their key, the same for all, is not known yet
    shared = {artifact.key for artifact in run_artifacts(context, samples, queries).values()}
    for name, alone in check_rivals(context.config, samples.rows).items():
        candidates = _candidates(alone.config.candidates, samples.rows, size.queries)
        made = run_artifacts(alone, samples, queries)
        keys = {kind: artifact.key for kind, artifact in made.items()} | {"scores": run_name(alone, made)}
        for cost in run_costs(alone, replace(size, candidates=candidates)):
            if keys[cost.kind] not in shared:
                yield replace(cost, kind=f"{name}: {cost.kind}")
        shared |= set(keys.values())


def _candidates(config: CandidatesConfig, samples: int, queries: int) -> int:
    """Return the candidates of one query; of policy `pooled`, the most that there can be."""
    if config.policy == "all":
        return samples
    k = config.k or samples
    return config.scored or (k if config.policy == "top_k" else min(samples, k * queries))
