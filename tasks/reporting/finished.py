"""Summaries of finished pipelines, kept so that starting one again with nothing to do takes a second.

A pipeline that is started again reuses all that is there. To learn that all is there it loads torch, starts a Prefect
server and reads every weight. A kept summary answers from the input files' paths, sizes and times, and from listings of
what was made; where either differs, the pipeline is started.
"""

from __future__ import annotations

import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fastgda_core.feature_spaces import SOURCES, encoder_names
from storage_schemas.commit import input_key, manifest_path
from storage_schemas.files import AnyPath, read_if_there, stamps, write_atomically
from storage_schemas.listings import list_tree
from storage_schemas.snapshots.published import NotPublished, read_published
from storage_schemas.workspace import Workspace
from tasks.artifact import Artifact, Made
from tasks.config.pipeline import PipelineConfig
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


class _KeptArtifact(BaseModel):
    """An artifact, with a hash of the listing of its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    key: str
    path: str
    rows: int
    seconds: float
    listing: str


class _Kept(BaseModel):
    """`finished/<configuration's name>.json`: the newest summary of a pipeline, and what it holds for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: str
    published: int
    run: str
    made: list[_KeptArtifact]
    refused: str


def inputs_stamp(config: PipelineConfig) -> str | None:
    """Hash everything that a pipeline reads and runs on: configuration, stamps of files, packages.

    Returns:
        None where an encoder's weights come from a hub: they may change without a file of ours doing so.
    """
    spaces = (config.features.space, config.candidates.space or config.features.space)
    weights = {**SOURCES, **config.features.weights}
    sources = {weights[name] for space in spaces for name in encoder_names(space)} - {""}
    if not all(Path(source).is_dir() for source in sources):
        return None
    tars = [config.data.shards, (config.queries.shards or "").replace("{partition}", config.queries.partition or "")]
    read = [path for pattern in tars for path in matching_files(pattern)]
    code = (path for package in _PACKAGES for path in (_CODE / package).rglob("*.[ph]*") if path.suffix != ".pyc")
    folders = (config.model.folder, *map(Path, sorted(sources)))
    read += sorted({*code, *(path for folder in folders for path in folder.rglob("*") if path.is_file())})
    installed = sorted(path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
    return input_key("finished", config, stamps(read), installed)


def keep_summary(config: PipelineConfig, inputs: str | None, summary: RunSummary) -> None:
    """Keep the summary of a pipeline, unless it may have left parts undone.

    Args:
        inputs: their stamp before the pipeline began; nothing is kept where they changed meanwhile.
    """
    if inputs is None or config.execution.publish_incomplete or inputs_stamp(config) != inputs:
        return
    workspace = Workspace.at(config.workspace)
    made = [
        _KeptArtifact(
            **{**asdict(each.artifact), "path": workspace.relative(each.artifact.path)},
            seconds=each.seconds,
            listing=_listing(each.artifact.path),
        )
        for each in summary.made
    ]
    kept = _Kept(
        inputs=inputs,
        published=read_published(workspace).version,
        run=summary.run,
        made=made,
        refused=summary.refused,
    )
    write_atomically(workspace.finished(config.name), kept.model_dump_json(indent=2).encode())


def kept_summary(config: PipelineConfig) -> RunSummary | None:
    """The summary of the same pipeline, where starting it again would change nothing."""
    workspace = Workspace.at(config.workspace)
    content = read_if_there(workspace.finished(config.name))
    if content is None:
        return None
    try:
        kept, published = _Kept.model_validate_json(content), read_published(workspace).version
    except (ValidationError, NotPublished):
        return None
    if (kept.inputs, kept.published) != (inputs_stamp(config), published):
        return None
    if any(_listing(workspace.file(each.path)) != each.listing for each in kept.made):
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
