# SPDX-License-Identifier: Apache-2.0
"""A function of many items, computed in forked processes under a progress bar."""

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm

from training.files import DatasetError

GO_ON = 'run the same command again to go on'
ORPHAN_CHECK_S = 1.0


def in_processes(
    function: Callable, items: Sequence, workers: int, what: str, total: int, chunk: int = 4
) -> Iterator:
    """Yield function(item) in order, computed in forked processes, under a bar that ends at `total`.

    A process takes `chunk` items at once: where one of them fails, none of the chunk is yielded. Raises DatasetError
    where a process is ended.
    """
    bar = functools.partial(tqdm, desc=what, total=total, initial=total - len(items), delay=1)
    if workers == 1:
        yield from map(function, bar(items))
        return
    # Forked: the head and its tables are there already, and spawned processes would each import torch anew.
    context = multiprocessing.get_context('fork')
    try:
        with ProcessPoolExecutor(workers, context, _begin_worker, (function, os.getpid())) as pool:
            yield from bar(pool.map(_work, items, chunksize=chunk))
    except BrokenProcessPool:
        raise DatasetError(f'{what}: a process was ended (out of memory?); {GO_ON}') from None


_function = None


def _begin_worker(function, parent):
    global _function
    torch.set_num_threads(1)
    _function = function
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()


def _end_with(parent):
    """End this process soon after the one that started it: a killed one cannot, and the queue would wait for ever."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK_S)
    os._exit(1)


def _work(item):
    return _function(item)
