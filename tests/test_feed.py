# SPDX-License-Identifier: Apache-2.0
"""Which items an iteration takes and how they are loaded: the same for any number of processes and workers."""

import collections
import multiprocessing

import numpy as np
import pytest
import torch
from toy_data import make_toy_data

from training import feed
from training.dataset import DatasetError, HeadDataset, open_source
from training.feed import IterationItems, Plan, fake_items, iterations, real_items

COUNT = 5
INTERVALS = {'Gmain': 1, 'Greg': 4, 'Dmain': 1}
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('toy')
    make_toy_data(root, COUNT)
    return HeadDataset(open_source(root / 'images128x128', root / 'meshes128x128'))


def items_of(data, rank=0, num_ranks=1, seed=3, with_real_meshes=False):
    return IterationItems(data, Plan(8, 2, rank, num_ranks), seed, INTERVALS, with_real_meshes)


def flatten(iteration):
    """Return all arrays of an iteration by name."""
    arrays = {f'real {name}': x for name, x in iteration.reals._asdict().items() if x is not None}
    for phase, fakes in iteration.fakes.items():
        arrays |= {f'{phase} {name}': x for name, x in fakes._asdict().items()}
    return {name: np.asarray(x) for name, x in arrays.items()}


def assert_same(a, b):
    assert a.iteration == b.iteration and flatten(a).keys() == flatten(b).keys()
    for name, x in flatten(a).items():
        assert x.dtype == flatten(b)[name].dtype and np.array_equal(x, flatten(b)[name]), name


@pytest.mark.parametrize('num_ranks', [1, 2, 4])
def test_processes_share_the_micro_batches_of_an_iteration(num_ranks):
    plans = [Plan(8, 2, rank, num_ranks) for rank in range(num_ranks)]
    parts = [plan.samples(5) for plan in plans]
    assert all(part.shape == (plan.num_rounds, 2) for plan, part in zip(plans, parts))
    micro_batches = sorted(row for part in parts for row in part.tolist())
    assert micro_batches == [[40, 41], [42, 43], [44, 45], [46, 47]]


def test_iterations_do_not_share_images():
    plan = Plan(6, 3)
    seen = np.concatenate([plan.samples(iteration).ravel() for iteration in range(4)])
    assert seen.tolist() == list(range(24))


