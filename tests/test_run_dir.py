# SPDX-License-Identifier: Apache-2.0
"""Run directories: numbers, continuing, refusing, locking."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from training.run_dir import (
    DATA_FILE,
    LOCK_FILE,
    MAX_DIFFERENCES,
    OPTIONS_FILE,
    RunError,
    load_config,
    locked,
    open_run,
)
from training.state import save_state
from training.train_config import make_config

ROOT = pathlib.Path(__file__).resolve().parents[1]


def config(outdir, **given):
    return make_config('toy', str(outdir), 'toy-data', **{'device': 'cpu', **given})


def test_runs_are_numbered_on(tmp_path):
    out = tmp_path / 'new' / 'out'
    first = open_run(config(out), 'a', fresh=False)
    assert first == out / '00000-toy-16-batch4-gamma1'
    (out / '00041-something-else').mkdir()
    (out / 'notes').mkdir()
    (out / '99-not-a-run').mkdir()
    assert open_run(config(out, gamma=2.0), 'a', fresh=False).name == '00042-toy-16-batch4-gamma2'
    assert open_run(config(out, desc='x'), 'a', fresh=False).name == '00043-toy-16-batch4-gamma1-x'


def test_options_are_on_disk(tmp_path):
    wanted = config(tmp_path, seed=7)
    folder = open_run(wanted, 'a', fresh=False)
    assert load_config(folder) == wanted
    assert json.loads((folder / DATA_FILE).read_text()) == {'path': 'toy-data', 'sha256': 'a'}
    assert sorted(path.name for path in folder.iterdir()) == sorted([OPTIONS_FILE, DATA_FILE])


def test_the_same_options_continue_the_newest_run(tmp_path):
    first = open_run(config(tmp_path), 'a', fresh=False)
    assert open_run(config(tmp_path), 'a', fresh=False) == first
    second = open_run(config(tmp_path), 'a', fresh=True)
    assert second != first and second.name.startswith('00001-')
    assert open_run(config(tmp_path), 'a', fresh=False) == second
    elsewhere = config(tmp_path, kimg=5.0, snap=3, workers=0, tick=1.0, save_minutes=2.0)
    assert open_run(elsewhere, 'a', fresh=False) == second


def test_other_options_begin_a_run(tmp_path):
    first = open_run(config(tmp_path), 'a', fresh=False)
    save_state(first, 4, {})
    second = open_run(config(tmp_path, glr=0.001), 'a', fresh=False)
    assert second.name == first.name.replace('00000', '00001')
    assert open_run(config(tmp_path), 'a', fresh=False) == first  # An older one with the same options goes on.
    third = open_run(config(tmp_path), 'other data', fresh=False)
    assert third.name.startswith('00002-')


def test_a_description_names_one_run(tmp_path):
    first = open_run(config(tmp_path, desc='x'), 'a', fresh=False)
    save_state(first, 4, {})
    with pytest.raises(RunError) as caught:
        open_run(config(tmp_path, desc='x', glr=0.001), 'a', fresh=False)
    assert f'--desc=x: {first} was trained with other options (glr 0.0025 there, 0.001 now)' in str(caught.value)
    assert '--fresh' in str(caught.value) and '\n' not in str(caught.value)
    with pytest.raises(RunError, match=r'\(other data\)'):
        open_run(config(tmp_path, desc='x'), 'b', fresh=False)
    assert open_run(config(tmp_path, desc='x', glr=0.001), 'a', fresh=True).name.startswith('00001-')
    assert open_run(config(tmp_path, desc='x'), 'a', fresh=False) == first


def test_a_described_run_without_a_state_is_no_obstacle(tmp_path):
    first = open_run(config(tmp_path, desc='x'), 'a', fresh=False)
    assert open_run(config(tmp_path, desc='x', glr=0.001), 'a', fresh=False) != first


def test_long_lists_of_differences_are_cut(tmp_path):
    save_state(open_run(config(tmp_path, desc='x'), 'a', fresh=False), 4, {})
    other = config(tmp_path, desc='x', glr=1.0, dlr=1.0, seed=5, mirror=True, freezed=1, p=0.5, target=0.1, aug='ada')
    with pytest.raises(RunError) as caught:
        open_run(other, 'a', fresh=False)
    assert str(caught.value).count(' there, ') == MAX_DIFFERENCES and ', …)' in str(caught.value)
    nested = config(tmp_path, desc='x', density_reg=0.5)
    with pytest.raises(RunError, match=r'loss\.density_reg 0\.25 there, 0\.5 now'):
        open_run(nested, 'a', fresh=False)


DAMAGES = {
    'no options': lambda folder: (folder / OPTIONS_FILE).unlink(),
    'cut options': lambda folder: (folder / OPTIONS_FILE).write_text('{"preset": '),
    'not options': lambda folder: (folder / OPTIONS_FILE).write_text('[1, 2]'),
    'not text': lambda folder: (folder / OPTIONS_FILE).write_bytes(b'\xff\xfe\x00'),
    'unknown options': lambda folder: (folder / OPTIONS_FILE).write_text('{"colour": 1}'),
    'no data file': lambda folder: (folder / DATA_FILE).unlink(),
    'not data': lambda folder: (folder / DATA_FILE).write_text('[]'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_run_whose_options_cannot_be_read_is_not_continued(tmp_path, damage):
    first = open_run(config(tmp_path, desc='x'), 'a', fresh=False)
    DAMAGES[damage](first)
    second = open_run(config(tmp_path, desc='x'), 'a', fresh=False)
    assert second != first
    save_state(first, 4, {})
    assert open_run(config(tmp_path, desc='x'), 'a', fresh=False) == second
    with pytest.raises(RunError, match='its options cannot be read'):
        open_run(config(tmp_path, desc='x', seed=9), 'b', fresh=False)


def test_a_name_is_no_pattern(tmp_path):
    first = open_run(config(tmp_path, desc='a.c'), 'a', fresh=False)
    assert open_run(config(tmp_path, desc='abc'), 'a', fresh=False) != first


def test_two_commands_at_once_get_two_folders(tmp_path, monkeypatch):
    mkdir, raced = pathlib.Path.mkdir, []

    def slow_mkdir(self, *arguments, **options):
        if self.name.startswith('00000-') and not raced:
            raced.append(self)
            mkdir(self)  # The other command.
        return mkdir(self, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, 'mkdir', slow_mkdir)
    assert open_run(config(tmp_path), 'a', fresh=False).name.startswith('00001-')


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError):
        open_run(config(tmp_path / 'file'), 'a', fresh=False)


def test_a_lock_clears_away_leftovers_and_keeps_out_a_second_one(tmp_path):
    (tmp_path / '.tmp-training-state-1').write_bytes(b'half')
    (tmp_path / 'log.txt').write_text('kept')
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_FILE, 'log.txt']
        (tmp_path / '.tmp-mine').write_bytes(b'being written')
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())
    with locked(tmp_path):
        assert not (tmp_path / '.tmp-mine').exists()


def test_the_lock_of_another_process_ends_with_it(tmp_path):
    script = textwrap.dedent(f'''
        import pathlib, sys
        sys.path.insert(0, {str(ROOT)!r})
        from training.run_dir import locked
        with locked(pathlib.Path({str(tmp_path)!r})):
            print('locked', flush=True)
            sys.stdin.read()
    ''')
    process = subprocess.Popen([sys.executable, '-c', script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == 'locked\n'
        with pytest.raises(RunError, match=rf'{tmp_path}: process {process.pid} trains in it; .*--fresh'):
            with locked(tmp_path):
                pytest.fail('locked twice')
        process.kill()
        process.wait(timeout=10)
        with locked(tmp_path):
            assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())
    finally:
        process.kill()
        process.communicate()


def test_what_does_not_decide_the_numbers_is_no_difference(tmp_path):
    one = config(tmp_path)
    assert dataclasses.replace(one, timeout_s=5.0, device='cuda', kimg=1.0, workers=1).digest() == one.digest()
    halves = dataclasses.replace(one, batch_gpu=2)
    assert dataclasses.replace(halves, gpus=2).digest() == halves.digest()
    assert halves.digest() != one.digest()  # Minibatch statistics see micro-batches.
    assert dataclasses.replace(one, seed=1).digest() != one.digest()
