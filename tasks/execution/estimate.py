"""Estimate what a run will take, before it is started; nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from fastgda_core.diffusion.precision import Precision
from fastgda_core.errors import UsageError
from fastgda_core.teachers.needs import Needs, Work
from fastgda_core.teachers.registry import TEACHERS
from storage_schemas.runs.noise_plan import NOISE_PLAN
from tasks.artifact import Artifact
from tasks.config.inputs import CandidatesConfig
from tasks.config.pipeline import PipelineConfig, check_sizes
from tasks.context import Context
from tasks.execution.cost import Rate, costs_of, rate, run_costs
from tasks.execution.encodings import Encodings
from tasks.execution.known import ModelShape, known_speed
from tasks.execution.plan import run_artifacts, run_name
from tasks.execution.rivals import check_rivals
from tasks.execution.seen import Seen, known_shape, look, shape_of
from tasks.execution.traffic import Bytes, Traffic, contracted
from tasks.execution.ways import Way, ways
from tasks.inputs.candidates import check_neighbours
from tasks.teaching.cost import KindCost, Size, scores_of
from tasks.teaching.noise import planned
from tasks.teaching.noise_pilot import CHEAPEST, DEAREST
from tasks.watching.status_text import amount, duration

USUAL_DEVICE = "h100"  # of a plan without the model, where none is named
LONGEST_WORD = 11  # of a stage's name
CHEAP_SECONDS, LONG_SECONDS = 2.0, 3600.0  # of one shard: below, overhead shows; above, a failure costs much


@dataclass(frozen=True)
class Estimate:
    """Parts, rows and forward passes of a run, and what they take at a rate.

    needs: of the teacher, of the whole training set.
    least: the same under the cheapest noise plan, where a pilot of the run will choose among cheaper and dearer ones.
    traffic: bytes of each kind of part, of latents too; None where they are not known.
    ways: exact, first-order and sketch work on the same data.
    encodings: of captions; None where they are not known.
    unseen: what was not there to look at.
    refused: why a run of this size would be refused on this machine; empty: nothing is known of that.
    layers: which of the model's a query's step moves; empty where the teacher moves none.
    """

    size: Size
    kinds: list[KindCost]
    rate: Rate
    price: float | None
    currency: str
    needs: Needs
    least: list[KindCost] | None = None
    traffic: dict[str, Bytes | None] = field(default_factory=dict)
    ways: list[Way] = field(default_factory=list)
    encodings: Encodings | None = None
    unseen: tuple[str, ...] = ()
    refused: str = ""
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
        for line in self.unseen:
            yield f"not looked at: {line}"
        if self.refused:
            yield f"a run is refused here: {self.refused}"
        yield (
            f"{size.samples:,} training samples ({size.captions:.1f} captions each), {size.queries:,} queries, "
            f"{size.candidates:,} candidates each"
        )
        yield from self._stages()
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
        yield from self._ways()
        yield from self.advice()

    def _stages(self) -> Iterator[RenderableType]:
        """Yield the table of the kinds of parts, and what does not fit into it."""
        table = _figures("stage", "parts", "rows", "forward passes", "read", "written", "device time", "one part")
        for kind in self.kinds:
            seconds = kind.seconds(self.rate.forwards_per_second)
            one = duration(seconds / kind.parts) if seconds / kind.parts >= 1 else f"{seconds / kind.parts:.2f} s"
            whole = duration(seconds)
            if kind.unknown:
                whole = one = "?"
            moved = _told(self.traffic.get(kind.kind))
            table.add_row(kind.kind, *map(amount, (kind.parts, kind.rows, kind.forwards)), *moved, whole, one)
        yield table
        if (latents := self.traffic.get("latents")) is not None:
            yield "latents: {} read, {} written, before these".format(*_told(latents))
        if self.encodings is not None:
            yield self.encodings.told()
        for kind in self.kinds:
            if kind.contraction > kind.forwards:
                yield (
                    f"{kind.kind}: products with all queries' updates take {kind.contraction:,.0f} more passes' FLOPs, "
                    "which is in the device time: a smaller teacher.shard_queries, or sketches, would spend less"
                )

    def _ways(self) -> Iterator[RenderableType]:
        """Yield what the same data take by other ways of work."""
        if not self.ways:
            return
        names = ["the same by", "forward passes", "products, passes", "read", "written", "device hours"]
        table = _figures(*names, *([f"cost, {self.currency}"] if self.price is not None else []))
        for way in self.ways:
            figures = [way.seconds / 3600] + ([way.seconds / 3600 * self.price] if self.price is not None else [])
            moved = decimal(round(way.read_bytes)), decimal(round(way.written_bytes))
            table.add_row(way.name, amount(way.forwards), amount(way.contraction), *moved, *map(_fine, figures))
        yield table
        if self.price is None:
            yield "no price: give --price, or execution.price_per_device_hour, for the cost"

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


def estimate(config: PipelineConfig, device: str | None = None) -> Estimate:
    """Estimate a run from its configuration, model and tars, or from what it expects where these are not there.

    Args:
        device: a name of `known.DEVICES`, whose measured speed counts; None: that of this machine, known or tried.

    Raises:
        UsageError: the configuration asks for more than there is, or no such device was measured.
    """
    seen = look(config)
    if seen.context is not None:
        config = seen.context.config  # with the architecture's own layers
    candidates = _candidates(config.candidates, seen.count, seen.queries)
    check_sizes(config, seen.count, candidates)
    size = Size(seen.count, seen.captions, seen.queries, candidates)
    shape = known_shape(config) if seen.context is None else shape_of(seen.context)
    # Of a noise plan that a pilot will choose the dearest counts.
    teacher = planned(config, *DEAREST) if config.teacher.agreement is not None else config
    rivals = list(_rival_costs(seen.context, seen.samples, size)) if seen.context and seen.samples else []

    speed = _speed(config, seen, shape, device)
    found = speed(config.teacher.precision)

    def with_products(costs: list[KindCost], config: PipelineConfig) -> list[KindCost]:
        if found.of_whole_parts:
            return costs
        more = contracted(config, size, shape)
        return [replace(cost, contraction=more) if cost.kind == "scores" else cost for cost in costs]

    costs = with_products(costs_of(config, size), teacher)
    least = None
    if config.teacher.agreement is not None:
        pilot = [cost for cost in costs if cost.kind == NOISE_PLAN]
        cheapest = planned(config, *CHEAPEST)
        least = [*with_products(costs_of(cheapest, size), cheapest), *pilot, *rivals]
    traffic = Traffic(teacher, size, shape, seen.image_bytes)
    moved = {cost.kind: traffic.of(cost) for cost in costs} | {"latents": traffic.latents()}

    def in_precision(precision: Precision) -> float:
        return speed(precision).forwards_per_second

    return Estimate(
        size,
        [*costs, *rivals],
        found,
        config.execution.price_per_device_hour,
        config.execution.currency,
        _needs(teacher, size, shape),
        least,
        moved,
        ways(teacher, size, shape, seen.image_bytes, in_precision, products=not found.of_whole_parts),
        Encodings.of(teacher, size, shape, costs),
        seen.unseen,
        _refused(config, seen),
        _layers(config, shape),
    )


def _layers(config: PipelineConfig, shape: ModelShape) -> str:
    """Return the selection of layers that the teacher moves, as chosen or by default, in words."""
    if "layers" not in TEACHERS[config.teacher.name].settings:
        return ""
    return f"{config.teacher.layers}: {shape.layers:,}, {shape.layer_weights:,} weights"


def _speed(config: PipelineConfig, seen: Seen, shape: ModelShape, device: str | None) -> Callable[[Precision], Rate]:
    """Return how fast the model runs in a precision: as configured, by a table, or as it runs here.

    A speed that was configured or found here is that of the configuration's own precision, and stands for others.
    """
    if device is None and seen.context is not None:
        found = rate(seen.context)
        return lambda _: found
    if device is None and (configured := config.execution.forwards_per_second) is not None:
        found = Rate(configured, "execution.forwards_per_second")
        return lambda _: found
    name = device or USUAL_DEVICE

    def by_table(precision: Precision) -> Rate:
        flops, source = known_speed(name, precision)
        return Rate(flops / shape.flops, source)

    return by_table


def _needs(config: PipelineConfig, size: Size, shape: ModelShape) -> Needs:
    """Return what the configured teacher needs."""
    teacher, images = config.teacher, config.model.images
    method = TEACHERS[teacher.name]
    work = Work(
        weights=shape.layer_weights if "layers" in method.settings else 0,
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


def _refused(config: PipelineConfig, seen: Seen) -> str:
    try:
        check_neighbours(config.candidates, seen.count)
    except UsageError as error:
        return str(error)
    return ""


def _figures(name: str, *figures: str) -> Table:
    """Return an empty table of names and figures that fits into 80 columns: lines between columns would not."""
    table = Table(name, *figures, box=SIMPLE_HEAD, padding=0, show_edge=False)
    table.columns[0].min_width = LONGEST_WORD
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _fine(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else amount(value)


def _told(moved: Bytes | None) -> tuple[str, str]:
    return ("-", "-") if moved is None else (decimal(round(moved.read)), decimal(round(moved.written)))


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
