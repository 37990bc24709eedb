# SPDX-License-Identifier: Apache-2.0
"""Statistics of a tick: moments, values that are not finite, one reduction over processes, saving."""

import math

import numpy as np
import pytest
import torch

from torch_utils.training_stats import Collector


class Processes:
    """Several collectors whose reductions meet, as those of processes would: the sum is handed out to each in turn."""

    def __init__(self, *collectors):
        self.collectors, self.calls = collectors, []

    def total(self):
        """Return what a reduction gives: the sum of what each collector hands to `reduce`."""
        rows = []
        for collector in self.collectors:
            state = collector.state_dict()
            rows.append(torch.tensor([state[name] for name in sorted(state)], dtype=torch.float64))
        return sum(rows)

    def reduce(self):
        """Return a function as `Ranks.sum_` without its name, for one round of calls by all collectors."""
        total = self.total()

        def put(moments):
            self.calls.append(moments.clone())
            moments.copy_(total)

        return put


def test_moments_are_those_of_all_values():
    rng = np.random.default_rng(0)
    values = [rng.normal(3, 2, size) for size in ((5,), (2, 3), (), (1, 4, 2))]
    collector = Collector()
    for value in values:
        collector.report('a', torch.from_numpy(np.asarray(value)))
    collector.report('b', 7)
    everything = np.concatenate([np.ravel(value) for value in values])
    found = collector.collect()
    assert list(found) == ['a', 'b']
    assert found['a'].count == len(everything) and found['a'].num_nonfinite == 0
    assert found['a'].mean == pytest.approx(everything.mean(), rel=1e-12)
    assert found['a'].std == pytest.approx(everything.std(), rel=1e-9)
    assert found['b'] == (1, 7.0, 0.0, 0)


def test_values_that_are_not_finite_are_counted_and_left_out():
    collector = Collector()
    collector.report('a', torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf]))
    collector.report('b', math.nan)
    found = collector.collect()
    assert found['a'] == (2, 2.0, 1.0, 3)
    assert (found['b'].count, found['b'].num_nonfinite) == (0, 1)
    assert math.isnan(found['b'].mean) and math.isnan(found['b'].std)


def test_equal_values_have_no_negative_variance():
    collector = Collector()
    collector.report('a', torch.full([1000], 1e8 + 0.1, dtype=torch.float64))
    std = collector.collect()['a'].std
    assert 0 <= std < 10


def test_statistics_start_anew_after_each_tick():
    collector = Collector()
    collector.report('a', 1.0)
    assert list(collector.collect()) == ['a']
    assert collector.collect(reduce=lambda moments: pytest.fail('nothing to reduce')) == {}
    collector.report('a', 5.0)
    assert collector.collect()['a'].mean == 5


def test_reporting_keeps_no_graph():
    collector = Collector()
    collector.report('a', torch.ones(3, requires_grad=True) * 2)
    assert not collector._moments['a'].requires_grad


def test_one_reduction_sums_all_names_in_one_order():
    first, second = Collector(), Collector()
    for name in ('b', 'a'):  # The orders of reporting differ.
        first.report(name, torch.tensor([1.0, 2.0]) if name == 'a' else 10.0)
    second.report('a', torch.tensor([6.0, math.nan]))
    second.report('b', 30.0)
    processes = Processes(first, second)
    reduce = processes.reduce()
    found = [first.collect(reduce), second.collect(reduce)]
    assert len(processes.calls) == 2 and [call.shape for call in processes.calls] == [(2, 4), (2, 4)]
    assert processes.calls[0].tolist() == [[2, 3, 5, 0], [1, 10, 100, 0]]
    assert processes.calls[0].dtype == torch.float64
    assert found[0] == found[1]
    assert found[0]['a'] == (3, 3.0, pytest.approx(np.std([1, 2, 6])), 1)
    assert found[0]['b'] == (2, 20.0, 10.0, 0)


def test_gathering_moves_everything_to_the_first_process():
    first, second = Collector(), Collector()
    first.report('a', 1.0)
    second.report('a', 3.0)
    reduce = Processes(first, second).reduce()
    first.gather(reduce, is_first=True)
    second.gather(reduce, is_first=False)
    resumed = Collector()
    resumed.load_state_dict(first.state_dict())
    assert first.state_dict() == {'a': [2, 4, 10, 0]} and second.state_dict() == {'a': [0, 0, 0, 0]}
    for collector in (resumed, second):
        collector.report('a', 8.0)
    found = resumed.collect(Processes(resumed, second).reduce())['a']
    assert found == (4, 5.0, pytest.approx(np.std([1, 3, 8, 8])), 0)


def test_a_state_holds_plain_numbers():
    collector = Collector()
    collector.report('a', torch.tensor([0.1, math.nan]))
    state = collector.state_dict()
    assert all(type(x) is float for x in state['a'])
    resumed = Collector()
    resumed.load_state_dict(state)
    assert resumed.collect() == collector.collect()
