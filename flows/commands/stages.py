"""Commands that plan and start the stages of a run."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.commands.judges import check_output, print_judges, write_table
from flows.commands.options import (
    DEFAULT_WORKSPACE,
    ConfigArgument,
    JsonOption,
    RunArgument,
    Runner,
    RunnerOption,
    WorkspaceOption,
    read_config,
)
from flows.commands.own_server import run_flow, server_is_configured, start_server, wait_for_server
from flows.commands.terminal import out, say, warn
from storage_schemas.which_workspace import command
from storage_schemas.workspace import Workspace

if TYPE_CHECKING:
    from tasks.artifact import Made
    from tasks.config.pipeline import PipelineConfig
    from tasks.reporting.finished import RunSummary
    from tasks.watching.trust import Trust


def _checked(path: Path, runner: Runner | None = None) -> PipelineConfig:
    """The configuration, checked before a server starts and before the flows and what they need are loaded."""
    from tasks.config.packages import require_packages

    config = read_config(path, runner)
    require_packages(config)
    return config


def _begin(path: Path, runner: Runner | None = None) -> PipelineConfig:
    """The configuration, checked, while a server starts."""
    config = _checked(path, runner)
    start_server()
    return config


def run(config: ConfigArgument, runner: RunnerOption = None) -> None:
    """The whole pipeline on your model (a diffusers folder) and your data (WebDataset shards).

    Where it is finished and no input has changed, it says so within a second or two.

    Example: `fastgda run my_config.yaml`
    """
    run_pipeline(_checked(config, runner))


def plan(
    config: ConfigArgument,
    device: Annotated[
        str | None, typer.Option(help="A device whose speed was measured, as h100; default: this machine's own speed.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of an hour of the device.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate what a run will take, without running it: parts, rows, forward passes, bytes, device-hours, cost.

    The tars are read for that where no run has indexed them yet. Nothing is written. Where the config has a section
    `expected`, model and tars need not be there.

    Example: `fastgda plan my_config.yaml --price 2.5`
    """
    checked = read_config(config)
    from tasks.execution.estimate import estimate

    if price is not None:
        execution = checked.execution.model_copy(update={"price_per_device_hour": price})
        checked = checked.model_copy(update={"execution": execution})
    estimated = estimate(checked, device)
    if as_json:
        print(json.dumps(estimated.as_json(), indent=2))
        return
    for renderable in estimated.shown():
        out.print(renderable, highlight=False, soft_wrap=True)


def curate(config: ConfigArgument, runner: RunnerOption = None) -> None:
    """Score and publish: the part of the pipeline that needs GPUs. A second time it computes only what is missing.

    Example: `fastgda curate my_config.yaml`
    """
    checked = _begin(config, runner)
    from flows.curation import curate as curation

    done = run_flow(curation, checked)
    print_made(done.run.name, done.made, done.trust)
    say(f"published: {done.ranks.key}")


def train(
    config: ConfigArgument,
    snapshot: Annotated[str | None, typer.Option(help="Whose rank labels; default: the published ones.")] = None,
) -> None:
    """Train a rank head on published scores.

    Example: `fastgda train my_config.yaml`
    """
    checked = _begin(config)
    from flows.training import train_rank_head

    head = run_flow(train_rank_head, checked, snapshot)
    _say_head(head, config)


def import_head(
    checkpoint: Annotated[Path, typer.Argument(help="A `.pth` of the FastGDA release.")], config: ConfigArgument
) -> None:
    """A rank head of the FastGDA release as a head of this workspace, over the config's feature space, not centred.

    Example: `fastgda import-head dino+clip_text.pth my_config.yaml`
    """
    checked = read_config(config)
    from tasks.distilling.heads import import_head as import_checkpoint

    _say_head(import_checkpoint(checked, checkpoint), config)


