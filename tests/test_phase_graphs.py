# SPDX-License-Identifier: Apache-2.0
"""What surrounds the graphs of training phases, with a stand-in for CUDA graphs that runs the body again.

The stand-in writes into the tensors of the capture, as a graph does; the real ones are in test_gpu_training.py.
"""

import contextlib
import gc
import sys

import pytest
import torch
from parity import ROOT
from simple_head import TEMPLATE

from torch_utils import graphs
from torch_utils.distributed import Ranks
from torch_utils.training_stats import Collector
from training import phase_graphs
from training.phase_graphs import PhaseGraphs, Recorded
from training.train_config import make_config
from training.trainer import Trainer, new_networks

sys.path.append(str(ROOT / 'benchmarks'))

import bm_training  # noqa: E402  (needs the path above)



class Replay:
    """Runs a body on its own inputs; results go into the tensors of the first run."""

    def __init__(self, body, inputs, parameters):
        self.body, self.inputs, self.parameters = body, [x.clone() for x in inputs], parameters
        self.recorded, self.gradients = self.run()

    def run(self):
        kept = [p.grad for p in self.parameters]
        phase_graphs._forget_gradients(self.parameters)
        recorded = self.body(*self.inputs)
        gradients = [p.grad for p in self.parameters]
        for parameter, gradient in zip(self.parameters, kept):
            parameter.grad = gradient
        return recorded, gradients

    def replay(self):
        """Overwrite what the capture left."""
        recorded, gradients = self.run()
        pairs = [*zip(self.gradients, gradients), *zip(self.recorded.w_means, recorded.w_means)]
        pairs += [(own[1], new[1]) for own, new in zip(self.recorded.reports, recorded.reports, strict=True)]
        for own, new in pairs:
            if own is not None:
                own.copy_(new)


class StandIn(PhaseGraphs):
    """Graphs on a CPU."""

    def __init__(self):
        self._captured, self.captures = {}, []

    def _capture(self, key, body, inputs, parameters):
        self.captures.append(key)
        graph = Replay(body, inputs, parameters)
        return phase_graphs._Captured(key, graph, graph.inputs, graph.gradients, graph.recorded)


def trained(batch, graphs, monkeypatch):
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda self: self)
    config = make_config(
        'toy', '', '', batch=batch, batch_gpu=4, device='cpu', gen_pose_cond=True, blur_fade_kimg=0.3, freezed=2,
        gpc_reg_fade_kimg=0.05, style_mixing_prob=0.5, topology_path=str(TEMPLATE),
    )
    trainer = Trainer(config, new_networks(config), Ranks(0, 1, 'cpu'), Collector())
    trainer._graphs = graphs
    for iteration in range(3):
        trainer.step(bm_training.random_data(trainer, iteration))
    return trainer


@pytest.mark.parametrize('batch', [4, 12])
def test_training_equals_that_without_graphs(batch, monkeypatch):
    """Keys, schedules, statistics, means of w; sums over micro-batches are added in another order."""
    plain, captured = trained(batch, None, monkeypatch), trained(batch, StandIn(), monkeypatch)
    tolerance = dict(rtol=0, atol=0) if batch == 4 else dict(rtol=1e-3, atol=2e-3)
    for a, b in zip(plain.networks, captured.networks):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.allclose(x, y, **tolerance), name
    expected, actual = plain.stats.state_dict(), captured.stats.state_dict()
    assert set(expected) == set(actual)
    assert all(actual[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-3) for name in expected)
    radii = [key[1] for key in captured._graphs.captures if key]
    assert len(radii) > 4 and len(captured._graphs._captured) == 4  # A new radius takes the place of the old.


def test_gradients_are_as_before_where_a_capture_fails():
    class Failing(StandIn):
        def _capture(self, key, body, inputs, parameters):
            body(*inputs)
            raise RuntimeError('operation not permitted')

    parameter = torch.nn.Parameter(torch.ones(2))

    def body(x):
        (parameter * x).sum().backward()
        return Recorded([], [])

    for is_first, before in ((True, None), (False, torch.tensor([5.0, 6.0]))):
        parameter.grad = before
        with pytest.raises(RuntimeError, match='not permitted'):
            Failing().run('Gmain', 0, body, [torch.ones(2)], [parameter], is_first)
        assert parameter.grad is before


def test_a_trainer_goes_on_without_graphs_where_a_capture_fails(monkeypatch, caplog):
    class Failing(StandIn):
        def _capture(self, key, body, inputs, parameters):
            if self.captures:
                raise RuntimeError('out of memory\nand a long story')
            return super()._capture(key, body, inputs, parameters)

    plain, fallen = trained(8, None, monkeypatch), trained(8, Failing(), monkeypatch)
    assert fallen._graphs is None
    assert [record.message for record in caplog.records] == ['Greg runs without CUDA graphs: out of memory']
    for x, y in zip(plain.networks.G.parameters(), fallen.networks.G.parameters()):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-3)


def test_captures_are_not_disturbed(monkeypatch):
    """Garbage that holds a graph goes before a capture, never within; other threads may call CUDA."""
    freed, given = [], []

    class Garbage:
        def __init__(self, name):
            self.name, self.itself = name, self

        def __del__(self):
            freed.append(self.name)

    @contextlib.contextmanager
    def capture(graph, **options):
        given.append((graph, options))
        assert freed == ['before']
        yield

    monkeypatch.setattr(torch.cuda, 'graph', capture)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        gc.disable()
        Garbage('before')
        gc.enable()
        with pytest.raises(ValueError), graphs.capturing('graph', 'pool'):
            Garbage('within')
            assert [[] for _ in range(1000)] and freed == ['before'] and not gc.isenabled()
            raise ValueError
    finally:
        gc.set_threshold(*threshold)
    assert gc.isenabled() and gc.collect() >= 0 and freed == ['before', 'within']
    assert given == [('graph', {'pool': 'pool', 'capture_error_mode': 'thread_local'})]
