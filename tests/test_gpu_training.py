# SPDX-License-Identifier: Apache-2.0
"""Training on a CUDA device: every part of the objective, going on from a state, and the time of R1."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import toy_data
from click.testing import CliRunner
from parity import ROOT
from simple_head import TEMPLATE

import train_next3d
from torch_utils.distributed import Ranks
from torch_utils.training_stats import Collector
from training.precision import set_precision
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
    options = ['--cfg=toy', '--device=cuda', '--workers=1', f'--topology_path={TEMPLATE}']
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
    config = make_config('demo', '', '', batch=8, topology_path=str(TEMPLATE))
    ranks = Ranks(0, 1, 'cuda')
    medians = bm_training.measure(config, ranks, iterations=17)['median_ms']
    assert medians['Dreg'] < 10 * medians['Gmain'], medians


@pytest.mark.parametrize('batch, disc_render', [(4, None), (8, None), (12, None), (4, 'waves')])
def test_graphs_train_as_single_launches_do(batch, disc_render):
    """All phases, blur and swaps fading, gradients of several micro-batches: the same numbers to rounding.

    So small a learning rate keeps the weights: Adam turns gradients that are zero but for rounding into whole steps,
    and after some of them two runs without graphs differ as much. What gradients were is seen in Adam's means. They may
    differ by 2 %, or three times as much as two runs without graphs.
    """
    trainers = []
    for nographs in (True, True, False):
        config = make_config(
            'demo', '', '', batch=batch, batch_gpu=4, nographs=nographs, gen_pose_cond=True, blur_fade_kimg=0.2,
            gpc_reg_fade_kimg=0.05, topology_path=str(TEMPLATE), style_mixing_prob=0.5, glr=1e-9, dlr=1e-9,
            disc_render=disc_render,
        )
        trainer = bm_training.Trainer(config, bm_training.new_networks(config), Ranks(0, 1, 'cuda'), Collector())
        for iteration in range(6):
            trainer.step(bm_training.random_data(trainer, iteration))
        trainers.append(trainer)
    plain, _, captured = trainers
    assert plain._graphs is None and len(captured._graphs._captured) == 4
    assert set(plain.stats.state_dict()) == set(captured.stats.state_dict())
    for name, expected in plain.stats.state_dict().items():
        if 'signs' in name:  # Those of logits near zero depend on rounding.
            continue
        assert captured.stats.state_dict()[name] == pytest.approx(expected, rel=2e-2, abs=1e-3), name
    for name in ('G', 'D'):
        states = [trainer._optimizers[name].state for trainer in trainers]
        triples = [
            [state[p]['exp_avg'] for state, p in zip(states, parameters)]
            for parameters in zip(*(getattr(trainer.networks, name).parameters() for trainer in trainers))
            if any(state.get(p) for state, p in zip(states, parameters))  # The others have no gradients.
        ]
        largest = max(float(a.norm()) for a, _, _ in triples)
        assert largest > 0
        for number, (a, again, b) in enumerate(triples):
            rounding = max(2e-2 * float(a.norm()), 3 * float((a - again).norm()))
            assert float((a - b).norm()) < rounding + 1e-4 * largest, (name, number)
    averages = [trainer.networks.G.backbone.mapping.w_avg for trainer in (plain, captured)]
    assert torch.allclose(*averages, atol=1e-4)


def test_a_step_never_waits_for_the_device():
    config = make_config('demo', '', '', batch=4, topology_path=str(TEMPLATE))
    for graphs in (False, True):
        config = dataclasses.replace(config, graphs=graphs)
        trainer = bm_training.Trainer(config, bm_training.new_networks(config), Ranks(0, 1, 'cuda'), Collector())
        data = bm_training.random_data(trainer, 0)
        for _ in range(2):
            trainer.iteration = 0  # All phases are due.
            trainer.step(data)
        trainer.iteration = 0
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            trainer.step(data)
        finally:
            torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('precision', ['tf32', 'bf16', 'fp16'])
def test_precision_changes_the_losses_little(precision):
    """All phases with the same weights, which so small a learning rate keeps: losses beside those of float32.

    Adam's first steps are the signs of gradients, so that the weights after one differ visibly.
    """
    means = []
    for name in ('fp32', precision):
        config = make_config(
            'demo', '', '', batch=4, precision=name, glr=1e-9, dlr=1e-9,
            topology_path=str(TEMPLATE),
        )
        trainer = bm_training.Trainer(config, bm_training.new_networks(config), Ranks(0, 1, 'cuda'), Collector())
        trainer.step(bm_training.random_data(trainer, 0))
        means.append({key: s.mean for key, s in trainer.stats.collect().items() if key.startswith('Loss/')})
    set_precision((), 'fp32')
    for key, expected in means[0].items():
        assert means[1][key] == pytest.approx(expected, rel=5e-2, abs=2e-2), key


def test_what_cannot_be_captured_is_launched(caplog):
    """A loss that reads a number from the device: one warning, and the numbers of a run without graphs."""
    config = make_config('demo', '', '', batch=8, batch_gpu=4, topology_path=str(TEMPLATE))
    means = []
    for graphs in (False, True):
        config = dataclasses.replace(config, graphs=graphs)
        trainer = bm_training.Trainer(config, bm_training.new_networks(config), Ranks(0, 1, 'cuda'), Collector())
        prepare = trainer.loss._prepare
        trainer.loss._prepare = lambda images, nimg, p=prepare: (images['image'].sum().item(), p(images, nimg))[1]
        for iteration in range(2):
            trainer.step(bm_training.random_data(trainer, iteration))
        means.append(trainer.stats.collect()['Loss/D/loss'].mean)
    assert trainer._graphs is None and len(caplog.records) == 1
    assert 'runs without CUDA graphs' in caplog.records[0].message and means[1] == pytest.approx(means[0], rel=2e-2)
