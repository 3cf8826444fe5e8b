"""Latents of the training samples, in parts, and blocks of samples with their captions encoded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import ImageOps

from fastgda_core.diffusion.loss import Condition, concatenate, take
from fastgda_core.interruption import checkpoint
from fastgda_core.teachers.training_loss import SampleBlock
from storage_schemas.commit import Manifest, input_key
from storage_schemas.listings import quarantined_in
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.inputs.samples import captions_of, readable_images_ahead
from tasks.teaching.captions import encoded_captions
from tasks.teaching.latent_rows import LATENT_PART_SAMPLES, LatentRows, part_tensors, read_latent_rows
from tasks.teaching.tensor_parts import TensorParts

BLOCK_SAMPLES = 1024  # of which the next are read while a teacher is busy with one


def latents_of(context: Context, samples: Artifact) -> Artifact:
    """Return the artifact of the samples' latents, which need not be made yet."""
    model = context.config.model
    rounded = [] if model.latents == "float32" else [model.latents]
    key = input_key("latents", samples.key, context.model_hash, model.flips, *rounded)
    return LatentParts.together(context.workspace, key, samples.rows)


class LatentParts(TensorParts):
    """Latents of every sample, and the captions that they come with, in parts of 512."""

    kind = title = "latents"

    def __init__(self, context: Context, samples: Artifact, latents: Artifact) -> None:
        self.context, self.samples, self.artifact = context, samples, latents

    @property
    def count(self) -> int:
        return -(-self.samples.rows // LATENT_PART_SAMPLES)

    def rows(self, number: int) -> int:
        return min(LATENT_PART_SAMPLES, self.samples.rows - number * LATENT_PART_SAMPLES)

    def make(self, number: int) -> Manifest:
        started = time.monotonic()
        first = number * LATENT_PART_SAMPLES
        tensors, unreadable = self._encode(list(range(first, first + self.rows(number))))
        return self.keep(number, tensors, started, quarantined=unreadable)

    def _encode(self, train_ids: list[int]) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
        """Return the tensors of a part, and why samples cannot be read any more; these have latents of NaN."""
        model = self.context.model()
        captions = captions_of(self.samples.path, train_ids)
        latents: list[torch.Tensor] = []
        unreadable: dict[int, str] = {}
        for number, (images, faults) in enumerate(readable_images_ahead(self.samples.path, train_ids, 64)):
            checkpoint()
            chosen = train_ids[64 * number : 64 * (number + 1)]
            unreadable |= faults
            seen = [images, [ImageOps.mirror(i) for i in images]] if self.context.config.model.flips else [images]
            encoded = torch.stack([model.encode_images(several) for several in seen], dim=1).cpu()
            encoded[[train_id in faults for train_id in chosen]] = torch.nan
            latents.append(encoded)
        whole = torch.cat(latents)
        stored = whole.bfloat16() if self.context.config.model.latents == "bf16" else whole
        return part_tensors(stored, train_ids, captions), unreadable


def unreadable_samples(latents: Artifact, train_ids: Iterable[int]) -> dict[int, str]:
    """Return which of these samples have no latents, and why."""
    wanted = list(train_ids)
    numbers = sorted({train_id // LATENT_PART_SAMPLES for train_id in wanted})
    return quarantined_in((part(latents.path, number, "safetensors") for number in numbers), wanted)


def load_block(
    context: Context, latents: Artifact, train_ids: list[int], *, captions: int | None = None
) -> SampleBlock:
    """Load the named samples on the context's device, with so many captions of each at most, or with all.

    They come part by part: in the order given where that is ascending; the block's `train_ids` tell in any case.
    """
    several = read_latent_rows(latents.path, train_ids)
    return _block(context, several if captions is None else [rows.with_captions(captions) for rows in several])


def blocks_ahead(context: Context, latents: Artifact, train_ids: list[int]) -> Iterator[SampleBlock]:
    """Yield the named samples, ascending and not none, in blocks; the next is read while the caller works on one."""
    stretches = [train_ids[start : start + BLOCK_SAMPLES] for start in range(0, len(train_ids), BLOCK_SAMPLES)]
    with ThreadPoolExecutor(1) as reader:
        begun = reader.submit(read_latent_rows, latents.path, stretches[0])
        for following in [*stretches[1:], None]:
            rows = begun.result()
            if following is not None:
                begun = reader.submit(read_latent_rows, latents.path, following)
            yield _block(context, rows)


def _block(context: Context, several: list[LatentRows]) -> SampleBlock:
    device = context.device
    counts = torch.cat([rows.captions_of for rows in several])
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number_within = torch.arange(len(owner)) - (torch.cumsum(counts, 0) - counts)[owner]
    return SampleBlock(
        torch.cat([rows.train_ids for rows in several]).to(device),
        torch.cat([rows.latents for rows in several]).to(device),
        _condition(context, several),
        owner.to(device),
        number_within.to(device),
    )


def _condition(context: Context, several: list[LatentRows]) -> Condition:
    """Return the condition of all captions: encoded here, or as parts of an earlier release have it."""
    captions = [caption for rows in several for own in rows.captions or () for caption in own]
    encoded = encoded_captions(context, captions) if captions else {}
    if all(not rows.condition for rows in several):
        return encoded
    conditions, first = list[dict[str, torch.Tensor]](), 0
    for rows in several:
        if rows.condition:
            conditions.append({name: tensor.to(context.device) for name, tensor in rows.condition.items()})
        else:
            last = first + int(rows.captions_of.sum())
            conditions.append(take(encoded, slice(first, last)))
            first = last
    return concatenate(conditions)
