"""Tars that are read in parts: the tables do not depend on how they were cut, and what changed is read again alone."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from storage_schemas import tables
from storage_schemas.commit import manifest_path
from storage_schemas.snapshots.vacuum import vacuum
from storage_schemas.workspace import Workspace
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.execution.preparing import make_samples
from tasks.inputs import sample_parts
from tasks.inputs.joined_samples import Joined
from tasks.inputs.sample_parts import SampleParts, cut
from tasks.inputs.samples import ingest_samples, look_at_samples
from tasks.inputs.tars import find_shards, scan, scan_shard
from tests import tiny
from tests.tasks.configs import document

SHARES, WHOLE = 7_000, 2**28  # bytes of a part: a share of a tar, and all tars together


def write_faulty(folder: Path) -> list[Path]:
    """Tars with everything that can be wrong, and a key that two of them have."""
    good, moving = tiny.sample_members(range(12)), io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(moving, "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    odd = [
        ("s0001.seg.png", b"a companion"),
        ("alone.json", b"{}"),
        ("rotten.jpg", b"no image"),
        ("rotten.txt", b"x"),
        ("s0003.jpg", b"twice"),
        ("notes.csv", b"of nobody"),
        ("moving.webp", moving.getvalue()),
        ("moving.txt", b"red"),
    ]
    tiny.write_tar(folder / "a.tar", [*good[:9], *odd, *good[9:]])
    tiny.write_tar(folder / "b.tar", tiny.sample_members(range(10, 20)))  # two keys of a.tar
    tiny.write_tar(folder / "c.tar", [])
    whole = tiny.write_tar(folder / "d.tar", tiny.sample_members(range(19, 26))).read_bytes()
    (folder / "d.tar").write_bytes(whole[: 11 * 1024])
    (folder / "e.tar").write_bytes(b"\x1f\x8b no tar")
    tiny.write_tar(folder / "f.tar", tiny.sample_members(range(3)))
    return find_shards(str(folder / "*.tar"), "data.shards")


def context(shards: str, workspace: Path) -> Context:
    config = document(workspace=str(workspace), data__shards=shards, features={"space": "pixel"})
    return Context(PipelineConfig.model_validate(config), "model")


def parts_in(workspace: Path) -> dict[str, int]:
    """The files of parts, with the time when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (workspace / "samples" / "parts").glob("*.parquet")}


@pytest.mark.parametrize("size", [SHARES, 20_000, WHOLE])
def test_train_ids_and_rejections_are_those_of_one_reading_however_tars_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    shards = write_faulty(tmp_path)
    samples, rejections = scan(shards, lambda: None)  # one after the other, with a dict of all keys
    monkeypatch.setattr(sample_parts, "PART_BYTES", size)
    where = context(str(tmp_path / "*.tar"), tmp_path / "workspace")
    looked, table = look_at_samples(where)
    made = ingest_samples.fn(where).artifact
    count = len(parts_in(tmp_path / "workspace"))
    assert (count > len(shards), count > 1) == (size == SHARES, size != WHOLE) or size not in (SHARES, WHOLE)
    found = tables.read(made.path, tables.SAMPLES).to_pylist()
    expected = [{"train_id": number, **asdict(sample)} for number, sample in enumerate(samples)]
    assert found == [{name: row[name] for name in tables.SAMPLES.schema.names} for row in expected]
    rejected = tables.read(made.path.with_name("rejected.parquet"), tables.REJECTED_SAMPLES).to_pylist()
    assert rejected == [asdict(rejection) for rejection in rejections] and len(rejected) > 10
    assert (looked.key, looked.rows) == (made.key, made.rows) and table.to_pylist() == found


def test_only_the_part_of_a_tar_that_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        tiny.write_tar(tmp_path / f"{number:02d}.tar", tiny.sample_members(range(3 * number, 3 * number + 3)))
    monkeypatch.setattr(sample_parts, "_ends_a_part", lambda shard, _size: shard.stem in ("03", "07", "09"))
    where, workspace = context(str(tmp_path / "*.tar"), tmp_path / "workspace"), tmp_path / "workspace"
    ingest_samples.fn(where)
    before = parts_in(workspace)
    assert len(before) == 4
    tiny.write_tar(tmp_path / "05.tar", tiny.sample_members(range(100, 103)))
    made = ingest_samples.fn(where).artifact
    changed = parts_in(workspace)
    assert len(changed.keys() - before.keys()) == 1 and before.items() <= changed.items()
    keys = tables.read(made.path, tables.SAMPLES)["key"].to_pylist()
    assert keys[15:18] == ["s0100", "s0101", "s0102"] and len(keys) == 36
    tiny.write_tar(tmp_path / "05a.tar", tiny.sample_members(range(200, 203)))  # between two others
    assert ingest_samples.fn(where).artifact.rows == 39
    assert len(parts_in(workspace).keys() - changed.keys()) == 1


def test_tars_end_a_part_as_often_as_their_bytes_ask_for() -> None:
    drawn = [sample_parts._ends_a_part(Path(f"data/{number:05d}.tar"), 2**26) for number in range(8_000)]
    assert sum(drawn) == pytest.approx(8_000 / 4, rel=0.1)


