# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, signalled, starved of disk or fed damaged states: nothing is lost, and nothing hangs."""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import toy_data
import torch
from click.testing import CliRunner
from helpers import assert_same
from parity import ROOT
from simple_head import TEMPLATE

import legacy
from dataset_preprocessing import pack
from torch_utils.distributed import Ranks
from training import evaluation, feed, loop
from training.dataset import HeadDataset
from training.run_dir import RunError
from training.state import list_states
from training.train_config import make_config
from training.trainer import Trainer

ITEMS, ITERATIONS, BATCH = 64, 12, 4
NEVER = 10**6  # Ticks between snapshots: states are written by time, pictures only at the end.


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """64 toy heads, packed."""
    root = tmp_path_factory.mktemp('heads')
    toy_data.make_toy_data(root, ITEMS, 128)
    sides = [f'--data={root}/images128x128', f'--rdata={root}/meshes128x128', f'--out={root}/packed', '--workers=1']
    assert CliRunner().invoke(pack.main, sides).exit_code == 0
    return root / 'packed'


def command(data, outdir, *more):
    """Return the command line of a toy run that writes a state after every iteration."""
    options = [
        '--cfg=toy', f'--data={data}', f'--outdir={outdir}', '--device=cpu', '--workers=1', '--batch-gpu=2',
        f'--kimg={ITERATIONS * BATCH / 1000}', '--tick=0.004', f'--snap={NEVER}', '--save-minutes=0.00001',
        '--dist-timeout=30', f'--topology-path={TEMPLATE}', *more,
    ]
    return [sys.executable, str(ROOT / 'train_next3d.py'), *options]


@contextlib.contextmanager
def started(line, **kwargs):
    """Start a command in a process group of its own; nothing of it outlives the block."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    one_thread = {**os.environ, 'OMP_NUM_THREADS': '1'}  # Tiny tensors: threads would wait for each other.
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, env=one_thread, **pipes, **kwargs)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def finish(line, timeout=120, code=0, **kwargs):
    """Run a command to its end and return what it printed."""
    with started(line, **kwargs) as process:
        text, _ = process.communicate(timeout=timeout)
        assert process.returncode == code, text
    return text


class Process(NamedTuple):
    pid: int
    parent: int
    group: int
    command: str


def processes():
    """Return the running processes, zombies left out."""
    found = []
    for folder in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has just ended.
            state, parent, group = (folder / 'stat').read_text().rpartition(')')[2].split()[:3]
            command = (folder / 'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace')
            if state != 'Z':
                found.append(Process(int(folder.name), int(parent), int(group), command))
    return found


def wait_for_states(outdir, count, seconds=60):
    """Wait until a run has written states after so many images."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(newest_nimg(folder) >= count for folder in outdir.glob('0*')):
            return
        time.sleep(0.05)
    raise AssertionError(f'no state of {count} images within {seconds} s')


def newest_nimg(folder):
    states = list_states(folder)
    return int(states[0].name.split('-')[2]) if states else 0


def final_state(outdir):
    (folder,) = outdir.glob('0*')
    assert newest_nimg(folder) == ITERATIONS * BATCH
    return torch.load(list_states(folder)[0], weights_only=True)['trainer']


@pytest.fixture(scope='module')
def uninterrupted(data, tmp_path_factory):
    """The final state and the folder of a run of one process that nobody disturbed."""
    outdir = tmp_path_factory.mktemp('one')
    finish(command(data, outdir))
    return final_state(outdir), outdir


