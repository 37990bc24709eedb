# SPDX-License-Identifier: Apache-2.0
"""Micro-batches of training phases as CUDA graphs: thousands of launches become one.

What a graph was captured with stays: shapes, Python numbers, the order of draws. What changes from one micro-batch to
the next is copied into tensors that the graph reads, and what it computed is read from tensors that it writes.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from torch_utils.graphs import capturing

WARM_UP = 2  # Runs before a capture: kernels are compiled and cuDNN chooses its algorithms.


class Recorded(NamedTuple):
    """What a micro-batch leaves behind besides gradients: (name, values) of statistics, and means of w."""

    reports: list[tuple[str, torch.Tensor]]
    w_means: list[torch.Tensor]


class _Captured(NamedTuple):
    key: Hashable
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    recorded: Recorded


class PhaseGraphs:
    """One graph for each phase's micro-batches, in one pool of memory: they run one after another."""

    def __init__(self):
        self._captured: dict[str, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, phase: str, key: Hashable, body: Callable[..., Recorded], inputs: Sequence[torch.Tensor],
            parameters: Sequence[nn.Parameter], is_first: bool) -> Recorded:
        """Run body(*inputs), which adds to the parameters' gradients by backward(), as a graph.

        key: stands for everything that the body of this phase depends on besides its inputs and the parameters' values;
        a new one takes the place of the old: schedules do not turn back. is_first: gradients start from zero; else
        they are added to those of the micro-batch before. The tensors of the result live until the next run. Raises
        RuntimeError, gradients as before, where the body cannot be captured.
        """
        before = None if is_first else [p.grad for p in parameters]
        captured = self._captured.get(phase)
        if captured is None or captured.key != key:
            captured = None
            self._captured.pop(phase, None)  # First: its gradients are as large as the network.
            try:
                captured = self._captured[phase] = self._capture(key, body, inputs, parameters)
            except RuntimeError:
                for parameter, gradient in zip(parameters, before or [None] * len(parameters)):
                    parameter.grad = gradient
                raise
        for own, new in zip(captured.inputs, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        captured.graph.replay()
        for parameter, gradient in zip(parameters, captured.gradients):
            parameter.grad = gradient
        if before is not None:
            pairs = [(p, old) for p, old in zip(parameters, before) if old is not None]
            torch._foreach_add_([old for _, old in pairs], [p.grad for p, _ in pairs])
            for parameter, old in pairs:
                parameter.grad = old
        return captured.recorded

    def keep_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move gradients out of the graph's memory, which its next replay overwrites."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _capture(self, key, body, inputs, parameters):
        own = [x.to('cuda', copy=True) for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                _forget_gradients(parameters)
                body(*own)
        torch.cuda.current_stream().wait_stream(stream)
        _forget_gradients(parameters)
        torch.cuda.empty_cache()  # The warm-up's memory is not the graph's.
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with capturing(graph, self._pool):
                recorded = body(*own)
        finally:
            torch.cuda.set_stream(current)  # A capture that fails would stay on its own.
        gradients = [p.grad for p in parameters]
        _forget_gradients(parameters)
        return _Captured(key, graph, own, gradients, recorded)


def _forget_gradients(parameters):
    for parameter in parameters:
        parameter.grad = None
