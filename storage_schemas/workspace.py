"""Layout of a workspace: one folder that holds everything a pipeline knows.

What depends on inputs lies in a folder named after its input key, so changed settings never
overwrite the results of others, and a repeated run finds what it made before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from storage_schemas.errors import StoreError
from storage_schemas.files import AnyPath, any_path


@dataclass(frozen=True)
class Workspace:
    """The paths of a workspace's files, whether or not a file is there."""

    root: AnyPath

    # The root may hold other things as well: our files are looked for in these folders only.
    FOLDERS: ClassVar[tuple[str, ...]] = (
        *("samples", "latents", "features", "queries", "curvature", "updates", "base_losses", "candidates"),
        *("scores", "exact_checks", "teacher_checks", "ranks", "runs", "snapshots", "published", "leases"),
        *("heads", "indexes", "metrics", "studies", "reports", "finished", "quarantine", "parts"),
        *("sketches", "retrainings"),
        "tombstones",
        "vectors",
        "calibrations",
    )
    # Of kinds of parts that are older than `parts`, or are asked for by themselves.
    OWN_FOLDERS: ClassVar[Mapping[str, str]] = {
        "latents": "latents",
        "curvature": "curvature",
        "unlearning steps": "updates",
        "base losses": "base_losses",
        "sketches": "sketches",
    }

    @classmethod
    def at(cls, location: str | AnyPath) -> Workspace:
        """Return the workspace at a path or URL; a local path is made absolute.

        Raises:
            StoreError: there is no such kind of store, its package is not installed, or nothing can be written there.
        """
        root = any_path(location)
        if getattr(root, "protocol", "") in ("http", "https"):
            raise StoreError(
                f"{location}: a workspace is written to: name a folder, or a store as s3://bucket/workspace"
            )
        return cls(root.resolve() if isinstance(root, Path) else root)

    def relative(self, path: AnyPath) -> str:
        """Return the name of a workspace's file in JSON and Parquet: its path relative to the workspace."""
        return path.relative_to(self.root).as_posix()  # type: ignore[arg-type]  # both are of one kind

    def file(self, relative: str) -> AnyPath:
        """Return the path of a file that `relative` named."""
        return self.root / relative

    def score_shard(self, run: str, shard: int) -> AnyPath:
        return part(self.scores(run), shard)

    def samples(self, key: str) -> AnyPath:
        return self.root / "samples" / key / "samples.parquet"

    def rejected_samples(self, key: str) -> AnyPath:
        return self.root / "samples" / key / "rejected.parquet"

    def sample_plan(self, key: str) -> AnyPath:
        """JSON that says how the tars are cut into parts: `SamplePlan`."""
        return self.root / "samples" / key / "plan.json"

    @property
    def sample_parts(self) -> AnyPath:
        """Folder of what was read from tars, part by part, each named after its own key."""
        return self.root / "samples" / "parts"

    def sample_part(self, key: str) -> AnyPath:
        return self.sample_parts / f"{key}.parquet"

    @property
    def newest_samples(self) -> AnyPath:
        """JSON that names the samples indexed last, published or not: `Indexed`."""
        return self.root / "samples" / "newest.json"

    def parts(self, kind: str, key: str) -> AnyPath:
        """Folder of what leads to scores; the kind is "latents", "unlearning steps" or any other."""
        return self.root / self.OWN_FOLDERS.get(kind, f"parts/{kind.replace(' ', '_')}") / key

    def features(self, encoder: str, key: str) -> AnyPath:
        return self.root / "features" / encoder / key

    def feature_mean(self, key: str) -> AnyPath:
        """The mean over the training samples, which is subtracted from the features of a space."""
        return self.root / "features" / "means" / f"{key}.safetensors"

    def queries(self, key: str) -> AnyPath:
        return self.root / "queries" / key / "queries.parquet"

    def candidates(self, run: str) -> AnyPath:
        return self.root / "candidates" / run / "part-00000.parquet"

    def index_rows(self, key: str) -> AnyPath:
        """The training sample of each row of an index of one's own, int64 of NumPy; -1 where there is none."""
        return self.root / "parts" / "index_rows" / key / "train_ids.npy"

    def scores(self, run: str) -> AnyPath:
        return self.root / "scores" / run

    def exact_check(self, run: str) -> AnyPath:
        return self.root / "exact_checks" / run

    def teacher_check(self, key: str) -> AnyPath:
        return self.root / "teacher_checks" / f"{key}.parquet"

    def ranks(self, run: str) -> AnyPath:
        return self.root / "ranks" / run

    @property
    def runs(self) -> AnyPath:
        return self.root / "runs"

    def run(self, run: str) -> AnyPath:
        """The record of a run: `RunRecord`."""
        return self.runs / run / "run.json"

    def plan_shards(self, run: str) -> AnyPath:
        return self.runs / run / "plan_shards.parquet"

    def plan_queries(self, run: str) -> AnyPath:
        return self.runs / run / "plan_queries.parquet"

    def attempts(self, run: str, kind: str = "scores") -> AnyPath:
        """Folder of one file a worker, which only that worker writes."""
        return self.runs / run / ("attempts" if kind == "scores" else f"attempts-{kind.replace(' ', '-')}")

    def ledger(self, run: str) -> AnyPath:
        return self.runs / run / "shards.parquet"

    def quarantined_samples(self, run: str) -> AnyPath:
        """The samples that the run's parts left out, as the ledger's last writing found them."""
        return self.runs / run / "quarantined.parquet"

    def assignment(self, run: str) -> AnyPath:
        """The work of the run's workers, with its configuration: `Assignment`, replaced by each coordinator."""
        return self.runs / run / "assignment.json"

    def control(self, run: str) -> AnyPath:
        """The wish that the run pause or stop: `Control`; absent where there is none."""
        return self.runs / run / "control.json"

    def order(self, run: str) -> AnyPath:
        """The parts that processes in a queue of a cluster are to make now: `Order`."""
        return self.runs / run / "order.json"

    def slurm(self, run: str) -> AnyPath:
        """The run's tasks in a Slurm queue, as of the coordinator's last look: `SlurmQueue`."""
        return self.runs / run / "slurm.json"

    def beats(self, run: str) -> AnyPath:
        """Folder of one file a worker process, which it replaces every few seconds: `Beat`."""
        return self.runs / run / "workers"

    def compaction(self, run: str) -> AnyPath:
        """The large files that hold all rows of a finished run: `Compaction`."""
        return self.runs / run / "compaction.json"

    def labelling(self, run: str) -> AnyPath:
        """The way in which the run's scores become rank labels now: `Labelling`; absent where it is as published."""
        return self.runs / run / "labelling.json"

    def checks(self, run: str) -> AnyPath:
        """The checks of the run's teacher: name, key, path and rows of each."""
        return self.runs / run / "checks.json"

    def lake_marker(self, run: str) -> AnyPath:
        """A marker that is there while the run's shards are registered in a lake, which reads them where they lie."""
        return self.runs / run / "in_lake"

    def retrainings(self, key: str) -> AnyPath:
        """Folder of the models that were trained again by one recipe: a file of losses each, and what belongs to it."""
        return self.root / "retrainings" / key

    def retraining_list(self, run: str) -> AnyPath:
        """The models by which a run was judged, with what each was trained without."""
        return self.runs / run / "retrainings.parquet"

    def regeneration_distances(self, run: str) -> AnyPath:
        """How far the pictures of the models by which a run was judged are from the queries'."""
        return self.runs / run / "regeneration_distances.parquet"

    def rivals(self, run: str) -> AnyPath:
        """The runs that other teachers made of this run's samples and queries: `RivalRecord` by name."""
        return self.runs / run / "rivals.json"

    def removals(self, run: str) -> AnyPath:
        """What methods named for some queries, and models are trained again without."""
        return self.runs / run / "removals.parquet"

    def snapshot(self, snapshot: str) -> AnyPath:
        return self.root / "snapshots" / f"{snapshot}.json"

    def quarantine(self, when: str) -> AnyPath:
        """Folder of the damaged files that one `fastgda verify` found, under their old relative paths."""
        return self.root / "quarantine" / when

    def head(self, version: str) -> AnyPath:
        return self.root / "heads" / version

    def vectors(self, key: str) -> AnyPath:
        """Folder of the vectors of training samples by one head, in parts."""
        return self.root / "vectors" / key

    def index(self, version: str) -> AnyPath:
        return self.root / "indexes" / version

    def index_parts(self, version: str) -> AnyPath:
        """Folder of what an index is built from, part by part, until it is there."""
        return self.index(version) / "building"

    def metrics(self, key: str) -> AnyPath:
        return self.root / "metrics" / f"{key}.parquet"

    def calibration(self, metrics: str) -> AnyPath:
        """What the similarities of a head say of rank and score, by the key of its metrics: `Calibration`."""
        return self.root / "calibrations" / f"{metrics}.json"

    def evaluation(self, key: str) -> AnyPath:
        """JSON beside the metrics of this key: which head they are of, on which snapshot: `EvaluationRecord`."""
        return self.root / "metrics" / f"{key}.json"

    def study(self, key: str) -> AnyPath:
        """Folder of a study's parts, one for each head that it trained, and of the table of all."""
        return self.root / "studies" / key

    def report(self, run: str) -> AnyPath:
        return self.root / "reports" / run / "report.html"

    def judge_table(self, run: str, ending: str) -> AnyPath:
        """The table of what judges found of a run, beside its report; the ending is that of a format."""
        return self.root / "reports" / run / f"judges.{ending}"

    def finished(self, name: str) -> AnyPath:
        """The newest summary of the pipeline of a configuration of this name."""
        return self.root / "finished" / f"{name}.json"

    def lease(self, key: str) -> AnyPath:
        """Folder of the processes that make, or made, the thing with this key: `Lease`."""
        return self.root / "leases" / key

    def published(self, number: int) -> AnyPath:
        """JSON that names the published run, head, index and metrics; SQL and `attribute` answer from the newest."""
        return self.root / "published" / f"{number:05d}.json"

    @property
    def tombstones(self) -> AnyPath:
        """Folder of the records of take-downs."""
        return self.root / "tombstones"

    def tombstone(self, number: int) -> AnyPath:
        """JSON that says which samples were taken down, by whom and why: `Tombstone`."""
        return self.tombstones / f"{number:05d}.json"

    @property
    def current(self) -> AnyPath:
        """A copy of the newest of `published`; absent where nothing is published."""
        return self.root / "current.json"

    @property
    def catalog(self) -> AnyPath:
        return self.root / "catalog.duckdb"


