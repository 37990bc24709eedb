# SPDX-License-Identifier: Apache-2.0
"""Processes that agree, share and compare, and notice that one of them is gone, hangs or fails."""

import datetime
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from helpers import assert_same

from torch_utils import distributed
from torch_utils.distributed import Ranks, RanksFailedError, ToldElsewhereError, checksum, is_launched, launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
TIMEOUT_S = 2.0
LIMIT_S = 60.0  # For processes that would wait for ever.
# Two processes of scenarios below, without torchrun's launcher: it would end the survivors that are under test.
WORKER = 'import sys; sys.path[:0] = [{root!r}, {tests!r}]; import test_distributed as t; t.run_scenario({name!r})'
pytestmark = pytest.mark.usefixtures('one_thread')


def tree():
    """Return nested content with tensors of several types, which torch.equal tells apart bit for bit."""
    torch.manual_seed(1)
    return {
        'weights': {'a': torch.randn(3, 4), 'half': torch.randn(5).half(), 'scalar': torch.tensor(3.5)},
        'optimizer': [{'step': torch.tensor(7.0), 'lr': 0.002, 'betas': (0.0, 0.99)}, torch.randn(2, 2).double()],
        'counts': torch.arange(6).reshape(2, 3), 'mask': torch.tensor([True, False]), 'empty': torch.zeros(0, 3),
        'strided': torch.randn(4, 3).t(), 1: None, 'name': 'x', 'p': 0.25,
    }


def raised(action, *arguments):
    """Return type and text of what an action raises."""
    try:
        action(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return 'nothing', ''


def refuse():
    raise FileNotFoundError('no such data')


def cooperate(ranks):
    """What two processes do that both work."""
    other = ranks.rank == 1
    total = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
    ranks.sum_(total, 'a test')
    assert total.tolist() == [3, 30]
    assert ranks.agree([ranks.rank, -ranks.rank, 2.5, not other]) == [1, 0, 2.5, 1]
    calls = []
    assert ranks.first_alone(lambda: calls.append(1) or {'path': 'x', 'rank': ranks.rank}) == {'path': 'x', 'rank': 0}
    start = time.monotonic()
    assert ranks.first_then_all(lambda: time.sleep(0.5) or ranks.rank) == ranks.rank
    assert time.monotonic() - start > 0.4 + 0.5 * other  # One after the other.
    kind, text = raised(ranks.first_then_all, refuse)
    assert (kind, text) == ('ToldElsewhereError' if other else 'FileNotFoundError', 'no such data')
    assert len(calls) == (0 if other else 1)
    expected = ('ToldElsewhereError' if other else 'FileNotFoundError'), 'no such data'
    assert raised(ranks.first_alone, refuse) == expected
    assert_same(ranks.share({} if other else tree()), tree())
    weights = [torch.arange(4.0), torch.arange(3)]
    ranks.check_equal('G', weights)
    weights[0][2] += 1e-6 * other
    message = 'D: processes 1 hold other weights than process 0'
    assert raised(ranks.check_equal, 'D', weights) == ('RuntimeError', message)
    ranks.check_equal('G', [torch.ones(2)])  # They still understand each other.


def lose_the_other(ranks):
    """Process 1 is killed; what process 0 then hears of a reduction."""
    ranks.sum_(torch.ones(1), 'a greeting')
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    name, text = raised(ranks.sum_, torch.ones(1), 'the reduction of gradients')
    assert name == 'RankLostError' and text.startswith('process 0 lost contact') and '\n' not in text, text
    assert 'during the reduction of gradients' in text
    assert time.monotonic() - begin < distributed.LINGER_S + TIMEOUT_S / 2
    assert raised(ranks.agree, [1])[0] == 'RankLostError'
    os._exit(0)


def wait_in_vain(ranks):
    """Process 1 sleeps; what process 0 hears after the time-out."""
    ranks.sum_(torch.ones(1), 'a greeting')
    if ranks.rank == 1:
        time.sleep(TIMEOUT_S + distributed.LINGER_S + 3)
        os._exit(0)
    begin = time.monotonic()
    assert raised(ranks.agree, [1])[0] == 'RankLostError'
    assert TIMEOUT_S - 1 < time.monotonic() - begin < TIMEOUT_S + distributed.LINGER_S + 2
    os._exit(0)


SCENARIOS = {'cooperate': cooperate, 'lose_the_other': lose_the_other, 'wait_in_vain': wait_in_vain}


def run_scenario(name):
    """What a process of a scenario does."""
    torch.set_num_threads(1)
    with distributed.joined('cpu', TIMEOUT_S) as ranks:
        SCENARIOS[name](ranks)


def free_port():
    """Return a port that nothing listens on."""
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, timeout=datetime.timedelta(seconds=1))
    return store.port


