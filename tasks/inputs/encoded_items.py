"""Encode images and captions of samples or queries: each image is decoded once, for all encoders that see it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastgda_core.features import Encoder
from fastgda_core.images import in_threads
from fastgda_core.interruption import checkpoint
from tasks.artifact import Artifact
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import captions_of, ready_images_ahead


@dataclass
class Encoded:
    """What an encoder made of some items.

    features: (items, d) float32; unreadable: samples whose image can no longer be read, with reasons.
    seconds: of the encoder, with its share of the time that was waited for images.
    """

    features: Tensor
    unreadable: dict[int, str]
    seconds: float


@dataclass(frozen=True)
class InBatches:
    """An encoder and its items at a time."""

    encoder: Encoder
    size: int


@dataclass
class Pass:
    """One pass over the images of some items. waited: seconds in which encoders had no image; encoding: all others."""

    encoded: dict[str, Encoded] = field(default_factory=dict)
    waited: float = 0.0
    encoding: float = 0.0

    @property
    def idle(self) -> float:
        """The share of the time in which the device waited for images, 0 to 1."""
        return self.waited / max(self.waited + self.encoding, 1e-9)


def encode_items(
    encoders: Mapping[str, InBatches], items: Artifact, numbers: list[int], advance: Callable[[float], None]
) -> Pass:
    """Encode some items by each of these encoders.

    Args:
        encoders: by name.
        items: samples or queries.
        numbers: of the items.
        advance: called with the number of items just finished, by all encoders together.
    """
    seeing = {name: each for name, each in encoders.items() if each.encoder.modality == "image"}
    done = Pass()
    if seeing:
        _encode_images(done, seeing, items, numbers, lambda count: advance(count * len(seeing) / len(encoders)))
    for name in encoders.keys() - seeing.keys():
        started = time.monotonic()
        captions = _captions(items, numbers)
        features = _encode_texts(encoders[name], captions, lambda count: advance(count / len(encoders)))
        done.encoded[name] = Encoded(features, {}, time.monotonic() - started)
        done.encoding += done.encoded[name].seconds
    return done


def _encode_images(
    done: Pass,
    encoders: Mapping[str, InBatches],
    items: Artifact,
    numbers: list[int],
    advance: Callable[[float], None],
) -> None:
    """Encode images, of which each encoder gets its own batches, the same as if it were alone."""
    waiting: dict[str, list[Any]] = {name: [] for name in encoders}
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    seconds = dict.fromkeys(encoders, 0.0)
    unreadable: dict[int, str] = {}

    def encode(name: str, least: int) -> None:
        """Encode what waits for an encoder as long as that is `least` images."""
        encoder, size, images = encoders[name].encoder, encoders[name].size, waiting[name]
        while len(images) >= least:
            started = time.monotonic()
            found[name].append(_encode_batch(encoder, images[:size], items))
            del images[:size]
            seconds[name] += time.monotonic() - started

    started = time.monotonic()
    for images, faults in _images(encoders, items, numbers):
        done.waited += time.monotonic() - started
        checkpoint()
        unreadable |= faults
        for place, name in enumerate(encoders):
            waiting[name] += [image[place] for image in images]
            encode(name, encoders[name].size)
        advance(len(images))
        started = time.monotonic()
    for name in encoders:
        encode(name, 1)
        share = done.waited / len(encoders)
        done.encoded[name] = Encoded(torch.cat(found[name]), unreadable, seconds[name] + share)
    done.encoding += sum(seconds.values())


def _images(
    encoders: Mapping[str, InBatches], items: Artifact, numbers: list[int]
) -> Iterator[tuple[list[list[Any]], dict[int, str]]]:
    """Yield in batches what each encoder takes of each image, and why some images are grey."""
    size = min(each.size for each in encoders.values())
    if items.name != "samples":
        queries = [load_queries(items)[number] for number in numbers]
        batches = in_threads(lambda query: query.image, queries, size)
        return (([[image] * len(encoders) for image in images], {}) for images in batches)
    halves = [each.encoder.prepare for each in encoders.values()]

    def prepare(image: Image.Image) -> list[Any]:
        return [image if half is None else half(image) for half in halves]

    return ready_images_ahead(items.path, numbers, size, prepare)


def _encode_batch(encoder: Encoder, images: list[Any], items: Artifact) -> Tensor:
    if items.name == "queries":
        return encoder.encode_queries(images)
    return (encoder.of_prepared or encoder.encode)(images)


def _encode_texts(encoder: InBatches, captions: list[list[str]], advance: Callable[[float], None]) -> Tensor:
    """Return features of some items, (items, d), each the mean over its captions; equal captions are encoded once.

    The mean is of the outputs as they are, and not of unit vectors: a file holds what the encoder gave, and serves
    spaces with and without `unit_length`.
    """
    firsts, features = Counter(several[0] for several in captions), []
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(captions)))
    for start in range(0, len(distinct), encoder.size):
        checkpoint()
        batch = distinct[start : start + encoder.size]
        features.append(encoder.encoder.encode(batch))
        advance(sum(firsts[text] for text in batch))
    row, encoded = {text: number for number, text in enumerate(distinct)}, torch.cat(features)
    return torch.stack([encoded[[row[text] for text in several]].mean(0) for several in captions])


def _captions(items: Artifact, numbers: list[int]) -> list[list[str]]:
    """Return the captions of some items; a query has one."""
    if items.name == "queries":
        return [[load_queries(items)[number].caption] for number in numbers]
    return captions_of(items.path, numbers)
