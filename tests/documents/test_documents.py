"""Documents name files, functions and pages that are there; licence, citation and workflow agree with the package."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES, ROOT / "benchmarks" / "RESULTS.md"]
MAPS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "docs" / "architecture.md"]
WIDTH = 120
PLACE = re.compile(
    r"`((?:\.ci|benchmarks|deployments|docs|fastgda_core|flows|storage_schemas|tasks|tests)/[\w./-]*)(::\w+)?`"
)


def named(path: Path) -> Any:
    return pytest.param(path, id=str(path.relative_to(ROOT)))


def prose(document: Path) -> list[str]:
    """Lines outside of code blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL).splitlines()


def anchors(document: Path) -> set[str]:
    """The headings of a document as GitHub links to them."""
    headings = [line.lstrip("#").strip().lower() for line in prose(document) if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


def metadata() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("document", [named(each) for each in DOCUMENTS])
def test_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", document.read_text()):
        page = document.parent / target if target else document
        assert page.exists(), f"{document.name}: {target}"
        assert not anchor or anchor in anchors(page), f"{document.name}: {target}#{anchor}"


def test_the_index_names_every_page_and_the_readme_names_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name})" not in index] == []
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", [named(each) for each in MAPS])
def test_files_and_functions_that_a_document_names_are_there(document: Path) -> None:
    places = PLACE.findall(document.read_text())
    assert places
    for path, name in places:
        assert (ROOT / path).exists(), f"{document.name}: {path}"
        if name:
            word = name.removeprefix("::")
            defined = rf"^(?:def|class) {word}\b|^{word}\b.*="
            assert re.search(defined, (ROOT / path).read_text(), re.MULTILINE), f"{document.name}: {path}{name}"


@pytest.mark.parametrize("document", [named(each) for each in DOCUMENTS if each.parent.name != "benchmarks"])
def test_lines_of_prose_are_no_longer_than_lines_of_code(document: Path) -> None:
    long = [line for line in prose(document) if len(line) > WIDTH and not line.startswith(("|", "!["))]
    assert long == []


def test_the_workflow_runs_what_ci_runs_on_the_versions_that_we_say() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    versions = [f"Programming Language :: Python :: {version}" for version in job["strategy"]["matrix"]["python"]]
    assert versions == [each for each in metadata()["classifiers"] if re.search(r":: 3\.\d+$", each)]


def test_citation_and_licence_are_those_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = metadata()
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert set(project["urls"].values()) <= {reference["url"] for reference in citation["references"]}
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_notice_names_files_that_are_there() -> None:
    listed = re.findall(r"^    ((?:deployments|docs)/\S+)$", (ROOT / "NOTICE").read_text(), re.MULTILINE)
    assert listed and all((ROOT / path).is_file() for path in listed)
