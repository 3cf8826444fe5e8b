"""Candidates by a folder of clip-retrieval, compared with brute force over its embeddings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastgda_core.errors import UsageError
from storage_schemas import tables
from storage_schemas.clip_index import ClipIndex
from storage_schemas.errors import StoreError
from tasks.artifact import Artifact
from tasks.config.inputs import CandidatesConfig
from tasks.config.pipeline import PipelineConfig
from tasks.context import Context
from tasks.inputs.candidates import candidate_features, candidates_key, choose_candidates
from tasks.inputs.index_rows import join_rows, map_rows
from tasks.inputs.queries import load_queries, make_queries
from tasks.inputs.samples import ingest_samples, samples_table
from tests import tiny
from tests.clip_folder import ORDER, ROWS, embeddings, write_folder, write_shards
from tests.tasks.configs import document
from tests.tasks.without_prefect import without_prefect

K = 20
THERE = [row for row in range(ROWS) if row % 4]  # whose images were fetched
QUERIES = range(6)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip") / "index")


@dataclass(frozen=True)
class World:
    context: Context
    samples: Artifact
    queries: Artifact


def world(folder: Path, clip: Path, model: Path, **changes: object) -> World:
    """Samples of three quarters of the rows, six queries and the twins of a sample."""
    if not (folder / "shards.tar").exists():
        write_shards(folder / "shards.tar", THERE)
        tiny.write_tar(folder / "queries.tar", tiny.sample_members(QUERIES))
    candidates = {"policy": "top_k", "k": K, "space": "pixel", "index": {"folder": str(clip), "nprobe": 6}}
    config = document(
        workspace=str(folder / "workspace"),
        data__shards=str(folder / "shards.tar"),
        model__folder=str(model),
        queries={
            "shards": str(folder / "queries.tar"),
            "split": {"train": 4, "validation": 1, "test": 1},
            "twins": 1,
            "steps": 1,
        },
        features={"space": "pixel"},
        candidates=candidates,
        evaluation={"cutoffs": [3], "validation_cutoff": 3, "neighbors": 1},
    )
    config["candidates"] |= {name.removeprefix("candidates__"): value for name, value in changes.items()}
    context = Context(PipelineConfig.model_validate(config), "m")
    with without_prefect():
        samples = ingest_samples(context).artifact
        return World(context, samples, make_queries(context, samples).artifact)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, clip: Path, model_folder: Path) -> World:
    return world(tmp_path_factory.mktemp("world"), clip, model_folder)


def chosen(world: World) -> dict[str, list[tuple[int, int, float]]]:
    """(train_id, neighbor_rank, similarity) of each query's candidates."""
    with without_prefect():
        path = choose_candidates(world.context, "run", world.samples, world.queries).artifact.path
    found: dict[str, list[tuple[int, int, float]]] = {}
    for row in tables.read(path, tables.CANDIDATES).to_pylist():
        found.setdefault(row["query_id"], []).append((row["train_id"], row["neighbor_rank"], row["similarity"]))
    path.unlink()
    return found


def test_candidates_are_the_nearest_rows_whose_images_are_there(made: World) -> None:
    found = chosen(made)
    for number in QUERIES:
        cosines = embeddings([number]).astype(np.float64)[0] @ embeddings(ORDER).astype(np.float64).T
        in_order = np.sort(cosines)[::-1]
        mine = found[f"s{number:04d}"]
        for train_id, rank, similarity in mine:  # of two that are as near either may be first
            assert similarity == pytest.approx(cosines[THERE[train_id]], abs=1e-5)
            assert similarity == pytest.approx(in_order[rank - 1], abs=1e-5)
        surely = {place for place, row in enumerate(THERE) if cosines[row] > in_order[K] + 1e-5}
        assert surely <= {train_id for train_id, _, _ in mine}
        assert 0 < len(surely) <= len(mine) < K


def test_queries_of_the_twin_test_are_scored_against_their_twin(made: World) -> None:
    twins = [query for query in load_queries(made.queries) if query.split in (tables.TWIN, tables.PSEUDO)]
    found = chosen(made)
    assert len(twins) == 2
    for query in twins:
        twin = int(query.query_id.split("-")[1])
        ranks = [rank for train_id, rank, _ in found[query.query_id] if train_id == twin]
        assert len(ranks) == 1
        assert ranks[0] == 1 or query.split == tables.TWIN  # an image is nearest to itself; a drawn one is anywhere


def test_of_the_nearest_some_are_drawn_before_it_is_asked_which_are_there(
    made: World, clip: Path, model_folder: Path
) -> None:
    folder = made.context.workspace.root.parent
    assert isinstance(folder, Path)
    some = chosen(world(folder, clip, model_folder, candidates__scored=8))
    every = chosen(made)
    for number in QUERIES:
        name = f"s{number:04d}"
        assert {each[:2] for each in some[name]} < {each[:2] for each in every[name]}
        drawn = np.random.default_rng([0, number]).choice(K, 8, replace=False) + 1  # seed, number of the query
        assert {each[1] for each in some[name]} <= set(drawn.tolist())


