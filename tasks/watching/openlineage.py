"""Jobs as OpenLineage sees them: a flow is a job, and each stage that it makes is a job within."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from prefect.runtime import flow_run

from fastgda_core.errors import Stopped
from tasks.artifact import Artifact, Made, followed_by
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.watching import openlineage_events as events
from tasks.watching.openlineage_events import Job, Sender

P = ParamSpec("P")
T = TypeVar("T")
# What a stage reads, by its name; one that is not here reads all that its job had before it.
READS: dict[str, tuple[str, ...]] = {
    "samples": (),
    "queries": ("samples",),
    "features of samples": ("samples",),
    "features of queries": ("queries",),
    "candidates": ("samples", "queries", "features of samples", "features of queries"),
    "latents": ("samples",),
    "curvature": ("latents",),
    "unlearning steps": ("queries", "latents", "curvature"),
    "base losses": ("latents",),
    "rank labels": ("teacher scores",),
    "rank head": ("samples", "queries", "features of samples", "rank labels"),
    "index": ("samples", "features of samples", "rank head"),
}
OF_MODEL = {"queries", "latents", "curvature", "unlearning steps", "base losses", "teacher scores"}


@dataclass
class _Following:
    """A flow at work, followed: its job, what it has had so far, and what of it was made before, by name."""

    job: Job
    config: PipelineConfig
    sender: Sender
    had: dict[str, Artifact] = field(default_factory=dict)
    read: dict[str, Artifact] = field(default_factory=dict)
    model_hash: str = ""
    told: set[tuple[str, str]] = field(default_factory=set)  # names and paths of the artifacts whose making was told

    def inputs_of(self, stage: str) -> list[Any]:
        names = [name for name in READS.get(stage, tuple(self.had)) if name in self.had and name != stage]
        inputs = [events.made_dataset(self.config, self.had[name], output=False) for name in names]
        if stage in ("samples", "queries"):
            inputs += self.given(stage)
        if stage in OF_MODEL:
            inputs.append(events.given_dataset(self.config.model.folder, self.model_hash))
        return inputs

    def given(self, stage: str) -> list[Any]:
        """Return the user's files that samples or queries are read from."""
        path = self.config.data.shards if stage == "samples" else self.config.queries.pattern
        return [events.given_dataset(path)] if path else []

    def stage(self, artifact: Artifact) -> Job:
        return Job(self.job.namespace, f"{self.job.name}.{artifact.name.replace(' ', '_')}", str(uuid4()), self.job)


_following: ContextVar[_Following | None] = ContextVar("following", default=None)


def told(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Send events of the runs of a flow, where its parameter `config` or the environment asks for it.

    The run's id is that of the Prefect flow run. A flow that another one starts is a part of its job.
    """

    def decorate(flow: Callable[P, T]) -> Callable[P, T]:
        parameters = inspect.signature(flow)

        @functools.wraps(flow)
        def followed(*args: P.args, **kwargs: P.kwargs) -> T:
            config = parameters.bind(*args, **kwargs).arguments["config"]
            if not events.wanted(config):
                return flow(*args, **kwargs)
            with _followed(name, config) as following, followed_by(functools.partial(_making, following)):
                result = flow(*args, **kwargs)
                following.had |= {made.artifact.name: made.artifact for made in _made_in(result)}
                for made in _made_in(result):
                    _tell_afterwards(following, made)
                return result

        return followed

    return decorate


def uses(context: Context, *artifacts: Artifact) -> None:
    """Note what the flow at work reads of what was made before it."""
    following = _following.get()
    if following is not None:
        following.model_hash = context.model_hash
        following.had |= {artifact.name: artifact for artifact in artifacts}
        following.read |= {artifact.name: artifact for artifact in artifacts}


@contextmanager
def _followed(name: str, config: PipelineConfig) -> Iterator[_Following]:
    """Send START, and how it ended, of a flow that runs in the block."""
    outer = _following.get()
    sender = outer.sender if outer else events.sender_of(config)
    namespace = events.namespace_of(config)
    run = flow_run.get_id() if outer is None or flow_run.get_id() != outer.job.run else None
    job = Job(namespace, f"{config.name}.{name}", run or str(uuid4()), outer.job if outer else None)
    following = _Following(job, config, sender, dict(outer.had) if outer else {})
    token = _following.set(following)
    try:
        sender.send(events.event(job, "START"))
        yield following
        raw = [*following.given("samples"), *following.given("queries")] if name == "curate" else []
        read = [each for each in following.read.values() if _identity(each) not in following.told]
        inputs = [events.made_dataset(config, each, output=False) for each in read]
        made = [each for each in following.had.values() if _identity(each) in following.told]
        outputs = [events.made_dataset(config, each, output=True) for each in made]
        sender.send(events.event(job, "COMPLETE", inputs=[*raw, *inputs], outputs=outputs))
    except BaseException as error:
        sender.send(_end_of(job, error))
        raise
    finally:
        _following.reset(token)
        if outer is None:
            sender.flush()
        else:
            outer.had |= following.had
            outer.told |= following.told


def _end_of(job: Job, error: BaseException) -> Any:
    """Return the event of a job that an error ended: FAIL, or ABORT where somebody stopped it."""
    stopped = isinstance(error, (KeyboardInterrupt, Stopped, SystemExit)) or type(error).__name__ == "RunCancelled"
    return events.event(job, "ABORT" if stopped else "FAIL", error=f"{type(error).__name__}: {error}")


@contextmanager
def _making(following: _Following, artifact: Artifact) -> Iterator[Callable[[Artifact], None]]:
    """Send START, and COMPLETE or FAIL, of a stage that is made in the block."""
    following = _following.get() or following
    job, inputs, done = following.stage(artifact), following.inputs_of(artifact.name), list[Artifact]()
    following.sender.send(events.event(job, "START", inputs=inputs))
    try:
        yield done.append
    except BaseException as error:
        following.sender.send(_end_of(job, error))
        raise
    outputs = [events.made_dataset(following.config, made, output=True) for made in done]
    following.sender.send(events.event(job, "COMPLETE", inputs=inputs, outputs=outputs))
    following.told |= set(map(_identity, done))
    following.had |= {made.name: made for made in done}


def _tell_afterwards(following: _Following, made: Made) -> None:
    """Send the events of a stage that was made without being followed."""
    artifact = made.artifact
    if made.reused or _identity(artifact) in following.told:
        return
    job, inputs, now = following.stage(artifact), following.inputs_of(artifact.name), datetime.now(UTC)
    started = now - timedelta(seconds=made.seconds)
    following.sender.send(events.event(job, "START", inputs=inputs, at=started))
    outputs = [events.made_dataset(following.config, artifact, output=True)]
    following.sender.send(events.event(job, "COMPLETE", inputs=inputs, outputs=outputs, at=now))
    following.told.add(_identity(artifact))


def _identity(artifact: Artifact) -> tuple[str, str]:
    """Return what stays of an artifact while it is made: the key of some is that of their content."""
    return artifact.name, str(artifact.path)


def _made_in(result: object) -> Iterable[Made]:
    """Return what a flow made, in order, from its result."""
    if isinstance(result, Made):
        return [result]
    metrics = getattr(result, "metrics", None)
    return getattr(result, "made", None) or ([metrics] if isinstance(metrics, Made) else [])