def run_two(name):
    """Run two processes of a scenario; return exit statuses, and what they wrote."""
    port = free_port()
    processes = []
    for rank in range(2):
        env = os.environ | {
            'RANK': str(rank), 'WORLD_SIZE': '2', 'LOCAL_RANK': str(rank), 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': str(port),
        }
        command = [sys.executable, '-c', WORKER.format(root=str(ROOT), tests=str(ROOT / 'tests'), name=name)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(subprocess.Popen(command, env=env, **pipes))
    deadline = time.monotonic() + LIMIT_S
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.parametrize('name, statuses', [
    ('cooperate', [0, 0]), ('lose_the_other', [0, -signal.SIGKILL]), ('wait_in_vain', [0, 0]),
])
def test_two_processes(name, statuses):
    found, outputs = run_two(name)
    assert found == statuses, '\n'.join(outputs)


def hold_or_die(how):
    """A worker of `launch`: process 1 ends as told, the others would wait for it."""
    assert is_launched()
    with distributed.joined('cpu', LIMIT_S) as ranks:
        if ranks.rank == 1 and how == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.rank == 1 and how == 'status':
            os._exit(3)
        try:
            ranks.sum_(torch.ones(1), 'a test')
        except distributed.RankLostError:
            os._exit(distributed.LOST_STATUS)


@pytest.mark.parametrize('how, message, status', [
    ('killed', 'process 1 of 2 ended with SIGKILL', 128 + signal.SIGKILL),
    ('status', 'process 1 of 2 ended with exit status 3', 3),
])
def test_the_launcher_names_the_process_that_failed(how, message, status):
    begin = time.monotonic()
    with pytest.raises(RanksFailedError) as caught:
        launch(hold_or_die, (how,), 2)
    assert (str(caught.value), caught.value.status) == (message, status)
    assert time.monotonic() - begin < LIMIT_S / 2


def test_the_launcher_returns_when_all_is_done_and_leaves_no_trace():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
    before = [signal.getsignal(number) for number in numbers]
    launch(hold_or_die, ('well',), 2)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_single_process_talks_to_nobody(monkeypatch):
    for name in ('all_reduce', 'broadcast', 'broadcast_object_list', 'all_gather', 'init_process_group'):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail('communication'))
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert not is_launched()
    with distributed.joined('cpu', 1.0) as ranks:
        assert (ranks.rank, ranks.size, ranks.device.type, ranks.is_first) == (0, 1, 'cpu', True)
        tensor, content = torch.ones(2), tree()
        ranks.sum_(tensor, 'nothing')
        assert tensor.tolist() == [1, 1]
        assert ranks.agree([1, 0.5]) == [1, 0.5]
        assert ranks.share(content) is content
        assert ranks.first_alone(lambda: 5) == 5
        ranks.check_equal('G', [tensor])
        with pytest.raises(FileNotFoundError):
            ranks.first_alone(refuse)


def test_being_launched_takes_all_variables(monkeypatch):
    for number, name in enumerate(distributed.VARIABLES):
        assert not is_launched()
        monkeypatch.setenv(name, str(number))
    assert is_launched()


def test_a_process_without_a_gpu_says_so(monkeypatch):
    for name, value in {'RANK': 3, 'WORLD_SIZE': 4, 'LOCAL_RANK': 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(RuntimeError, match='process 3 of this machine has no GPU: 1 were found'):
        with distributed.joined('cuda', 1.0):
            pass


def test_only_the_first_process_tells():
    """The others learn the reason all the same."""
    assert issubclass(ToldElsewhereError, RuntimeError)
    assert Ranks(0, 2).is_first and not Ranks(1, 2).is_first


def test_checksums_depend_on_every_bit_and_the_order():
    torch.manual_seed(0)
    tensors = [torch.randn(50), torch.arange(7), torch.randn(3, 4)]
    original = checksum(tensors).item()
    assert checksum([x.clone() for x in tensors]).item() == original
    for number, tensor in enumerate(tensors):
        for position in (0, tensor.numel() - 1):
            for bit in (0, 15, 30, 31):
                changed = [x.clone() for x in tensors]
                flat = changed[number].view(-1)
                bits = flat.view(torch.int32) if tensor.dtype == torch.float32 else flat
                bits[position] ^= torch.tensor(1 << bit).to(bits.dtype) if bit < 31 else -(1 << 31)
                assert checksum(changed).item() != original, (number, position, bit)
    assert checksum(tensors[::-1]).item() != original
    assert checksum([tensors[0].flip(0), *tensors[1:]]).item() != original
    assert checksum([torch.tensor([0.0])]).item() != checksum([torch.tensor([-0.0])]).item()
