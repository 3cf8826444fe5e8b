"""Draw the training of a rank head."""

from __future__ import annotations

import io

from fastgda_core.extras import installed
from storage_schemas.commit import commit
from storage_schemas.files import AnyPath
from storage_schemas.heads.records import HeadRecord
from tasks.progress import console

LOSS_CURVE = "training.png"  # beside a trained head
NO_CURVE = "no picture of the training: matplotlib is not installed: pip install 'fastgda[report]'"


def loss_curve(head: HeadRecord, cutoff: int, *, format: str = "png") -> bytes | None:
    """Draw training loss and validation mAP per epoch of a head that was trained here, as PNG or SVG.

    None where matplotlib is missing.
    """
    if not installed("matplotlib"):
        return None
    from matplotlib.figure import Figure

    history, best_epoch = head.history, head.best_epoch
    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(9.6, 2.6), layout="constrained")
    loss_axis, map_axis = figure.subplots(1, 2)
    loss_axis.plot(epochs, [point.loss for point in history], color="#2b6cb0", marker="o", markersize=3)
    loss_axis.set(title=f"Training loss ({head.loss})", xlabel="epoch")
    map_axis.plot(epochs, [point.validation_map for point in history], color="#2f855a", marker="o", markersize=3)
    assert best_epoch is not None
    map_axis.axvline(best_epoch + 1, color="#a0aec0", linestyle="--", linewidth=1)
    map_axis.set(title=f"Validation mAP({cutoff}), epoch kept dashed", xlabel="epoch")
    for axis in (loss_axis, map_axis):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if format == "svg" else None
    figure.savefig(buffer, format=format, metadata=metadata, dpi=110)
    return buffer.getvalue()


def commit_curve(folder: AnyPath, head: HeadRecord, cutoff: int, *, key: str, started: float) -> None:
    """Commit the picture of a head version; without matplotlib print a line, as the head is as good without it."""
    picture = loss_curve(head, cutoff)
    if picture is None:
        console.print(NO_CURVE, highlight=False, markup=False, soft_wrap=True)
        return
    rows = len(head.history)
    commit(folder / LOSS_CURVE, lambda path: path.write_bytes(picture), key=key, rows=rows, started=started)
