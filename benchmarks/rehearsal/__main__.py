"""A rehearsal: real pictures from npm's `@iconify/json`, from tars to ten answers of a service, stage by stage.

    python -m benchmarks.rehearsal FOLDER
    python -m benchmarks.rehearsal FOLDER --pictures 2000 --nearest 20 --package iconify-json.tgz

Every stage is the real `fastgda` command. FOLDER gets the tars in `pictures/`, the config, the workspace, `stages.md`
with seconds and memory, `answers.png`, and `answers.md` with the licences of what that shows. Run again, it goes on
where it ended; a stage that is there keeps the figures of its making.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rehearsal.measure import FASTGDA, REST, ROOT, Figures, Kept, run_measured, watched

COMMANDS = ("curate", "train", "index", "evaluate")
ANSWERS, SERVED = 10, "start and answers"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for everything that is made")
    parser.add_argument("--pictures", type=int, default=200_000)
    parser.add_argument("--package", type=Path, help="@iconify/json as `npm pack` names it; default: npm fetches it")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--nearest", type=int, default=100, help="of each query, which make the pool")
    parser.add_argument("--model", type=Path, help="a diffusers folder; default: the demo's")
    parser.add_argument("--space", default="efficientnet_lite0+minilm_text", help="the feature space")
    parser.add_argument("--processes", type=int, default=2, help="that rasterise")
    arguments = parser.parse_args(given)
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = Kept(folder / "stages.json")
    for figures in rehearse(folder, arguments):
        kept.add(figures)
        (folder / "stages.md").write_text(kept.table())
        print(f"{figures.stage}: {figures.seconds:.1f} s, {figures.peak / 1e9:.2f} GB", flush=True)
    print(kept.table())


def rehearse(folder: Path, arguments: argparse.Namespace) -> Iterator[Figures]:
    """Go the whole road, and yield each stage's figures."""
    pictures, log = folder / "pictures", folder / "log.txt"
    if not (pictures / "queries.json").is_file():
        command = [sys.executable, "-m", "benchmarks.rehearsal.icons", str(pictures), str(arguments.pictures)]
        command += ["--queries", str(arguments.queries), "--processes", str(arguments.processes)]
        command += ["--package", str(arguments.package.resolve())] if arguments.package else []
        with watched("", "pictures", arguments.pictures) as seen:
            subprocess.run(command, check=True, cwd=ROOT)
        yield from seen
    config = write_config(folder, arguments)
    for command_name in COMMANDS:
        yield from run_measured([*FASTGDA, command_name, str(config)], command_name, REST, log)
    with watched("serve", SERVED, ANSWERS) as seen:
        answer(folder)
    yield from seen


def write_config(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write the configuration: the demo's teacher, thin, and a symmetric head."""
    import yaml

    path, model = folder / "config.yaml", arguments.model
    if model is None:
        from tasks.demo.openmoji import write_model_folder

        model = folder / "model"
        write_model_folder(model)
    captions = json.loads((folder / "pictures" / "queries.json").read_text())
    fifth = len(captions) // 5
    cutoff = max(2, arguments.nearest // 2)
    config: dict[str, Any] = {
        "name": "rehearsal",
        "workspace": "workspace",
        "data": {"shards": "pictures/icons-*.tar"},
        "model": {"folder": str(model.resolve())},
        "queries": {
            "captions": captions,
            "split": {"train": len(captions) - 2 * fifth, "validation": fifth, "test": fifth},
            "steps": 10,
            "twins": 0,
        },
        "features": {"space": arguments.space},
        "curvature": {"samples": 512},
        "candidates": {"policy": "pooled", "k": arguments.nearest},
        "teacher": {
            "name": "abu_plus_first_order",
            "objective": "output_norm",
            "negatives": "tie",
            "damping": 1,
            "alpha": 1.0e-4,
            "timestep_list": [middle_timestep(model)],
            "gradient_pairs": 12,
        },
        "self_consistency": None,
        "head": {
            "loss": "listwise",
            "rank_offset": 0.1,
            "initialization": "features",
            "learning_rate": 3e-5,
            "epochs": 4,
        },
        "evaluation": {"cutoffs": [cutoff], "validation_cutoff": cutoff, "gain_floor": None},
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def middle_timestep(model: Path) -> int:
    """Return the timestep in the middle of a model's schedule, where the demo's scores are made."""
    schedule = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    return int(schedule["num_train_timesteps"]) // 2


def answer(folder: Path) -> None:
    """Start a service on the workspace, ask it, and write the sheet and what it shows."""
    from benchmarks.rehearsal.answers import ask, sheet
    from benchmarks.service import service

    with service(folder / "workspace", 1, {}) as address:
        shown = ask(f"http://{address}", ANSWERS)
    (folder / "answers.png").write_bytes(sheet(shown))
    sets = {hit.metadata["set"] for each in shown for hit in each.hits}
    lines = (folder / "pictures" / "LICENCES.md").read_text().splitlines()
    chosen = [line for line in lines if (name := re.match(r"\| (\S+) \|", line)) and name[1] in {*sets, "set", "---"}]
    milliseconds = statistics.median(each.milliseconds for each in shown)
    (folder / "answers.md").write_text(
        f"{len(shown)} answers, {milliseconds:.0f} ms in the median. The pictures are of these sets:\n\n"
        + "\n".join(chosen)
        + "\n"
    )


if __name__ == "__main__":
    main()
