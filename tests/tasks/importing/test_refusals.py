"""What a release's folder lacks or gets wrong is said in one line, and nothing is published."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgda_core.errors import UsageError
from storage_schemas.errors import StoreError
from tasks.importing.release import Asked, import_folder
from tests.tasks.importing.release_world import CANDIDATES, SAMPLES, make_world


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    return make_world(tmp_path_factory.mktemp("original"), model_folder).root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "coco"))


def rewritten(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Return what changes the array in a file of features."""
    return lambda root: np.save(root / "feats" / name, change(np.load(root / "feats" / name)))


def repickled(name: str, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    """Return what changes the arrays of the one split in a pickle."""

    def write(root: Path) -> None:
        ((split, arrays),) = pickle.loads((root / name).read_bytes()).items()
        (root / name).write_bytes(pickle.dumps({split: change(arrays)}))

    return write


def put(array: np.ndarray, place: tuple[int, int], value: float) -> np.ndarray:
    array[place] = value
    return array


def reannotated(change: Callable[[dict[str, list[dict[str, object]]]], object]) -> Callable[[Path], None]:
    """Return what changes the caption file."""

    def write(root: Path) -> None:
        path = root / "trainset" / "annotations" / "captions_train2017.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return write


def no_number(root: Path) -> None:
    shutil.rmtree(root / "feats" / "dino+clip_text")
    rewritten("clip_text/train_query_feats.npy", lambda array: put(array, (3, 1), np.nan))(root)


def a_program(root: Path) -> None:
    (root / "query_train" / "nn_dino.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")


def a_programs_weights(root: Path) -> None:
    torch.save({"scale": Path("x")}, root / "weights" / "dino+clip_text.pth")


def other_head(root: Path) -> None:
    shutil.copyfile(root / "weights" / "dino+clip_text.pth", root / "weights" / "dino.pth")


def other_layers(root: Path) -> None:
    path = root / "ekfac_fisher" / "lambda_matrix.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def no_gradients(root: Path) -> None:
    path = root / "ekfac_fisher" / "num_lambda_processed.safetensors"
    save_file({name: 0 * count for name, count in load_file(path).items()}, path)


def other_network(root: Path) -> None:
    weights = torch.load(root / "model.bin", weights_only=True)
    weights["conv_out.bias"] = weights["conv_out.bias"][:2]
    torch.save(weights, root / "model.bin")


def first_picture(root: Path) -> Path:
    return min((root / "trainset" / "train2017").iterdir())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no features": (lambda root: shutil.rmtree(root / "feats"), r"no feats/<space>/data_feats\.npy: give"),
    "no captions": (lambda root: shutil.rmtree(root / "trainset"), r"captions_train2017\.json is missing"),
    "an unknown encoder": (lambda root: (root / "feats" / "dino").rename(root / "feats" / "dina"), "encoder 'dina'"),
    "a pointer": (
        lambda root: (root / "influence_train.pkl").write_bytes(POINTER),
        r"influence_train\.pkl is a Git LFS pointer",
    ),
    "no scores": (lambda root: (root / "influence_test.pkl").unlink(), r"no influence_test\.pkl.*merge_test\.py"),
    "a cut array": (
        lambda root: (root / "feats/dino/data_feats.npy").write_bytes(b"\x93NUMPY\x01\x00"),
        r"dino/data_feats\.npy cannot be read as an array",
    ),
    "objects": (
        lambda root: np.save(root / "feats/dino/data_feats.npy", np.array([[None]]), allow_pickle=True),
        r"dino/data_feats\.npy cannot be read as an array",
    ),
    "fewer rows": (
        rewritten("clip_text/data_feats.npy", lambda array: array[:-1]),
        f"has {SAMPLES - 1} rows where there are {SAMPLES}",
    ),
    "other widths": (rewritten("dino/test_query_feats.npy", lambda array: array[:, :-1]), "differ in width"),
    "joined otherwise": (
        rewritten("dino+clip_text/data_feats.npy", lambda array: array[:, ::-1]),
        r"dino\+clip_text has other outputs of dino than feats/dino",
    ),
    "no number": (no_number, "feats: clip_text of queries, row 3, is not finite"),
    "a picture is missing": (
        lambda root: first_picture(root).unlink(),
        r"1 training pictures cannot be used and train_ids are places.*No such file",
    ),
    "a damaged picture": (
        lambda root: first_picture(root).write_bytes(b"no JPEG"),
        "1 training pictures cannot be used",
    ),
    "an image twice": (reannotated(lambda told: told["images"].append(told["images"][0])), "names an image twice"),
    "a path for a name": (
        reannotated(lambda told: told["images"][5].update(file_name="../../x.jpg")),
        "which is no plain name",
    ),
    "no caption file": (reannotated(lambda told: told.pop("images")), "is no caption file of MSCOCO"),
    "a query's picture is missing": (
        lambda root: (root / "query_test/images/2.png").unlink(),
        r"query_test/images/2\.png is missing, of 4 captions",
    ),
    "a picture too many": (
        lambda root: shutil.copyfile(root / "query_test/images/2.png", root / "query_test/images/4.png"),
        "has 5 pictures and 4 captions",
    ),
    "an empty caption": (
        lambda root: (root / "query_test/captions.txt").write_text("a\n\nb\nc\n"),
        r"captions\.txt: line 2 is empty",
    ),
    "ids out of range": (
        repickled("influence_train.pkl", lambda arrays: {**arrays, "rank": arrays["rank"] + SAMPLES}),
        r"has 60 training samples, the file scores train_id 1\d\d",
    ),
    "other neighbours": (
        repickled("query_train/nn_dino.pkl", lambda arrays: {"rank": arrays["rank"][:, ::-1]}),
        f"row 0 scores other samples than the {CANDIDATES} nearest",
    ),
    "too few neighbours": (
        repickled("query_train/nn_dino.pkl", lambda arrays: {"rank": arrays["rank"][:, :5]}),
        r"neighbours of shape \(12, 5\)",
    ),
    "an unsorted ranking": (
        repickled("influence_test.pkl", lambda arrays: {**arrays, "rank": arrays["rank"][:, ::-1]}),
        "row 0 of rank does not sort the scores",
    ),
    "a program": (a_program, r"nn_dino\.pkl names '(os|posix)\.system', which is refused"),
    "weights that are a program": (a_programs_weights, r"dino\+clip_text\.pth is no checkpoint of plain tensors"),
    "a head of other features": (other_head, r"dino\.pth takes 48 features and dino has 32"),
    "a Fisher of other layers": (other_layers, "factors of . layers.*not those of one of"),
    "a Fisher of nothing": (no_gradients, "or of no gradient"),
    "another network": (other_network, r"model\.bin: 1 weights are not those.*conv_out\.bias: \(2,\) and not \(4,\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_in_one_line(case: str, root: Path, tmp_path: Path) -> None:
    spoil, said = CASES[case]
    spoil(root)
    asked = Asked(root, str(tmp_path / "workspace"), tmp_path / "release.yaml")
    with pytest.raises((UsageError, StoreError), match=said) as raised:
        import_folder(asked)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "release.yaml").exists() and not (tmp_path / "workspace" / "published").exists()


def test_the_folder_above_and_a_foreign_configuration_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"give {root}"):
        import_folder(Asked(root.parent, str(tmp_path / "workspace"), tmp_path / "release.yaml"))
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(UsageError, match="was not written by an import"):
        import_folder(Asked(root, str(tmp_path / "workspace"), tmp_path / "mine.yaml"))


