# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of the four training phases against the published implementation, in its published behaviour."""

import numpy as np
import parity
import pytest
import torch
from parity import agrees, fill, rnd

from training.config import DiscriminatorConfig, MappingConfig, Next3DConfig
from training.discriminator import Discriminator
from training.generator import Next3DGenerator
from training.loss import GeneratorInput, LossConfig, Next3DLoss, RealInput

BATCH = 2
PHASES = {
    'Gmain': 'generator_main',
    'Greg': 'generator_regularisation',
    'Dmain': 'discriminator_main',
    'Dreg': 'discriminator_regularisation',
}
ABSENT_IN_NEW_NETWORKS = ('dense_faces', 'dataset_label_std')


@pytest.fixture(scope='module')
def networks(topology):
    info, _ = parity.load('train_step')
    g_kwargs, d_kwargs = info['g_kwargs'], info['d_kwargs']
    widths = dict(channel_base=g_kwargs['channel_base'], channel_max=g_kwargs['channel_max'])
    generator = Next3DGenerator(Next3DConfig(sr_num_fp16_res=0, **widths), *topology)
    discriminator = Discriminator(
        DiscriminatorConfig(
            **widths,
            num_fp16_res=0,
            conv_clamp=d_kwargs['conv_clamp'],
            disc_c_noise=1,
            mapping=MappingConfig(num_layers=8),
        )
    )
    return generator, discriminator


def reset(networks, info):
    generator, discriminator = networks
    fill(generator, info['g_state'], info['seed'], ABSENT_IN_NEW_NETWORKS).train()
    fill(discriminator, info['d_state'], info['d_seed']).train()
    for network in networks:
        network.zero_grad(set_to_none=True)


def loss_of(networks, info, variant, report):
    kwargs = info['loss_kwargs'][variant]
    config = LossConfig(
        r1_gamma=kwargs['r1_gamma'],
        density_region='published',
        reg_type='monotonic-fixed' if variant == 'monotonic-fixed' else 'l1',
        gpc_reg_prob=kwargs['gpc_reg_prob'],
        gpc_reg_fade_kimg=kwargs['gpc_reg_fade_kimg'],
        blur_init_sigma=kwargs['blur_init_sigma'],
        blur_fade_kimg=kwargs['blur_fade_kimg'] * 32 / BATCH,
    )
    return Next3DLoss(*networks, config, BATCH, report=report)


def run_phase(loss, phase, info, arrays, meshes, nimg, real_c=None):
    seed = info['seed']
    fake = GeneratorInput(rnd(f't/z/{phase}', (BATCH, 512), seed), torch.from_numpy(arrays['gen_c']), meshes)
    image = rnd('t/real', (BATCH, 3, 512, 512), seed, 0.5).clamp(-1, 1)
    real = RealInput(image, torch.from_numpy(arrays['real_c'] if real_c is None else real_c))
    inputs = {'G': [fake], 'Dmain': [fake, real], 'Dreg': [real]}
    for network, name in ((loss.generator, 'G'), (loss.discriminator, 'D')):
        network.requires_grad_(phase[0] == name)
    with parity.sequence_draws():
        arguments = inputs.get(phase, inputs['G'])
        getattr(loss, PHASES[phase])(*arguments, gain=info['intervals'][phase], nimg=nimg)


CASES = [
    ('resume', 'Gmain'), ('resume', 'Greg'), ('resume', 'Dmain'), ('resume', 'Dreg'),
    ('blur', 'Dmain'), ('blur', 'Dreg'), ('monotonic-fixed', 'Greg'),
]


@pytest.mark.parametrize('variant, phase', CASES)
def test_phase(networks, demo_meshes, variant, phase):
    info, arrays = parity.load('train_step')
    expected = info['variants'][variant][phase]
    reset(networks, info)
    reports = {}
    loss = loss_of(networks, info, variant, lambda name, values: reports.setdefault(name, values.detach()))
    run_phase(loss, phase, info, arrays, demo_meshes, info['cur_nimg'][variant])
    assert set(reports) == set(expected['reports'])
    for name, values in expected['reports'].items():
        agrees(f'training, {phase}: losses', reports[name].flatten(), values, 'image')
    network = networks[0] if phase[0] == 'G' else networks[1]
    assert {name for name, p in network.named_parameters() if p.grad is None} == set(expected['no_grad'])
    check_gradients(f'training, {phase}: gradients', network, expected, info['seed'])


def check_gradients(label, network, expected, seed):
    """Compare norms, and projections on random directions, of the gradients of all parameters.

    Nine of ten have to agree to the tolerance of gradients, all to twenty times that: a pre-activation at a leaky
    ReLU's kink, or sums that nearly cancel (noise strengths), multiply rounding in a few of some hundred parameters.
    """
    names = list(expected['grad_norms'])
    gradients = {name: network.get_parameter(name).grad for name in names}
    reference = np.array([expected['grad_norms'][name] for name in names])
    scale = np.maximum(reference, 1e-4 * reference.max())
    norms = np.array([gradients[name].norm().item() for name in names])
    dots = np.array([(gradients[n].double() * rnd('dot/' + n, gradients[n].shape, seed)).sum().item() for n in names])
    projections = np.array([expected['grad_dots'][name] for name in names])
    for deviation in (np.abs(norms - reference) / scale, np.abs(dots - projections) / scale):
        agrees(f'{label}, nine of ten', np.quantile(deviation, 0.9)[None] + 1, np.ones(1), 'gradient')
        assert deviation.max() < 20 * parity.TOLERANCE['gradient'], f'{label}: {names[int(deviation.argmax())]}'
