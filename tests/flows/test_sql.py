"""`fastgda sql` as a person and as a script uses it."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import Result
from typer.testing import CliRunner

from fastgda_core.errors import UsageError
from flows.commands.main import app
from flows.commands.print_answer import print_answer
from tasks.serving.answers import Agreement, Answer, Hit, Versions
from tests.storage_schemas.workspaces import publish_run

ROOT = Path(__file__).parents[2]
RUN = "a-run-with-a-name-of-fifty-characters-2b3c4d5e6f-00"
QUERIES = tuple(f"query-{number:02d}" for number in range(20))
HOSTILE = 'a "cat", \x1b[31mred\x9b0m\x00 \u202etac\r\nand\ta dog'
CAPTIONS = (HOSTILE, "a long one " * 10_000)
COMMAND = [sys.executable, "-c", "from flows.commands.main import main; main()", "sql"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 scored pairs whose captions are hostile; tests only read it."""
    folder = tmp_path_factory.mktemp("sql") / "workspace"
    publish_run(folder, RUN, queries=QUERIES, captions=CAPTIONS)
    return folder


def invoke(root: Path, statement: str, *options: str) -> Result:
    return CliRunner().invoke(app, ["sql", statement, "--workspace", str(root), *options])


def output(root: Path, statement: str, *options: str) -> str:
    done = invoke(root, statement, *options)
    if done.exception:
        raise done.exception
    return done.stdout_bytes.decode()


