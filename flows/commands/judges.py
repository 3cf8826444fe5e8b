"""The table of the judges in the terminal and in a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgda_core.errors import UsageError
from fastgda_core.extras import require_extra
from flows.commands.terminal import out, warn
from storage_schemas.files import read_whole, replace_through
from storage_schemas.workspace import Workspace

if TYPE_CHECKING:
    from tasks.config.pipeline import PipelineConfig
    from tasks.judging.judge_table import JudgeTable, Section

ENDINGS = {".csv": "csv", ".md": "md", ".html": "html", ".svg": "svg", ".png": "png"}
_STYLES = {"best": "bold", "close": "underline", "": ""}
_WIDE = 1_000  # columns of an output that another program reads


def check_output(output: Path | None, config: PipelineConfig) -> None:
    """Check where the table is to go, before hours of work.

    Raises:
        UsageError: no format has the file's ending, a picture lacks its package, it is a folder, or no model is trained
            again for this run.
    """
    if output is None:
        return
    if output.suffix not in ENDINGS:
        raise UsageError(f"--output {output}: end it in {', '.join(ENDINGS)}")
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder: name a file")
    if output.suffix in (".svg", ".png"):
        require_extra("report", "matplotlib", wanted_by=f"--output {output}")
    if config.judge is None:
        raise UsageError("--output is for the table of models that are trained again: give the config a section judge")


def write_table(workspace: Workspace, run: str, output: Path) -> None:
    """Copy the table of a run that was judged to a file, in the format of its ending."""
    content = read_whole(workspace.judge_table(run, ENDINGS[output.suffix]))
    replace_through(output.resolve(), lambda path: path.write_bytes(content), lambda path: None)


def print_judges(table: JudgeTable) -> None:
    """Print the table, the best of a column bold and what is close to it underlined, and what is doubtful."""
    console = Console(highlight=False, width=None if out.is_terminal else _WIDE)
    for rendered in _tables(table):
        console.print(rendered)
    for doubt in table.doubts:
        warn(doubt)


def _tables(table: JudgeTable) -> Iterator[Table]:
    from tasks.judging.judge_table import REACH

    for section in table.sections:
        shown = Table(title=section.shared, title_justify="left")
        shown.add_column("method")
        for head in section.heads:
            shown.add_column(head, justify="right")
        for method in section.methods:
            shown.add_row(method, *_cells(section, method))
        if any(column.reach for column in section.columns):
            shown.add_section()
            shown.add_row(REACH, *(column.text(REACH) for column in section.columns), style="dim")
        yield shown


def _cells(section: Section, method: str) -> list[Text]:
    return [Text(column.text(method), _STYLES[column.place(method)]) for column in section.columns]
