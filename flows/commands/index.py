"""Commands on the versions of the search index."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flows.commands.index_build import add, build
from flows.commands.options import DEFAULT_WORKSPACE, JsonOption, WorkspaceOption, trimmed
from flows.commands.terminal import say
from flows.commands.text_table import print_rows
from storage_schemas.workspace import Workspace

if TYPE_CHECKING:
    from storage_schemas.publishing.index_versions import IndexVersion


class _Versions(TyperGroup):
    """`fastgda index CONFIG` is `fastgda index build CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
        return super().parse_args(ctx, args if named else ["build", *args])


index_app = typer.Typer(
    name="index",
    help="Versions of the search index. `fastgda index CONFIG` is `fastgda index build CONFIG`.",
    cls=_Versions,
    no_args_is_help=True,
)
index_app.command("build")(build)
index_app.command("add")(add)

VersionArgument = Annotated[
    str, typer.Argument(help="Of the index; `fastgda index list` names them.", callback=trimmed)
]


@index_app.command("list")
def list_versions(workspace: WorkspaceOption = DEFAULT_WORKSPACE, as_json: JsonOption = False) -> None:
    """Every version: kind, vectors, recall, mAP on the test queries, head, size, age, and which one is served.

    Example: `fastgda index list`
    """
    from storage_schemas.publishing.index_versions import cutoff_of, index_versions
    from storage_schemas.snapshots.published import published_or_none

    place = Workspace.at(workspace)
    published = published_or_none(place)
    versions, cutoff = index_versions(place, published), cutoff_of(published)
    if as_json:
        print(json.dumps([_as_json(each) for each in versions], indent=2, default=str))
        return
    columns = ["version", "", "kind", "vectors", "recall@10", "@100", f"mAP({cutoff})", "head", "MB", "age", "samples"]
    snapshot = published.snapshot if published else ""
    print_rows(columns, [_row(each, snapshot) for each in versions], sys.stdout)


def _row(each: IndexVersion, snapshot: str) -> list[str]:
    precision = each.precision_on(snapshot)
    return [
        each.version,
        _state(each),
        each.kind or "exact",
        f"{each.vectors:,}",
        _figure(each.recall_at_10),
        _figure(each.recall_at_100),
        _figure(precision.mean if precision else None),
        each.head or "-",
        f"{each.size / 1e6:.1f}",
        _age(each.built_at),
        each.samples or "-",
    ]


def _state(each: IndexVersion) -> str:
    back = f"{each.rollbacks} back" if each.rollbacks and not each.served else ""
    return ", ".join(filter(None, ("served" if each.served else back, "stale" if each.stale else "")))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _age(built_at: datetime | None) -> str:
    if built_at is None:
        return "-"
    hours = (datetime.now(UTC) - built_at).total_seconds() / 3600
    return f"{hours / 24:.0f} d" if hours >= 48 else f"{hours:.0f} h" if hours >= 1 else f"{hours * 60:.0f} min"


def _as_json(each: IndexVersion) -> dict[str, Any]:
    means = {snapshot: precision.mean for snapshot, precision in each.precision.items()}
    return {**asdict(each), "precision": means}


@index_app.command()
def promote(
    version: VersionArgument,
    force: Annotated[bool, typer.Option("--force", help="Also where it is worse than what is served.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Serve a version, unless its recall or its mAP is worse than what is served.

    Example: `fastgda index promote 713ef097df6eebbc`
    """
    from storage_schemas.publishing.serving import promote_index

    published = promote_index(Workspace.at(workspace), version, force=force)
    number = published.version
    say(f"index {version} is served: number {number} of what is published; `fastgda index rollback` undoes it")


@index_app.command()
def rollback(workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Serve what was served before; scores stay what they are. Again: what was served before that.

    Example: `fastgda index rollback`
    """
    from storage_schemas.publishing.serving import rollback_index

    published, left = rollback_index(Workspace.at(workspace))
    say(f"index {published.index_version} is served again" + (f", in place of {left}" if left else ""))


@index_app.command()
def prune(
    keep: Annotated[int, typer.Option(min=0, help="How many rollbacks stay possible.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Delete versions that are not served and that no rollback leads to; what was built after the served one stays.

    Vectors that no version is built from go, too, after a day.

    Example: `fastgda index prune --keep 2 --dry-run`
    """
    from storage_schemas.publishing.serving import prune_indexes
    from storage_schemas.publishing.unused_vectors import prune_vectors

    gone = prune_indexes(Workspace.at(workspace), keep, dry_run=dry_run)
    vectors = prune_vectors(Workspace.at(workspace), {each.version for each in gone}, dry_run=dry_run)
    for each in gone:
        say(f"index {each.version}: {each.size:,} bytes")
    verb = "would be" if dry_run else "are"
    say(f"{len(gone)} versions {verb} deleted, {sum(each.size for each in gone):,} bytes")
    if vectors:
        freed = sum(each.size for each in vectors)
        say(f"vectors of {len(vectors)} heads that no index names {verb} deleted, {freed:,} bytes")
