"""Fields of a tar's .json beside the captions, and how an image looks, come into the table of samples."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgda_core.errors import BadSample
from tasks.inputs.looks import LOOK_BYTES, look_of, same_looks
from tasks.inputs.metadata import metadata_of
from tasks.inputs.tars import scan
from tests import tiny


def scanned(path: Path, document: str) -> tuple[list[str], list[str]]:
    """(metadata of the samples, reasons of the rejections) of a tar with one image and this .json."""
    tiny.write_tar(path / "a.tar", [("a.jpg", tiny.draw(1)[0]), ("a.json", document.encode())])
    samples, rejections = scan([path / "a.tar"], lambda: None)
    return [sample.metadata for sample in samples], [each.reason for each in rejections]


def test_single_values_are_kept_in_order_of_their_names(tmp_path: Path) -> None:
    document = {"caption": "a", "zone": "süd", "year": 2001, "share": 0.5, "free": True, "gone": None, "tags": ["x"]}
    (found,), rejected = scanned(tmp_path, json.dumps({**document, "author": {"name": "y"}}))
    assert found == '{"free":true,"share":0.5,"year":2001,"zone":"süd"}' and rejected == []


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ('"x": NaN', "x of its .json is nan"),
        ('"x": -Infinity', "x of its .json is -inf"),
        ('"x": 1e999', "x of its .json is inf"),
        (f'"x": {10**30}', "x of its .json is no number of 64 bits"),
        (f'"x": {"1" * 5000}', "does not decode"),
        (f'"x": "{"y" * 2001}"', "x of its .json has 2,001 characters"),
        (f'"{"n" * 65}": 1', "a name has 1 to 64 printable characters"),
        ('"": 1', "a name has 1 to 64 printable characters"),
        ('"a\\nb": 1', r"a name has 1 to 64 printable characters"),
        ('"x": "\\ud800"', "x of its .json holds a lone surrogate"),
        ('"\\ud800": 1', "a name has 1 to 64 printable characters"),
        ('"x": "a\\u0000b"', "x of its .json holds a character NUL"),
        (", ".join(f'"f{n}": {n}' for n in range(65)), "its .json has 65 fields"),
        ('"x": ' + "[" * 100_000, "does not decode"),
    ],
)
def test_hostile_fields_reject_their_sample_with_a_reason(tmp_path: Path, fields: str, why: str) -> None:
    found, (reason,) = scanned(tmp_path, f'{{"caption": "a", {fields}}}')
    assert found == [] and why in reason and reason.isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.dictionaries(st.text(max_size=70), JSON, max_size=6))
def test_any_document_becomes_plain_values_or_a_reason(document: dict[str, object]) -> None:
    try:
        found = metadata_of(document)
    except BadSample:
        return
    values = json.loads(found)
    assert values.items() <= document.items() and not {"caption", "captions"} & values.keys()
    assert all(isinstance(value, str | bool | int | float) for value in values.values())
    found.encode()


def picture(seed: int, side: int = 96) -> Image.Image:
    """A picture with the spectrum of photographs: what is twice as fine is half as strong."""
    rng, frequency = np.random.default_rng(seed), np.fft.fftfreq(side)
    strength = np.maximum(np.hypot(frequency[:, None], frequency), 1 / side)
    common, own = rng.normal(size=(side, side, 1)), rng.normal(size=(side, side, 3))
    drawn = np.fft.ifft2(np.fft.fft2(common + own, axes=(0, 1)) / strength[..., None], axes=(0, 1)).real
    return Image.fromarray(np.clip(128 + 50 * drawn / drawn.std(), 0, 255).astype(np.uint8))


def again(image: Image.Image, kind: str, **settings: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return Image.open(buffer).convert("RGB")


def pairs(images: list[Image.Image]) -> list[tuple[int, int]]:
    looks = np.stack([np.frombuffer(look_of(image), np.uint8) for image in images])
    assert looks.shape[1] == LOOK_BYTES
    return [(first, second) for first, second in same_looks(looks).tolist()]


def test_copies_of_a_picture_look_the_same_and_other_pictures_do_not() -> None:
    originals = [picture(seed) for seed in range(30)]
    copies = [
        again(originals[0], "PNG"),
        again(originals[1], "JPEG", quality=90),
        again(originals[2], "WEBP", lossless=True),
        originals[3].resize((128, 128), Image.Resampling.BICUBIC),
    ]
    assert pairs([*originals, *copies]) == [(number, 30 + number) for number in range(4)]


def test_a_picture_in_another_colour_turned_or_mirrored_looks_different() -> None:
    image = picture(5)
    red, green, blue = image.split()
    changed = [
        Image.merge("RGB", (blue, green, red)),
        image.rotate(90),
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    ]
    brighter = image.point([min(255, value + 12) for value in range(256)] * 3)
    assert pairs([image, *changed, brighter]) == []


def test_looks_are_found_in_pairs_whatever_their_order() -> None:
    images = [picture(seed) for seed in (1, 2, 1, 3, 2, 1)]
    order = list(range(6))
    random.Random(0).shuffle(order)
    assert pairs([images[place] for place in range(6)]) == [(0, 2), (0, 5), (1, 4), (2, 5)]
