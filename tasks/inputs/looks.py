"""How an image looks, in 80 bytes, so that copies of one picture are found whatever their files' bytes.

A perceptual hash (imagehash's `phash`: signs of the lowest 16 x 16 frequencies of the brightness) tells shapes apart
and hardly sees colours; the mean colours of a 4 x 4 grid see them. Both have to agree.
"""

from __future__ import annotations

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _GRID = 16, 4
HASH_BYTES, COLOUR_BYTES = _SIDE * _SIDE // 8, 3 * _GRID * _GRID
LOOK_BYTES = HASH_BYTES + COLOUR_BYTES
# Of 3,953 OpenMoji, 420 pairs of other bytes are within 4 bits of 64 and 8 of 255, as hands of two colours of skin are;
# 4 are within these, and differ in a few pixels. A sample that is not folded costs a line of an answer, one that is
# folded wrongly somebody's name: docs/answers.md says how many copies are found.
MOST_BITS, MOST_COLOUR = 2, 1


def look_of(image: Image.Image) -> bytes:
    """Return the hash of an RGB image's look, `LOOK_BYTES` long."""
    bits = imagehash.phash(image, hash_size=_SIDE).hash
    colours = np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BOX), np.uint8)
    return np.packbits(bits).tobytes() + colours.tobytes()


def same_looks(looks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the pairs of images that look the same, (pairs, 2), the earlier one first, from looks, (n, LOOK_BYTES)."""
    bits = np.unpackbits(looks[:, :HASH_BYTES], axis=1).astype(np.float32)
    ones = bits.sum(1)
    apart = ones[:, None] + ones[None] - 2 * (bits @ bits.T)
    near_hashes = apart <= MOST_BITS
    if np.count_nonzero(near_hashes) == len(looks):  # each to itself alone, as in most answers
        return np.empty((0, 2), np.int64)
    pairs = np.argwhere(np.triu(near_hashes, k=1))
    colours = looks[:, HASH_BYTES:].astype(np.int16)
    near = np.abs(colours[pairs[:, 0]] - colours[pairs[:, 1]]).max(1, initial=0) <= MOST_COLOUR
    found: NDArray[np.int64] = pairs[near]
    return found
