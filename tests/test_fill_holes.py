# SPDX-License-Identifier: Apache-2.0
"""The mouth fill: hand-worked masks, mazes, agreement of the implementations and with the published one."""

import numpy as np
import parity
import pytest
import torch
from scipy import ndimage

from torch_utils.custom_ops import plugin, plugin_problem
from torch_utils.ops.fill_holes import OPAQUE, fill_holes


@pytest.fixture(params=['ref', 'cpp'])
def impl(request):
    if request.param == 'cpp' and plugin_problem('fill_holes') is not None:
        pytest.skip(plugin_problem('fill_holes'))
    return request.param


def mask(*rows):
    """A picture of a mask as a batch of one: '#' is 1, a digit is tenths, a space is 0."""
    values = {'#': 1.0, ' ': 0.0, **{str(digit): digit / 10 for digit in range(10)}}
    return torch.tensor([[[[values[character] for character in row] for row in rows]]])


def by_components(alpha):
    """The rule by connected components, in float32 like the ops."""
    filled = np.ones_like(alpha)
    for image, out in zip(alpha[:, 0], filled[:, 0]):
        labels, _ = ndimage.label(image <= np.float32(OPAQUE))
        border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        reached = np.isin(labels, border if labels[0, 0] == 0 else labels[0, 0]) & (labels > 0)
        out[reached] = image[reached]
    return filled


def spiral(size):
    """A corridor of one pixel that winds from the corner to the middle, and how far it goes."""
    walls = np.ones((size, size), dtype=np.float32)
    position, direction = np.array([0, 0]), np.array([0, 1])
    walls[0, 0] = 0
    while True:
        ahead, beyond = position + direction, position + 2 * direction
        is_free = (ahead >= 0).all() and (ahead < size).all() and walls[tuple(ahead)] == 1
        if is_free and (beyond >= 0).all() and (beyond < size).all():
            is_free = walls[tuple(beyond)] == 1
        if not is_free:
            direction = np.array([direction[1], -direction[0]])
            ahead, beyond = position + direction, position + 2 * direction
            if walls[tuple(ahead)] == 0 or walls[tuple(beyond)] == 0:
                return torch.from_numpy(walls)[None, None]
        position = ahead
        walls[tuple(position)] = 0


def test_holes_are_closed_and_the_outside_is_kept(impl):
    alpha = mask('  3    ',
                 ' ####  ',
                 ' # 5## ',
                 ' ##  # ',
                 '  #### ')
    expected = mask('  3    ',
                    ' ####  ',
                    ' ##### ',
                    ' ##### ',
                    '  #### ')
    assert torch.equal(fill_holes(alpha, impl), expected)


def test_the_flood_does_not_pass_diagonally(impl):
    alpha = mask('  # ',
                 ' # #',
                 '# # ',
                 ' #  ')
    expected = mask('  ##',
                    ' ###',
                    '####',
                    '####')
    assert torch.equal(fill_holes(alpha, impl), expected)


def test_a_covered_corner_seeds_from_the_whole_border(impl):
    alpha = mask('###  ',
                 '# #2 ',
                 '#### ',
                 '5    ')
    expected = mask('###  ',
                    '###2 ',
                    '#### ',
                    '5    ')
    assert torch.equal(fill_holes(alpha, impl), expected)
    assert torch.equal(fill_holes(torch.ones(1, 1, 3, 4), impl), torch.ones(1, 1, 3, 4))


def test_the_threshold_is_inclusive_in_single_precision(impl):
    opaque = torch.tensor(254, dtype=torch.float32) / 255
    above = torch.nextafter(opaque, torch.tensor(2.0))
    assert torch.equal(fill_holes(opaque.view(1, 1, 1, 1), impl), opaque.view(1, 1, 1, 1))
    assert fill_holes(above.view(1, 1, 1, 1), impl).item() == 1
    assert fill_holes(torch.full((1, 1, 1, 1), torch.nan), impl).item() == 1


def test_the_flood_follows_a_spiral_to_its_end(impl):
    alpha = spiral(61)
    assert (alpha == 0).sum() > 61 * 61 // 2 - 61
    assert torch.equal(fill_holes(alpha, impl), alpha)
    blocked = alpha.clone()
    blocked[..., 0, 5] = 1
    expected = torch.ones_like(alpha)
    expected[..., 0, :5] = 0
    assert torch.equal(fill_holes(blocked, impl), expected)


