"""Frozen features of training samples and queries."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from prefect import task
from prefect.cache_policies import NO_CACHE
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastgda_core.features import ENCODERS, Encoder, concatenate, encoder_names, load_encoder, mean_over, text_space
from fastgda_core.features.encoders import USUAL, preprocessing_of
from storage_schemas import tables
from storage_schemas.commit import Manifest, commit, commit_table, committed, input_key, read_manifest
from storage_schemas.files import AnyPath, Stamps, file_sha256, folder_stamps, private_folder, temporary_name
from storage_schemas.listings import committed_parts, quarantined_in
from storage_schemas.workspace import part
from tasks.artifact import Artifact, Made, remembered
from tasks.config.inputs import FeaturesConfig
from tasks.context import Context, load_tensors
from tasks.inputs.encoded_items import InBatches, encode_items
from tasks.inputs.queries import join_queries
from tasks.inputs.samples import caption_counts
from tasks.parts import Parts
from tasks.progress import stage

PART_ITEMS = 1024
log = logging.getLogger("fastgda.inputs")


@task(task_run_name="features of {items.name}", cache_policy=NO_CACHE)
def extract_features(context: Context, items: Artifact) -> Made:
    """Extract the outputs of every encoder of the feature space for samples or queries, in parts of 1,024.

    For samples whose features are to be centred their mean is computed, too.
    """
    key = input_key(str(context.workspace.root), items.name, features_key(context, items))
    return remembered(key, lambda: _extracted(context, items))


def _extracted(context: Context, items: Artifact) -> Made:
    parts = FeatureParts.of(context, items, [context])
    reused = not parts.missing()
    parts.make_missing()
    manifests = parts.committed().values()
    seconds = sum(manifest.seconds for manifest in manifests)
    if context.config.features.centre and items.name == "samples":
        left_out = {train_id: why for manifest in manifests for train_id, why in manifest.quarantined.items()}
        mean, was_there = _commit_mean(context, items, left_out)
        seconds, reused = seconds + mean.seconds, reused and was_there
    name, folder = f"features of {items.name}", context.workspace.root / "features"
    return Made(Artifact(name, features_key(context, items), folder, items.rows), seconds, reused)


class FeatureParts(Parts):
    """The outputs of some encoders for samples or queries, in parts of 1,024, with a file an encoder.

    The part's path and key are those of the last encoder's file: it is there when all are.
    """

    kind = "features"

    def __init__(self, context: Context, items: Artifact, folders: Mapping[str, tuple[AnyPath, str]]) -> None:
        """Take the folder and input key of each encoder by name."""
        self.context, self.items, self.folders = context, items, dict(folders)
        self._loaded: dict[str, InBatches] = {}
        self._whole: dict[int, Manifest] = {}
        self.title = f"{', '.join(folders)} of {items.name}"
        folder, key = list(folders.values())[-1]
        self.artifact = Artifact(self.kind, key, folder, items.rows)

    @classmethod
    def of(cls, context: Context, items: Artifact, spaces: Iterable[Context]) -> FeatureParts:
        """Return the parts of all encoders of some contexts' feature spaces; that comes last which lacks most."""
        folders = {name: place for space in spaces for name, place in feature_folders(space, items).items()}
        there = {name: committed_parts(*place) for name, place in folders.items()}
        parts = cls(
            context, items, {name: folders[name] for name in sorted(folders, key=lambda name: -len(there[name]))}
        )
        if len(found := parts._complete(there)) == parts.count:  # and stays so: no other listing is needed
            parts._whole = found
        return parts

    @property
    def count(self) -> int:
        return -(-self.items.rows // PART_ITEMS)

    def rows(self, number: int) -> int:
        return min(PART_ITEMS, self.items.rows - number * PART_ITEMS)

    def _encoder(self, name: str) -> InBatches:
        if name not in self._loaded:
            config = self.context.config.features
            encoder = load_encoder(name, self.context.device, config.weights.get(name))
            self._loaded[name] = InBatches(encoder, config.batch_size or ENCODERS[name].batch)
        return self._loaded[name]

    def make(self, number: int) -> Manifest:
        lacking = {
            name: self._encoder(name)
            for name, (folder, key) in self.folders.items()
            if committed(part(folder, number), key) is None
        }
        numbers = list(range(number * PART_ITEMS, number * PART_ITEMS + self.rows(number)))
        done = encode_items(lacking, self.items, numbers, lambda _: None)
        for name in lacking:
            encoded, (folder, key) = done.encoded[name], self.folders[name]
            table = tables.FEATURES.rows(item=[str(item) for item in numbers], feature=as_lists(encoded.features))
            commit_table(
                part(folder, number),
                table,
                tables.FEATURES,
                key=key,
                started=time.monotonic() - encoded.seconds,
                device=str(self.context.device),
                quarantined=encoded.unreadable,
            )
        log.info("%s %05d: the device waited for images %.0f %% of the time", self.title, number, 100 * done.idle)
        made = self.made(number)
        assert made is not None
        return made

    def made(self, number: int) -> Manifest | None:
        several = [committed(part(folder, number), key) for folder, key in self.folders.values()]
        return _together(several) if all(several) else None

    def committed(self) -> dict[int, Manifest]:
        return self._whole or self._complete({name: committed_parts(*place) for name, place in self.folders.items()})

    def _complete(self, there: Mapping[str, Mapping[str, Manifest]]) -> dict[int, Manifest]:
        """Return the manifests of the parts of which every encoder's file is there, by number."""
        several = {
            number: [there[name].get(self.path(number).name) for name in self.folders] for number in range(self.count)
        }
        return {number: _together(each) for number, each in several.items() if all(each)}


def _together(several: Sequence[Manifest | None]) -> Manifest:
    """Return the last of the manifests of a part's files, with the seconds of all and what any left out."""
    there = list(filter(None, several))
    quarantined = {train_id: why for manifest in there for train_id, why in manifest.quarantined.items()}
    seconds = sum(manifest.seconds for manifest in there)
    return there[-1].model_copy(update={"seconds": seconds, "quarantined": quarantined})


def unreadable_items(context: Context, items: Artifact, numbers: list[int]) -> dict[int, str]:
    """Return which of these samples have the features of a grey picture, and why."""
    folders = [folder for folder, _ in feature_folders(context, items).values()]
    parts = sorted({number // PART_ITEMS for number in numbers})
    return quarantined_in((part(folder, number) for folder in folders for number in parts), numbers)


def _commit_mean(context: Context, samples: Artifact, left_out: dict[int, str]) -> tuple[Manifest, bool]:
    """Commit the mean of phi over all samples but those left out, whose pictures are grey.

    Return its manifest, and whether it was there before.
    """
    path, key = _mean_place(context, samples)
    manifest = committed(path, key)
    # A sample that was left out counts as soon as its tar is restored and its part made again.
    if manifest is not None and manifest.quarantined == left_out:
        return manifest, True
    started = time.monotonic()
    with stage("mean of the features", samples.rows) as advance:
        mean = mean_over(_kept(feature_blocks(context, samples), left_out, advance))
    made = commit(
        path,
        functools.partial(save_file, {"mean": mean}),
        key=key,
        rows=samples.rows - len(left_out),
        started=started,
        quarantined=left_out,
    )
    return made, False


def _kept(blocks: Iterable[Tensor], left_out: dict[int, str], advance: Callable[[int], None]) -> Iterator[Tensor]:
    """Yield the rows of consecutive blocks but for those with these numbers."""
    start = 0
    for block in blocks:
        yield block[torch.tensor([number not in left_out for number in range(start, start + len(block))])]
        start += len(block)
        advance(len(block))


def feature_mean(context: Context, samples: Artifact) -> Tensor | None:
    """Load the mean that is subtracted from phi, the samples' mean, (d,); None where features are not centred."""
    return load_tensors(_mean_place(context, samples)[0])["mean"] if context.config.features.centre else None


def _mean_place(context: Context, samples: Artifact) -> tuple[AnyPath, str]:
    """Return the path of the mean of the config's feature space, and its input key."""
    key = input_key("mean of features", _parts_keys(context, samples), context.config.features.unit_length)
    return context.workspace.feature_mean(key), key


def load_features(context: Context, items: Artifact, samples: Artifact) -> Tensor:
    """Load phi of samples or queries in the config's space, (items, d) float32, less the mean of the samples."""
    folders = feature_folders(context, items).values()
    parts = [_vectors(tables.read_parts(folder, tables.FEATURES)) for folder, _ in folders]
    mean = feature_mean(context, samples)
    return concatenate(parts, unit_length=context.config.features.unit_length, mean=mean)


def map_features(context: Context, samples: Artifact) -> Tensor:
    """Map phi of samples, as `load_features` loads it, from an Arrow file: for more than there is memory.

    The file lies in the workspace, or in the folder for temporary files where that is an object store.
    """
    path = _mapped_path(context, samples)
    if not path.exists():
        cache = path.parent
        cache.mkdir(parents=True, exist_ok=True)
        # Named as unfinished until it is whole, so that `fastgda vacuum` finds what a process that died left behind.
        scratch, temporary = (cache / temporary_name(f"{path.stem}.{kind}") for kind in ("npy", "arrow"))
        try:
            _write_arrow(temporary, _write_rows(scratch, context, samples))
            temporary.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
    with pa.memory_map(str(path)) as source:
        vectors = pa.ipc.open_file(source).get_batch(0).column("phi")
    return from_dlpack(vectors.flatten()).view(len(vectors), -1)


def _mapped_path(context: Context, samples: Artifact) -> Path:
    """Return the path of the mapped file of the samples' phi; phi centred by another mean has another file."""
    root, config = context.workspace.root, context.config.features
    cache = root / "features" if isinstance(root, Path) else private_folder("features")
    mean = read_manifest(_mean_place(context, samples)[0]) if config.centre else None
    key = input_key("phi", _parts_keys(context, samples), config.unit_length, *([mean.sha256] if mean else []))
    return cache / f"{key}.arrow"


def _write_rows(path: Path, context: Context, samples: Artifact) -> NDArray[np.float32]:
    """Write phi, (rows, d), to a mapped file of its own: an Arrow file of one batch is written from one array."""
    mapped, start = np.empty((0, 0), np.float32), 0
    for phi in feature_blocks(context, samples, feature_mean(context, samples)):
        if not start:
            mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(samples.rows, phi.shape[1]))
        mapped[start : start + len(phi)] = phi.numpy()
        start += len(phi)
    return mapped


def feature_blocks(
    context: Context, samples: Artifact, mean: Tensor | None = None, *, first: int = 0, last: int | None = None
) -> Iterator[Tensor]:
    """Yield phi of the samples part by part, (<= 1,024, d) each, less `mean`: parts `first` to before `last`."""
    folders = [folder for folder, _ in feature_folders(context, samples).values()]
    every = range(-(-samples.rows // PART_ITEMS))
    for number in every[first:last]:
        parts = [_vectors(tables.read(part(folder, number), tables.FEATURES)) for folder in folders]
        yield concatenate(parts, unit_length=context.config.features.unit_length, mean=mean)


def _write_arrow(path: Path, rows: NDArray[np.float32]) -> None:
    """Write one column, `phi`, in one batch: a process that maps the file sees one tensor."""
    batch = pa.record_batch({"phi": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write(batch)


def _vectors(table: pa.Table) -> Tensor:
    column = table["feature"].combine_chunks()
    return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())


def load_query_features(context: Context, sets: Sequence[Artifact], samples: Artifact) -> Tensor:
    """Load phi of the queries of some sets together, (queries, d), in the order of `join_queries`."""
    loaded = [load_features(context, several, samples) for several in sets]
    return torch.stack([loaded[number][row] for number, row in join_queries(sets)])


def encode_query(encoders: Sequence[Encoder], image: Image.Image, caption: str) -> list[Tensor]:
    """Return what each encoder makes of a query's RGB picture or of its caption, (1, width) each."""
    return [encoder.encode_queries([image if encoder.modality == "image" else caption]) for encoder in encoders]


def load_encoders(config: FeaturesConfig, device: torch.device) -> list[Encoder]:
    """Return the encoders of a feature space, in order; those that somebody in this process holds are shared."""
    return [_shared_encoder(name, device, config.weights.get(name)) for name in encoder_names(config.space)]


_held: WeakValueDictionary[Hashable, Encoder] = WeakValueDictionary()


def _shared_encoder(name: str, device: torch.device, source: str | None) -> Encoder:
    """Return an encoder, loaded only where nobody holds the same one: weights that changed on disk are another one."""
    folder = source is not None and Path(source).is_dir()
    key = name, device, source, folder_stamps(Path(str(source))) if folder else ()
    found = _held.get(key)
    if found is None:
        found = _held[key] = load_encoder(name, device, source)
    return found


def in_space(context: Context, **changes: Any) -> Context:
    """Return the same context with another feature space: fields of the configuration's section `features`."""
    features = context.config.features.model_copy(update=changes)
    return dataclasses.replace(context, config=context.config.model_copy(update={"features": features}))


def features_key(context: Context, items: Artifact) -> str:
    """Return the key of what the features of all encoders together depend on."""
    config = context.config.features
    raw = [] if config.unit_length else ["raw"]
    centred = ["centred"] if config.centre else []
    weights = filter(None, weights_keys(config).values())
    averaged = _averaged(items, config.space)
    return input_key(config.space, items.key, *weights, *raw, *centred, *averaged, table=tables.FEATURES)


def feature_folders(context: Context, items: Artifact) -> dict[str, tuple[AnyPath, str]]:
    """Return folder and input key of each encoder of the config's feature space."""
    keys = {
        name: input_key(
            "features", name, items.key, *filter(None, [weights]), *_averaged(items, name), table=tables.FEATURES
        )
        for name, weights in weights_keys(context.config.features).items()
    }
    return {name: (context.workspace.features(name, key), key) for name, key in keys.items()}


def _parts_keys(context: Context, items: Artifact) -> list[str]:
    """Return the input key of each encoder's parts."""
    return [key for _, key in feature_folders(context, items).values()]


def weights_keys(config: FeaturesConfig) -> dict[str, str]:
    """Return `weights_key` of each encoder of a feature space; empty where the weights come with a package."""
    return {
        name: weights_key(name, config.weights.get(name) or ENCODERS[name].source)
        for name in encoder_names(config.space)
    }


def weights_key(name: str, source: str) -> str:
    """Return what tells one set of weights from another: a hash of the files of a folder, else the hub id."""
    if not source or not Path(source).is_dir():
        return source
    files = _files_hash(folder_stamps(Path(source)))
    # By the files alone where images are prepared as usual: so are features of before a folder's processor was read.
    usual = name not in USUAL or (own := preprocessing_of(name, source)) == USUAL[name]
    return files if usual else input_key(files, own)


@functools.lru_cache(maxsize=16)
def _files_hash(files: Stamps) -> str:
    return input_key("weights", [(Path(path).name, file_sha256(Path(path))) for path, _, _ in files])


def _averaged(items: Artifact, space: str) -> list[str]:
    """Return what stands in a key where captions are averaged; nothing where no item has several, as ever before."""
    if items.name == "queries" or not text_space(space):
        return []
    return ["mean of captions"] if _most_captions(items.path) > 1 else []


@functools.lru_cache(maxsize=16)
def _most_captions(samples: AnyPath) -> int:
    return max((pc.max(counts).as_py() for counts in caption_counts(samples)), default=0)


def as_lists(features: Tensor) -> pa.ListArray:
    """Return vectors, (n, d), as a column of a table."""
    width = features.shape[1]
    offsets = np.arange(len(features) + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(offsets, features.numpy().ravel(), type=tables.VECTOR)
