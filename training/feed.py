# SPDX-License-Identifier: Apache-2.0
"""Which items each iteration takes, and their loading ahead of need: functions of the seed and the iteration alone."""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from torch_utils.randomness import sample_draws, uniform
from training.dataset import HeadDataset

PREFETCH = 2  # Iterations that each worker loads ahead.
RETRY_DELAYS_S = (1.0, 5.0, 30.0)  # Before a file that could not be read is tried again: network disks have hiccups.


@dataclasses.dataclass(frozen=True)
class Plan:
    """How images are dealt out: micro-batch m of an iteration holds images m·batch_gpu on; rank m mod num_ranks has it.

    So the micro-batches of an iteration are the same for any number of processes.
    """

    batch: int
    batch_gpu: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def num_rounds(self) -> int:
        """How many micro-batches a process runs in each phase."""
        return self.batch // (self.batch_gpu * self.num_ranks)

    def samples(self, iteration: int) -> np.ndarray:
        """Return the global numbers of this process's images [num_rounds, batch_gpu]."""
        first = np.arange(self.num_rounds)[:, None] * self.num_ranks + self.rank
        return iteration * self.batch + first * self.batch_gpu + np.arange(self.batch_gpu)


class Fakes(NamedTuple):
    """Labels [n, c_dim] and meshes [n, V + 68, 3] float32 of the pictures that a phase generates."""

    label: np.ndarray
    mesh: np.ndarray


class Reals(NamedTuple):
    """Pictures [n, 3, R, R] uint8, labels [n, c_dim], and meshes [n, V + 68, 3] (None where nothing renders them)."""

    image: np.ndarray
    label: np.ndarray
    mesh: np.ndarray | None


class IterationData(NamedTuple):
    """What one process needs in one iteration; n = num_rounds·batch_gpu images, in the order of `Plan.samples`."""

    iteration: int
    reals: Reals
    fakes: dict[str, Fakes]


class IterationItems(Dataset):
    """Iteration number -> IterationData.

    intervals: name of each phase that generates pictures -> it runs in every so-manyth iteration.
    """

    def __init__(self, data: HeadDataset, plan: Plan, seed: int, intervals: dict[str, int], with_real_meshes: bool):
        self.data, self.plan, self.seed = data, plan, seed
        self.intervals, self.with_real_meshes = intervals, with_real_meshes

    def __getitem__(self, iteration):
        samples = self.plan.samples(iteration).reshape(-1)
        phases = [name for name, interval in self.intervals.items() if iteration % interval == 0]
        return IterationData(
            iteration,
            self._reals(real_items(samples, len(self.data), self.seed)),
            {phase: self._fakes(fake_items(samples, len(self.data), self.seed, phase)) for phase in phases},
        )

    def _reals(self, indices):
        items = [_patiently(self.data.__getitem__, i) for i in indices]
        meshes = np.stack([item.mesh for item in items]) if self.with_real_meshes else None
        return Reals(np.stack([item.image for item in items]), np.stack([item.label for item in items]), meshes)

    def _fakes(self, indices):
        labels, meshes = zip(*(_patiently(self.data.camera_and_mesh, i) for i in indices))
        return Fakes(np.stack(labels), np.stack(meshes))


def real_items(samples: np.ndarray, count: int, seed: int) -> list[int]:
    """Return the items of samples by their global numbers: every epoch shows each item once, in an order of its own."""
    return [int(_epoch_order(int(n) // count, count, seed)[int(n) % count]) for n in samples]


def fake_items(samples: np.ndarray, count: int, seed: int, phase: str) -> list[int]:
    """Return a random item for the label and mesh of each generated sample."""
    with sample_draws(seed, f'{phase}/items', samples):
        draws = uniform([len(samples)]).double()
    return (draws * count).long().tolist()


@functools.lru_cache(maxsize=4)
def _epoch_order(epoch, count, seed):
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def _patiently(read, index):
    for delay in RETRY_DELAYS_S:
        try:
            return read(index)
        except OSError:
            time.sleep(delay)
    return read(index)


@contextlib.contextmanager
def iterations(
    items: IterationItems, start: int, end: int, workers: int, pin_memory: bool
) -> Iterator[Iterator[IterationData]]:
    """Give an iterator over iterations start to end - 1 with tensors in place of arrays.

    They are loaded ahead by worker processes (0: none), which are gone after the block.
    """
    ahead = dict(prefetch_factor=PREFETCH, multiprocessing_context='fork') if workers else {}
    loader = DataLoader(
        items, batch_size=None, sampler=range(start, end), num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=_set_up_worker, **ahead,
    )
    iterator = iter(loader)
    try:
        yield iterator
    finally:
        if workers:
            # The loader ends them when it is forgotten, which an error's traceback puts off; and Python, at its own
            # end, would wait for processes that ignore SIGTERM.
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()


def _set_up_worker(_number):
    """Leave signals, which often reach all processes, to the training process: it still needs data to save by them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
