"""What a question asks for beside its image and caption, and what tells one question from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from fastgda_core.errors import UsageError
from tasks.serving.answers import Tier, Versions

AROUND = 8  # of each list beside the hits


@dataclass(frozen=True)
class Settings:
    """See `Attributor.attribute`."""

    k: int = 20
    tier: Tier = "fast"
    where: str | None = None
    exclude: Sequence[int] = ()
    first: int | None = None
    relative: bool = False
    around: int = AROUND
    beside: bool = False

    def check(self) -> None:
        """Raise UsageError where these make no sense together."""
        if self.k < 1:
            raise UsageError(f"k is {self.k}: ask for 1 or more")
        if self.around < 0:
            raise UsageError(f"around is {self.around}: ask for 0 or more")
        if self.first is not None and self.first < 1:
            raise UsageError(f"first is {self.first}: score 1 or more")
        if self.first is not None and self.tier == "fast":
            raise UsageError("first is of tiers sketch and exact: ask one of these")
        if self.relative and self.tier != "sketch":
            raise UsageError("relative is of tier sketch: ask tier sketch")

    def lineage(self, versions: Versions, asked: str, tombstones: int) -> str:
        """Return what names an answer: versions, question, settings, and the newest take-down that it honours."""
        mine = {**vars(self), "exclude": sorted(set(self.exclude))}
        document = json.dumps([vars(versions), asked, mine, tombstones], sort_keys=True)
        return hashlib.sha256(document.encode()).hexdigest()[:16]


def name_of(picture: Image.Image | None, caption: str | None) -> str:
    """Return what tells the question about an RGB picture and its caption from any other."""
    shown = b"" if picture is None else repr(picture.size).encode() + picture.tobytes()
    return hashlib.sha256(repr((picture is None, caption)).encode() + shown).hexdigest()
