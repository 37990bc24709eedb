# SPDX-License-Identifier: Apache-2.0
"""Metrics by name: what each is in words, and measuring it into a line of results."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from metrics import avatar, distribution
from metrics.subject import MetricError, Subject

WORDS = {
    'fid': 'Fréchet distance of features of generated and of real pictures (Heusel et al. 2017)',
    'kid': 'kernel distance of features of generated and of real pictures (Binkowski et al. 2018)',
    'pr': 'precision and recall by third neighbours among features of generated and real '
          'pictures (Kynkäänniemi et al. 2019)',
}  # fmt: skip
THOUSANDS = (5, 10, 50)
LEAST = {'fid': 2, 'kid': 4 * distribution.LEAST_KID_SUBSET, 'pr': distribution.NEIGHBOUR + 1}


class Metric(NamedTuple):
    """A metric: its definition in words, and what measures it.

    count: how many pictures or latents in full. needs: 'inception', 'mobilenet', 'estimator' or None: the file it is
    measured with. of_reals: whether a data set's own pictures can take the network's place. items: count -> how many
    items a data set has to have. measure: (subject, count) -> values, what they were made with.
    """

    definition: str
    count: int
    needs: str | None
    of_reals: bool
    items: Callable[[int], int]
    measure: Callable[[Subject, int], tuple[dict[str, float], dict]]


def _distributions():
    for kind, words in WORDS.items():
        for features in ('inception', 'mobilenet'):
            for thousands in THOUSANDS:
                ending = '' if features == 'inception' else f'_{features}'
                count = 1000 * thousands
                yield f'{kind}{thousands}k{ending}', Metric(
                    f'{words}; {features} features'
                    + ('' if features == 'inception' else ', not comparable with published numbers'),
                    count, features, True, functools.partial(max, LEAST[kind]),
                    functools.partial(_distribution, kind, features),
                )  # fmt: skip


def _distribution(kind, features, subject, count):
    return distribution.measure(subject, kind, features, count)


def _words(function):
    return ' '.join(function.__doc__.split())


AVATAR = {
    **dict.fromkeys(('aed', 'apd', 'follow'), (avatar.driven, 10_000, 'estimator', lambda n: avatar.split_count(n)[1])),
    'id': (avatar.identity, 1000, 'estimator', lambda _: 4), 'depth': (avatar.depth, 1024, None, lambda _: 2),
    'reprojection': (avatar.reprojection, 1024, None, lambda _: 2),
    'animation': (avatar.animation, 1024, None, lambda _: 2),
}  # fmt: skip
METRICS = dict(_distributions()) | {
    name: Metric(_words(function), count, needs, function is avatar.driven, items, function)
    for name, (function, count, needs, items) in AVATAR.items()
}


def expect_names(names: list[str]) -> None:
    """Raise MetricError for names that are no metrics."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise MetricError(f'--metrics: expected some of {", ".join(METRICS)}, found {", ".join(unknown) or "none"}')


def expect_items(name: str, num: int | None, found: int, of_reals: bool = False) -> None:
    """Raise MetricError where a data set has fewer items than a metric takes with `num` pictures (None: its own).

    of_reals: the data set's pictures are measured themselves, so that distributions need two sets of them.
    """
    metric = METRICS[name]
    wanted = metric.items(num or metric.count)
    if of_reals and name.startswith(tuple(WORDS)):
        wanted *= 2
    if found < wanted:
        fewer = '--num, in training NAME-N, takes fewer'
        raise MetricError(f'{name}: expected {wanted} pictures in the data set, found {found}; {fewer}')


def measure(names: list[str], subject: Subject) -> Iterator[dict[str, Any]]:
    """Yield a line of results for each metric as it is found, in the order of names; JSON can hold it (None: NaN).

    aed, apd and follow are measured at once.
    """
    expect_names(names)
    for name in names:
        expect_items(name, subject.num, len(subject.dataset))
    for name in names:
        metric = METRICS[name]
        start = time.monotonic()
        key = metric.measure, subject.num or metric.count
        if key not in subject.memo:
            subject.memo[key] = metric.measure(subject, metric.count)
        values, about = subject.memo[key]
        if metric.measure is avatar.driven:
            values = {key: value for key, value in values.items() if key.startswith(name)}
            if not values:
                raise MetricError(f'{name}: expected an estimator of expressions by name, found {about["estimator"]}')
        else:
            values = {_full(key, name): value for key, value in values.items()}
        yield {
            'metric': name,
            'results': {key: value if math.isfinite(value) else None for key, value in values.items()},
            'definition': metric.definition,
            **about,
            'seed': subject.seed,
            'seconds': round(time.monotonic() - start, 3),
        }  # fmt: skip


def _full(key, name):
    """Name values of distributions by their metric: 'kid_se' of kid5k_mobilenet -> 'kid5k_mobilenet_se'."""
    kind = key.removesuffix('_se')
    if kind in ('fid', 'kid'):
        return key.replace(kind, name, 1)
    return f'{name}_{key}' if kind in ('precision', 'recall') else key
