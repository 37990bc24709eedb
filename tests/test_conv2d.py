# SPDX-License-Identifier: Apache-2.0
"""Convolutions with gradients of any order against torch's own."""

import pytest
import torch
from torch.nn import functional

from torch_utils.ops import conv2d as module
from torch_utils.ops.conv2d import conv2d, conv_transpose2d

# stride, padding, groups, height and width, side of the kernel. With stride 2 some rows of the picture are not read.
CASES = [
    (1, (0, 0), 1, (5, 6), 3), (1, (1, 1), 1, (5, 6), 3), (1, (0, 0), 1, (4, 3), 1), (2, (0, 0), 1, (7, 8), 3),
    (2, (1, 1), 1, (6, 7), 3), (2, (1, 0), 2, (6, 6), 3), (1, (1, 1), 2, (4, 4), 3), (3, (2, 1), 1, (8, 9), 2),
]
OURS = {False: conv2d, True: conv_transpose2d}
TORCHS = {False: functional.conv2d, True: functional.conv_transpose2d}


@pytest.fixture(autouse=True)
def on_the_cpu_too(monkeypatch):
    monkeypatch.setattr(module, '_DEVICE_TYPES', ['cpu', 'cuda'])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def inputs(case, is_transposed):
    stride, padding, groups, size, k = case
    x = draw(2, 4, *size)
    w = draw(4, 6 // groups, k, k, seed=1) if is_transposed else draw(6, 4 // groups, k, k, seed=1)
    return x, w, dict(stride=stride, padding=padding, groups=groups)


@pytest.mark.parametrize('is_transposed', [False, True])
@pytest.mark.parametrize('case', CASES, ids=str)
def test_result_and_gradients_of_two_orders_are_torchs(case, is_transposed):
    x, w, geometry = inputs(case, is_transposed)
    results = []
    for convolve in (OURS[is_transposed], TORCHS[is_transposed]):
        y = convolve(x, w, **geometry)
        first = torch.autograd.grad(y, [x, w], draw(*y.shape, seed=2), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, w])
        results.append([y, *first, *second])
    for actual, expected in zip(*results):
        assert actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('is_transposed', [False, True])
@pytest.mark.parametrize('case', CASES[3:5], ids=str)
def test_gradients_against_differences(case, is_transposed):
    x, w, geometry = inputs(case, is_transposed)
    x, w = x.detach()[:1, :2, :5, :5].requires_grad_(), w.detach()[:2, :2].requires_grad_()
    torch.autograd.gradcheck(lambda x, w: OURS[is_transposed](x, w, **geometry), (x, w))
    torch.autograd.gradgradcheck(lambda x, w: OURS[is_transposed](x, w, **geometry), (x, w))


def test_only_what_is_asked_for_is_differentiated():
    x, w, geometry = inputs(CASES[1], False)
    assert torch.autograd.grad(conv2d(x.detach(), w, **geometry).sum(), w)[0].shape == w.shape
    assert torch.autograd.grad(conv2d(x, w.detach(), **geometry).sum(), x)[0].shape == x.shape
    with torch.no_grad():
        assert conv2d(x, w, **geometry).grad_fn is None


def test_a_cpu_takes_torchs_gradients(monkeypatch):
    x, w, geometry = inputs(CASES[1], False)
    assert 'Convolution' in type(conv2d(x, w, **geometry).grad_fn).__name__
    ours = type(conv2d(x, w, **geometry).grad_fn)
    monkeypatch.undo()
    assert not isinstance(conv2d(x, w, **geometry).grad_fn, ours)


def test_no_pictures():
    x, w, geometry = inputs(CASES[4], False)
    y = conv2d(x[:0], w, **geometry)
    assert y.shape[0] == 0 and torch.autograd.grad(y.sum(), w)[0].abs().sum() == 0
