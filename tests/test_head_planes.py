# SPDX-License-Identifier: Apache-2.0
"""Sampling of the texture by views, with its gradient: on a GPU, else in Triton's interpreter, against grid_sample."""

import pytest
import torch
from torch.nn.functional import grid_sample

from torch_utils.ops import head_planes

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize('channels, size, views', [
    (8, (9, 7), (2, 5, 6)), (32, (16, 16), (4, 3, 11)), (1, (4, 4), (1, 1, 1)),
])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_views_and_their_gradient(channels, size, views, memory_format):
    texture = draw(2, channels, *size).contiguous(memory_format=memory_format).requires_grad_()
    uv = draw(2, *views, 2, seed=1) * 0.8  # Some points lie outside.
    k, h, w = views
    seen = grid_sample(texture, uv.reshape(2, k * h, w, 2), padding_mode='zeros', align_corners=False)
    expected = seen.reshape(2, -1, k, h, w).transpose(1, 2)
    actual = head_planes.sample_views(texture, uv)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    cotangent = draw(*expected.shape, seed=2)
    gradients = [torch.autograd.grad(out, texture, cotangent)[0] for out in (actual, expected)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)
    front = head_planes.sample_front(texture, uv, torch.float16)
    assert front.dtype == torch.float16 and front.stride(1) == 1
    assert torch.allclose(front.float(), expected[:, 0], rtol=2e-3, atol=2e-3)


def test_what_the_kernels_refuse():
    assert head_planes.problem(draw(1, 6, 4, 4)) == 'channels: expected a power of two, got 6'
    with pytest.raises(ValueError, match='^uv: expected'):
        head_planes.sample_views(draw(2, 4, 4, 4), draw(1, 1, 3, 3, 2))
