"""Threads that compute: each in itself alone."""

from __future__ import annotations

import faiss
import torch


def one_thread() -> None:
    """Let the libraries below this thread compute in this thread alone: OpenMP keeps a pool for every caller."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
