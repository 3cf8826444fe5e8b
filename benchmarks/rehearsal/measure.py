"""Seconds, seconds of all cores, and peak memory of each stage of a command, taken from outside the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERVAL = 0.5  # seconds between two looks at the processes
TICKS = os.sysconf("SC_CLK_TCK")
# Lines of the command's log after which a stage is over: the last of a progress, and those of stages without one.
FINISHED = re.compile(r"^(?P<stage>.+): (?P<rows>\d+)/(?P=rows), \d+ s elapsed, 0 s left$")
OTHERS = {
    "candidates and plan": re.compile(r"^run \S+ is begun: (?P<rows>\d+) pairs"),
    "snapshot and publication": re.compile(r"^snapshot \S+ is published: (?P<rows>\d+) rows"),
}


REST = "what is left"  # of a command after its last stage


@dataclass(frozen=True)
class Figures:
    """What one stage of a command took; memory is that of all its processes together, in bytes.

    peak: with files that are mapped, whose pages the system takes back when it needs them; own: without these.
    """

    command: str
    stage: str
    rows: int
    seconds: float
    core_seconds: float
    peak: int
    own: int


class Sampler:
    """Looks at the processes that this one starts while the block runs, and at theirs."""

    def __init__(self) -> None:
        self._ended, self._peak, self._own, self._cores = threading.Event(), 0, 0, 0.0
        self._others = {pid for pid, fields in _processes().items() if int(fields[1]) == os.getpid()}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def since(self) -> tuple[float, int, int]:
        """Return the core seconds until now, and the peaks of memory since the last call, with and without files."""
        self._look()
        peak, own = self._peak, self._own
        self._peak = self._own = 0
        return self._cores, peak, own

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        cores, memory, own = descendants(os.getpid(), self._others)
        # A process that ended is in its parent's sum once the parent has waited for it, and nowhere until then.
        self._cores = max(self._cores, cores)
        self._peak, self._own = max(self._peak, memory), max(self._own, own)


def _processes() -> dict[int, list[str]]:
    """Return what `/proc/PID/stat` tells of each process, after its name."""
    told: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            told[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return told


def descendants(parent: int, others: Collection[int] = ()) -> tuple[float, int, int]:
    """Return the core seconds and the bytes of all processes below a process, with and without those of files.

    Pages that several processes share count once. Neither `others` are looked at nor what is below them.
    """
    told = {pid: fields for pid, fields in _processes().items() if pid not in others}
    # After the name, proc(5) has: state, ppid, utime, stime, cutime, cstime at 11 to 14, vsize at 20, startstack at 25.
    below: set[int] = set()
    wanted = {parent}
    while wanted:
        wanted = {pid for pid, fields in told.items() if int(fields[1]) in wanted}
        below |= wanted
    ticks = sum(int(each) for pid in below for each in told[pid][11:15])
    waited_for = sum(int(each) for each in told[parent][13:15])
    # A process that is about to become another program has its parent's memory until then, which is not its own.
    place = {pid: (fields[20], fields[25]) for pid, fields in told.items()}
    memory = [memory_of(pid) for pid in below if place[pid] != place.get(int(told[pid][1]))]
    return (ticks + waited_for) / TICKS, sum(every for every, _ in memory), sum(own for _, own in memory)


def memory_of(pid: int) -> tuple[int, int]:
    """Return a process's bytes in memory, its share of those that it has with others, and the same without files."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # it is gone
        return 0, 0
    told = {name: 1024 * int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    return told.get("Pss", 0), told.get("Pss_Anon", 0) + told.get("Pss_Shmem", 0)


FASTGDA = [str(Path(sys.executable).with_name("fastgda")), "--log-level", "info", "--log-format", "json"]


def run_measured(words: Sequence[str], command: str, rest: str, log: Path) -> Iterator[Figures]:
    """Run a command, write what it says to `log`, and yield a stage's figures as each is over.

    A stage's figures are those since the stage before it, or since the start of the command: the first one has what the
    command imports, too.

    Args:
        words: of the command line.
        command: its name in the figures.
        rest: the name of what comes after its last stage, or of all where it has none.

    Raises:
        SystemExit: the command failed.
    """
    with Sampler() as sampler, log.open("a") as written:
        (cores, *_), started = sampler.since(), time.monotonic()
        process = subprocess.Popen(words, stdout=written, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stderr is not None
        for line in process.stderr:
            written.write(line)
            written.flush()
            if (found := _over(line)) is not None:
                now = time.monotonic()
                so_far, *memory = sampler.since()
                yield Figures(command, *found, now - started, so_far - cores, *memory)
                started, cores = now, so_far
        if process.wait():
            sys.exit(f"{' '.join(words)} failed: see {log}")
        so_far, *memory = sampler.since()
        yield Figures(command, rest, 0, time.monotonic() - started, so_far - cores, *memory)


@contextmanager
def watched(command: str, stage: str, rows: int) -> Iterator[list[Figures]]:
    """Give a list that holds the figures of the block when it is over."""
    found: list[Figures] = []
    with Sampler() as sampler:
        (before, *_), started = sampler.since(), time.monotonic()
        yield found
        seconds, (cores, *memory) = time.monotonic() - started, sampler.since()
    found.append(Figures(command, stage, rows, seconds, cores - before, *memory))


def _over(line: str) -> tuple[str, int] | None:
    """Return the stage that is over after a line of the log, with its rows."""
    try:
        message = json.loads(line)["message"]
    except (ValueError, KeyError, TypeError):
        return None
    if found := FINISHED.match(message):
        return found["stage"], int(found["rows"])
    return next(((stage, int(found["rows"])) for stage, line in OTHERS.items() if (found := line.match(message))), None)


class Kept:
    """The figures of a folder by command and stage: what is made again takes the place of what was kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        told = json.loads(path.read_text()) if path.is_file() else []
        self._figures = {(each["command"], each["stage"]): Figures(**each) for each in told}

    def add(self, figures: Figures) -> None:
        """Keep a stage's figures; those of a stage that was found made are not those of its making."""
        place = figures.command, figures.stage
        if figures.stage == REST and place in self._figures:
            return
        self._figures[place] = figures
        self._path.write_text(json.dumps([asdict(each) for each in self._figures.values()], indent=1))

    def table(self) -> str:
        """Return the figures as Markdown."""
        lines = ["| command | stage | rows | seconds | core seconds | peak GB | without mapped files |"]
        lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for each in self._figures.values():
            rows = f"{each.rows:,}" if each.rows else ""
            numbers = f"{each.seconds:,.1f} | {each.core_seconds:,.1f} | {each.peak / 1e9:.2f} | {each.own / 1e9:.2f}"
            lines.append(f"| {each.command} | {each.stage} | {rows} | {numbers} |")
        return "\n".join(lines) + "\n"