def on_terminal(root: Path, statement: str, *options: str, columns: int = 80) -> str:
    """What a terminal without colours is sent."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [*COMMAND, statement, "--workspace", str(root), *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=environment | {"TERM": "dumb"},
    )
    os.close(theirs)
    sent = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        sent += piece
    os.close(ours)
    assert process.wait() == 0, sent
    return sent.decode()


def test_a_table_shows_the_first_rows_and_says_how_many_there_are(root: Path) -> None:
    for statement in ("SELECT * FROM scores", "SELECT * FROM scores ORDER BY score, train_id, query_id"):
        shown = output(root, statement)
        assert shown.count("│ query-") == 40
        assert "the first 40 of 80 rows: --limit N shows more, --format csv has all" in shown
    shown = output(root, "SELECT * FROM scores", "--limit", "60")
    assert shown.count("│ query-") == 60 and "the first 60 of 80 rows" in shown
    assert " of " not in output(root, "SELECT * FROM scores LIMIT 40")


def test_a_limit_holds_in_every_format(root: Path, tmp_path: Path) -> None:
    assert len(output(root, "FROM scores", "--format", "csv", "--limit", "5").splitlines()) == 6
    assert len(json.loads(output(root, "FROM scores", "--format", "json", "--limit", "5"))) == 5
    output(root, "FROM scores", "--format", "parquet", "--limit", "5", "--output", str(tmp_path / "x.parquet"))
    assert pq.read_metadata(tmp_path / "x.parquet").num_rows == 5


def test_rows_that_cannot_be_counted_in_time_are_shown_all_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.commands.rows.COUNT_SECONDS", 0.2)
    shown = output(root, "SELECT hash(a.range) AS h FROM range(1000000) a, range(1000000) b WHERE h <> 1")
    assert "the first 40 of more rows than are counted in 0 s" in shown


def test_csv_is_what_the_table_holds_with_lf_at_the_end_of_lines(root: Path) -> None:
    assert output(root, "SELECT run, 1 AS one FROM runs", "--format", "csv") == f"run,one\n{RUN},1\n"
    assert output(root, "SELECT unnest(['', NULL]) AS x", "--format", "csv") == 'x\n""\n""\n'
    statement = "SELECT captions[1] AS a, captions[1] AS a, NULL AS n, captions, train_id, 1.50 AS d FROM samples"
    text = output(root, f"{statement} ORDER BY train_id", "--format", "csv")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["a", "a_1", "n", "captions", "train_id", "d"] and len(rows) == 5
    assert rows[1] == [HOSTILE, HOSTILE, "", rows[1][3], "0", "1.50"] and json.loads(rows[1][3]) == list(CAPTIONS)


def test_json_is_one_array_whose_numbers_are_numbers(root: Path) -> None:
    statement = """
        SELECT 1.5 AS x, sum(range) AS sum, 'nan'::DOUBLE AS nan, NULL AS n, true AS yes, 0.1 + 0.2e0 AS y,
               '\\xFF'::BLOB AS bytes, {'a': [1.25, NULL]} AS "na""med", 2 AS x
        FROM range(4)
    """
    assert json.loads(output(root, statement, "--format", "json")) == [
        {
            **{"x": 1.5, "sum": 6, "nan": None, "n": None, "yes": True, "y": 0.1 + 0.2},
            **{"bytes": "<1 bytes>", 'na"med': {"a": [1.25, None]}, "x_1": 2},
        }
    ]
    samples = json.loads(output(root, "SELECT train_id, captions FROM samples ORDER BY ALL", "--format", "json"))
    assert samples == [{"train_id": number, "captions": list(CAPTIONS)} for number in range(4)]
    assert json.loads(output(root, "SELECT 1 WHERE false", "--format", "json")) == []


def test_null_is_not_the_text_none(root: Path) -> None:
    shown = output(root, "SELECT NULL AS a, '' AS b, [1, NULL] AS c")
    assert "None" not in shown and "│ NULL │   │ [1,null] │" in shown


def test_a_query_is_explained(root: Path) -> None:
    for prefix in ("EXPLAIN", "explain analyze", "EXPLAIN (ANALYZE)"):
        shown = output(root, f"{prefix} SELECT count(*) FROM scores WHERE score > 1")
        assert "score" in shown and len(shown.splitlines()) > 5
    for statement in ("EXPLAIN DELETE FROM shards", "EXPLAIN (ANALYZE) DELETE FROM shards"):
        with pytest.raises(Exception, match="only a query can be explained"):
            output(root, statement)


def test_ids_are_whole_and_text_is_short_where_a_program_reads(root: Path) -> None:
    statement = "SELECT run, s.key, s.captions[2] AS long, image_sha256, s.captions[1] AS c FROM runs, samples s"
    lines = output(root, statement).splitlines()
    assert len(lines) == 4 + 4 + 1 and "long text is cut" in lines[-1]
    assert all(RUN in line and "0" * 63 in line and "…" in line and len(line) < 1000 for line in lines[3:7])


def test_what_a_terminal_obeys_is_escaped(root: Path) -> None:
    statement = "SELECT captions[1] AS caption, 'x' AS \"na\x1bme\" FROM samples"
    for shown in (output(root, statement), on_terminal(root, statement, columns=200)):
        assert '│ a "cat", \\u001b[31mred\\u009b0m\\u0000 \\u202etac\\r\\nand\\ta dog' in shown
        assert not set(shown) & set("\x1b\x9b\x00\u202e\r\t") and "na\\u001bme" in shown


def test_json_on_a_terminal_is_the_same_json_and_csv_is_escaped(root: Path) -> None:
    statement = "SELECT captions FROM samples LIMIT 1"
    text = on_terminal(root, statement, "--format", "json")
    assert json.loads(text) == [{"captions": list(CAPTIONS)}]
    assert not set(text) & set("\x1b\x9b\x00\u202e\r\t")
    text = on_terminal(root, "SELECT captions[1] AS caption FROM samples LIMIT 1", "--format", "csv")
    assert "\\u001b[31mred\\u009b0m" in text and not set(text) & set("\x1b\x9b\x00\u202e\r\t")


def test_ids_are_whole_on_a_narrow_terminal(root: Path) -> None:
    narrow = on_terminal(root, "SELECT run, image_sha256, captions[1] AS caption FROM runs, samples")
    lines = narrow.splitlines()
    assert lines[0] == "── 1 ──" and lines[1].split() == ["run", RUN] and lines[2].split()[1] == "0" * 64
    assert len(lines) == 4 * 4
    folded = on_terminal(root, f"SELECT run, '{'word ' * 20}' AS text FROM runs")
    assert all(len(line) <= 80 for line in folded.splitlines()) and f"│ {RUN} │" in folded


def test_answers_of_the_index_are_shown_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    key, shard = "folder/" + "k" * 60, f"/data/{'s' * 60}.tar"
    hits = [Hit(1, 7, key, [HOSTILE], shard, 0, 0.5), Hit(2, 8, key, [CAPTIONS[1]], shard, 9, 0.4, duplicates=[3, 4])]
    agreement = Agreement("mAP(100)", 0.8766, 0.01, "similarity")
    print_answer(Answer("fast", hits, [], [], agreement, Versions(1, RUN, "s", "h", "i"), "l", 0.1))
    table, facts = capsys.readouterr().out.split("\n\n")
    shown = table + "\n"
    assert facts.startswith("tier fast agrees with the teacher similarity at mAP(100) 0.877 ± 0.010")
    assert "(+2 that look the same)" in shown
    assert not set(shown) & set("\x1b\x9b\x00\u202e\r\t") and "\\u001b[31mred" in shown
    assert len(shown.splitlines()) == 6 and shown.count(key) == shown.count("s" * 60 + ".tar") == 2


def test_an_output_is_whole_or_as_it_was(root: Path, tmp_path: Path) -> None:
    fails = "SELECT CASE WHEN range = 200000 THEN error('too far') ELSE range END AS x FROM range(300000)"
    for format in ("csv", "json", "parquet", "table"):
        path = tmp_path / f"rows.{format}"
        output(root, "FROM scores", "--format", format, "--output", str(path))
        before = path.read_bytes()
        done = invoke(root, f"{fails} ORDER BY x", "--format", format, "--output", str(path), "--limit", "250000")
        assert isinstance(done.exception, UsageError) and "too far" in str(done.exception)
        assert path.read_bytes() == before and "answer" not in str(done.exception)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json", ".parquet", ".table"]


def test_what_parquet_has_no_type_for_is_one_line(root: Path, tmp_path: Path) -> None:
    done = invoke(root, "SELECT INTERVAL 1 DAY AS i", "--format", "parquet", "--output", str(tmp_path / "x.parquet"))
    assert isinstance(done.exception, UsageError) and "cast that column" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_as_output_is_refused(root: Path, tmp_path: Path) -> None:
    done = invoke(root, "SELECT 1", "--output", str(tmp_path))
    assert isinstance(done.exception, UsageError) and "is a folder" in str(done.exception)


INTERRUPTED = """
import os, signal, sys, threading
import duckdb, pyarrow
from flows.commands import rows
from flows.commands.main import main