def test_every_epoch_shows_each_item_once_in_its_own_order():
    orders = [real_items(np.arange(7) + 7 * epoch, 7, seed=0) for epoch in range(4)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert real_items(np.arange(28), 7, seed=0) == sum(orders, [])  # An iteration may straddle epochs.
    assert real_items(np.arange(7), 7, seed=1) != orders[0]


def test_items_do_not_depend_on_how_samples_are_split():
    samples = np.arange(100, 132)
    for parts in (np.split(samples, 8), samples[:, None], [samples[::-1].copy()]):
        order = np.concatenate(parts).tolist()
        expected = dict(zip(samples.tolist(), real_items(samples, 9, 5)))
        assert sum((real_items(part, 9, 5) for part in parts), []) == [expected[n] for n in order]
        expected = dict(zip(samples.tolist(), fake_items(samples, 9, 5, 'Gmain')))
        assert sum((fake_items(part, 9, 5, 'Gmain') for part in parts), []) == [expected[n] for n in order]


def test_generated_pictures_take_all_items_equally_often():
    drawn = fake_items(np.arange(20_000), 10, 0, 'Gmain')
    counts = collections.Counter(drawn)
    assert sorted(counts) == list(range(10))
    assert max(abs(count - 2000) for count in counts.values()) < 5 * np.sqrt(2000 * 0.9)
    assert all(type(x) is int for x in drawn[:3])


def test_generated_pictures_differ_by_phase_and_seed():
    samples = np.arange(50)
    draws = [fake_items(samples, 1000, seed, phase) for seed in (0, 1) for phase in ('Gmain', 'Dmain')]
    assert len({tuple(draw) for draw in draws}) == 4


def test_an_iteration_has_what_its_phases_need(data):
    items = items_of(data)
    phases = [list(items[i].fakes) for i in (0, 1, 4)]
    assert phases == [['Gmain', 'Greg', 'Dmain'], ['Gmain', 'Dmain'], ['Gmain', 'Greg', 'Dmain']]
    content = items[4]
    assert content.iteration == 4 and content.reals.mesh is None
    samples = np.arange(32, 40)
    for row, index in enumerate(real_items(samples, COUNT, 3)):
        assert np.array_equal(content.reals.image[row], data[index].image)
        assert np.array_equal(content.reals.label[row], data[index].label)
    for phase, fakes in content.fakes.items():
        for row, index in enumerate(fake_items(samples, COUNT, 3, phase)):
            assert np.array_equal(fakes.label[row], data[index].label)
            assert np.array_equal(fakes.mesh[row], data[index].mesh)
    assert content.reals.image.shape == (8, 3, 128, 128) and content.reals.image.dtype == np.uint8


def test_meshes_of_reals_come_where_they_are_rendered(data):
    content = items_of(data, with_real_meshes=True)[0]
    index = real_items(np.arange(1), COUNT, 3)[0]
    assert np.array_equal(content.reals.mesh[0], data[index].mesh) and len(content.reals.mesh) == 8


def test_two_processes_load_what_one_does(data):
    whole = flatten(items_of(data)[4])
    halves = [flatten(items_of(data, rank, 2)[4]) for rank in range(2)]
    for name, x in whole.items():
        rounds = [half[name].reshape(2, 2, *x.shape[1:]) for half in halves]  # Micro-batches of 2 images.
        assert np.array_equal(np.stack(rounds, axis=1).reshape(x.shape), x), name


def load(items, start, end, workers):
    with iterations(items, start, end, workers, pin_memory=False) as feed:
        return list(feed)


def test_workers_are_gone_after_the_block(data):
    with iterations(items_of(data), 0, 100, workers=2, pin_memory=False) as feed:
        next(feed)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def test_workers_load_the_same(data):
    alone = load(items_of(data), 0, 3, workers=0)
    helped = load(items_of(data), 0, 3, workers=1)
    assert [x.iteration for x in helped] == [0, 1, 2] and len(alone) == 3
    for a, b in zip(alone, helped):
        assert_same(a, b)
        assert isinstance(b.reals.image, torch.Tensor) and isinstance(b.fakes['Gmain'].mesh, torch.Tensor)
    later = load(items_of(data), 2, 3, workers=1)
    assert len(later) == 1
    assert_same(later[0], alone[2])


def flaky(monkeypatch, data, failures):
    """Make the reading of meshes fail so many times; return the list of calls."""
    calls, read = [], data.source.mesh

    def mesh(index):
        calls.append(index)
        if len(calls) <= failures:
            raise OSError(5, 'Input/output error')
        return read(index)

    monkeypatch.setattr(data.source, 'mesh', mesh)
    return calls


def test_a_file_that_could_not_be_read_is_tried_again(data, monkeypatch):
    expected = items_of(data)[0]
    waits = []
    monkeypatch.setattr(feed.time, 'sleep', waits.append)
    calls = flaky(monkeypatch, data, failures=2)
    assert_same(items_of(data)[0], expected)
    assert waits == list(feed.RETRY_DELAYS_S[:2]) and calls[0] == calls[1] == calls[2]


def test_a_file_that_stays_unreadable_ends_the_reading(data, monkeypatch):
    waits = []
    monkeypatch.setattr(feed.time, 'sleep', waits.append)
    flaky(monkeypatch, data, failures=1000)
    with pytest.raises(OSError, match='Input/output error'):
        items_of(data)[0]
    assert waits == list(feed.RETRY_DELAYS_S)


def test_damaged_data_is_not_tried_again(data, monkeypatch):
    def mesh(_index):
        raise DatasetError('00000/x.obj: expected a mesh')

    monkeypatch.setattr(feed.time, 'sleep', lambda _: pytest.fail('waits'))
    monkeypatch.setattr(data.source, 'mesh', mesh)
    with pytest.raises(DatasetError, match='x.obj'):
        items_of(data)[0]
