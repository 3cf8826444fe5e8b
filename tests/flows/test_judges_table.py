"""The judges' table in the terminal, and in a file that a user names."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgda_core.errors import UsageError
from flows.commands import judges
from flows.commands.judges import check_output, print_judges, write_table
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tests.tasks.configs import document
from tests.tasks.judging.test_judge_table import leading, table

RETRAIN = {"steps": 2}


def test_a_row_of_each_method_is_printed_whole_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    print_judges(table())
    lines = capsys.readouterr().out.splitlines()
    (sketch,) = (line for line in lines if "│ sketch " in line)
    cells = [cell.strip() for cell in sketch.split("│")[1:-1]]
    assert cells == ["sketch", "0.47 ± 0.03 ± 0.04 (0.37 to 0.57)", "", "0.02 ± 0.01 ± 0.03"]
    assert any("what a score can reach" in line and "0.84 ± 0.03" in line for line in lines)
    assert not any("warning" in line for line in lines)


def test_in_a_terminal_the_best_is_bold_and_what_is_close_underlined() -> None:
    shown = {
        cell.plain: str(cell.style)
        for section in table().sections[:1]
        for method in section.methods
        for cell in judges._cells(section, method)[:1]
    }
    assert list(shown.values()) == ["bold", "underline", "underline", ""]


def test_a_doubtful_teacher_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    print_judges(table(*leading(0.01, (0.04, 0.03))))
    assert "warning: the teacher is ahead of captions alone by 0.01 ± 0.04 ± 0.03" in capsys.readouterr().out


def test_a_file_has_the_format_of_its_ending(tmp_path: Path) -> None:
    workspace = Workspace.at(tmp_path / "workspace")
    for ending in ("csv", "md", "html"):
        path = workspace.judge_table("run", ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ending)
        write_table(workspace, "run", tmp_path / f"table.{ending}")
        assert (tmp_path / f"table.{ending}").read_text() == ending


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    plain = PipelineConfig.model_validate(document())
    judged = PipelineConfig.model_validate(document(judge={"retrain": RETRAIN}))
    check_output(None, plain)
    check_output(tmp_path / "table.md", judged)
    (tmp_path / "folder.md").mkdir()
    for output, config, message in (
        (tmp_path / "table.txt", judged, r"end it in \.csv, \.md, \.html"),
        (tmp_path / "folder.md", judged, "is a folder: name a file"),
        (tmp_path / "table.md", plain, "give the config a section judge"),
    ):
        with pytest.raises(UsageError, match=message):
            check_output(output, config)