def evaluate(
    config: ConfigArgument,
    index: Annotated[str | None, typer.Option(help="Version of the index; default: the newest.")] = None,
) -> None:
    """Measure an index on the test queries, and serve it if it is good enough. Exit code 1 if it is not.

    Example: `fastgda evaluate my_config.yaml`
    """
    checked = _begin(config)
    from flows.evaluation import evaluate as evaluation

    evaluated = run_flow(evaluation, checked, index)
    say(f"index {evaluated.index.key}: mAP {evaluated.tuned:.3f} tuned, {evaluated.untuned:.3f} untuned")
    asking = command(Workspace.at(checked.workspace), "attribute IMAGE --caption CAPTION")
    say(evaluated.refused or f"promoted: {asking} answers from it")
    if evaluated.refused:
        raise typer.Exit(1)


def study(config: ConfigArgument, as_json: JsonOption = False) -> None:
    """Compare what makes a head good here: feature spaces, losses, queries, candidates, each with several seeds.

    Example: `fastgda study my_config.yaml`
    """
    checked = _begin(config)
    from flows.study import study as compare
    from storage_schemas import tables
    from tasks.judging.study_results import answers

    compared = run_flow(compare, checked)
    cutoff = checked.evaluation.validation_cutoff
    rows = answers(tables.read(compared.metrics.artifact.path, tables.STUDY), cutoff)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table("question", "value", f"mAP({cutoff})", "± over seeds", title="Heads compared", title_justify="left")
    before = ""
    for row in rows:
        question, before = row.question if row.question != before else "", row.question
        table.add_row(question, row.value, f"{row.mean:.3f}", f"{row.deviation:.3f}" if row.seeds > 1 else "")
    out.print(table)
    say(f"Picture: {compared.picture.artifact.path}")


def judge(
    config: ConfigArgument,
    output: Annotated[
        Path | None, typer.Option(help="File for the judges' table (.csv, .md, .html) or its scatter (.svg, .png).")
    ] = None,
) -> None:
    """Check the teacher of a finished run: against the exact one, itself, and models that are trained again.

    Where models are trained again (section `judge`), what they say of the teacher, the features, the head and every
    other tier of answers is printed as a table, and kept beside the run's report. Rivals (`judge.rivals`) are scored
    first and are rows of it. Exit code 1 where one of them has no scores.

    Example: `fastgda judge my_config.yaml`
    """
    checked = _checked(config)
    check_output(output, checked)
    start_server()
    from flows.evaluation import judge as judgement
    from storage_schemas import tables
    from tasks.judging.judge_table import judge_table
    from tasks.judging.retrained import RETRAINING_CHECK

    judged = run_flow(judgement, checked)
    for made in judged.made:
        check = made.artifact
        say(f"{check.name}: {check.rows:,} rows")
        # Figures; folders hold pairs, and losses of models. Those of models that were trained again make a table.
        if check.path.suffix == ".parquet" and check.name != RETRAINING_CHECK:
            for row in tables.read(check.path, tables.METRICS).to_pylist():
                if not row["query_id"]:
                    cutoff = f"({row['cutoff']})" if row["cutoff"] else ""
                    say(f"  {row['metric']}{cutoff}, {row['space']}: {row['value']:.3f}")
    workspace = Workspace.at(checked.workspace)
    if checked.judge is None or (table := judge_table(workspace, judged.run)) is None:
        return
    print_judges(table)
    if output is not None:
        write_table(workspace, judged.run, output)
    say(f"Table and picture: {workspace.judge_table(judged.run, 'html')}; .md, .csv and the scatter lie beside it")
    if judged.failed:
        warn(f"without scores: {'; '.join(judged.failed)}: mend what is said above and ask again, for these alone")
        raise typer.Exit(1)


