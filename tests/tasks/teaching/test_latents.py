"""Parts of latents: what is in them, what of them is read, and how captions become conditions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from storage_schemas.commit import input_key
from storage_schemas.files import AnyPath
from storage_schemas.workspace import part
from tasks.artifact import Artifact
from tasks.inputs.samples import samples_table
from tasks.teaching.captions import CAPTIONS_AT_A_TIME, CaptionCache
from tasks.teaching.latent_rows import LATENT_PART_SAMPLES, part_tensors, read_latent_rows
from tasks.teaching.latents import LatentParts, blocks_ahead, latents_of, load_block
from tests.object_store import bytes_sent, empty_workspace
from tests.tasks.whole_runs import SAMPLES, WholeRun

SHAPE = (2, 4, 16, 16)  # of a sample of MSCOCO's model, with flips


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.integration)])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnyPath:
    return tmp_path if request.param == "disk" else empty_workspace(request.getfixturevalue("s3"), monkeypatch)


def written(folder: AnyPath, parts: int) -> tuple[Tensor, list[list[str]]]:
    """Write parts of random latents and captions; return what is in them."""
    generator, samples = torch.Generator().manual_seed(0), parts * LATENT_PART_SAMPLES
    latents = torch.randn(samples, *SHAPE, generator=generator)
    captions = [[f"caption {number} of {sample}: é" for number in range(sample % 4 + 1)] for sample in range(samples)]
    for number in range(parts):
        rows = range(number * LATENT_PART_SAMPLES, (number + 1) * LATENT_PART_SAMPLES)
        tensors = part_tensors(latents[rows.start : rows.stop], list(rows), captions[rows.start : rows.stop])
        part(folder, number, "safetensors").write_bytes(save(tensors))
    return latents, captions


def test_scattered_samples_are_read_at_most_a_fifth_above_their_bytes(folder: AnyPath) -> None:
    """One of fifty samples, as 20,000 of 1,000,000; a part is a hundred times what is wanted of it."""
    parts = 8
    latents, captions = written(folder, parts)
    chosen = np.sort(np.random.default_rng(0).choice(len(latents), len(latents) // 50, replace=False)).tolist()
    wanted = latents[chosen].nbytes + sum(len(json.dumps(captions[sample]).encode()) for sample in chosen)
    before = int(Path("/proc/self/io").read_text().split()[1])
    with bytes_sent() as sent:
        found = read_latent_rows(folder, chosen)
    read = sent["GET"] if not isinstance(folder, Path) else int(Path("/proc/self/io").read_text().split()[1]) - before
    assert wanted < read < 1.2 * wanted
    assert torch.equal(torch.cat([rows.latents for rows in found]), latents[chosen])
    assert [own for rows in found for own in rows.captions or ()] == [captions[sample] for sample in chosen]
    with bytes_sent() as sent:
        read_latent_rows(folder, chosen)
    assert sent["GET"] <= 1.05 * wanted, "heads are read once a process"


def test_rows_come_part_by_part_as_often_as_they_are_named(tmp_path: Path) -> None:
    latents, captions = written(tmp_path, 2)
    found = read_latent_rows(tmp_path, [600, 3, 600, 1, 3])
    expected = [600, 600, 3, 1, 3]
    assert torch.cat([rows.train_ids for rows in found]).tolist() == expected
    assert torch.equal(torch.cat([rows.latents for rows in found]), latents[expected])
    assert [own for rows in found for own in rows.captions or ()] == [captions[sample] for sample in expected]
    assert torch.cat([rows.captions_of for rows in found]).tolist() == [sample % 4 + 1 for sample in expected]


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), min_size=1))
def test_any_caption_survives(tmp_path_factory: pytest.TempPathFactory, captions: list[list[str]]) -> None:
    folder = tmp_path_factory.mktemp("captions")
    tensors = part_tensors(torch.zeros(len(captions), 1, 1, 1, 1), list(range(len(captions))), captions)
    save_file(tensors, part(folder, 0, "safetensors"))
    (found,) = read_latent_rows(folder, range(len(captions)))
    assert found.captions == captions


def earlier_part(path: Path, latents: Tensor, train_ids: list[int], counts: list[int], condition: Tensor) -> None:
    """Write a part as 0.1.0 did."""
    tensors = {"train_ids": torch.tensor(train_ids), "latents": latents, "captions_of": torch.tensor(counts)}
    save_file({**tensors, "condition/encoder_hidden_states": condition}, path)


def test_parts_of_an_earlier_release_give_the_block_that_they_gave_beside_new_ones(
    unlearned: WholeRun, tmp_path: Path
) -> None:
    context, path = unlearned.context, part(tmp_path, 0, "safetensors")
    latents, captions = written(tmp_path, 2)
    artifact = Artifact("latents", "k", tmp_path, len(latents))
    counts = [len(own) for own in captions[:LATENT_PART_SAMPLES]]
    first = [sum(counts[:sample]) for sample in range(LATENT_PART_SAMPLES)]
    known = context.model().encode_captions(captions[513])["encoder_hidden_states"]
    stored = torch.randn(sum(counts), *known.shape[1:])
    earlier_part(path, latents[:LATENT_PART_SAMPLES], list(range(LATENT_PART_SAMPLES)), counts, stored)

    block = load_block(context, artifact, [9, 2, 7])
    rows = [first[sample] + number for sample in (9, 2, 7) for number in range(counts[sample])]
    assert torch.equal(block.condition["encoder_hidden_states"], stored[rows])
    assert torch.equal(block.latents, latents[[9, 2, 7]])
    assert block.owner.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert block.caption_number.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]

    mixed = load_block(context, artifact, [2, 513])
    assert torch.equal(mixed.condition["encoder_hidden_states"][:3], stored[first[2] : first[3]])
    torch.testing.assert_close(mixed.condition["encoder_hidden_states"][3:], known)
    few = load_block(context, artifact, [7, 2, 513], captions=1)
    assert few.owner.tolist() == [0, 1, 2] and few.caption_number.tolist() == [0, 0, 0]
    assert torch.equal(few.condition["encoder_hidden_states"][:2], stored[[first[7], first[2]]])
    torch.testing.assert_close(few.condition["encoder_hidden_states"][2:], known[:1])


def test_a_part_made_again_in_the_new_layout_is_read_as_that(unlearned: WholeRun, tmp_path: Path) -> None:
    latents, captions = written(tmp_path, 1)
    new = part(tmp_path, 0, "safetensors").read_bytes()
    counts = [len(own) for own in captions]
    earlier_part(part(tmp_path, 0, "safetensors"), latents, list(range(512)), counts, torch.zeros(sum(counts), 1))
    (found,) = read_latent_rows(tmp_path, [5])
    assert found.captions is None
    part(tmp_path, 0, "safetensors").write_bytes(new)
    (found,) = read_latent_rows(tmp_path, [5])
    assert found.captions == [captions[5]] and torch.equal(found.latents, latents[5:6])


def test_a_part_holds_no_embeddings_and_in_bf16_half_the_bytes(unlearned: WholeRun) -> None:
    context, artifacts = unlearned.context, unlearned.run.artifacts
    samples, latents = artifacts["samples"], artifacts["latents"]
    model = context.config.model
    assert latents.key == input_key("latents", samples.key, context.model_hash, model.flips), "earlier runs are found"
    rounded = replace(
        context, config=context.config.model_copy(update={"model": model.model_copy(update={"latents": "bf16"})})
    )
    parts = LatentParts(rounded, samples, latents_of(rounded, samples))
    assert parts.make(0).rows == SAMPLES and parts.artifact.key != latents.key
    sizes = {}
    for name, path in {"float32": part(latents.path, 0, "safetensors"), "bf16": parts.path(0)}.items():
        with safe_open(path, "pt") as file:
            assert {*file.keys()} == {"captions", "captions_end", "latents", "train_ids"}
            sizes[name] = file.get_tensor("latents").nbytes
    assert sizes["float32"] == 2 * sizes["bf16"]
    whole, half = load_block(context, latents, [3, 7]), load_block(rounded, parts.artifact, [3, 7])
    assert half.latents.dtype == torch.float32
    assert torch.equal(half.latents, whole.latents.bfloat16().float()) and not torch.equal(half.latents, whole.latents)


def test_blocks_read_ahead_are_the_block_in_pieces(unlearned: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.teaching.latents.BLOCK_SAMPLES", 5)
    context, latents = unlearned.context, unlearned.run.artifacts["latents"]
    pieces = list(blocks_ahead(context, latents, list(range(SAMPLES))))
    whole = load_block(context, latents, list(range(SAMPLES)))
    assert [len(piece.train_ids) for piece in pieces] == [5, 5, 5, 5, 4]
    assert torch.equal(torch.cat([piece.latents for piece in pieces]), whole.latents)
    for name, tensor in whole.condition.items():
        torch.testing.assert_close(torch.cat([piece.condition[name] for piece in pieces]), tensor)


def test_captions_are_encoded_once_a_process_and_are_what_the_model_makes_of_each_alone(unlearned: WholeRun) -> None:
    model, device = unlearned.context.model(), unlearned.context.device
    captions = [own[0] for own in samples_table(unlearned.run.artifacts["samples"].path)["captions"].to_pylist()]
    asked, cache = list[str](), CaptionCache(10**9)

    def encode(some: list[str]) -> dict[str, Tensor]:
        asked.extend(some)
        return model.encode_captions(some)

    wanted = [*captions, captions[0], captions[5]]
    found = cache.conditions(wanted, encode, device)
    again = cache.conditions([captions[5], "another", captions[0]], encode, device)
    assert asked == [*captions, "another"]
    for name, tensor in found.items():
        alone = torch.cat([model.encode_captions([caption])[name] for caption in wanted])
        torch.testing.assert_close(tensor, alone, rtol=0, atol=1e-6)  # in batches the last bit may differ
        assert torch.equal(again[name][0], tensor[5]) and torch.equal(again[name][2], tensor[0])


def test_a_full_cache_drops_what_was_not_asked_for_the_longest(unlearned: WholeRun) -> None:
    asked, row = list[list[str]](), 40  # bytes

    def encode(some: list[str]) -> dict[str, Tensor]:
        asked.append(some)
        numbers = torch.tensor([int(text) for text in some])
        return {"a": numbers[:, None].float().expand(-1, 8), "b": numbers}

    def of(numbers: range | list[int]) -> list[list[str]]:
        asked.clear()
        found = cache.conditions([str(number) for number in numbers], encode, torch.device("cpu"))
        assert found["b"].tolist() == list(numbers) and found["a"][:, 3].tolist() == list(numbers)
        assert cache.bytes == row * len(cache) <= cache.most_bytes
        return asked

    cache = CaptionCache(200 * row)
    assert [len(some) for some in of(range(300))] == [CAPTIONS_AT_A_TIME, CAPTIONS_AT_A_TIME, 44]
    assert len(cache) == 200 and of(range(100, 300)) == []
    of([100, 7])
    assert of([100, 102]) == [] and of([101]) == [["101"]]
    cache.most_bytes = 0
    assert of([100, 500]) == [["500"]] and len(cache) == 0
