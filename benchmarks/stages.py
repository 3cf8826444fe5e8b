"""Stages of a run made here and now, without a flow."""

from __future__ import annotations

from storage_schemas.commit import committed
from tasks.context import Context, Stage
from tasks.curvature import CurvatureParts, curvature_of
from tasks.samples import LatentParts, latents_of


def make_latents(context: Context, samples: Stage) -> Stage:
    latents = latents_of(context, samples)
    return _made(LatentParts(context, samples, latents))


def make_curvature(context: Context, latents: Stage) -> Stage:
    return _made(CurvatureParts(context, latents, curvature_of(context, latents)))


def _made(parts: LatentParts | CurvatureParts) -> Stage:
    for number in range(parts.count):
        if committed(parts.path(number), parts.key(number)) is None:
            parts.make(number)
    return parts.stage
