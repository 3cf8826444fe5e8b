"""The two locks hold what pyproject.toml asks for, and agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HARD = "no extra"
REQUIREMENTS: dict[str, list[str]] = {HARD: PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
RUNS = (HARD, "demo", "report", "alerts", "metrics")


def pins(name: str) -> dict[str, str]:
    """Version by package of a lock's lines, whatever machine they are for."""
    lines = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    return {canonicalize_name(line.name): str(line.specifier).removeprefix("==") for line in lines}


def test_what_runs_has_the_pins_of_what_develops() -> None:
    runs, develops = pins("requirements.lock"), pins("requirements-dev.lock")
    assert runs.items() <= develops.items()
    assert not {"pytest", "mypy", "ruff", "moto", "ray", "dask", "s3fs", "duckdb-extension-ducklake"} & set(runs)


@pytest.mark.parametrize(
    ("lock", "extra"),
    [("requirements.lock", extra) for extra in RUNS]
    + [("requirements-dev.lock", extra) for extra in REQUIREMENTS if extra != "gpu"],
)
def test_a_lock_satisfies_an_extra(lock: str, extra: str) -> None:
    torch = re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())
    assert torch is not None
    locked = {**pins(lock), "torch": torch[1]}
    for requirement in map(Requirement, REQUIREMENTS[extra]):
        if requirement.name != PROJECT["name"]:
            assert locked[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_developers_have_every_extra_but_the_one_that_takes_the_place_of_another() -> None:
    (own,) = [each for each in map(Requirement, REQUIREMENTS["dev"]) if each.name == PROJECT["name"]]
    assert own.extras == set(REQUIREMENTS) - {HARD, "gpu", "dev"}


def test_faiss_is_the_same_release_everywhere() -> None:
    faiss = [each for several in REQUIREMENTS.values() for each in map(Requirement, several) if "faiss" in each.name]
    assert {each.name for each in faiss} == {"faiss-cpu", "faiss-gpu"}
    assert {each.specifier for each in faiss} == {SpecifierSet(">=1.15,<2")}


def test_the_readme_lists_every_extra() -> None:
    table = (ROOT / "README.md").read_text().split("| extra | brings |")[1].split("\n\n")[0]
    first = re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE)
    assert {name for cell in first for name in re.findall(r"`(\w+)`", cell)} == set(REQUIREMENTS) - {HARD}