def test_without_pictures_model_and_heads_scores_and_features_are_imported(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "trainset" / "train2017")
    for name in ("weights", "ekfac_fisher", "feats/dino", "feats/clip_text"):
        shutil.rmtree(root / name)
    (root / "model.bin").unlink()
    with pytest.raises(UsageError, match=r"dino\+clip_text is 48 wide and its encoders are 768 \+ 512"):
        import_folder(Asked(root, str(tmp_path / "workspace"), tmp_path / "release.yaml"))
    shutil.rmtree(root / "feats")
    draw = np.random.default_rng(0)
    for name, rows in (("data", SAMPLES), ("train_query", 12), ("test_query", 4)):
        (root / "feats" / "dino+clip_text").mkdir(parents=True, exist_ok=True)
        wide = np.asfortranarray(draw.normal(size=(rows, 1280)).astype(np.float16))
        np.save(root / "feats" / "dino+clip_text" / f"{name}_feats.npy", wide)
    imported = import_folder(Asked(root, str(tmp_path / "workspace"), tmp_path / "release.yaml"))
    assert imported.head is None and not imported.heads
    assert [line.partition(":")[0] for line in imported.lacking] == [
        "no new queries can be scored, and no pictures are shown",
        "no new queries can be scored",
    ]
    parts = sorted((tmp_path / "workspace" / "features").rglob("*.parquet"))
    assert {part.parts[-3] for part in parts} == {"dino", "clip_text"} and len(parts) == 4