first = rows._print_table
def start(*arguments):
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    first(*arguments)
rows._print_table = start
sys.argv.insert(1, "sql")
main()
"""
MEASURED = """
import sys
from pathlib import Path
from flows.commands.main import app
STATEMENT = "SELECT range AS x, 'row ' || range AS text, range / 7 AS third FROM range(1000000)"
for format in ("csv", "json", "parquet"):
    output = f"{sys.argv[2]}/rows.{format}"
    app(["sql", STATEMENT, "--workspace", sys.argv[1], "--format", format, "--output", output], standalone_mode=False)
status = Path("/proc/self/status").read_text()  # getrusage counts what this process was before its exec
print(int(status.split("VmHWM:")[1].split()[0]) // 1024)
"""


def test_rows_are_written_as_they_come(root: Path, tmp_path: Path) -> None:
    """A million rows as Python objects are more."""
    command = [sys.executable, "-c", MEASURED, str(root), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 350
    assert pq.read_metadata(tmp_path / "rows.parquet").num_rows == 1_000_000
    for name in ("rows.csv", "rows.json"):
        assert (tmp_path / name).read_bytes().count(b"\n") in (1_000_001, 1_000_002)


@pytest.mark.parametrize(("format", "rows"), [("csv", 10**11), ("table", 10**6)])
def test_a_reader_that_has_enough_ends_it_quietly(root: Path, format: str, rows: int) -> None:
    statement = f"SELECT range AS x FROM range({rows})"
    process = subprocess.Popen(
        [*COMMAND, statement, "--workspace", str(root), "--format", format],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=30)


def test_a_query_ends_with_ctrl_c_and_without_a_traceback(root: Path) -> None:
    statement = "SELECT sum(hash(a.range)) FROM range(10000000) a, range(1000000) b"
    run = [sys.executable, "-c", INTERRUPTED, statement, "--workspace", str(root)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_lake_writes_rows_the_same_way(tmp_path: Path) -> None:
    pytest.importorskip("duckdb_extension_ducklake", reason="needs the extra `lake`")
    publish_run(tmp_path / "workspace", "run-1")
    options = ["--workspace", str(tmp_path / "workspace"), "--catalog", f"sqlite:{tmp_path / 'lake.sqlite'}"]
    assert CliRunner().invoke(app, ["lake", "add", "run-1", *options]).exception is None
    rows = CliRunner().invoke(app, ["lake", "sql", "FROM run_scores", *options, "--format", "csv"]).stdout_bytes
    assert rows.startswith(b"run,query_id,train_id,score,standard_error\nrun-1,q0,0,0.0,\n") and rows.count(b"\n") == 13
    table = CliRunner().invoke(app, ["lake", "sql", "FROM run_scores", *options, "--limit", "2"]).stdout
    assert "the first 2 of 12 rows" in table
