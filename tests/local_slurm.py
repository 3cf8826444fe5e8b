"""Slurm's commands for one machine without Slurm: job arrays are processes of this machine, and a folder is the queue.

As Slurm 22.05 of Debian answers: the same options, output and messages, for what FastGDA asks of it. Where Slurm
itself is installed, `tests/orchestration/test_slurm.py` runs the same against that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = "LOCAL_SLURM"  # in the environment
LAST_SECONDS = 0.5  # between SIGTERM and SIGKILL (KillWait)


def install(folder: Path, **settings: object) -> dict[str, str]:
    """Put the commands into `folder/bin`, and return the environment in which they are found.

    Args:
        settings: max_array (MaxArraySize), limit (tasks in the queue at most).
    """
    (folder / "bin").mkdir(parents=True)
    (folder / "tasks").mkdir()
    (folder / "settings.json").write_text(json.dumps(settings))
    for name in COMMANDS:
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} {name} "$@"\n')
        script.chmod(0o755)
    return {FOLDER: str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def away(folder: Path, is_away: bool) -> None:
    """Let the controller not answer, or answer again."""
    (folder / "away").touch() if is_away else (folder / "away").unlink()


def queue(folder: Path) -> dict[str, dict[str, object]]:
    """All tasks that there ever were, by id: state, reason, pid."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "tasks").glob("*.json"))}


def purge(folder: Path) -> None:
    """Forget the tasks that are over, as Slurm does after MinJobAge."""
    for task, known in queue(folder).items():
        if known["state"] not in ("PENDING", "RUNNING"):
            (folder / "tasks" / f"{task}.json").unlink()


def _write(folder: Path, task: str, **known: object) -> None:
    path = folder / "tasks" / f"{task}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    new = path.with_suffix(".new")
    new.write_text(json.dumps({**before, **known}))
    new.replace(path)


def _options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    named = [each.removeprefix("--").partition("=") for each in arguments if each.startswith("--")]
    return {name: value for name, _, value in named}, [each for each in arguments if not each.startswith("--")]


def sbatch(folder: Path, arguments: list[str]) -> str:
    given, (script,) = _options(arguments)
    lines = Path(script).read_text().splitlines()
    inside, _ = _options([line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")])
    options = {**inside, **given}
    settings = json.loads((folder / "settings.json").read_text())
    last, _, at_once = options["array"].removeprefix("0-").partition("%")
    size = int(last) + 1
    if size > settings.get("max_array", 1001):
        sys.exit("sbatch: error: Batch job submission failed: Invalid job array specification")
    waiting = [known for known in queue(folder).values() if known["state"] in ("PENDING", "RUNNING")]
    if len(waiting) + size > settings.get("limit", 10_000):
        sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
                 "accounting/QOS policy (job submit limit, user's size and/or time limits)")  # fmt: skip
    job = str(1 + len(list(folder.glob("job-*"))))
    shutil.copy(script, folder / f"job-{job}")
    for number in range(size):
        _write(folder, f"{job}_{number}", state="PENDING", reason="Resources", name=options["job-name"], pid=0)
    # The controller of the array, which outlives sbatch.
    controller = [
        sys.executable,
        "-S",
        "-E",
        __file__,
        "control",
        job,
        str(size),
        at_once or str(size),
        json.dumps(options),
    ]
    subprocess.Popen(controller, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return job


def control(folder: Path, arguments: list[str]) -> str:
    """Run the tasks of one array, so many at a time, until all are over."""
    job, size, at_once, options = arguments[0], int(arguments[1]), int(arguments[2]), json.loads(arguments[3])
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    waiting = [f"{job}_{number}" for number in range(size)]
    minutes, _, seconds = options.get("time", "60:00").partition(":")
    limit = 60 * int(minutes) + int(seconds or 0)
    warned: set[str] = set()
    warning = int(re.findall(r"\d+$", options["signal"])[0])
    while waiting or running:
        known = queue(folder)
        for task in [task for task in waiting if known.get(task, {}).get("state") == "CANCELLED"]:
            waiting.remove(task)
        while waiting and len(running) < at_once:
            task = waiting.pop(0)
            log = options["output"].replace("%A", job).replace("%a", task.partition("_")[2])
            ids = {"ARRAY_JOB_ID": job, "ARRAY_TASK_ID": task.partition("_")[2], "ARRAY_TASK_MIN": "0"}
            ids |= {"ARRAY_TASK_MAX": str(size - 1), "JOB_ID": str(1000 + int(job))}
            environment = {**os.environ, **{f"SLURM_{name}": value for name, value in ids.items()}}
            with Path(log).open("wb") as file:
                process = subprocess.Popen(
                    ["bash", str(folder / f"job-{job}")],
                    env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            running[task] = process, time.monotonic()
            _write(folder, task, state="RUNNING", reason="None", pid=process.pid)
        for task, (process, since) in list(running.items()):
            at = time.monotonic() - since
            if at > limit - warning and task not in warned:
                warned.add(task)
                process.send_signal(signal.SIGTERM)
            code = process.poll()
            if code is None and at > limit:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code, state = 0, ("TIMEOUT", "TimeLimit")
            elif code is not None:
                state = ("COMPLETED", "None") if code == 0 else ("FAILED", "NonZeroExitCode")
            if code is not None:
                del running[task]
                if queue(folder).get(task, {}).get("state") == "RUNNING":  # and not cancelled
                    _write(folder, task, state=state[0], reason=state[1])
        time.sleep(0.05)
    return ""


def squeue(folder: Path, arguments: list[str]) -> str:
    options, _ = _options(arguments)
    assert options["format"] == "%i|%T|%r" and options["states"] == "all" and options["user"] == str(os.getuid())
    found = {task: known for task, known in queue(folder).items() if known["name"] == options["name"]}
    return "\n".join(f"{task}|{known['state']}|{known['reason']}" for task, known in found.items())


def scancel(folder: Path, arguments: list[str]) -> str:
    options, named = _options(arguments)
    for task, known in queue(folder).items():
        if named and task not in named:
            continue
        if not named and (known["name"], known["state"]) != (options["name"], options["state"]):
            continue
        if "signal" in options:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(str(known["pid"])), signal.SIGTERM)
            continue
        _write(folder, task, state="CANCELLED", reason="None")
        if known["state"] == "RUNNING":
            pid = int(str(known["pid"]))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
                time.sleep(LAST_SECONDS)
                os.killpg(pid, signal.SIGKILL)
    return ""


def scontrol(folder: Path, arguments: list[str]) -> str:
    assert arguments == ["show", "config"]
    settings = json.loads((folder / "settings.json").read_text())
    return f"KillWait                = 30 sec\nMaxArraySize            = {settings.get('max_array', 1001)}"


def sacct(folder: Path, arguments: list[str]) -> str:
    sys.exit("Slurm accounting storage is disabled")


COMMANDS = {"sbatch": sbatch, "squeue": squeue, "scancel": scancel, "scontrol": scontrol, "sacct": sacct}


def main(name: str, arguments: list[str]) -> None:
    folder = Path(os.environ[FOLDER])
    if (folder / "away").exists() and name != "control":
        sys.exit(f"slurm_load_jobs error: Unable to contact slurm controller (connect failure) [{name}]")
    said = {**COMMANDS, "control": control}[name](folder, arguments)
    if said:
        print(said)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
