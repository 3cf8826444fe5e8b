"""Summaries of finished pipelines, kept so that starting one again with nothing to do takes a second.

A pipeline that is started again reuses all that is there. To learn that all is there it loads torch, starts a Prefect
server and reads every weight. A kept summary answers from the input files' paths, sizes and times, and from listings of
what was made; where either differs, the pipeline is started.
"""

from __future__ import annotations

import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from fastgda_core.feature_spaces import SOURCES, encoder_names
from storage_schemas.commit import input_key, manifest_path
from storage_schemas.files import AnyPath, folder_stamps, stamps
from storage_schemas.listings import list_tree
from storage_schemas.runs.finished import FinishedRecord, MadeRecord, read_finished, write_finished
from storage_schemas.runs.rivals import read_rivals
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.tombstones import read_tombstones
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
from tasks.inputs.index_rows import candidate_index
from tasks.inputs.tars import matching_files
from tasks.watching.trust import Trust, trust_in

_CODE = Path(__file__).parents[2]
_PACKAGES = ("fastgda_core", "storage_schemas", "tasks", "flows")


@dataclass(frozen=True)
class RunSummary:
    """The result of a pipeline.

    made: in order; trust: what is known of the teacher; refused: why the index is not served, empty where it is.
    """

    run: str
    made: list[Made]
    trust: Trust
    refused: str

    @property
    def report(self) -> Artifact:
        return self.made[-1].artifact


def inputs_stamp(config: PipelineConfig) -> str | None:
    """Hash everything that a pipeline reads and runs on: configuration, stamps of files, packages, take-downs.

    Returns:
        None where an encoder's weights come from a hub: they may change without a file of ours doing so.
    """
    rivals = list(config.judge.rivals.values()) if config.judge else []
    spaces = [config.features.space, config.candidates.space or config.features.space]
    spaces += [rival.space for rival in rivals if rival.space]
    checkpoints = [folder for teacher in (config.teacher, *rivals) for folder in teacher.checkpoints]
    adapters = [] if config.model.adapter is None else [config.model.adapter]
    weights = {**SOURCES, **config.features.weights}
    sources = {weights[name] for space in spaces for name in encoder_names(space)} - {""}
    if not all(Path(source).is_dir() for source in sources):
        return None
    tars = [path for pattern in (config.data.shards, config.queries.pattern) for path in matching_files(pattern)]
    near = candidate_index(config.candidates)
    code = (path for package in _PACKAGES for path in (_CODE / package).rglob("*.[ph]*") if path.suffix != ".pyc")
    folders = [
        folder_stamps(folder) for folder in (config.model.folder, *adapters, *checkpoints, *map(Path, sorted(sources)))
    ]
    installed = sorted(path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
    take_downs = read_tombstones(Workspace.at(config.workspace)).sha256  # index and report are made anew without them
    of_index = [] if near is None else [near.stamps]
    return input_key("finished", config, stamps([*tars, *sorted(code)]), folders, installed, take_downs, *of_index)


def keep_summary(config: PipelineConfig, inputs: str | None, summary: RunSummary) -> None:
    """Keep the summary of a pipeline, unless it may have left parts undone, or rivals without scores.

    Args:
        inputs: their stamp before the pipeline began; nothing is kept where they changed meanwhile.
    """
    if inputs is None or config.execution.publish_incomplete or inputs_stamp(config) != inputs:
        return
    workspace = Workspace.at(config.workspace)
    if any(rival.failed for rival in read_rivals(workspace, summary.run).values()):
        return
    made = [
        MadeRecord(
            **{**asdict(each.artifact), "path": workspace.relative(each.artifact.path)},
            seconds=each.seconds,
        )
        for each in summary.made
    ]
    record = FinishedRecord(
        inputs=inputs,
        published=read_published(workspace).version,
        listings={path: _listing(workspace.file(path)) for path in {each.path for each in made}},
        run=summary.run,
        made=made,
        refused=summary.refused,
    )
    write_finished(workspace, config.name, record)


def kept_summary(config: PipelineConfig, inputs: str | None) -> RunSummary | None:
    """Return the summary of the same pipeline, where starting it again would change nothing.

    Args:
        inputs: their stamp now.
    """
    workspace = Workspace.at(config.workspace)
    kept = read_finished(workspace, config.name)
    if kept is None or kept.inputs != inputs:
        return None
    try:
        published = read_published(workspace).version
    except NotPublished:
        return None
    listings = kept.listings.items()
    if published != kept.published or any(_listing(workspace.file(path)) != listing for path, listing in listings):
        return None
    made = [
        Made(Artifact(each.name, each.key, workspace.file(each.path), each.rows), each.seconds, reused=True)
        for each in kept.made
    ]
    return RunSummary(kept.run, made, trust_in(workspace, kept.run), kept.refused)


def _listing(path: AnyPath) -> str:
    """Hash the names, sizes and stamps of an artifact's files: of a folder all, else the file and its manifest."""
    if isinstance(path, Path) and not path.is_dir():
        return input_key(stamps(each for each in (path, manifest_path(path)) if each.exists()))
    return input_key(list_tree(path))
