"""A run's status as Markdown for Prefect, and as a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from storage_schemas.which_workspace import command, option
from storage_schemas.workspace import Workspace
from tasks.printable import printable
from tasks.watching.run_status import RunStatus, WorkerStatus
from tasks.watching.stage_progress import StageProgress

BAR = 24
SHOWN = 20  # failures, samples: more than that nobody reads


def duration(seconds: float | None) -> str:
    """Write seconds as `2 d 3 h`, `4 h 5 min`, `6 min 7 s` or `8 s`."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def amount(count: float) -> str:
    """Write a number whole below 100,000, else as `506 k`, `91.4 M` or `1.0 G`: columns of terminals are narrow."""
    if count < 1e5:
        return f"{count:,.0f}"
    if count < 1e6:
        return f"{count / 1e3:,.0f} k"
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.1f} G"


def facts(status: RunStatus) -> list[tuple[str, str]]:
    """Return what is said of a run, as (name, value)."""
    share = status.rows / status.pairs if status.pairs else 1.0
    filled = round(BAR * share)
    shards = ", ".join(f"{count:,} {state}" for state, count in status.shards.items() if count)
    said = [("state", status.state)]
    if status.state != "done":
        said += [(stage.kind, _stage(stage)) for stage in status.stages]
    if shards:  # else nothing but stages, of a preparation
        said.append(("rows", f"{'█' * filled}{'░' * (BAR - filled)} {share:.1%}  {status.rows:,} of {status.pairs:,}"))
        said.append(("shards", shards))
    if (
        shards
        and status.state == "running"
        and (status.rows or not any(stage.done < stage.parts for stage in status.stages))
    ):
        said.append(("speed", f"{status.rows_per_second:,.1f} rows/s"))
        said.append(("time left", duration(status.seconds_left)))
    said.append(("device-hours", f"{status.device_hours:.3f}"))
    if status.cost is not None:
        said.append(("cost", f"{status.cost:,.2f} {status.currency}"))
    if status.failed_attempts:
        said.append(("failed attempts", ", ".join(f"{n} {name}" for name, n in status.failed_attempts.items())))
    for job, states in status.slurm.items():
        said.append((f"Slurm job {job}", ", ".join(f"{count:,} {state.lower()}" for state, count in states.items())))
    said += [(f"rival {name}", run) for name, run in status.rivals.items()]
    return [*said, *status.trust.facts]


def _stage(stage: StageProgress) -> str:
    said = [f"{stage.done:,} of {stage.parts:,} parts"]
    said += [f"{stage.failed:,} failed"] if stage.failed else []
    said += [f"{duration(stage.seconds_left)} left"] if stage.seconds_left is not None else []
    return ", ".join(said)


def slow_parts(status: RunStatus) -> list[str]:
    """Return a line for each part that takes too long, with what to do about one that hangs."""
    lines, again = [], command(Workspace.at(status.workspace), f"retry {status.run}")
    for s in status.stragglers:
        host, _, process = s.worker.rpartition(":")
        told = f"{s.kind} {s.number:05d} on {s.worker}: {duration(s.seconds)}, others took {duration(s.median)}"
        mend = f"; it hangs: `kill -9 {process}` on {host} ends it, and then {again}"
        lines.append(told + (mend if s.hangs else ""))
    return lines


def remedies(status: RunStatus) -> list[str]:
    """Return the commands that mend what is wrong."""
    commands, workspace = [], option(Workspace.at(status.workspace))
    if status.failures or (status.left_out and status.state == "done") or status.state in ("stopped", "cancelled"):
        commands.append(f"fastgda retry {status.run}{workspace}")
    if status.state == "paused":
        commands.append(f"fastgda resume {status.run}{workspace}")
    return commands


def status_markdown(status: RunStatus) -> str:
    """Return the status as Markdown, for an artifact."""
    lines = [f"## {status.run}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts(status)]
    if status.workers:
        lines += ["", "| worker | device | at | for | parts | rows |", "| --- | --- | --- | ---: | ---: | ---: |"]
        lines += [
            f"| {_named(w)} | {w.device} | {w.at or '-'} | {duration(w.part_seconds)} | {w.parts} | {w.rows:,} |"
            for w in status.workers
        ]
    if status.stragglers:
        lines += ["", "**Slow**", ""]
        lines += [f"- {told}" for told in slow_parts(status)]
    if status.failures:
        lines += [
            "",
            "### Failed",
            "",
            "| part | state | attempts | worker | why |",
            "| --- | --- | ---: | --- | --- |",
        ]
        lines += [
            f"| {f.name} | {f.state} | {f.attempts} | {f.worker} | {_cell(f'{f.error_class}: {f.error}')} |"
            for f in status.failures[:SHOWN]
        ]
        if len(status.failures) > SHOWN:
            lines.append(f"| | | | | and {len(status.failures) - SHOWN} more |")
    if status.left_out:
        lines += ["", "### Samples left out", "", "| train_id | found in | why |", "| ---: | --- | --- |"]
        lines += [f"| {s.train_id} | {s.found_in} | {_cell(s.reason)} |" for s in status.left_out[:SHOWN]]
    lines += [line for warning in status.trust.warnings for line in ("", f"> **Warning** {warning}")]
    for line in remedies(status):
        lines += ["", "```", line, "```"]
    return "\n".join(lines) + "\n"


def _named(worker: WorkerStatus) -> str:
    return f"{worker.worker} (Slurm {worker.slurm})" if worker.slurm else worker.worker


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def status_table(status: RunStatus) -> RenderableType:
    """Return the status as a table, for a terminal."""
    colors = {"done": "green", "running": "cyan", "incomplete": "red", "paused": "yellow", "cancelled": "yellow"}
    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim")
    about.add_column()
    for name, value in facts(status):
        about.add_row(name, Text(printable(value), style=colors.get(value, "") if name == "state" else ""))
    parts: list[RenderableType] = [Text(status.run, style="bold"), about]
    if status.workers:
        workers = Table("worker", "device", "at", "for", "parts", "rows", title="workers", title_justify="left")
        for w in status.workers:
            names = Text(printable(_named(w))), Text(printable(w.device))
            workers.add_row(*names, w.at or "-", duration(w.part_seconds), str(w.parts), f"{w.rows:,}")
        parts.append(workers)
    parts += [Text(f"slow: {told}", "yellow") for told in slow_parts(status)]
    if status.failures:
        failed = Table("part", "state", "attempts", "worker", title="failed", title_justify="left")
        failed.add_column("why", overflow="fold")
        for f in status.failures[:SHOWN]:
            why = Text(printable(f"{f.error_class}: {f.error}"))
            failed.add_row(f.name, f.state, str(f.attempts), Text(printable(f.worker)), why)
        parts.append(failed)
        if len(status.failures) > SHOWN:
            parts.append(Text(f"and {len(status.failures) - SHOWN} more"))
    if status.left_out:
        left = Table("train_id", "found in", title="samples left out", title_justify="left")
        left.add_column("why", overflow="fold")
        for sample in status.left_out[:SHOWN]:
            left.add_row(str(sample.train_id), sample.found_in, Text(printable(sample.reason)))
        parts.append(left)
    parts += [Text(f"warning: {printable(warning)}", "yellow") for warning in status.trust.warnings]
    parts += [Text(f"  {command}", "bold") for command in remedies(status)]
    return Group(*parts)
