"""What an estimate can see of model and data, and what it takes from `expected` because it is not there yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastgda_core.errors import UsageError
from tasks.artifact import Artifact
from tasks.config.expected import ExpectedConfig
from tasks.config.inputs import SplitConfig
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context, open_context
from tasks.execution.known import MODELS, ModelShape
from tasks.inputs.index_rows import candidate_index
from tasks.inputs.queries import count_queries
from tasks.inputs.samples import look_at_samples
from tasks.inputs.tars import matching_files
from tasks.teaching.families import family_of


@dataclass(frozen=True)
class Seen:
    """Model and data, as they are or as they are expected.

    context, samples: None where the model, or one of both, is not there.
    captions: of a sample, on average; image_bytes: of an image in its tar.
    unseen: one line for each thing that was not looked at.
    """

    context: Context | None
    samples: Artifact | None
    count: int
    captions: float
    image_bytes: float
    queries: int
    unseen: tuple[str, ...]


def look(config: PipelineConfig) -> Seen:
    """Look at what is there, and write nothing.

    Raises:
        UsageError: something is wrong with it, or is not there and the configuration has no `expected`.
    """
    expected, unseen = config.expected, list[str]()
    context = None
    if expected is not None and not config.model.folder.exists():
        unseen.append(f"the model: there is no folder {config.model.folder}; sizes are those of {expected.denoiser}")
    else:
        context = open_context(config)
        family_of(config).check(context)
    if expected is not None and (near := candidate_index(config.candidates)) is not None and not near.path.exists():
        unseen.append(f"the index of candidates: there is no {near.path}")
    data = _looked_at(config, context, expected, unseen)
    return Seen(context, *data, _queries(config, unseen), tuple(unseen))


def _looked_at(
    config: PipelineConfig, context: Context | None, expected: ExpectedConfig | None, unseen: list[str]
) -> tuple[Artifact | None, int, float, float]:
    """Return the samples' artifact, their number, captions of one and bytes of an image."""
    if expected is not None and not matching_files(config.data.shards):
        unseen.append(f"the training images: no file matches {config.data.shards}")
        return None, expected.samples, expected.captions, expected.image_bytes
    samples, table = look_at_samples(context or Context(config, ""))
    captions = pc.mean(pc.list_value_length(table["captions"])).as_py()
    return (samples if context else None), table.num_rows, float(captions), float(pc.mean(table["size"]).as_py())


def _queries(config: PipelineConfig, unseen: list[str]) -> int:
    split = config.queries.split
    if config.expected is None or config.queries.captions or matching_files(config.queries.pattern):
        return count_queries(config.queries)
    if not isinstance(split, SplitConfig):
        raise UsageError("queries.split gives shares of queries that are not there: give numbers, or queries.shards")
    unseen.append(f"the queries: no file matches {config.queries.pattern}; their number is that of queries.split")
    return split.total + 2 * config.queries.twins


@torch.no_grad()
def shape_of(context: Context) -> ModelShape:
    """Count what one forward of the model takes, by running it once, on a sample of nothing."""
    at = context.at_checkpoints()[0]
    model = replace(at.teacher_model(), compiled_denoisers=None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_caption:
        condition = model.encode_captions(["a trial"])
    noise = torch.zeros(1, *model.latent_shape, device=model.device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_forward:
        model.losses(noise, condition, torch.zeros(1, dtype=torch.long, device=model.device), noise)
    flops = of_forward.get_total_flops(), of_caption.get_total_flops()
    return ModelShape.of(*flops, prod(model.latent_shape), _numbers(condition), at.layers(model).values())


def known_shape(config: PipelineConfig) -> ModelShape:
    """Return the shape that `expected` names."""
    assert config.expected is not None
    layers = config.teacher.layers if config.model.adapter is None else "lora"
    if layers != "cross-attn-kv":
        raise UsageError(
            f"teacher.layers is {layers}, and models that are not there are known by their cross-attn-kv layers alone: "
            f"put the model into {config.model.folder}"
        )
    return MODELS[config.expected.denoiser]


def _numbers(condition: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in condition.values())
