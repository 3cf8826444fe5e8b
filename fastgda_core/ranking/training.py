"""Train the rank head with Lightning."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastgda_core.evaluation.candidates import CandidateScores
from fastgda_core.evaluation.ranking_metrics import average_precision
from fastgda_core.ranking.batches import RankBatches, RankPairs, epoch_seed
from fastgda_core.ranking.head import RankHead, start_from_features
from fastgda_core.ranking.loss_names import LossName
from fastgda_core.ranking.losses import LOSSES, rank_loss

PREFETCHED = 4
LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Hyperparameters of the rank head; the defaults are the paper's.

    loss: see `fastgda_core.ranking.losses`.
    input_norm: a LayerNorm before the first layer.
    initialization: "xavier", or "features" (see `start_from_features`).
    rank_offset: weighs a pair by 1 / (pi + rank_offset), so that the top of the ranking counts most; None weighs all
        alike.
    patience: epochs without a better validation mAP after which training ends; None: never.
    accelerator, devices, strategy: as in Lightning; several devices are spawned processes ("ddp_spawn") unless
        `strategy` says otherwise. Each process draws its own batches, so that the head depends on how many there are.
    resident: features are copied to the device at once; else they stay where they are, a memory map say, and the rows
        of the next batches are fetched ahead.
    """

    epochs: int = 10
    batch_size: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    outside_probability: float = 0.1
    loss: LossName = "bce"
    input_norm: bool = False
    initialization: Literal["xavier", "features"] = "xavier"
    rank_offset: float | None = None
    patience: int | None = None
    seed: int = 0
    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str | None = None
    resident: bool = True


@dataclass(frozen=True)
class RankData:
    """Everything the head is trained on.

    query_features: (queries, d).
    sample_features: (samples, d), phi.
    train_pairs: labelled pairs of the training queries.
    validation: rows of the validation queries.
    validation_scores: the teacher's scores of their candidates.
    relevant: bool of the shape of these scores, the teacher's top L.
    """

    query_features: Tensor
    sample_features: Tensor
    train_pairs: RankPairs
    validation: Tensor
    validation_scores: CandidateScores
    relevant: Tensor


@dataclass(frozen=True)
class TrainedHead:
    """The head of the best epoch, and per epoch (training loss, validation mAP)."""

    head: RankHead
    best_epoch: int
    history: list[tuple[float, float]] = field(default_factory=list)


@dataclass  # not frozen: Lightning moves batches to the device field by field
class FeatureBatch:
    """phi of a batch's queries, (q, d), and samples, (s, d), and the label of each pair, (q, s), NaN where none."""

    queries: Tensor
    samples: Tensor
    label: Tensor


class FeatureBatches(IterableDataset[FeatureBatch]):
    """The batches of an epoch with their features, fetched ahead by a thread unless they are on the device."""

    def __init__(self, batches: RankBatches, queries: Tensor, samples: Tensor, *, ahead: bool) -> None:
        self.batches, self.queries, self.samples, self.ahead = batches, queries, samples, ahead

    def __iter__(self) -> Iterator[FeatureBatch]:
        found = (
            FeatureBatch(self.queries[batch.queries], self.samples[batch.samples], batch.label)
            for batch in self.batches
        )
        return fetched_ahead(found) if self.ahead else found


def fetched_ahead(items: Iterable[Any], count: int = PREFETCHED) -> Iterator[Any]:
    """Yield the same items, made by a thread that is up to `count` ahead; an exception of the thread is raised here."""
    # A DataLoader's worker hands over 25 batches of the paper's size in 1.2 s where the thread takes 0.25 s. It would
    # also be forked beside threads, or, if it is spawned, get a copy of all features instead of the memory map.
    source, end = iter(items), object()
    thread = ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, source, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, source, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


class RankDataModule(lightning.LightningDataModule):
    """Pairs and features on the trainer's device, and batches of them."""

    def __init__(self, data: RankData, training: HeadTraining) -> None:
        super().__init__()
        self.data, self.training_options = data, training

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device if self.training_options.resident else torch.device("cpu")
        self.query_features = self.data.query_features.to(device)
        self.sample_features = self.data.sample_features.to(device)
        self.pairs = self.data.train_pairs.to(device)

    def train_dataloader(self) -> DataLoader[FeatureBatch]:
        trainer, options = self.trainer, self.training_options
        assert trainer is not None
        module = trainer.lightning_module
        assert isinstance(module, RankModule)
        batches = RankBatches(
            self.pairs,
            options.batch_size,
            options.outside_probability,
            options.seed,
            lambda: len(module.history),  # trainer.current_epoch is late when training goes on from a checkpoint
            trainer.global_rank,
            trainer.world_size,
        )
        ahead = not options.resident
        return DataLoader(
            FeatureBatches(batches, self.query_features, self.sample_features, ahead=ahead), batch_size=None
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(1)))  # one step, which ranks the candidates of all queries


