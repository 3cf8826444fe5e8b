"""The section of how a run is carried out: where, how often tried, when given up. Nothing here changes a score."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.config.section import Section
from tasks.config.slurm import SlurmConfig


class PoolConfig(Section):
    """A deployment of the flow `make parts` in a work pool, and how much of it a run may use."""

    deployment: str = Field(
        default="make parts/process",
        pattern=r"^[^/]+/[^/]+$",
        description="FLOW/DEPLOYMENT that a job is a run of; its work pool says on which machines, with which device",
    )
    queue: str | None = Field(default=None, description="work queue of the pool; default: the deployment's own")
    slots: int = Field(default=1, ge=1, description="jobs in flight: devices of this pool that the run may hold")
    speed: float = Field(default=1.0, gt=0, description="of its devices against the estimate: sizes its jobs")


class OpenLineageConfig(Section):
    """Events of what a pipeline reads and makes, for a receiver of OpenLineage (Marquez, DataHub, ...)."""

    url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="of the receiver; default: what OPENLINEAGE_URL, or openlineage.yml, says. A key is read from "
        "OPENLINEAGE_API_KEY",
    )
    namespace: str | None = Field(
        default=None, min_length=1, description="of the jobs; default: OPENLINEAGE_NAMESPACE, else fastgda"
    )


class ExecutionConfig(Section):
    """The place where the parts of a run are made, and what happens when one of them fails."""

    runner: Literal["local", "ray", "dask", "pool", "slurm"] = Field(
        default="local",
        description="this machine, a Ray or Dask cluster, jobs in Prefect work pools, or job arrays in Slurm",
    )
    address: str | None = Field(
        default=None, description="of the Ray or Dask cluster; default: one of this machine's own, for this run"
    )
    workers: int | None = Field(
        default=None, ge=1, description="processes of runners local, ray and dask; default: one per GPU, else one"
    )
    pools: tuple[PoolConfig, ...] = Field(
        default=(PoolConfig(),), description="of runner pool: one or several, for several kinds of GPU"
    )
    slurm: SlurmConfig = Field(default=SlurmConfig(), description="of runner slurm")
    window: int = Field(default=64, ge=1, description="parts submitted ahead of those that are finished")
    job_minutes: float = Field(
        default=20.0, gt=0, description="of runner pool: work in one job; short jobs share a cluster more fairly"
    )
    retries: int = Field(default=3, ge=0, description="of a part whose failure may pass by itself")
    retry_delay: float = Field(default=5.0, ge=0, description="seconds before the first retry; doubles, with jitter")
    max_deaths: int = Field(
        default=3, ge=1, description="worker processes that may die over a part before it is quarantined"
    )
    timeout_factor: float = Field(
        default=10.0,
        gt=1,
        description="a part may take this many times its estimate; it is stopped between two micro-batches, and at 1.5 "
        "times that limit its process is ended, or, where the part is made in the run's own process, the run",
    )
    timeout_floor: float = Field(default=300.0, gt=0, description="seconds that any part may take")
    straggler_factor: float = Field(default=3.0, gt=1, description="times the median after which a part is named slow")
    lost_after: float = Field(
        default=120.0, ge=2, description="seconds without a sign of life after which a job's worker counts as dead"
    )
    start_within: float = Field(
        default=900.0,
        ge=2,
        description="of runner pool: seconds from a worker's taking a job to the start of its process, in which an "
        "image is pulled or a machine comes up; after them the job is given up, as its worker died in between",
    )
    publish_incomplete: bool = Field(
        default=False, description="publish what there is of a run some of whose parts failed for good"
    )
    forwards_per_second: float | None = Field(
        default=None, gt=0, description="of one device; default: measured in this workspace, else by a short trial"
    )
    price_per_device_hour: float | None = Field(default=None, ge=0, description="for cost estimates")
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$", description="of the price")

    openlineage: OpenLineageConfig | None = Field(
        default=None, description="send OpenLineage events; OPENLINEAGE_URL in the environment asks for them, too"
    )

    @model_validator(mode="after")
    def _options_belong_to_their_runner(self) -> Self:
        if self.address is not None and self.runner not in ("ray", "dask"):
            raise ValueError(f"address belongs to runners ray and dask, not to {self.runner}: remove it")
        own = {"pool": "pools.slots", "slurm": "slurm.tasks"}
        if self.workers is not None and self.runner in own:
            raise ValueError(
                f"workers belongs to runners local, ray and dask; of runner {self.runner}, set {own[self.runner]}"
            )
        if not self.pools:
            raise ValueError("pools is empty: name a deployment of `make parts`, or remove it")
        deployments = [(pool.deployment, pool.queue) for pool in self.pools]
        if len(set(deployments)) != len(deployments):
            raise ValueError("pools names a deployment twice: add up its slots")
        return self
