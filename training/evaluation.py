# SPDX-License-Identifier: Apache-2.0
"""The registry of metrics that a run evaluates at its snapshots; it is empty until something registers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch_utils.distributed import Ranks
from training.dataset import HeadDataset
from training.generator import Next3DGenerator


class Evaluation(NamedTuple):
    """What a metric is given; all processes call it together. The averaged generator is in eval mode on the device."""

    generator: Next3DGenerator
    dataset: HeadDataset
    ranks: Ranks
    nimg: int


Metric = Callable[[Evaluation], dict[str, Any]]
_METRICS: dict[str, Metric] = {}


def register(name: str) -> Callable[[Metric], Metric]:
    """Decorate a function that returns plain numbers by name, so that `--metrics` may name it."""

    def add(metric):
        _METRICS[name] = metric
        return metric

    return add


def names() -> list[str]:
    """Return the names of the registered metrics, sorted."""
    return sorted(_METRICS)


def evaluate(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers of a registered metric; KeyError for another name."""
    return _METRICS[name](evaluation)
