# SPDX-License-Identifier: Apache-2.0
"""Training on a CUDA device: every part of the objective, going on from a state, and the time of R1."""

import json
import sys

import numpy as np
import pytest
import toy_data
from click.testing import CliRunner
from parity import ROOT

import train_next3d
from torch_utils.distributed import Ranks
from training.train_config import make_config

sys.path.append(str(ROOT / 'benchmarks'))

import bm_training  # noqa: E402  (needs the path above)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope='module')
def toy_heads(tmp_path_factory):
    root = tmp_path_factory.mktemp('heads')
    toy_data.make_toy_data(root, 8, 128)
    return root


def train_toy(root, outdir, *more):
    places = [f'--data={root}/images128x128', f'--rdata={root}/meshes128x128', f'--outdir={outdir}']
    options = ['--cfg=toy', '--device=cuda', '--workers=1', f'--topology_path={ROOT}/data/demo/head_template.obj']
    result = CliRunner().invoke(train_next3d.main, [*places, *options, *more])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize('option', [
    '--aug=ada', '--disc-render=True', '--disc-render=uv', '--reg_type=monotonic-fixed', '--style_mixing_prob=0.5',
    '--d_num_fp16_res=4', '--blur_fade_kimg=10', '--gen_pose_cond=True',
])
def test_toy_training(toy_heads, tmp_path, option):
    assert 'Finished' in train_toy(toy_heads, tmp_path, option)
    folder = next(tmp_path.glob('0*'))
    rows = [json.loads(row) for row in (folder / 'stats.jsonl').read_text().splitlines()]
    assert all(np.isfinite(rows[-1][name]['mean']) for name in rows[-1] if name.startswith('Loss/'))
    assert rows[-1]['Resources/gpu_GiB'] > 0


def test_training_goes_on_in_the_middle_of_a_tick(toy_heads, tmp_path):
    """Statistics and optimisers of the state come back to the device."""
    long = ['--kimg=0.016', '--tick=0.016', '--save-minutes=0.00001']
    train_toy(toy_heads, tmp_path, '--kimg=0.012', *long[1:])
    assert 'Going on from' in train_toy(toy_heads, tmp_path, *long)


def test_r1_is_no_slower_than_ten_generator_phases():
    """Torch's own second gradient of depthwise convolutions was twenty times slower than that."""
    config = make_config('demo', '', '', batch=8, topology_path=str(ROOT / 'data/demo/head_template.obj'))
    ranks = Ranks(0, 1, 'cuda')
    medians = bm_training.measure(config, ranks, iterations=17)['median_ms']
    assert medians['Dreg'] < 10 * medians['Gmain'], medians