def retrained(folder: AnyPath, retraining: str) -> AnyPath:
    """Return the path of one model's losses on all queries, in the folder of its recipe."""
    return folder / f"{retraining}.parquet"


def retrained_weights(folder: AnyPath, retraining: str, part: str) -> AnyPath:
    """Return the path of one model's weights, in a folder as diffusers lays out the part: `unet` or `transformer`."""
    return folder / retraining / part / "diffusion_pytorch_model.safetensors"


def regenerated(folder: AnyPath, retraining: str) -> AnyPath:
    """Return the path of the pictures that one model generated, in the folder of its recipe."""
    return folder / "regenerated" / f"{retraining}.parquet"


def beside_retrained(folder: AnyPath, retraining: str, what: str) -> AnyPath:
    """Return the path of what belongs to one model: the `state` or folder `begun` of its training, its `log`."""
    return folder / f"{retraining}.{what}"


def recipe(folder: AnyPath) -> AnyPath:
    """Return the path of the settings by which the models of a folder were trained."""
    return folder / "recipe.json"


def part(folder: AnyPath, number: int, suffix: str = "parquet") -> AnyPath:
    """Return the path of one part of a sharded table or tensor."""
    return folder / f"part-{number:05d}.{suffix}"


def twins_beside(queries: AnyPath) -> AnyPath:
    """Return the path of the twins of a query set, by the path of its `queries.parquet`."""
    return queries.with_name("twins.parquet")
