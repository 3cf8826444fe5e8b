"""An answer in a terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flows.commands.text_table import print_rows

if TYPE_CHECKING:
    from tasks.serving.answers import Answer, Column, Hit


def print_answer(answer: Answer) -> None:
    """Print an answer: the training samples, best first, what stands beside them, and how far to believe them."""
    _print_hits(answer.hits)
    for title, hits in (
        ("these lower the image's likelihood most", answer.lowering),
        ("these look alike by untuned features, and influence it little", answer.similar),
    ):
        if hits:
            print(f"\n{title}:")
            _print_hits(hits)
    for column in answer.beside:
        print(f"\n{_way(column)}:")
        _print_hits(column.hits)
        for note in column.notes:
            print(note)
    print()
    for line in _facts(answer):
        print(line)


def _way(column: Column) -> str:
    """Return how a column was made, and how far that agrees with the teacher."""
    made = f"nearest by {column.space}, untuned features of {column.way}" if column.space else f"by tier {column.way}"
    agreement = column.agreement
    if agreement.value is None:
        return f"{made}; its agreement with the teacher was not measured"
    error = "" if agreement.error is None else f" ± {agreement.error:.3f}"
    return f"{made}, which agrees with the teacher at {agreement.measure} {agreement.value:.3f}{error}"


def _print_hits(hits: list[Hit]) -> None:
    fields = {"similarity": "similarity", "top": "predicted_rank", "score": "score", "±": "score"}
    columns = [name for name, field in fields.items() if any(getattr(hit, field) is not None for hit in hits)]
    rows = [
        [
            *(str(hit.rank), str(hit.train_id), *(_figure(hit, name) for name in columns)),
            *(hit.key, hit.captions[0], Path(hit.shard).name + _folded(hit)),
        ]
        for hit in hits
    ]
    print_rows(["#", "train_id", *columns, "key", "caption", "shard"], rows, sys.stdout)


def _figure(hit: Hit, name: str) -> str:
    if name == "±":
        return "-" if hit.standard_error is None else f"{hit.standard_error / abs(hit.score or 1):.0%}"
    if name == "top":  # the share of samples among which the teacher is expected to rank it
        return "-" if hit.predicted_rank is None else f"{hit.predicted_rank:.2%}"
    value = hit.similarity if name == "similarity" else hit.score
    return "-" if value is None else f"{value:.4f}" if name == "similarity" else f"{value:.3e}"


def _folded(hit: Hit) -> str:
    return f" (+{len(hit.duplicates)} that look the same)" if hit.duplicates else ""


def _facts(answer: Answer) -> list[str]:
    """Return what tells how far to believe an answer, a line each."""
    found, agreement, versions = [], answer.agreement, answer.versions
    if answer.influence is not None:
        of = answer.influence
        found.append(
            f"of {of.scored:,} samples scored these {len(answer.hits)} hold {of.share:.1%} of the positive influence; "
            f"negative influence is {abs(of.negative) / (of.positive - of.negative or 1):.1%} of all"
        )
    if agreement.value is not None:
        error = "" if agreement.error is None else f" ± {agreement.error:.3f}"
        found.append(
            f"tier {answer.tier} agrees with the teacher {agreement.teacher} at "
            f"{agreement.measure} {agreement.value:.3f}{error}"
        )
    found += filter(None, [agreement.note, *answer.notes])
    parts = {"run": versions.run, "head": versions.head, "index": versions.index}
    made = ", ".join(f"{name} {version}" for name, version in parts.items() if version)
    return [*found, f"answer {answer.lineage}: {made}"]