def test_two_processes_survive_kills_at_random_moments(data, tmp_path, uninterrupted):
    """A killed rank ends the run in time; five times kill -9 of everything; the end equals that of a quiet run."""
    quiet = tmp_path / 'quiet'
    finish(command(data, quiet, '--gpus=2'))
    line = command(data, tmp_path / 'killed', '--gpus=2')
    with started(line) as process:
        wait_for_states(tmp_path / 'killed', BATCH)
        ranks = [p.pid for p in processes() if p.parent == process.pid and 'spawn_main' in p.command]
        assert len(ranks) == 2
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        text, _ = process.communicate(timeout=60)
        assert time.monotonic() - begin < 30 and process.returncode == 1
        assert 'process 1 of 2 ended with SIGKILL; the same command goes on' in text, text
    seed = random.randrange(10**6)
    for kill in range(5):
        delay = random.Random(seed + kill).uniform(0, 12)
        with started(line) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=delay)  # Leaving the block kills the group.
    text = finish(line)
    assert 'Finished' in text, f'seed {seed}: {text}'
    assert_same(final_state(quiet), final_state(tmp_path / 'killed'), f'seed {seed}')
    assert not list((tmp_path / 'killed').glob('0*/.tmp-*'))
    networks = [legacy.load_network_pkl(next(run.glob('0*/network-snapshot-000000.pkl')))
                for run in (quiet, tmp_path / 'killed')]
    for name in ('G', 'D', 'G_ema'):
        assert_same(*(dict(n[name].state_dict()) for n in networks))
    # One process with the same micro-batches has the same losses; later ones differ by what Adam makes of rounding.
    for number, tolerance in ((0, 1e-5), (ITERATIONS - 1, 2e-2)):
        one, two = (losses(run, number) for run in (uninterrupted[1], quiet))
        assert one.keys() == two.keys() and len(one) >= 6
        assert one == pytest.approx(two, rel=tolerance, abs=tolerance)


def losses(outdir, tick):
    """Return the means of the losses in a tick of one iteration."""
    rows = next(outdir.glob('0*/stats.jsonl')).read_text().splitlines()
    return {name: value['mean'] for name, value in json.loads(rows[tick]).items() if name.startswith('Loss/')}


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_save_the_state(data, tmp_path, uninterrupted, number):
    """To the whole process group, loaders included, as a terminal and batch systems send them."""
    line = [x if 'save-minutes' not in x else '--save-minutes=0' for x in command(data, tmp_path)]
    with started(line) as process:
        while 'tick 1' not in (row := process.stdout.readline()):
            assert row, 'ended before its first tick'
        os.killpg(process.pid, number)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, text
    assert re.search(rf'Stopped at kimg 0\.0\d\d by {number.name}; the same command goes on', text), text
    assert 'Going on from training-state-' in finish(line)
    assert_same(uninterrupted[0], final_state(tmp_path))


def test_damaged_states_are_skipped(data, tmp_path, uninterrupted):
    """The state before is used, and the statistics have no gaps or repetitions."""
    line = command(data, tmp_path)
    with started(line):
        wait_for_states(tmp_path, 5 * BATCH)
    (folder,) = tmp_path.glob('0*')
    newest = list_states(folder)[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    text = finish(line)
    assert f'Warning: {newest.name} is damaged' in text
    assert_same(uninterrupted[0], final_state(tmp_path))
    rows = (folder / 'stats.jsonl').read_text().splitlines()
    images = [int(re.search(r'"nimg": (\d+)', row)[1]) for row in rows]
    assert images == list(range(BATCH, ITERATIONS * BATCH + 1, BATCH))


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 3 MiB, too small for a state; skipped where mounting is not allowed."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f'no tmpfs: {mounted.stderr.decode().strip()}')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_full_disk(data, small_disk, uninterrupted):
    """Training goes on with a warning while the disk is full; where it has to stop it says what is kept."""
    text = finish(command(data, small_disk), code=1)
    assert re.search(r'Warning: the state at kimg 0\.004 could not be saved \(No space left on device\); '
                     r'training goes on, no state had been saved before', text), text
    assert re.search(r'Error: the state at kimg 0\.048 could not be saved \(No space left on device\)', text), text
    assert 'Traceback' not in text
    assert not list(small_disk.glob('0*/.tmp-*')) and not list(small_disk.glob('0*/training-state-*'))
    subprocess.run(['mount', '-o', 'remount,size=200m', str(small_disk)], check=True)
    finish(command(data, small_disk))
    assert_same(uninterrupted[0], final_state(small_disk))


def test_older_states_survive_a_full_disk(data, tmp_path):
    """The same without privileges: files may not grow over 2 MB from the third state on."""
    line = command(data, tmp_path)
    with started(line):
        wait_for_states(tmp_path, 2 * BATCH)
    (folder,) = tmp_path.glob('0*')
    before = {path: path.read_bytes() for path in list_states(folder)}

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**6, 2 * 10**6))

    text = finish(line, code=1, preexec_fn=limit)
    assert 'could not be saved (File too large); the last good state is kept: ' in text, text
    assert {path: path.read_bytes() for path in list_states(folder)} == before


def config_for(data, outdir, **more):
    settings = dict(device='cpu', workers=0, batch_gpu=4, kimg=ITERATIONS * BATCH / 1000, snap=NEVER, save_minutes=0.0)
    config = make_config('toy', str(outdir), str(data), topology_path=str(TEMPLATE), **settings)
    return dataclasses.replace(config, **more)


