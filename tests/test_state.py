# SPDX-License-Identifier: Apache-2.0
"""States of a run on disk: whole or absent, damaged ones left aside, nothing executed, full disks harmless."""

import errno
import hashlib
import os
import pathlib
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import assert_same

from training import state
from training.state import KEEP, NAME, StateError, list_states, load_newest, remove_leftovers, save_state

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures('one_thread')


def content(value=1.0):
    """Return a state with networks and an optimiser that has taken a step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.full([4, 3], value)).square().sum().backward()
    optimizer.step()
    weights = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    return {
        'weights': weights, 'optimizer': optimizer.state_dict(), 'value': value, 'none': None,
        'stats': {'a': [1.0, float('inf')]}, 'mixed': [torch.arange(3), torch.ones(2, dtype=torch.float16)],
    }


def no_warnings(text):
    raise AssertionError(text)


def test_a_state_comes_back_bit_for_bit(tmp_path):
    written = content()
    path = save_state(tmp_path, 1234, written)
    found, read = load_newest(tmp_path, no_warnings)
    assert found == path
    assert_same(read, written)
    assert NAME.fullmatch(path.name)[1] == '000000001234'
    assert NAME.fullmatch(path.name)[2] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert [x.name for x in tmp_path.iterdir()] == [path.name]
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
    optimizer.load_state_dict(read['optimizer'])
    assert_same(optimizer.state_dict(), written['optimizer'])


def test_the_newest_states_are_kept(tmp_path):
    for nimg in (5, 20, 100, 1000):
        save_state(tmp_path, nimg, {'nimg': nimg})
    assert [int(NAME.fullmatch(path.name)[1]) for path in list_states(tmp_path)] == [1000, 100][:KEEP]
    assert load_newest(tmp_path, no_warnings)[1] == {'nimg': 1000}


def test_without_states_nothing_is_loaded(tmp_path):
    (tmp_path / 'training-state-later.pt').write_bytes(b'')  # Another program's.
    assert load_newest(tmp_path, no_warnings) is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rename(path):
    path.rename(path.with_name(path.name[:-19] + '0' * 16 + '.pt'))


DAMAGES = {
    'a flipped bit': flip,
    'cut off': lambda path: path.write_bytes(path.read_bytes()[:-100]),
    'empty': lambda path: path.write_bytes(b''),
    'renamed': rename,
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_state_is_skipped_with_a_warning(tmp_path, damage):
    older, newest = save_state(tmp_path, 1, {'nimg': 1}), save_state(tmp_path, 2, {'nimg': 2})
    DAMAGES[damage](newest)
    warnings = []
    assert load_newest(tmp_path, warnings.append) == (older, {'nimg': 1})
    assert len(warnings) == 1 and warnings[0].startswith('training-state-000000000002-')
    assert 'is damaged and left aside' in warnings[0] and '\n' not in warnings[0]
    assert list_states(tmp_path) == [older] and len(list(tmp_path.glob('*.damaged'))) == 1
    again = save_state(tmp_path, 1, {'nimg': 'again'})  # It does not count as older than the damaged one.
    assert again.exists()


def test_a_run_whose_states_are_all_damaged_does_not_begin_anew_unasked(tmp_path):
    paths = [save_state(tmp_path, nimg, {'nimg': nimg}) for nimg in (1, 2)]
    for path in paths:
        path.write_bytes(b'garbage')
    for _ in range(2):  # Nor when the command is run once more.
        with pytest.raises(StateError, match='all 2 states are damaged; --fresh'):
            load_newest(tmp_path, lambda text: None)
    assert all(path.exists() for path in paths)


def test_a_disk_that_cannot_be_read_for_now_is_no_damage(tmp_path):
    path = save_state(tmp_path, 1, {'nimg': 1})
    save_state(tmp_path, 0, {'nimg': 0})
    path.unlink()
    path.mkdir()  # Reading it raises an OSError.
    with pytest.raises(OSError, match='directory'):
        load_newest(tmp_path, lambda text: None)


@pytest.mark.parametrize('data', [b'', b'garbage', b'PK\x03\x04', pickle.dumps({'a': 1}, protocol=2)])
def test_a_file_that_is_no_state_is_skipped_even_with_the_right_hash(tmp_path, data):
    older = save_state(tmp_path, 1, {'nimg': 1})
    digest = hashlib.sha256(data).hexdigest()[:16]
    (tmp_path / f'training-state-000000000002-{digest}.pt').write_bytes(data)
    warnings = []
    found = load_newest(tmp_path, warnings.append)
    assert found == (older, {'nimg': 1}) or (found[1] == {'a': 1} and not warnings)


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_state_is_not_executed(tmp_path):
    folder, trace = tmp_path / 'run', tmp_path / 'executed'
    folder.mkdir()
    older = save_state(folder, 1, {'nimg': 1})
    save_state(folder, 2, {'nimg': Exploit(trace)})
    trace.exists() and trace.rmdir()
    warnings = []
    assert load_newest(folder, warnings.append) == (older, {'nimg': 1})
    assert len(warnings) == 1 and not trace.exists()


class FullDisk:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize('room', [0, 300, 1500])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, room):
    paths = [save_state(tmp_path, nimg, {'nimg': nimg}) for nimg in (1, 2)]
    before = {path: path.read_bytes() for path in paths}
    monkeypatch.setattr(state, 'open', lambda path, mode: FullDisk(open(path, mode), room), raising=False)
    with pytest.raises(OSError) as caught:
        save_state(tmp_path, 3, content())
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_disk_that_refuses_the_last_bytes_loses_nothing(tmp_path, monkeypatch):
    path = save_state(tmp_path, 1, {'nimg': 1})

    def refuse(_handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, 'fsync', refuse)
    with pytest.raises(OSError, match='Input/output error'):
        save_state(tmp_path, 2, {'nimg': 2})
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_size_limit_of_the_system_is_an_os_error(tmp_path):
    """The archive's writer is a C++ program: whether it hands on what the system says shows with a real limit alone."""
    script = textwrap.dedent(f'''
        import pathlib, resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        from training.state import list_states, save_state
        folder = pathlib.Path({str(tmp_path)!r})
        save_state(folder, 1, {{'nimg': 1}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        try:
            save_state(folder, 2, {{'a': [torch.zeros(30_000) for _ in range(9)]}})
        except OSError as error:
            print(type(error).__name__, error.errno, len(list(folder.iterdir())), len(list_states(folder)))
    ''')
    run = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ['OSError', str(errno.EFBIG), '1', '1'], run.stderr


def test_other_errors_are_not_hidden(tmp_path):
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save_state(tmp_path, 1, {'a': lambda: None})
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    path = save_state(tmp_path, 1, {'nimg': 1})
    (tmp_path / f'{state.TEMPORARY}99999').write_bytes(b'half')
    assert list_states(tmp_path) == [path]
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
