"""The `fastgda` command line."""

from __future__ import annotations

import os

# Before Prefect, transformers or diffusers are imported: nothing is sent anywhere and no hub is asked.
os.environ.update(
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    PYTORCH_ENABLE_MPS_FALLBACK="1",
)
os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # what fails is raised, and said once, by us
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
import csv
import json
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastgda_core.errors import UsageError
from storage_schemas.catalog import NotPublished, RefusedStatement

app = typer.Typer(
    name="fastgda",
    help="Which training images made this generated image? Teach, distil, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
out = Console()
err = Console(stderr=True)
DEMO_FOLDER = Path("demo")

WorkspaceOption = Annotated[Path, typer.Option(help="Folder of the workspace.", envvar="FASTGDA_WORKSPACE")]
DEFAULT_WORKSPACE = DEMO_FOLDER / "workspace"


class TableFormat(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where data, model and workspace are laid out.")] = DEMO_FOLDER,
) -> None:
    """The whole pipeline on OpenMoji: data, queries, teacher, head, index, evaluation, report.

    Example: `fastgda demo`
    """
    from flows.openmoji import demo as run_demo

    _print_summary(run_demo(folder.resolve()))
    out.print(
        f"\nAsk it something:  fastgda attribute {folder}/workspace/queries/*/images/q0003.png "
        '--caption "a laughing face with sunglasses"',
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def run(config: Annotated[Path, typer.Argument(help="YAML config; see deployments/openmoji.yaml.")]) -> None:
    """The same on your model (a diffusers folder) and your data (WebDataset shards).

    Example: `fastgda run my_config.yaml`
    """
    from flows.pipeline import attribution_pipeline
    from tasks.config import load_config

    _print_summary(attribution_pipeline(load_config(config)))


@app.command()
def sql(
    statement: Annotated[str, typer.Argument(help="One SELECT statement; `-` reads it from standard input.")],
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    format: Annotated[TableFormat, typer.Option(help="How to print the rows.")] = TableFormat.table,
    output: Annotated[Path | None, typer.Option(help="File to write; needed for parquet.")] = None,
) -> None:
    """Read-only SQL over samples, queries, candidates, scores, ranks, shards, metrics.

    Example: `fastgda sql "SELECT count(*) FROM scores"`
    """
    import duckdb

    from storage_schemas.catalog import query

    if format is TableFormat.parquet and output is None:
        raise UsageError("--format parquet needs --output FILE")
    text = sys.stdin.read() if statement == "-" else statement
    try:
        rows = query(workspace, text)
    except duckdb.Error as error:
        raise UsageError(str(error)) from error
    _write_rows(rows, format, output)


@app.command()
def attribute(
    image: Annotated[Path, typer.Argument(help="A generated image: PNG, JPEG or WebP.")],
    caption: Annotated[str, typer.Option(help="The caption that it was generated from.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many training images.")] = 20,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """The training images that influenced an image most, from the index.

    Example: `fastgda attribute laughing.png --caption "a laughing face with sunglasses" -k 8`
    """
    from dataclasses import asdict

    from fastgda_core.errors import BadSample
    from tasks.attribute import AttributionService
    from tasks.webdataset_shards import decode_image

    try:
        picture = decode_image(image.read_bytes())
    except (OSError, BadSample) as error:
        raise UsageError(f"{image}: {error}") from error
    answers = AttributionService(workspace.resolve()).attribute(picture, caption, k)
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2))
        return
    table = Table("#", "train_id", "cosine", "key", "caption", "shard")
    for answer in answers:
        table.add_row(
            str(answer.position),
            str(answer.train_id),
            f"{answer.similarity:.4f}",
            answer.key,
            answer.caption,
            Path(answer.shard).name,
        )
    out.print(table)


@app.command()
def train_demo_model(
    assets: Annotated[Path, typer.Option("--out", help="Folder for unet/, scheduler/ and samples.png.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 images.")] = 9000,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At the start of the cosine.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    initial: Annotated[Path | None, typer.Option(help="Train on from the weights of this folder.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the demo's data lies or is made.")] = DEMO_FOLDER,
) -> None:
    """Train the demo's denoiser again: over an hour on 2 cores.

    Example: `fastgda train-demo-model --out my_model`
    """
    from fastgda_core.diffusion.training import DenoiserTraining
    from flows.openmoji import train_model

    training = DenoiserTraining(steps=steps, learning_rate=learning_rate, seed=seed)
    grid = train_model(folder.resolve(), assets.resolve(), training, initial)
    out.print(f"Sample grid: {grid}", highlight=False, soft_wrap=True)


def _print_summary(summary: Any) -> None:
    table = Table("stage", "rows", "seconds", "", title=f"run {summary.run}", title_justify="left")
    for column in table.columns[1:3]:
        column.justify = "right"
    for stage in summary.stages:
        table.add_row(stage.name, f"{stage.rows:,}", f"{stage.seconds:.1f}", "[dim]reused" if stage.reused else "new")
    out.print(table)
    out.print(f"Report: {summary.report.path}", highlight=False, soft_wrap=True)


def _write_rows(rows: Any, format: TableFormat, output: Path | None) -> None:
    if format is TableFormat.parquet:
        import pyarrow.parquet as pq

        pq.write_table(rows, output)
        return
    stream = output.open("w", newline="", encoding="utf-8") if output else sys.stdout
    try:
        if format is TableFormat.json:
            json.dump(rows.to_pylist(), stream, default=_plain, ensure_ascii=False, indent=2)
            stream.write("\n")
        elif format is TableFormat.csv:
            writer = csv.writer(stream)
            writer.writerow(rows.column_names)
            writer.writerows([_plain(value) for value in row.values()] for row in rows.to_pylist())
        else:
            table = Table(*rows.column_names)
            for row in rows.to_pylist():
                table.add_row(*(str(_plain(value)) for value in row.values()))
            Console(file=stream).print(table, markup=False)
    finally:
        if output:
            stream.close()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 usage."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Dynamo detected a call")  # diffusers under model.compile, harmless
    try:
        app(standalone_mode=True)
    except (UsageError, NotPublished, RefusedStatement) as error:
        err.print("[red]error:[/] ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except _incomplete() as error:
        err.print("[red]failed:[/] ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _incomplete() -> tuple[type[BaseException], ...]:
    """The failures that have a message of their own, without importing the flows of commands that run none."""
    module = sys.modules.get("flows.pipeline")
    return (module.RunIncomplete,) if module else ()
