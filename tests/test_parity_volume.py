# SPDX-License-Identifier: Apache-2.0
"""Rays, planes, marching and importance sampling against the published implementation."""

import parity
import pytest
import torch
from parity import agrees, fill, rnd

from geometry import cameras
from legacy import _plane_axes, _sampling_config
from training.generator import Decoder
from training.volume import march, rays, samples
from training.volume.render import SamplingConfig, render_rays, sample_planes


@pytest.fixture(scope='module')
def rays_and_planes():
    _, a = parity.load('volume_rays_planes')
    return {name: torch.from_numpy(array) for name, array in a.items()}


@pytest.fixture(scope='module')
def volume():
    info, a = parity.load('volume_renderer')
    return info, {name: torch.from_numpy(array) for name, array in a.items()}


def decoder(info, table='decoder_state', lr_multiplier=1.0):
    return fill(Decoder(32, 64, lr_multiplier), info[table], info['seed']).eval()


def test_rays(rays_and_planes):
    a = rays_and_planes
    origins, directions = cameras.camera_rays(a['cam2world'], a['intrinsics'], 12)
    agrees('rays', origins, a['ray_origins'], 'op')
    agrees('rays', directions, a['ray_directions'], 'op')
    near, far = rays.box_limits(origins, directions, 1.0)
    agrees('box limits', near, a['box_near'], 'op')
    agrees('box limits', far, a['box_far'], 'op')


def test_plane_lookup(rays_and_planes):
    a = rays_and_planes
    axes = _plane_axes(a['plane_axes'])
    assert axes == ((0, 1), (0, 2), (2, 1))
    for box_warp, name in ((1, 'sampled'), (1.6, 'sampled_bw1.6')):
        actual = sample_planes(a['planes_small'], a['points'], box_warp, axes)
        agrees('plane lookup', actual, a[name].mean(dim=1), 'op')


def test_decoder(volume):
    info, a = volume
    for table, multiplier, name in (('decoder_state', 1.0, 'dec'), ('decoder_state_lr05', 0.5, 'dec5')):
        rgb, sigma = decoder(info, table, multiplier)(a['dec_feat'].mean(dim=1))
        agrees('decoder', rgb, a[f'{name}_rgb'], 'network')
        agrees('decoder', sigma, a[f'{name}_sigma'], 'network')


def test_marching(volume):
    _, a = volume
    lowest, highest = a['m_dep'].amin(), a['m_dep'].amax()
    out = march.march(a['m_col'], a['m_den'], a['m_dep'])
    agrees('marching', out.features, a['m_rgb'], 'op')
    agrees('marching', march.clamp_depth(out.depth, lowest, highest), a['m_depth'], 'op')
    agrees('marching', out.weights, a['m_weights'], 'op')
    white = march.march(a['m_col'], a['m_den'], a['m_dep'], white_back=True)
    agrees('marching', white.features, a['m_rgb_white'], 'op')
    empty = march.march(a['m_col'], a['m_den_empty'], a['m_dep'])
    agrees('marching', empty.features, a['m_rgb_empty'], 'op')
    agrees('marching', march.clamp_depth(empty.depth, lowest, highest), a['m_depth_empty'], 'op')


def test_sampling(volume):
    info, a = volume
    n, m, s = 2, a['ray_origins'].shape[1], 48
    offsets = parity.uniform_seq([n, m, s, 1])
    for name, disparity in (('strat', False), ('strat_disp', True)):
        depths = samples.stratified_depths(2.25, 3.3, s, offsets, disparity)
        agrees('stratified depths', depths[:, ::17], a[name], 'op')
    draws = parity.uniform_seq([7, 13])
    actual = samples.sample_histogram(a['pdf_bins'], a['pdf_weights'], draws)
    agrees('histogram sampling', actual, a['pdf_samples'], 'op')
    even = torch.linspace(0, 1, 13).expand(7, 13)
    actual = samples.sample_histogram(a['pdf_bins'], a['pdf_weights'], even)
    agrees('histogram sampling', actual, a['pdf_samples_det'], 'op')
    fine = samples.importance_depths(a['m_dep'], a['m_weights_empty'], parity.uniform_seq([12, 9]))
    agrees('importance depths', fine, a['imp'], 'op')


@pytest.mark.parametrize('tag', ['ffhq', 'white_auto', 'noimp', 'disp', 'bw16', 'dnoise'])
def test_renderer(volume, tag):
    info, a = volume
    config = sampling_config(info, tag)
    planes = rnd('vr/planes32', (2, 3, 32, 32, 32), info['seed']).requires_grad_(True)
    network = decoder(info)
    with parity.sequence_draws():
        out = render_rays(planes, network, a['ray_origins'], a['ray_directions'], config, parity.uniform_seq)
    agrees('volume renderer', out.features, a[f'{tag}_rgb'], 'network')
    agrees('volume renderer', out.depth, a[f'{tag}_depth'], 'network')
    agrees('volume renderer', out.weight_sum, a[f'{tag}_wsum'], 'network')
    if tag == 'ffhq':
        dy, dz = rnd('vr/dy', out.features.shape, info['seed']), rnd('vr/dz', out.depth.shape, info['seed'])
        ((out.features * dy).sum() + (out.depth * dz).sum()).backward()
        agrees('volume renderer, gradients', planes.grad, a['ffhq_dplanes'], 'gradient')
        for i, parameter in enumerate(network.parameters()):
            agrees('volume renderer, gradients', parameter.grad, a[f'ffhq_ddec{i}'], 'gradient')


def test_normals(volume):
    info, a = volume
    planes = rnd('vr/planes32', (2, 3, 32, 32, 32), info['seed'])
    network, rays_ = decoder(info), (a['ray_origins'], a['ray_directions'])
    config = sampling_config(info, 'ffhq')
    out = render_rays(planes, network, *rays_, config, parity.uniform_seq, with_normals=True)
    agrees('normals', out.features, a['normal_rgb'], 'network')
    agrees('normals', out.normals, a['normal_normal'], 'gradient')


def sampling_config(info, tag) -> SamplingConfig:
    overrides = next(run['overrides'] for run in info['runs'] if run['tag'] == tag)
    axes = torch.eye(3)[torch.tensor([[0, 1, 2], [0, 2, 1], [2, 1, 0]])]
    return _sampling_config({**info['rendering_kwargs'], **overrides}, axes)
