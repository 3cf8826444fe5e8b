"""The folder `data/coco` of the FastGDA release: where each file lies, and what of it is there.

Source: github.com/PeterWang512/FastGDA, its README and the code that reads the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastgda_core.errors import UsageError
from fastgda_core.feature_spaces import SOURCES

SPLITS = ("train", "test")
ANNOTATIONS = "captions_train2017.json"
_POINTER = b"version https://git-lfs"
FISHER_FILES = ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")
SPACES = ("dino+clip_text", "clip+clip_text", "dino", "clip", "clip_text")  # whose head is preferred, best first


@dataclass(frozen=True)
class ReleaseFolder:
    """The release's folder; what it may lack is None."""

    root: Path

    @property
    def annotations(self) -> Path:
        """The captions of the training images; the release's README leaves `trainset/` out of their path."""
        places = [self.root / "trainset" / "annotations" / ANNOTATIONS, self.root / "annotations" / ANNOTATIONS]
        return next((path for path in places if path.is_file()), places[0])

    def features(self, space: str) -> Path:
        return self.root / "feats" / space

    @property
    def spaces(self) -> list[str]:
        """The feature spaces that the folder has, by the names of their folders."""
        return sorted(path.parent.name for path in self.root.glob("feats/*/data_feats.npy"))

    def queries(self, split: str) -> Path:
        return self.root / f"query_{split}"

    def scores(self, split: str) -> Path | None:
        return self._file(f"influence_{split}.pkl")

    @property
    def neighbors(self) -> Path | None:
        return self._file("query_train/nn_dino.pkl")

    @property
    def denoiser(self) -> Path | None:
        return self._file("model.bin")

    @property
    def fisher(self) -> Path | None:
        folder = self.root / "ekfac_fisher"
        return folder if folder.is_dir() else None

    @property
    def heads(self) -> list[Path]:
        return sorted(self.root.glob("weights/*.pth"))

    def _file(self, name: str) -> Path | None:
        path = self.root / name
        return path if path.is_file() else None


def open_release(root: Path) -> ReleaseFolder:
    """Look at a folder before anything is read.

    Raises:
        UsageError: it lacks what every use needs, knows encoders of other names, or holds pointers to files.
    """
    folder = ReleaseFolder(root)
    inside = next((path for path in (root / "data" / "coco", root / "coco") if (path / "feats").is_dir()), None)
    if inside is not None:
        raise UsageError(f"{root} is not the release's data/coco itself: give {inside}")
    if not folder.spaces:
        raise UsageError(f"{root} has no feats/<space>/data_feats.npy: give the release's folder data/coco")
    for space in folder.spaces:
        if strange := [name for name in space.split("+") if name not in SOURCES]:
            raise UsageError(f"{root}/feats/{space}: there is no encoder {strange[0]!r}: move the folder away")
    if not folder.annotations.is_file():
        raise UsageError(f"{folder.annotations} is missing, whose order numbers the training images: fetch it")
    for split in SPLITS:
        if not (folder.queries(split) / "captions.txt").is_file():
            raise UsageError(f"{folder.queries(split)} has no captions.txt: fetch the folder query_{split}")
        if folder.scores(split) is None:
            raise UsageError(f"{root} has no influence_{split}.pkl: fetch it, or merge it with merge_{split}.py")
    for path in _files(folder):
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise UsageError(f"{path} is a Git LFS pointer and not the file: run `git lfs pull` in its repository")
    return folder


def _files(folder: ReleaseFolder) -> list[Path]:
    found = [*folder.root.glob("feats/*/*.npy"), *folder.heads, folder.annotations]
    found += [folder.queries(split) / "captions.txt" for split in SPLITS]
    found += [*folder.root.glob("ekfac_fisher/*.safetensors")]
    single = [*map(folder.scores, SPLITS), folder.neighbors, folder.denoiser]
    return [*found, *(path for path in single if path is not None)]
