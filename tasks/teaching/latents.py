"""Latents and caption embeddings of the training samples, in parts."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from PIL import ImageOps

from fastgda_core.diffusion.loss import concatenate
from fastgda_core.interruption import checkpoint
from fastgda_core.teachers.training_loss import SampleBlock
from storage_schemas.commit import Manifest, input_key
from storage_schemas.listings import quarantined_in
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.context import Context, load_tensors
from tasks.inputs.samples import captions_of, readable_images_ahead
from tasks.teaching.tensor_parts import TensorParts

LATENT_PART_SAMPLES = 512
_CONDITION = "condition/"


def latents_of(context: Context, samples: Artifact) -> Artifact:
    """Return the artifact of the samples' latents and caption embeddings, which need not be made yet."""
    key = input_key("latents", samples.key, context.model_hash, context.config.model.flips)
    return LatentParts.together(context.workspace, key, samples.rows)


class LatentParts(TensorParts):
    """Latents and caption embeddings of every sample, in parts of 512."""

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
        flat = [caption for several in captions for caption in several]
        conditions = [model.encode_captions(flat[start : start + 128]) for start in range(0, len(flat), 128)]
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
        counts = torch.tensor([len(several) for several in captions])
        tensors = {"train_ids": torch.tensor(train_ids), "latents": torch.cat(latents), "captions_of": counts}
        condition = {f"{_CONDITION}{name}": tensor.cpu() for name, tensor in concatenate(conditions).items()}
        return {name: tensor.contiguous() for name, tensor in {**tensors, **condition}.items()}, unreadable


def unreadable_samples(latents: Artifact, train_ids: Iterable[int]) -> dict[int, str]:
    """Return which of these samples have no latents, and why."""
    wanted = list(train_ids)
    numbers = sorted({train_id // LATENT_PART_SAMPLES for train_id in wanted})
    return quarantined_in((part(latents.path, number, "safetensors") for number in numbers), wanted)


def load_block(context: Context, latents: Artifact, train_ids: list[int]) -> SampleBlock:
    """Load the named samples on the context's device.

    They come part by part: in the order given where that is ascending; the block's `train_ids` tell in any case.
    """
    by_part: dict[int, list[int]] = {}
    for train_id in train_ids:
        by_part.setdefault(train_id // LATENT_PART_SAMPLES, []).append(train_id % LATENT_PART_SAMPLES)
    pieces: dict[str, list[torch.Tensor]] = {}
    for number, rows in by_part.items():
        tensors = load_tensors(part(latents.path, number, "safetensors"))
        chosen = torch.tensor(rows)
        last = torch.cumsum(tensors["captions_of"], 0)
        first = last - tensors["captions_of"]
        caption_rows = torch.cat([torch.arange(int(first[row]), int(last[row])) for row in rows])
        for name, tensor in tensors.items():
            pieces.setdefault(name, []).append(tensor[caption_rows if name.startswith(_CONDITION) else chosen])
    whole = {name: torch.cat(several) for name, several in pieces.items()}
    counts = whole["captions_of"]
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    number_within = torch.arange(len(owner)) - (torch.cumsum(counts, 0) - counts)[owner]
    device = context.device
    condition = {
        name.removeprefix(_CONDITION): tensor.to(device)
        for name, tensor in whole.items()
        if name.startswith(_CONDITION)
    }
    return SampleBlock(
        whole["train_ids"].to(device),
        whole["latents"].to(device),
        condition,
        owner.to(device),
        number_within.to(device),
    )
