# SPDX-License-Identifier: Apache-2.0
"""Element-wise, resampling and convolution operations against the published implementation."""

import parity
import pytest
import torch
from parity import agrees

from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.modulated_conv2d import modulated_conv2d
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d


def leaf(array):
    return None if array is None else torch.from_numpy(array).requires_grad_(True)


def kwargs_of(case, *known):
    return {k: v for k, v in case.items() if k not in known}


def test_bias_act_with_first_and_second_gradients():
    info, a = parity.load('ops_bias_act')
    for case in info['cases']:
        i = case['i']
        x, b = leaf(a[f'x{i}']), leaf(a.get(f'b{i}'))
        dy = leaf(a[f'dy{i}'])
        y = bias_act(x, b, **kwargs_of(case, 'i', 'bias'))
        agrees('bias_act', y, a[f'y{i}'], 'op')
        inputs = [x] if b is None else [x, b]
        gradients = torch.autograd.grad(y, inputs, dy, create_graph=True)
        agrees('bias_act, first gradient', gradients[0], a[f'dx{i}'], 'op')
        if b is not None:
            agrees('bias_act, first gradient', gradients[1], a[f'db{i}'], 'op')
        second = torch.autograd.grad(
            (gradients[0] * torch.from_numpy(a[f'ddx{i}'])).sum(), [dy, *inputs], allow_unused=True
        )
        for name, value in zip(('d_dy', 'd_x', 'd_b'), second):
            value = torch.zeros(a[f'{name}{i}'].shape) if value is None else value
            agrees('bias_act, second gradient', value, a[f'{name}{i}'], 'op')


def test_activation_defaults():
    info, _ = parity.load('ops_bias_act')
    assert set(info['defaults']) == set(ACTIVATIONS)
    for name, default in info['defaults'].items():
        assert ACTIVATIONS[name].default_alpha == default['def_alpha']
        assert ACTIVATIONS[name].default_gain == pytest.approx(default['def_gain'])


def test_upfirdn2d_and_wrappers():
    info, a = parity.load('ops_upfirdn2d')
    for case in info['cases']:
        i = case['i']
        x = leaf(a[f'x{i}'])
        f = torch.from_numpy(a[f'f{i}']) if case['has_filter'] else None
        y = upfirdn2d(x, f, **kwargs_of(case, 'i', 'has_filter'))
        agrees('upfirdn2d', y, a[f'y{i}'], 'op')
        (dx,) = torch.autograd.grad(y, x, torch.from_numpy(a[f'dy{i}']))
        agrees('upfirdn2d, first gradient', dx, a[f'dx{i}'], 'op')
    x, f = torch.from_numpy(a['wrap_x']), torch.from_numpy(a['wrap_f'])
    agrees('filter2d', filter2d(x, f), a['filter2d'], 'op')
    agrees('filter2d', filter2d(x, torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])), a['filter2d_1d'], 'op')
    agrees('upsample2d', upsample2d(x, f), a['upsample2d'], 'op')
    agrees('downsample2d', downsample2d(x, f), a['downsample2d'], 'op')


def test_setup_filter():
    _, a = parity.load('ops_upfirdn2d')
    agrees('setup_filter', setup_filter([1, 3, 3, 1]), a['wrap_f'], 'op')


def test_filtered_lrelu():
    info, a = parity.load('ops_filtered_lrelu')
    for case in info['cases']:
        i = case['i']
        x, b = leaf(a[f'x{i}']), leaf(a.get(f'b{i}'))
        fu, fd = (torch.from_numpy(a[f'{n}{i}']) if case[n] else None for n in ('fu', 'fd'))
        y = filtered_lrelu(x, fu, fd, b, **kwargs_of(case, 'i', 'bias', 'fu', 'fd'))
        agrees('filtered_lrelu', y, a[f'y{i}'], 'op')
        gradients = torch.autograd.grad(y, [x] if b is None else [x, b], torch.from_numpy(a[f'dy{i}']))
        agrees('filtered_lrelu, first gradient', gradients[0], a[f'dx{i}'], 'op')
        if b is not None:
            agrees('filtered_lrelu, first gradient', gradients[1], a[f'db{i}'], 'op')


def test_conv2d_resample():
    info, a = parity.load('ops_conv')
    for case in info['cases']:
        i = case['i']
        x, w = leaf(a[f'x{i}']), leaf(a[f'w{i}'])
        y = conv2d_resample(x, w, torch.from_numpy(a['f']), **kwargs_of(case, 'i', 'k'))
        agrees('conv2d_resample', y, a[f'y{i}'], 'op')
        dx, dw = torch.autograd.grad(y, [x, w], torch.from_numpy(a[f'dy{i}']))
        agrees('conv2d_resample, first gradient', dx, a[f'dx{i}'], 'op')
        agrees('conv2d_resample, first gradient', dw, a[f'dw{i}'], 'op')


def test_modulated_conv2d():
    info, a = parity.load('ops_conv')
    for case in info['modconv']:
        j = case['j']
        x, w, s = leaf(a['mc_x']), leaf(a['mc_w']), leaf(a['mc_s'])
        noise = torch.from_numpy(a[f'mc_noise_up{case["up"]}']) if case['noise'] else None
        y = modulated_conv2d(
            x, w, s, noise, resample_filter=torch.from_numpy(a['f']), **kwargs_of(case, 'j', 'noise')
        )
        agrees('modulated_conv2d', y, a[f'mc_y{j}'], 'op')
        gradients = torch.autograd.grad(y, [x, w, s], torch.from_numpy(a[f'mc_dy{j}']))
        for name, value in zip(('dx', 'dw', 'ds'), gradients):
            agrees('modulated_conv2d, first gradient', value, a[f'mc_{name}{j}'], 'op')
