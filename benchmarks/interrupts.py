"""Time from Ctrl-C to the prompt at random instants of `fastgda demo`, each of which goes on from the one before.

Every third instant is counted from the start of the command, the others from the first line of progress.

Run: python benchmarks/interrupts.py
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flows.demo import prepare

LONGEST_WAIT = 60.0  # seconds before the signal
PROGRESS = re.compile(r"^(?:\S+Z \w+ )?(.+): \d+/\d+, \d+ s elapsed", flags=re.MULTILINE)


def interrupted(folder: Path, wait: float, *, at_work: bool) -> tuple[str, float, float, int, str]:
    """Seconds before Ctrl-C, the last stage that was shown, seconds to the end, exit code, and what was said."""
    command = [str(Path(sys.executable).with_name("fastgda")), "demo", "--folder", str(folder)]
    with tempfile.TemporaryFile("w+") as errors:
        began = time.time()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        while at_work and process.poll() is None and not os.fstat(errors.fileno()).st_size:
            time.sleep(0.2)
        time.sleep(wait)
        waited = time.time() - began
        before = os.fstat(errors.fileno()).st_size
        over = process.poll() is not None
        started = time.monotonic()
        if not over:
            os.killpg(process.pid, signal.SIGINT)
        code = process.wait()
        seconds = time.monotonic() - started
        errors.seek(0)
        text = errors.read()
    stages = PROGRESS.findall(text[:before])
    stage = "over" if over else stages[-1] if stages else "none"
    said = [line for line in text[before:].splitlines() if not PROGRESS.match(line)]
    return waited, stage, seconds, code, " / ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="of the demo; default: a new one")
    parser.add_argument("--instants", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "demo"
        prepare(folder.resolve())
        print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}\n")
        print("| seconds before Ctrl-C | last stage shown | seconds to the prompt | exit code | said |")
        print("| ---: | --- | ---: | ---: | --- |", flush=True)
        worst = 0.0
        for number in range(arguments.instants):
            wait = chance.uniform(0.5, LONGEST_WAIT)
            waited, stage, seconds, code, said = interrupted(folder, wait, at_work=number % 3 > 0)
            worst = max(worst, seconds)
            print(f"| {waited:.1f} | {stage} | {seconds:.1f} | {code} | {said} |", flush=True)
    print(f"\nWorst case: {worst:.1f} s")


if __name__ == "__main__":
    main()
