"""Train the rank head with Lightning."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastgda_core.evaluation.ranking_metrics import average_precision
from fastgda_core.ranking.batches import RankBatch, RankBatches, RankPairs
from fastgda_core.ranking.head import RankHead, start_from_features


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Hyperparameters of the rank head; the defaults are the paper's.

    initialization: "xavier", or "features" (see `start_from_features`).
    rank_offset: weighs a pair by 1 / (pi + rank_offset), so that the head of the ranking counts; None weighs all alike.
    """

    epochs: int = 10
    batch_size: int = 4096
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    outside_probability: float = 0.1
    initialization: Literal["xavier", "features"] = "xavier"
    rank_offset: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class RankData:
    """Everything the head is trained on.

    query_features: (queries, d); sample_features: (samples, d), phi; train_pairs: labelled pairs of the training
    queries; validation: rows of the validation queries; relevant: (validation, samples) bool, the teacher's top L;
    candidates: (validation, samples) bool, the samples that the teacher ranked.
    """

    query_features: Tensor
    sample_features: Tensor
    train_pairs: RankPairs
    validation: Tensor
    relevant: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class TrainedHead:
    """The head of the best epoch, and per epoch (training loss, validation mAP)."""

    head: RankHead
    best_epoch: int
    history: list[tuple[float, float]] = field(default_factory=list)


class RankModule(lightning.LightningModule):
    """BCE of sigmoid(scale * cos + bias) against the rank label; validation is mAP(L) on held-out queries."""

    def __init__(self, data: RankData, training: HeadTraining, on_epoch: Callable[[], None]) -> None:
        super().__init__()
        self.head = RankHead(data.sample_features.shape[1])
        if training.initialization == "features":
            start_from_features(self.head, data.sample_features)
        self.data = data
        self.training_options = training
        self.on_epoch = on_epoch
        self.losses: list[float] = []
        self.history: list[tuple[float, float]] = []

    def on_fit_start(self) -> None:
        self.query_features = self.data.query_features.to(self.device)
        self.sample_features = self.data.sample_features.to(self.device)

    def training_step(self, batch: RankBatch, _index: int) -> Tensor:
        # F.embedding, unlike indexing, sums gradients in one order: the same seed gives the same head, bit for bit.
        queries = F.embedding(batch.query, self.head(self.query_features))
        samples = F.embedding(batch.position, self.head(self.sample_features[batch.samples]))
        losses = F.binary_cross_entropy_with_logits(
            self.head.rank_logits(queries, samples), batch.label, reduction="none"
        )
        offset = self.training_options.rank_offset
        weight = torch.ones_like(losses) if offset is None else 1 / (batch.label + offset)
        loss = (losses * weight).sum() / weight.sum()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, _batch: Tensor, _index: int) -> None:
        queries = self.head(self.query_features[self.data.validation])
        similarity = (queries @ self.head(self.sample_features).T).cpu()
        similarity[~self.data.candidates] = -torch.inf
        mean_average_precision = average_precision(similarity, self.data.relevant).mean()
        self.log("validation_map", mean_average_precision, batch_size=1)
        self.history.append((sum(self.losses) / max(1, len(self.losses)), mean_average_precision.item()))
        self.losses.clear()
        self.on_epoch()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        options = self.training_options
        return torch.optim.AdamW(self.head.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)


def train_head(data: RankData, training: HeadTraining, on_epoch: Callable[[], None] = lambda: None) -> TrainedHead:
    """Fit a rank head; the epoch with the best validation mAP wins.

    Args:
        data: features, labels and validation queries.
        training: hyperparameters.
        on_epoch: called after each epoch.
    """
    lightning.seed_everything(training.seed, verbose=False)
    module = RankModule(data, training, on_epoch)
    batches = RankBatches(
        data.train_pairs, len(data.sample_features), training.batch_size, training.outside_probability, training.seed
    )
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        best = ModelCheckpoint(dirpath=scratch, monitor="validation_map", mode="max", save_weights_only=True)
        trainer = lightning.Trainer(
            max_epochs=training.epochs,
            accelerator="auto",
            devices=1,
            logger=False,
            callbacks=[best],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=scratch,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(TensorDataset(torch.zeros(1))))
        weights = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    module.load_state_dict(weights)
    best_epoch = max(range(len(module.history)), key=lambda epoch: module.history[epoch][1])
    return TrainedHead(module.head.cpu().eval().requires_grad_(False), best_epoch, module.history)


def _quiet() -> warnings.catch_warnings:
    """Hold back Lightning's notices about loaders and devices, which say nothing about this data path."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return warnings.catch_warnings(action="ignore")