def backfill(
    config: ConfigArgument,
    first: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="First day.")] = None,
    last: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Last day; default: the first.")] = None,
    partition: Annotated[list[str] | None, typer.Option(help="Or a partition by name; may be repeated.")] = None,
) -> None:
    """Curate the queries of several partitions, beside those that are published already.

    Example: `fastgda backfill my_config.yaml --first 2026-11-01 --last 2026-11-07`
    """
    checked = _begin(config)
    from flows.curation import backfill as backfilling

    begin, end = first.date() if first else None, last.date() if last else None
    for outcome in run_flow(backfilling, checked, begin, end, partition):
        say(f"{outcome.partition}: run {outcome.run}")


def retry(
    run: RunArgument,
    shard: Annotated[list[str] | None, typer.Option(help="Only this shard, or these: 7 or 0-2,5.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    runner: RunnerOption = None,
) -> None:
    """Make only what a run lacks: shards that failed or were never reached, samples left out; then what follows.

    Example: `fastgda retry openmoji-1b2c3d4e5f`
    """
    from storage_schemas.runs.liveness import is_preparation
    from tasks.config.files import with_runner
    from tasks.config.packages import require_packages
    from tasks.config.stored import config_of
    from tasks.execution.number_ranges import chosen_shards

    config = config_of(workspace, run)
    config = with_runner(config, runner.value) if runner else config
    require_packages(config)
    shards = ",".join(shard) if shard else None
    place = Workspace.at(workspace)
    chosen_shards(place, run, shards)
    start_server()
    from flows.pipeline import attribution_pipeline
    from tasks.execution.retry import release

    wait_for_server()  # before anything is changed
    if is_preparation(place, run):
        from flows.curation import prepare

        run_flow(prepare, config, run)
        say(f"all parts of {run} are there; start the command that needed them again")
        return
    release(workspace, run, shards)
    if config.publish == "never":  # a rival's: `fastgda judge` reads it
        from flows.curation import curate as curation

        done = run_flow(curation, config)
        made = done.run.name
        print_made(made, done.made, done.trust)
    else:
        summary = run_flow(attribution_pipeline, config)
        made = summary.run
        print_summary(summary)
    if made != run:
        warn(f"the data or the model of run {run} changed since it was planned: run {made} was made instead")


def _say_head(head: Made, config: Path) -> None:
    again = f"`fastgda index {shlex.quote(str(config))}`"
    say(f"head {head.artifact.key}{' (was there)' if head.reused else ''}: {again} builds its index")


def run_pipeline(config: PipelineConfig) -> None:
    """Run the pipeline of a checked configuration, unless it is finished, and print what it made."""
    from tasks.reporting.finished import inputs_stamp, keep_summary, kept_summary

    inputs = inputs_stamp(config)
    # A server that is configured is to show each run, also one with nothing to do.
    if not server_is_configured() and (kept := kept_summary(config, inputs)) is not None:
        print_summary(kept)
        say("nothing to do: it was finished before, and no input has changed since")
        return
    start_server()
    from flows.pipeline import attribution_pipeline

    summary = run_flow(attribution_pipeline, config)
    keep_summary(config, inputs, summary)
    print_summary(summary)


def print_summary(summary: RunSummary) -> None:
    print_made(summary.run, summary.made, summary.trust)
    if summary.refused:
        say(f"not promoted: {summary.refused}")
    say(f"Report: {summary.report.path}")


def print_made(run: str, made: list[Made], trust: Trust) -> None:
    table = Table("stage", "rows", "seconds", "", title=f"run {run}", title_justify="left")
    for column in table.columns[1:3]:
        column.justify = "right"
    for each in made:
        artifact, reused = each.artifact, "[dim]reused" if each.reused else "new"
        table.add_row(artifact.name, f"{artifact.rows:,}", f"{each.seconds:.1f}", reused)
    out.print(table)
    for name, value in trust.facts:
        say(f"{name}: {value}")
    for warning in trust.warnings:
        warn(warning)


stage_commands = (run, plan, curate, judge, train, study, import_head, evaluate, backfill, retry)
