"""The invented pictures of the judge's world, and the tar that they come in."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import emoji
import numpy as np
from PIL import Image

from tasks.config.files import load_config
from tasks.demo import judge_world
from tasks.demo.invented import CAPTIONS, EACH, invented_pictures
from tasks.demo.openmoji import IMAGE_SIDE, list_openmoji, rasterised, write_shards
from tasks.inputs.tars import find_shards, read_image, scan


def pixels(png: bytes) -> np.ndarray:
    """As the world's model sees it: 16 pixels a side."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (IMAGE_SIDE, IMAGE_SIDE)
        return np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BOX), float)


def test_pictures_of_a_kind_are_alike_and_none_is_another_or_an_emoji() -> None:
    invented = invented_pictures()
    assert invented == invented_pictures()
    of_kind = {
        caption: np.stack([pixels(rasterised(each)) for each in invented if each.captions == [caption]])
        for caption in CAPTIONS.values()
    }
    every = np.stack([pixels(rasterised(each)) for each in judge_world.choose(list_openmoji())[::8]])

    def apart(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.sqrt(((first - second) ** 2).mean()))

    for caption, mine in of_kind.items():
        assert len(mine) == EACH
        assert min(apart(*pair) for pair in itertools.combinations(mine, 2)) > 5
        others = [*every, *(picture for other, several in of_kind.items() if other != caption for picture in several)]
        colours, of_others = mine.mean((1, 2)), np.stack(others).mean((1, 2))
        within = max(apart(*pair) for pair in itertools.combinations(colours, 2))
        assert 2 * within < min(apart(*pair) for pair in itertools.product(colours, of_others))


def test_nothing_else_has_their_words() -> None:
    words = {word for caption in CAPTIONS.values() for word in caption.split()[1:]}
    names = " ".join(name for entry in emoji.EMOJI_DATA.values() for name in (entry["en"], *entry.get("alias", [])))
    assert not any(word in names for word in words)


def test_they_come_after_the_emoji_in_the_same_tar_and_another_set_is_written_anew(tmp_path: Path) -> None:
    first = list_openmoji()[:3]
    write_shards(tmp_path, lambda every: every[:3], invented_pictures())
    samples, rejected = scan(find_shards(str(tmp_path / "*.tar"), "shards"), lambda: None)
    assert not rejected
    keys = [*(image.key for image in first), *(image.key for image in invented_pictures())]
    assert [sample.key for sample in samples] == keys
    assert [sample.captions for sample in samples[3:]] == [image.captions for image in invented_pictures()]
    last = read_image(samples[-1].shard, samples[-1].offset, samples[-1].size)
    assert last.getpixel((1, 1)) == (0x3A, 0x0A, 0x66)
    write_shards(tmp_path, lambda every: every[:3], invented_pictures()[:2])
    again, _ = scan(find_shards(str(tmp_path / "*.tar"), "shards"), lambda: None)
    assert len(again) == 5


def test_the_judges_configuration_asks_for_each_among_the_test_queries() -> None:
    queries = load_config(judge_world.CONFIG).queries
    assert queries.captions is not None
    splits = dict(zip(queries.captions, queries.split.of(len(queries.captions)).assign(queries.seed), strict=True))
    assert {splits[caption] for caption in CAPTIONS.values()} == {"test"}