def test_a_serpentine_in_either_direction(impl):
    alpha = torch.zeros(1, 1, 41, 40)
    alpha[..., 1::4, :-1] = 1
    alpha[..., 3::4, 1:] = 1
    assert torch.equal(fill_holes(alpha, impl), alpha)
    assert torch.equal(fill_holes(alpha.mT, impl), alpha.mT)


@pytest.mark.parametrize('batch, height, width', [(1, 1, 1), (2, 1, 9), (2, 9, 1), (3, 2, 2), (5, 17, 23), (2, 64, 61)])
@pytest.mark.parametrize('density', [0.2, 0.4, 0.55, 0.9])
def test_random_masks_agree_with_connected_components(impl, batch, height, width, density):
    rng = np.random.default_rng(int(1000 * density) + height)
    values = rng.choice(np.float32([0, 0.5, 254 / 255]), (batch, 1, height, width))
    alpha = np.where(rng.random(values.shape) < density, np.float32(1), values)
    assert np.array_equal(fill_holes(torch.from_numpy(alpha), impl).numpy(), by_components(alpha))


def test_images_of_a_batch_do_not_meet(impl):
    alpha = (torch.rand(7, 1, 19, 21, generator=torch.Generator().manual_seed(0)) < 0.45).float()
    alone = torch.cat([fill_holes(image[None], impl) for image in alpha])
    assert torch.equal(fill_holes(alpha, impl), alone)


@pytest.mark.parametrize('shape', [(0, 1, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0)])
def test_empty(impl, shape):
    assert fill_holes(torch.zeros(shape), impl).shape == shape


def test_the_argument_may_be_strided_and_is_not_changed(impl):
    storage = torch.rand(4, 30, 2, 26, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    alpha = storage.permute(0, 2, 3, 1)[:, :1, ::2, 1:].requires_grad_()
    before = alpha.detach().clone(memory_format=torch.contiguous_format)
    filled = fill_holes(alpha, impl)
    assert np.array_equal(filled.numpy(), by_components(before.numpy()))
    assert filled.is_contiguous() and not filled.requires_grad
    assert torch.equal(alpha, before) and filled.data_ptr() != alpha.data_ptr()


def test_default_is_one_of_the_implementations():
    alpha = mask('   ', ' # ', '   ')
    assert torch.equal(fill_holes(alpha), alpha)


def test_bad_calls():
    with pytest.raises(ValueError, match=r'^alpha: expected \[\*, 1, \*, \*\], got \[2, 3, 4\]$'):
        fill_holes(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match='^alpha: expected torch.float32, got torch.float16$'):
        fill_holes(torch.zeros(1, 1, 2, 2, dtype=torch.float16))
    with pytest.raises(ValueError, match="^fill_holes: expected impl to be one of 'ref', 'cuda', 'cpp' or None, got "):
        fill_holes(torch.zeros(1, 1, 2, 2), 'opencv')
    with pytest.raises(RuntimeError, match="^fill_holes: impl 'cpp' cannot be used: it takes CPU tensors, got meta$"):
        fill_holes(torch.zeros(1, 1, 2, 2, device='meta'), 'cpp')


@pytest.mark.skipif(plugin_problem('fill_holes') is not None, reason='the plugin cannot be built')
def test_the_compiled_module_checks_for_itself():
    for bad in (torch.zeros(1, 2, 3, 3), torch.zeros(3, 3), torch.zeros(1, 1, 0, 3), torch.zeros(1, 1, 3, 3).double()):
        with pytest.raises(RuntimeError, match='^alpha: expected'):
            plugin('fill_holes').forward(bad, OPAQUE)


@pytest.mark.gpu
def test_the_reference_on_a_gpu_equals_the_cpu():
    alpha = (torch.rand(3, 1, 67, 45, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    assert torch.equal(fill_holes(alpha.cuda(), 'ref').cpu(), fill_holes(alpha, 'ref'))


@pytest.mark.parametrize('mesh', ['demo', 'deformed'])
def test_published_masks(impl, mesh):
    _, arrays = parity.load(f'raster_{mesh}_img')
    alpha, expected = (torch.from_numpy(np.stack([arrays[f'alpha_{step}{view}'] for view in range(4)]))[:, None]
                       for step in ('eye', 'fill'))
    parity.agrees('mouth fill', fill_holes(alpha, impl), expected, 'exact')
