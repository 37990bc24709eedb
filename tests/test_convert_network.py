# SPDX-License-Identifier: Apache-2.0
"""convert_network.py: the same networks in a file of plain data, of fewer bytes where asked, or one line."""

import dataclasses
import resource
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from parity import ROOT

import convert_network
import legacy
from training.checkpoint import save_snapshot
from training.discriminator import Discriminator
from training.generator import Next3DGenerator
from training.topology import load_topology
from training.train_config import make_config


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    config = make_config('toy', '', '')
    topology = load_topology(ROOT / 'tests/data/simple_head/head_template.obj', config.generator.texture_resolution)
    path = tmp_path_factory.mktemp('source') / 'both.pkl'
    generator = Next3DGenerator(config.generator, *topology)
    save_snapshot(path, {'G_ema': generator, 'D': Discriminator(config.discriminator)})
    return path


def run(*arguments):
    return CliRunner().invoke(convert_network.main, list(map(str, arguments)))


def test_all_networks_keep_their_numbers(source, tmp_path):
    result = run(f'--source={source}', f'--dest={tmp_path}/new.pkl')
    assert result.exit_code == 0, result.output
    before, after = (legacy.load_network_pkl(path) for path in (source, tmp_path / 'new.pkl'))
    assert list(before) == list(after)
    for name in before:
        for (key, a), b in zip(before[name].state_dict().items(), after[name].state_dict().values(), strict=True):
            assert torch.equal(a, b), (name, key)


def test_half_of_one_network(source, tmp_path):
    result = run(f'--source={source}', f'--dest={tmp_path}/half.pkl', '--only=G_ema', '--dtype=fp16')
    assert result.exit_code == 0 and 'G_ema, ' in result.output
    before, after = (legacy.load_network_pkl(path)['G_ema'] for path in (source, tmp_path / 'half.pkl'))
    assert list(legacy.load_network_pkl(tmp_path / 'half.pkl')) == ['G_ema']
    weight, rounded = before.decoder.net[0].weight, after.decoder.net[0].weight
    assert rounded.dtype == torch.float32 and torch.equal(weight.half().float(), rounded)
    assert after.config == dataclasses.replace(before.config)


def test_bad_calls_are_one_line_and_leave_nothing(source, tmp_path):
    dest = tmp_path / 'new.pkl'
    huge = legacy.load_network_pkl(source, only='G_ema')
    huge['G_ema'].decoder.net[0].weight.fill_(1e9)
    save_snapshot(tmp_path / 'huge.pkl', huge)
    for arguments, words in [
        ((f'--source={source}', '--only=G'), 'holds none of G'),
        ((f'--source={source}', '--only=G', '--only=D'), 'holds D, no G'),
        ((f'--source={tmp_path}/none.pkl',), 'No such file'),
        ((f'--source={tmp_path}/huge.pkl', '--dtype=fp16'), '--dtype=fp16'),
    ]:
        result = run(*arguments, f'--dest={dest}')
        assert result.exit_code != 0 and words in result.output and result.output.count('\n') == 1, result.output
        assert not dest.exists()


def test_disk_full_leaves_the_old_file(source, tmp_path):
    (tmp_path / 'net.pkl').write_text('from before')
    process = subprocess.run(
        [sys.executable, '-B', str(ROOT / 'convert_network.py'), f'--source={source}', f'--dest={tmp_path}/net.pkl'],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert process.returncode == 1
    assert process.stderr == f'Error: {tmp_path / "net.pkl"}: cannot be written: File too large\n'
    assert [p.name for p in tmp_path.iterdir()] == ['net.pkl'] and (tmp_path / 'net.pkl').read_text() == 'from before'