def test_losses_that_are_not_finite_stop_the_run(data, tmp_path, monkeypatch, one_thread):
    config = config_for(data, tmp_path, patience=3)
    report, seen = Trainer._report, []

    def diverging(self, name, values):
        seen.append(self.iteration)
        report(self, name, values * float('nan') if self.iteration >= 4 and name == 'Loss/G/loss' else values)

    monkeypatch.setattr(Trainer, '_report', diverging)
    monkeypatch.setattr(loop, 'CHECK_EVERY', 1)
    with pytest.raises(RunError, match='not finite in the last 3 iterations; no state had been saved'):
        loop.train(config, Ranks())
    assert max(seen) == 6  # Iterations 4, 5 and 6 were bad.


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch, one_thread):
    config = config_for(data, tmp_path, save_minutes=1e-9)
    step = Trainer.step

    def breaking(self, batch):
        step(self, batch)
        if self.iteration == 3:
            next(self.networks.D.parameters()).data.fill_(float('inf'))

    monkeypatch.setattr(Trainer, 'step', breaking)
    with pytest.raises(RunError, match='D: holds weights that are not finite; the last good state.*-0{10}08-'):
        loop.train(config, Ranks())


def test_data_that_vanish_stop_the_run_with_its_state(data, tmp_path, monkeypatch, one_thread):
    config = config_for(data, tmp_path)
    read, count = HeadDataset.camera_and_mesh, []

    def vanishing(self, index):
        count.append(index)
        if len(count) > 100:
            raise OSError(5, 'Input/output error', 'vertices.npy')
        return read(self, index)

    monkeypatch.setattr(feed, 'RETRY_DELAYS_S', (0.0,))
    monkeypatch.setattr(HeadDataset, 'camera_and_mesh', vanishing)
    with pytest.raises(loop.ReadError, match='reading data failed: .*Input/output error'):
        loop.train(config, Ranks())
    (folder,) = tmp_path.glob('0*')
    saved = newest_nimg(folder)
    assert 0 < saved < ITERATIONS * BATCH
    monkeypatch.setattr(HeadDataset, 'camera_and_mesh', read)
    assert loop.train(config, Ranks()) == 0
    assert newest_nimg(folder) == ITERATIONS * BATCH


def test_a_fault_ends_the_process_though_loaders_run(data, tmp_path):
    """Loaders leave signals alone, and Python waits for child processes at its end: they have to be gone by then."""
    copy = tmp_path / 'packed'
    shutil.copytree(data, copy)
    with started(command(copy, tmp_path / 'runs', '--workers=2', '--kimg=100')) as process:
        wait_for_states(tmp_path / 'runs', BATCH)
        os.truncate(copy / 'images.zip', 1000)  # Every picture from now on.
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and 'Error: reading data failed' in text, text


def test_a_dead_loader_is_told_in_one_line(data, tmp_path):
    line = command(data, tmp_path)
    with started(line) as process:
        wait_for_states(tmp_path, BATCH)
        for child in processes():
            if child.parent == process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and 'Traceback' not in text, text
    assert re.search(r'Error: .*(loads data was ended|reading data failed)', text), text


def test_orphaned_processes_stop(data, tmp_path):
    """Where the launcher alone is killed, its processes save their state and leave."""
    with started(command(data, tmp_path, '--gpus=2', '--kimg=100')) as process:
        wait_for_states(tmp_path, BATCH)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 30
        while (left := [p for p in processes() if p.group == process.pid]) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left


def test_metrics_that_were_cut_off_are_evaluated_when_the_run_goes_on(data, tmp_path, monkeypatch, one_thread):
    calls = []

    def cut_off_once(given):
        calls.append(given.nimg)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return {'answer': 42.0}

    monkeypatch.setattr(evaluation, '_METRICS', {'answer': cut_off_once})
    config = config_for(data, tmp_path, metrics=('answer',), kimg=0.008)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, Ranks())
    assert loop.train(config, Ranks()) == 0
    row = json.loads(next(tmp_path.glob('0*/metric-answer.jsonl')).read_text())
    assert row['results'] == {'answer': 42.0} and row['nimg'] == 8 and calls == [8, 8]
    assert loop.train(config, Ranks()) == 0 and len(calls) == 2
