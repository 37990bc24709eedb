# SPDX-License-Identifier: Apache-2.0
"""The processes of a run: starting them, agreeing, reducing gradients, noticing that one is gone."""

import contextlib
import datetime
import logging
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

T = TypeVar('T')
PATIENCE = datetime.timedelta(days=1)  # How long the others wait while the first process checks data; death ends it.
VARIABLES = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')  # As torchrun sets them.
NETWORK_ERROR = re.compile('gloo|nccl|timed out|connection|socket', re.IGNORECASE)
LOST_STATUS = 4  # Exit status of a process that lost contact with the others.
SIGNAL_OFFSET = 128  # Exit status of a process ended by signal 0, as shells count.
# The launcher handles these, and goes on doing so when it has ended: pools forked later would survive their end.
LAUNCHER_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
MONITOR_S = 0.2  # Seconds between two looks of the launcher at its processes.
LINGER_S = 1.0  # How long a process that lost another one stays: the launcher blames the first it finds ended.


class RankLostError(RuntimeError):
    """Another process of the run is gone, or did not answer in time."""


class ToldElsewhereError(RuntimeError):
    """The first process failed and says why; this one has nothing to add."""


class RanksFailedError(RuntimeError):
    """A process started by `launch` failed; the message says which and how. status: its exit status, 128 + a signal."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Ranks:
    """What a process knows of its run: its number `rank` of `size`, its `device`, and how to reach the others.

    A run of one process needs no communication, and none is set up.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = 'cpu'):
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self._control = self._patient = None  # Groups for messages of the host, which wait for no device.

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor, what: str) -> None:
        """Replace a tensor on the device by its sum over all processes; `what` is named if that fails."""
        if self.size > 1:
            with self._explaining(what):
                dist.all_reduce(tensor)

    def agree(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each value over all processes."""
        if self.size == 1:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64)
        with self._explaining('an agreement before an iteration'):
            dist.all_reduce(message, dist.ReduceOp.MAX, group=self._control)
        return message.tolist()

    def first_alone(self, action: Callable[[], T]) -> T:
        """Run an action in the first process only and return its plain result in all.

        Its errors are raised there, and ToldElsewhereError in the others.
        """
        outcome: list[Any] = [None, None]
        failure = None
        if self.is_first:
            try:
                outcome[0] = action()
            except Exception as error:  # Whatever it is, the others must not wait for it.
                failure, outcome[1] = error, str(error)
        if self.size > 1:
            with self._explaining('the work of the first process on files'):
                dist.broadcast_object_list(outcome, src=0, group=self._patient)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise ToldElsewhereError(outcome[1])
        return outcome[0]

    def first_then_all(self, action: Callable[[], T]) -> T:
        """Run an action in the first process, then in the others; return each one's own result.

        What fails everywhere is raised in the first process alone, and as ToldElsewhereError in the others.
        """
        result = []
        self.first_alone(lambda: result.append(action()))
        return result[0] if self.is_first else action()

    def share(self, content: Any) -> Any:
        """Return the first process's nested dicts and lists of tensors and plain data in all; tensors on the CPU."""
        if self.size == 1:
            return content
        tensors: list[torch.Tensor] = []
        skeleton = _lift(content, tensors) if self.is_first else None
        outline = [skeleton, [(list(x.shape), x.dtype) for x in tensors]]
        with self._explaining('the sharing of the state'):
            dist.broadcast_object_list(outline, src=0, group=self._patient)
            skeleton, shapes = outline
            for number, (shape, dtype) in enumerate(shapes):
                mine = tensors[number] if self.is_first else torch.empty(shape, dtype=dtype)
                moved = mine.to(self.device).contiguous()
                dist.broadcast(moved, src=0)
                if not self.is_first:
                    tensors.append(moved.cpu())
        return content if self.is_first else _lower(skeleton, tensors)

    def check_same(self, name: str, digest: str) -> None:
        """Raise RuntimeError, in all processes, unless all have the same hexadecimal digest."""
        number = int(digest[:12], 16)  # A float64 holds so much exactly.
        highest, lowest = self.agree([number, -number])
        if highest != -lowest:
            raise RuntimeError(f'{name}: the processes of this run, on their machines, do not have the same')

    def check_equal(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """Raise RuntimeError unless all processes hold the same tensors, bit for bit."""
        if self.size == 1:
            return
        mine = checksum(tensors).to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self._explaining('a comparison of weights'):
            dist.all_gather(everyone, mine)
        sums = [x.item() for x in everyone]
        different = [str(rank) for rank, x in enumerate(sums) if x != sums[0]]
        if different:
            raise RuntimeError(f'{name}: processes {", ".join(different)} hold other weights than process 0')

    @contextlib.contextmanager
    def _explaining(self, what):
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not NETWORK_ERROR.search(str(error)):
                raise  # Something else went wrong while waiting.
            time.sleep(LINGER_S)
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            reason = re.sub(r'^\[\S+\] ', '', first_line).partition('. ')[0]  # Without the place in the source.
            raise RankLostError(
                f'process {self.rank} lost contact with the others during {what}: one of them was ended or does not '
                f'answer ({reason})'
            ) from error


class _Place(NamedTuple):
    """Stands for a tensor in a skeleton."""

    number: int


def _lift(content, tensors):
    """Return content with every tensor moved to the list and a place in its stead."""
    if isinstance(content, torch.Tensor):
        tensors.append(content)
        return _Place(len(tensors) - 1)
    if isinstance(content, dict):
        return {key: _lift(value, tensors) for key, value in content.items()}
    return [_lift(value, tensors) for value in content] if isinstance(content, list) else content


def _lower(skeleton, tensors):
    """Undo `_lift`."""
    if isinstance(skeleton, _Place):
        return tensors[skeleton.number]
    if isinstance(skeleton, dict):
        return {key: _lower(value, tensors) for key, value in skeleton.items()}
    return [_lower(value, tensors) for value in skeleton] if isinstance(skeleton, list) else skeleton


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return an int64 scalar that depends on every bit and on the order of float32 or integer tensors."""
    total = torch.zeros([], dtype=torch.int64)
    for number, tensor in enumerate(tensors, start=1):
        bits = tensor.detach().reshape(-1)
        bits = bits.view(torch.int32) if bits.dtype == torch.float32 else bits
        positions = torch.arange(1, len(bits) + 1, device=bits.device)
        total = total.to(bits.device) + (bits.to(torch.int64) * positions).sum() * number
    return total


@contextlib.contextmanager
def joined(device_type: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the run that the environment describes (as torchrun sets it), alone where it describes none.

    device_type: 'cuda' (device number LOCAL_RANK, NCCL) or 'cpu' (gloo). timeout_s: how long a collective may take.
    Raises RuntimeError where there are fewer devices than processes.
    """
    # Clusters set some of the variables for purposes of their own.
    rank, size, local = (int(os.environ[name]) for name in VARIABLES) if is_launched() else (0, 1, 0)
    device = torch.device(device_type, local) if device_type == 'cuda' else torch.device('cpu')
    if device_type == 'cuda':
        if local >= torch.cuda.device_count():
            raise RuntimeError(f'process {local} of this machine has no GPU: {torch.cuda.device_count()} were found')
        torch.cuda.set_device(device)
    ranks = Ranks(rank, size, device)
    if size == 1:
        yield ranks
        return
    local_size = int(os.environ.get('LOCAL_WORLD_SIZE', size))
    torch.set_num_threads(max(torch.get_num_threads() // local_size, 1))  # Or they wait for each other's cores.
    timeout = datetime.timedelta(seconds=timeout_s)
    options = {'device_id': device} if device_type == 'cuda' else {}
    dist.init_process_group('nccl' if device_type == 'cuda' else 'gloo', timeout=timeout, **options)
    ranks._control = dist.new_group(backend='gloo', timeout=timeout)
    ranks._patient = dist.new_group(backend='gloo', timeout=PATIENCE)
    yield ranks
    dist.destroy_process_group()  # Not after an error: it would wait for processes that may be gone.


def is_launched() -> bool:
    """Tell whether torchrun or `launch` started this process."""
    return all(name in os.environ for name in VARIABLES)


def launch(worker: Callable, arguments: tuple, num_ranks: int) -> None:
    """Start processes of `worker(*arguments)` on this machine with torchrun's elastic launcher and wait for them.

    Raises RanksFailedError, naming the process and its signal or exit status, once all of them have ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ('torch.distributed.elastic', 'torch.multiprocessing.spawn'):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # The error raised here says it in one line.
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_ranks, run_id=uuid.uuid4().hex, rdzv_backend='c10d',
        rdzv_endpoint='127.0.0.1:0', local_addr='127.0.0.1', max_restarts=0, monitor_interval=MONITOR_S,
        start_method='spawn',
    )
    before = {number: signal.getsignal(number) for number in LAUNCHER_SIGNALS}
    try:
        elastic_launch(config, worker)(*arguments)
    except ChildFailedError as error:
        raise _first_failure(error.failures, num_ranks) from error
    except SignalException as error:
        raise RanksFailedError(f'stopped by {error.sigval.name}', SIGNAL_OFFSET + error.sigval) from error
    finally:
        for number, handler in before.items():
            if handler is not None:  # Python's own.
                signal.signal(number, handler)


def _first_failure(failures, num_ranks):
    """Name the failure that the others followed from: not the loss of contact, or the launcher's signal, after it."""
    followers = (LOST_STATUS, -signal.SIGTERM, SIGNAL_OFFSET + signal.SIGTERM)
    rank, failure = min(failures.items(), key=lambda x: (x[1].exitcode in followers, x[1].timestamp))
    code = failure.exitcode
    how = failure.signal_name() if code < 0 else f'exit status {code}'
    status = SIGNAL_OFFSET - code if code < 0 else code
    return RanksFailedError(f'process {rank} of {num_ranks} ended with {how}', status)
