"""Real pictures with names: icons of `@iconify/json`, rasterised on white into WebDataset tars.

The package holds a JSON file for each icon set, `json/PREFIX.json`: `{"prefix", "info": {"name", "license", ...},
"icons": {NAME: {"body"}}, "width", "height"}`. A body is the inside of an `<svg>`.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
import webdataset

from storage_schemas.commit import write_atomically

PACKAGE = "@iconify/json"
SIDE = 96  # pixels, as the demo's model takes them
PER_TAR = 5000
# Licences under which a picture may be passed on and sold, at most with its author's name and under the same licence.
LICENCES = (
    *("MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "MPL-2.0", "Unlicense", "CC0-1.0", "OFL-1.1"),
    *("CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0"),
)


@dataclass(frozen=True)
class IconSet:
    """An icon set as its `info` tells of it; `coloured` where its icons have colours of their own."""

    prefix: str
    name: str
    author: str
    licence: str
    url: str
    category: str
    coloured: bool


@dataclass(frozen=True)
class Icon:
    """One icon: its set, its name there, and its SVG."""

    of: IconSet
    name: str
    svg: str

    @property
    def key(self) -> str:
        return f"{self.of.prefix}_{self.name}"

    @property
    def words(self) -> str:
        return " ".join(self.name.replace("-", " ").split())

    @property
    def draw(self) -> bytes:
        """A number that is as good as random and always the same."""
        return hashlib.sha256(self.key.encode()).digest()


def packed(folder: Path) -> Path:
    """Fetch the package with this machine's own npm; return its `.tgz`."""
    done = subprocess.run(
        ["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, stdout=subprocess.PIPE, text=True
    )
    return folder / done.stdout.split()[-1]


def read_package(package: Path) -> Iterator[Icon]:
    """Yield every icon of the sets whose licence is one of `LICENCES`, but for those that their set hides."""
    with tarfile.open(package) as tar:
        members = {member.name.removeprefix("package/"): member for member in tar if member.isfile()}
        # A file of a compressed tar is read in the order in which it lies there, else all before it is read again.
        files = sorted((name for name in members if name.startswith("json/")), key=lambda name: members[name].offset)
        for name in files:
            content = tar.extractfile(members[name])
            assert content is not None
            yield from _icons(json.load(content))


def _icons(document: dict[str, Any]) -> Iterator[Icon]:
    info = document["info"]
    licence = info["license"].get("spdx", "")
    if licence not in LICENCES:
        return
    of = IconSet(
        prefix=document["prefix"],
        name=info["name"],
        author=info["author"]["name"],
        licence=licence,
        url=info["author"].get("url", ""),
        category=info.get("category", ""),
        coloured=bool(info.get("palette")),
    )
    sides = {name: document.get(name, default) for name, default in DEFAULT_BOX.items()}
    for name, icon in document["icons"].items():
        if not icon.get("hidden"):
            yield Icon(of, name, _svg(sides | icon))


DEFAULT_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # of Iconify's format


def _svg(icon: dict[str, Any]) -> str:
    box = " ".join(str(icon[name]) for name in DEFAULT_BOX)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} viewBox="{box}">{icon["body"]}</svg>'


def choose(icons: Iterator[Icon], pictures: int, queries: int) -> tuple[list[Icon], list[Icon]]:
    """Return the icons that become training pictures, and others whose names become captions of queries.

    Sets with colours come first, and all sets lie mixed in the end. Queries are emoji where there are any, as these are
    what the demo's model draws, each with words of its own.
    """
    every = sorted(icons, key=lambda icon: icon.draw)
    asked: dict[str, Icon] = {}
    for icon in sorted(every, key=lambda icon: icon.of.category != "Emoji"):
        if len(asked) < queries:
            asked.setdefault(icon.words, icon)
    held_out = {icon.key for icon in asked.values()}
    left = [icon for icon in every if icon.key not in held_out]
    assert len(left) >= pictures, f"the package has {len(left)} pictures beside {queries} queries: ask for fewer"
    chosen = sorted(left, key=lambda icon: not icon.of.coloured)[:pictures]
    return sorted(chosen, key=lambda icon: icon.draw), list(asked.values())


def picture(icon: Icon) -> bytes | None:
    """Return an icon as a PNG on white; one without colours gets one by its name. None: it cannot be drawn."""
    hue, light = icon.draw[0] / 256, 0.3 + 0.3 * icon.draw[1] / 256
    colour = "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, light, 0.7))
    try:
        drawn = resvg_py.svg_to_bytes(
            svg_string=icon.svg.replace("currentColor", colour),
            width=SIDE,
            height=SIDE,
            background="#ffffff",
            skip_system_fonts=True,
        )
    except ValueError:
        return None
    return bytes(drawn)


def _members(icon: Icon) -> dict[str, Any] | None:
    drawn = picture(icon)
    if drawn is None:
        return None
    told = {
        "captions": [f"{icon.words}, {icon.of.name}"],
        "set": icon.of.prefix,
        "author": icon.of.author,
        "licence": icon.of.licence,
    }
    return {"__key__": icon.key, "png": drawn, "json": json.dumps(told, ensure_ascii=False).encode()}


def write_tar(path: Path, icons: Sequence[Icon]) -> int:
    """Write one tar; return how many icons could not be drawn."""
    buffer, failed = io.BytesIO(), 0
    with webdataset.TarWriter(buffer, encoder=False, mtime=0.0, user="", group="") as writer:
        for icon in icons:
            members = _members(icon)
            if members is None:
                failed += 1
            else:
                writer.write(members)
    write_atomically(path, buffer.getvalue())
    return failed


def write_pictures(folder: Path, package: Path, pictures: int, queries: int, workers: int) -> None:
    """Write `icons-*.tar`, `LICENCES.md` with a line for each set, and last `queries.json` with captions."""
    chosen, asked = choose(read_package(package), pictures, queries)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [chosen[start : start + PER_TAR] for start in range(0, len(chosen), PER_TAR)]
    paths = [folder / f"icons-{number:05d}.tar" for number in range(len(blocks))]
    with ProcessPoolExecutor(workers) as pool:
        failed = sum(pool.map(write_tar, paths, blocks))
    write_atomically(folder / "LICENCES.md", licences(package.name, chosen, failed).encode())
    write_atomically(folder / "queries.json", json.dumps([icon.words for icon in asked], indent=1).encode())


def licences(package: str, icons: Sequence[Icon], failed: int) -> str:
    """Return a Markdown table: each set, its author, its licence and how many of its icons are there."""
    counts = Counter(icon.of for icon in icons)
    lines = [
        f"Pictures of {package}: {len(icons):,}, of which {failed:,} could not be drawn",
        "",
        "| set | name | author | licence | pictures |",
        "| --- | --- | --- | --- | ---: |",
    ]
    for of in sorted(counts, key=lambda of: of.prefix):
        author = f"[{of.author}]({of.url})" if of.url else of.author
        lines.append(f"| {of.prefix} | {of.name} | {author} | {of.licence} | {counts[of]:,} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("pictures", type=int)
    parser.add_argument("--package", type=Path, help="default: npm fetches it")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        package = given.package or packed(Path(scratch))
        write_pictures(given.folder, package, given.pictures, given.queries, given.processes)


if __name__ == "__main__":
    main()
