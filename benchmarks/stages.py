"""Stages of a run made here and now, without a flow."""

from __future__ import annotations

from storage_schemas.commit import committed
from tasks.artifact import Artifact
from tasks.context import Context
from tasks.teaching.latents import LatentParts, latents_of


def make_latents(context: Context, samples: Artifact) -> Artifact:
    parts = LatentParts(context, samples, latents_of(context, samples))
    for number in range(parts.count):
        if committed(parts.path(number), parts.key(number)) is None:
            parts.make(number)
    return parts.artifact