@pytest.mark.parametrize("match", ["index_row", "url", "sha256"])
def test_rows_are_the_samples_that_say_the_same(
    tmp_path: Path, made: World, clip: Path, model_folder: Path, match: str
) -> None:
    folder = made.context.workspace.root.parent
    assert isinstance(folder, Path)
    again = world(folder, clip, model_folder, candidates__index={"folder": str(clip), "match": match})
    expected = np.full(ROWS, -1)
    expected[THERE] = np.arange(len(THERE))
    rows = join_rows(again.context, again.samples)
    assert rows.artifact.rows == len(THERE)
    np.testing.assert_array_equal(map_rows(rows), expected)
    assert join_rows(again.context, again.samples).reused
    fields = [json.loads(text) for text in samples_table(again.samples.path)["metadata"].to_pylist()]
    assert [each["index_row"] for each in fields] == THERE


def test_rows_are_samples_by_the_keys_of_the_tars_from_which_the_index_was_made(
    tmp_path: Path, clip: Path, model_folder: Path
) -> None:
    write_shards(tmp_path / "shards.tar", THERE, with_row=False)
    tiny.write_tar(tmp_path / "queries.tar", tiny.sample_members(QUERIES))
    by_key = world(tmp_path, clip, model_folder, candidates__index={"folder": str(clip), "match": "key"})
    expected = np.full(ROWS, -1)
    expected[THERE] = np.arange(len(THERE))
    np.testing.assert_array_equal(map_rows(join_rows(by_key.context, by_key.samples)), expected)
    by_row = world(tmp_path, clip, model_folder)
    with pytest.raises(UsageError, match=r"no row of .* is a sample of data.shards by the field index_row"):
        join_rows(by_row.context, by_row.samples)


def test_arrow_metadata_has_the_same_rows_as_parquet(tmp_path: Path, clip: Path) -> None:
    folder = tmp_path / "arrow"
    (folder / "metadata").mkdir(parents=True)
    (folder / "image.index").symlink_to(clip / "image.index")
    whole = pa.concat_tables([pq.read_table(path) for path in ClipIndex(clip).metadata])
    with pa.ipc.new_file(folder / "metadata" / "0.arrow", whole.schema) as writer:
        writer.write_table(whole, max_chunksize=7)
    for index in (ClipIndex(clip), ClipIndex(folder)):
        assert index.rows == ROWS
        firsts, batches = zip(*index.batches([index.column("url")]), strict=True)
        assert pa.Table.from_batches(batches)["URL"].to_pylist() == whole["URL"].to_pylist()
        assert list(firsts) == np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1].tolist()
    with pytest.raises(StoreError, match="has no column licence; it has image_path, caption, URL"):
        ClipIndex(clip).column("licence")


def test_the_key_of_an_index_follows_its_bytes_and_not_its_place(tmp_path: Path, clip: Path) -> None:
    copied = write_folder(tmp_path / "copied")
    assert ClipIndex(copied).key == ClipIndex(clip).key
    content = bytearray((copied / "image.index").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "image.index").write_bytes(content)
    assert ClipIndex(copied).key != ClipIndex(clip).key


def test_settings_without_an_index_depend_on_what_they_ever_did(made: World) -> None:
    config = CandidatesConfig(policy="top_k", k=7)
    assert config.science() == {"policy": "top_k", "k": 7, "scored": None, "seed": 0}
    by_index = made.context.config.candidates
    assert by_index.science() == {"policy": "top_k", "k": K, "scored": None, "seed": 0}
    assert by_index.index is not None
    other = by_index.model_copy(update={"index": by_index.index.model_copy(update={"nprobe": 5})})
    changed = Context(made.context.config.model_copy(update={"candidates": other}), "m")
    keys = [candidates_key(each, made.samples, made.queries) for each in (made.context, changed)]
    assert keys[0] != keys[1]


def test_an_index_of_another_encoder_is_refused_before_any_feature_of_a_sample(
    made: World, clip: Path, model_folder: Path
) -> None:
    folder = made.context.workspace.root.parent
    assert isinstance(folder, Path)
    other = world(folder, clip, model_folder, candidates__space="minilm_text")
    with without_prefect(), pytest.raises(UsageError, match=r"holds vectors of 3072 numbers and minilm_text gives 384"):
        candidate_features(other.context, other.samples, other.queries)


def test_an_index_without_its_metadata_is_refused(tmp_path: Path, made: World, clip: Path, model_folder: Path) -> None:
    folder = made.context.workspace.root.parent
    assert isinstance(folder, Path)
    half = tmp_path / "half"
    (half / "metadata").mkdir(parents=True)
    (half / "image.index").symlink_to(clip / "image.index")
    broken = world(folder, half, model_folder)
    with pytest.raises(StoreError, match="holds neither Parquet nor Arrow files"):
        candidates_key(broken.context, broken.samples, broken.queries)
    (half / "metadata" / "metadata_0.parquet").symlink_to(clip / "metadata" / "metadata_0.parquet")
    with without_prefect(), pytest.raises(UsageError, match=r"has 90 vectors and the metadata beside it 45 rows"):
        candidate_features(broken.context, broken.samples, broken.queries)


def test_a_query_with_too_few_candidates_is_named(made: World, clip: Path, model_folder: Path) -> None:
    folder = made.context.workspace.root.parent
    assert isinstance(folder, Path)
    few = world(folder, clip, model_folder, candidates__k=2)
    with pytest.raises(UsageError, match=r"query s000\d has \d of the 2 candidates that are to be scored"):
        chosen(few)
