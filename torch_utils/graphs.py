# SPDX-License-Identifier: Apache-2.0
"""Captures of CUDA graphs that nothing else in the program can spoil."""

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool=None) -> Iterator[None]:
    """Capture what the block launches, as `torch.cuda.graph` does.

    Threads that load data, encode or watch collectives may call CUDA meanwhile: only this one must not wait. Garbage is
    collected before and left alone within: to free another graph, an event or pinned memory ends a capture with
    cudaErrorStreamCaptureInvalidated, and collections come when they like.

    pool: memory shared with other graphs, as torch.cuda.graph_pool_handle() returns it.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode='thread_local'):
            yield
    finally:
        if was_enabled:
            gc.enable()