def test_a_reading_that_ended_half_way_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_faulty(tmp_path)
    monkeypatch.setattr(sample_parts, "PART_BYTES", SHARES)
    where, workspace = context(str(tmp_path / "*.tar"), tmp_path / "workspace"), tmp_path / "workspace"
    made = ingest_samples.fn(where).artifact
    whole, parts = tables.read(made.path, tables.SAMPLES), parts_in(workspace)
    lost = sorted(parts)[::3]
    for name in lost:  # one before its file was there, others before their manifests were
        manifest_path(workspace / "samples" / "parts" / name).unlink()
    (workspace / "samples" / "parts" / lost[0]).unlink()
    manifest_path(made.path).unlink()
    again = ingest_samples.fn(where)
    assert not again.reused and again.artifact == made and tables.read(made.path, tables.SAMPLES).equals(whole)
    after = parts_in(workspace)
    assert after.keys() == parts.keys() and {name for name in parts if after[name] != parts[name]} == {lost[0]}
    shutil.rmtree(workspace / "samples" / "parts")
    assert ingest_samples.fn(where).reused  # as an index of an earlier release, which has none


def test_workers_know_the_parts_from_their_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_faulty(tmp_path)
    workspace = Workspace.at(str(tmp_path / "workspace"))
    monkeypatch.setattr(sample_parts, "PART_BYTES", SHARES)
    mine = SampleParts.of(workspace, "k", shards)
    mine.keep_plan()
    monkeypatch.undo()
    theirs = SampleParts.planned(workspace, "k")
    assert theirs.plan == mine.plan != cut(shards)
    for number in reversed(range(theirs.count)):
        theirs.make(number)
    assert mine.missing() == [] and mine.standing().seconds > 0


def test_vacuum_removes_parts_of_earlier_tables_and_keeps_what_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_faulty(tmp_path)
    monkeypatch.setattr(sample_parts, "PART_BYTES", SHARES)
    where, workspace = context(str(tmp_path / "*.tar"), tmp_path / "workspace"), tmp_path / "workspace"

    def ingested() -> set[str]:
        before = set(parts_in(workspace))
        make_samples(where)
        return set(parts_in(workspace)) - before

    first = ingested()
    tiny.write_tar(tmp_path / "f.tar", tiny.sample_members(range(50, 53)))
    second = ingested()
    unfinished = SampleParts.of(where.workspace, "0" * 16, find_shards(str(tmp_path / "a.tar"), "data.shards"))
    unfinished.keep_plan()
    gone = {path.name for path in vacuum(where.workspace, older_than=timedelta(0))}
    assert len(gone) == len(second) == 2 and gone < first  # the shares of one tar
    assert set(parts_in(workspace)) == (first | second) - gone
    assert not any(manifest_path(workspace / "samples" / "parts" / name).exists() for name in gone)
    assert ingested() == set()


@pytest.mark.parametrize("of", [1, 3, 64])
def test_shares_of_a_caption_file_are_the_whole(tmp_path: Path, of: int) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg", "width": 24, "height": 24} for number in range(7)]
    notes = [{"image_id": number, "caption": tiny.draw(number)[1]} for number in range(6)]
    captions, pictures = tmp_path / "annotations" / "captions_few.json", tmp_path / "few"
    for folder in (captions.parent, pictures):
        folder.mkdir()
    captions.write_text(json.dumps({"images": images, "annotations": notes}))
    for number in range(1, 7):
        (pictures / f"{number}.jpg").write_bytes(tiny.draw(number)[0])
    found = [item for share in range(of) for item in scan_shard(captions, share, of)]
    assert [item.key for item in found] == [str(number) for number in range(7)]
    assert [type(item).__name__ for item in found] == ["Rejection", *["ShardSample"] * 5, "Rejection"]
    captions.write_text(json.dumps({"images": [], "annotations": []}))
    assert len([item for share in range(of) for item in scan_shard(captions, share, of)]) == 1


def test_a_key_that_is_used_again_in_any_part_is_rejected() -> None:
    rows = [
        {"shard": "a", "key": f"k{number % 70_000}", "reason": "" if number % 7 else "bad", "captions": ["c"]}
        for number in range(100_000)
    ]
    rest = {"offset": 1, "size": 2, "width": 3, "height": 4, "image_sha256": "s", "image_look": b"l"}
    rest |= {"metadata": "{}", "pictures": 1}
    whole = pa.Table.from_pylist([row | rest for row in rows], schema=tables.SCANNED.schema)
    joined = Joined([whole.slice(start, 9_999).select for start in range(0, len(rows), 9_999)])
    expected, seen = [], set()
    for row in rows:
        if not row["reason"] and row["key"] not in seen:
            seen.add(row["key"])
            expected.append(row["key"])
    found = pa.concat_tables(joined.samples())
    assert found["key"].to_pylist() == expected and found["train_id"].to_pylist() == list(range(joined.rows))
    assert joined.rejected.num_rows == len(rows) - joined.rows
