"""Two of the teacher's objectives on the demo's data, queries and Fisher: what each finds, and who agrees with it.

Prints Markdown tables and draws the first images of each beside some queries.

Run: python benchmarks/objectives.py [FOLDER] [--picture PATH]
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastgda_core.diffusion.objective import Objective
from fastgda_core.evaluation.ranking_metrics import (
    average_precision,
    expected_random_average_precision,
    spearman,
    top_mask,
)
from fastgda_core.features import cosines
from flows.curation import curate
from flows.demo import prepare
from flows.evaluation import judge
from storage_schemas.heads.metrics_history import mean_value
from tasks.config.files import load_config
from tasks.config.pipeline import PipelineConfig
from tasks.demo.openmoji import PUBLISHED_CONFIG
from tasks.distilling.ranks import candidate_scores, rows_of_split
from tasks.inputs.features import extract_features, in_space, load_features
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import sample_images
from tasks.teaching.run import Run
from tasks.watching.trust import KINDS, OTHER_TEACHER, Trust

CUTOFF, SHOWN, TILE, GAP, LABEL = 100, 8, 84, 8, 18
PICTURED = (3, 9, 12, 20, 28, 33, 39)  # queries, of several kinds
SPACES = {
    "captions alone": {"space": "minilm_text", "centre": False},
    "images alone, centred": {"space": "efficientnet_lite0", "centre": True},
    "both": {"centre": False},
    "both, centred": {"centre": True},
}


@dataclass(frozen=True)
class Teacher:
    """One objective's run: scores (queries, samples), trust, and how two such teachers agree."""

    run: Run
    scores: Tensor
    trust: Trust
    agreement: float


def teach(config: PipelineConfig, objective: Objective) -> Teacher:
    """Curate and judge the published config with this objective; what is there is reused."""
    teacher = config.teacher.model_copy(update={"objective": objective})
    changed = config.model_copy(update={"teacher": teacher})
    curation = curate(changed)
    (consistency,) = [made.artifact for made in judge(changed).made if made.artifact.name == "self-consistency"]
    run = curation.run
    names = [query.query_id for query in load_queries(run.artifacts["queries"])]
    scores = candidate_scores(run.workspace, curation.ranks, names).scores  # the demo's candidates are all samples
    agreement = mean_value(consistency.path, "spearman", OTHER_TEACHER, 0)
    assert agreement is not None
    return Teacher(run, scores, curation.trust, agreement)


def print_tables(teachers: dict[Objective, Teacher]) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "kronfluence"))
    print(f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {packages}\n")
    print(f"| objective | {' | '.join(f'twins, {kind}' for kind in KINDS.values())} | two whole teachers, Spearman |")
    print("| --- | --- | --- | ---: |")
    for objective, teacher in teachers.items():
        found = [
            f"{test.found} of {len(test.ranks)}, ranks {', '.join(f'{rank:,}' for rank in sorted(test.ranks))}"
            for test in teacher.trust.twins.values()
        ]
        print(f"| `{objective}` | {' | '.join(found)} | {teacher.agreement:.3f} |")
    first, second = (teacher.scores[_own(teacher)] for teacher in teachers.values())
    print(f"\nThe two objectives agree with Spearman {spearman(first, second).mean():.3f}.\n")
    print(f"| ranking, mAP({CUTOFF}) over all queries | {' | '.join(f'`{name}`' for name in teachers)} |")
    print(f"| --- |{' ---: |' * len(teachers)}")
    samples = next(iter(teachers.values())).scores.shape[1]
    print(f"| random |{f' {expected_random_average_precision(samples, CUTOFF):.3f} |' * len(teachers)}")
    for name, space in SPACES.items():
        figures = [_agreement(teacher, space) for teacher in teachers.values()]
        print(f"| {name} | {' | '.join(f'{mean:.3f} ± {error:.3f}' for mean, error in figures)} |")


def _own(teacher: Teacher) -> Tensor:
    """Rows of the queries that are of no test."""
    queries = [teacher.run.artifacts["queries"]]
    return torch.cat([rows_of_split(queries, split) for split in ("train", "validation", "test")])


def _agreement(teacher: Teacher, space: dict[str, object]) -> tuple[float, float]:
    context = in_space(teacher.run.context, **space)
    samples, queries = (teacher.run.artifacts[name] for name in ("samples", "queries"))
    for items in (samples, queries):
        extract_features.fn(context, items)
    own = _own(teacher)
    similarity = cosines(load_features(context, queries, samples)[own], load_features(context, samples, samples))
    values = average_precision(similarity.double(), top_mask(teacher.scores[own], CUTOFF))
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def draw(teachers: dict[Objective, Teacher], path: Path) -> None:
    """A row for each pictured query: the image, then the first images of each objective."""
    stages = next(iter(teachers.values())).run.artifacts
    queries, samples = load_queries(stages["queries"]), stages["samples"]
    step = TILE + GAP
    block = SHOWN * step + 3 * GAP
    sheet = Image.new(
        "RGB", (2 * GAP + step + len(teachers) * block, LABEL + GAP + len(PICTURED) * (step + LABEL)), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (objective, teacher) in enumerate(teachers.items()):
        left = 4 * GAP + step + column * block
        pen.text((left, GAP // 2), f"objective: {objective}", fill="#1a202c", font=font)
        for row, number in enumerate(PICTURED):
            top = LABEL + GAP + row * (step + LABEL)
            if column == 0:
                sheet.paste(queries[number].image.resize((TILE, TILE), Image.Resampling.NEAREST), (GAP, top))
                pen.text((GAP, top + TILE + 1), queries[number].caption, fill="#4a5568", font=font)
            best = teacher.scores[number].topk(SHOWN).indices.tolist()
            for place, image in enumerate(sample_images(samples.path, best)):
                sheet.paste(image.convert("RGB").resize((TILE, TILE)), (left + place * step, top))
    sheet.save(path, optimize=True)


def run(folder: Path, picture: Path | None) -> None:
    config = load_config(prepare(folder, PUBLISHED_CONFIG))
    teachers = {objective: teach(config, objective) for objective in (Objective.loss, Objective.output_norm)}
    print_tables(teachers)
    if picture is not None:
        draw(teachers, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory() as folder:
        run(Path(folder), arguments.picture)


if __name__ == "__main__":
    main()
