# SPDX-License-Identifier: Apache-2.0
"""Running statistics of scalars, kept on the device and reduced over all processes once per tick."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


class Statistic(NamedTuple):
    """Mean and population standard deviation of `count` finite values; NaN where there were none."""

    count: int
    mean: float
    std: float
    num_nonfinite: int


class Collector:
    """Collects values by name; reporting launches a few operations on their device and never waits for it."""

    def __init__(self):
        self._moments: dict[str, torch.Tensor] = {}

    def report(self, name: str, values: torch.Tensor | float) -> None:
        """Add one or more values of a statistic; values that are not finite are only counted."""
        values = torch.as_tensor(values).detach().flatten().to(torch.float64)
        is_finite = values.isfinite()
        finite = torch.where(is_finite, values, 0)
        count = is_finite.sum()
        moments = torch.stack([count, finite.sum(), finite.square().sum(), len(values) - count])
        before = self._moments.get(name)
        self._moments[name] = moments if before is None else before.to(moments.device) + moments

    def collect(self, reduce: Callable[[torch.Tensor], None] = lambda moments: None) -> dict[str, Statistic]:
        """Return the statistics since the last call, and forget them.

        reduce: sums a float64 tensor [names, 4] over all processes in place; called once, and only if there is
        anything. Every process has to have reported the same names.
        """
        names, moments = self._reduced(reduce)
        self._moments = {}
        return {name: _statistic(row) for name, row in zip(names, moments.tolist())}

    def gather(self, reduce: Callable[[torch.Tensor], None], is_first: bool) -> None:
        """Move what all processes have collected to the first one; `reduce` as in `collect`."""
        names, moments = self._reduced(reduce)
        self._moments = dict(zip(names, moments if is_first else torch.zeros_like(moments)))

    def _reduced(self, reduce):
        if not self._moments:
            return [], torch.zeros(0, 4)
        names = sorted(self._moments)
        # Plain numbers were collected on the host, the rest on one device.
        device = max((self._moments[name].device for name in names), key=lambda d: d.type == 'cuda')
        moments = torch.stack([self._moments[name].to(device) for name in names])
        reduce(moments)
        return names, moments

    def state_dict(self) -> dict[str, list[float]]:
        """Return what has been collected by this process since the last `collect`, as plain numbers."""
        return {name: moments.tolist() for name, moments in self._moments.items()}

    def load_state_dict(self, state: dict[str, list[float]], is_first: bool = True) -> None:
        """Go on from `state_dict` of what `gather` moved to the first process; the others have the names with zeros."""
        moments = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in state.items()}
        self._moments = moments if is_first else {name: torch.zeros_like(x) for name, x in moments.items()}


def _statistic(moments):
    count, total, squares, num_nonfinite = moments
    mean = total / count if count else math.nan
    variance = squares / count - mean**2 if count else math.nan
    return Statistic(int(count), mean, math.sqrt(max(variance, 0.0)) if count else math.nan, int(num_nonfinite))