class RankModule(lightning.LightningModule):
    """A loss of the cosines against the teacher's ranking; validation is mAP(L) on held-out queries."""

    def __init__(self, data: RankData, training: HeadTraining, on_epoch: Callable[[], None] | None) -> None:
        super().__init__()
        loss = LOSSES[training.loss]
        self.head = RankHead(
            data.sample_features.shape[1], input_norm=training.input_norm, outputs=loss.outputs, scale=loss.scale
        )
        if training.initialization == "features":
            start_from_features(self.head, data.sample_features)
        self.data = data
        self.training_options = training
        self.on_epoch = on_epoch
        self.history: list[tuple[float, float]] = []

    def on_train_batch_start(self, _batch: FeatureBatch, index: int) -> None:
        if index == 0:
            # Dropout, like the batches, depends on the seed and the epoch alone: a resumed training is the same one.
            torch.manual_seed(epoch_seed(self.training_options.seed, len(self.history), self.global_rank))
            self.total, self.steps = torch.zeros((), dtype=torch.float64, device=self.device), 0

    def training_step(self, batch: FeatureBatch, _index: int) -> Tensor:
        encoded = self.head(torch.cat([batch.queries, batch.samples]))
        queries, samples = encoded.split([len(batch.queries), len(batch.samples)])
        outputs = self.head.affine(queries @ samples.T)
        loss = rank_loss(self.training_options.loss, outputs, batch.label, self.training_options.rank_offset)
        self.total += loss.detach()
        self.steps += 1
        return loss

    def validation_step(self, _batch: Tensor, _index: int) -> None:
        features = self.trainer.datamodule  # type: ignore[attr-defined]
        queries = self.head.queries(features.query_features[self.data.validation].to(self.device))

        def encode(rows: Tensor) -> Tensor:
            samples = features.sample_features
            return self.head(samples[rows.to(samples.device)].to(self.device))

        similarity = self.data.validation_scores.cosines(queries, encode)
        mean_average_precision = average_precision(similarity, self.data.relevant).mean()
        self.log("validation_map", mean_average_precision, batch_size=1)
        self.history.append(((self.total / max(1, self.steps)).item(), mean_average_precision.item()))
        if self.on_epoch is not None:
            self.on_epoch()

    def __getstate__(self) -> dict[str, Any]:
        # Without `on_epoch`: a spawned process has no one to report its epochs to, and `on_epoch` may not pickle.
        return {**self.__dict__, "on_epoch": None}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = list(self.history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = [tuple(epoch) for epoch in checkpoint["history"]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = self.training_options
        return torch.optim.AdamW(
            self.head.parameters(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=self.device.type == "cuda",
        )


def train_head(
    data: RankData,
    training: HeadTraining,
    on_epoch: Callable[[], None] | None = None,
    checkpoints: Path | None = None,
) -> TrainedHead:
    """Fit a rank head; the epoch with the best validation mAP wins.

    Args:
        data: features, labels and validation queries.
        training: hyperparameters.
        on_epoch: called after each epoch.
        checkpoints: folder of the training's checkpoints, from which a training that was begun before goes on.
    """
    lightning.seed_everything(training.seed, verbose=False)
    module = RankModule(data, training, on_epoch)
    with tempfile.TemporaryDirectory() as scratch, _quiet(), _fast_matmul():
        folder = checkpoints or Path(scratch)
        best = ModelCheckpoint(folder, "best", monitor="validation_map", mode="max", enable_version_counter=False)
        every = ModelCheckpoint(folder, LATEST, enable_version_counter=False)
        stop = [EarlyStopping("validation_map", mode="max", patience=training.patience)] if training.patience else []
        trainer = lightning.Trainer(
            max_epochs=training.epochs,
            accelerator=training.accelerator,
            devices=training.devices,
            strategy=training.strategy or ("auto" if training.devices == 1 else "ddp_spawn"),
            logger=False,
            callbacks=[best, every, *stop],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=scratch,
        )
        latest = folder / f"{LATEST}.ckpt"
        trainer.fit(module, datamodule=RankDataModule(data, training), ckpt_path=latest if _whole(latest) else None)
        # From the files, as the training may have happened in other processes.
        history = torch.load(latest, map_location="cpu", weights_only=True)["history"]
        weights = torch.load(folder / "best.ckpt", map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(weights)
    best_epoch = max(range(len(history)), key=lambda epoch: history[epoch][1])
    return TrainedHead(module.head.cpu().eval().requires_grad_(False), best_epoch, [tuple(epoch) for epoch in history])


def _whole(checkpoint: Path) -> bool:
    """Return whether the checkpoint can be read; one that a crash of the machine left in pieces is deleted."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return False
    except Exception:  # of many kinds, after the place where the file ends
        checkpoint.unlink()
        return False
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Lightning's notices about loaders and devices, which say nothing about this data path."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric")
    ]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _fast_matmul() -> Iterator[None]:
    """Allow TF32 on GPUs inside the block: the teacher needs float32, a head of cosines does not."""
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
