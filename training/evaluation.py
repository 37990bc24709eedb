# SPDX-License-Identifier: Apache-2.0
"""The registry of metrics that a run evaluates at its snapshots; `measure.py` fills it."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch_utils.distributed import Ranks
from training.dataset import HeadDataset
from training.generator import Next3DGenerator


class EvaluationError(ValueError):
    """A metric that cannot be measured; one line that says why. All processes agree on it."""


class Evaluation(NamedTuple):
    """What a metric is given; all processes call it together. The averaged generator is in eval mode on the device.

    rendering_resolution: side of raw pictures; None: the network's. snapshot: the network's file. num: how many
    pictures to draw; None: the metric's own number.
    """

    generator: Next3DGenerator
    dataset: HeadDataset
    ranks: Ranks
    nimg: int
    rendering_resolution: int | None = None
    snapshot: pathlib.Path | None = None
    num: int | None = None


Metric = Callable[[Evaluation], dict[str, Any]]
_METRICS: dict[str, Metric] = {}


def register(name: str) -> Callable[[Metric], Metric]:
    """Decorate a function that returns numbers by name, so that `--metrics` may name it; 'about': what else to note."""

    def add(metric):
        _METRICS[name] = metric
        return metric

    return add


def names() -> list[str]:
    """Return the names of the registered metrics, sorted."""
    return sorted(_METRICS)


def evaluate(name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Return the numbers of a registered metric; KeyError for another name, EvaluationError. NAME-N: N pictures."""
    base, num = split_name(name)
    return _METRICS[base](evaluation._replace(num=num))


def split_name(name: str) -> tuple[str, int | None]:
    """Return ('kid5k', 200) of 'kid5k-200', and (name, None) of other names."""
    base, _, num = name.rpartition('-')
    return (base, int(num)) if base and num.isdecimal() and int(num) else (name, None)
