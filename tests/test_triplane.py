# SPDX-License-Identifier: Apache-2.0
"""The fused triplane kernels against `training.volume`: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from torch_utils.ops import triplane
from training.config import EG3D_PLANE_AXES, NEXT3D_PLANE_AXES
from training.generator import Decoder
from training.volume.render import SamplingConfig, query, render_rays

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TOLERANCE = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # Relative to the norm of the reference.


def deviation(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def make_field(channels=16, hidden=32, size=(13, 9), dtype=torch.float32, seed=0):
    """Planes [2, 3, C, H, W] that a decoder turns into densities on both sides of transparency."""
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randn(2, 3, channels, *size, generator=generator) * 3
    torch.manual_seed(seed)
    decoder = Decoder(channels, hidden, 1.0)
    for parameter in decoder.parameters():
        parameter.data.normal_(std=1.5, generator=generator)
    decoder.net[2].bias.data[0] = 1.0
    return planes.to(DEVICE, dtype).requires_grad_(), decoder.to(DEVICE)


def make_rays(count=5, seed=0):
    """Rays [2, count, 3] from in front of the volume; some pass it by."""
    generator = torch.Generator().manual_seed(seed)
    origins = torch.randn(2, count, 3, generator=generator) * 0.1 + torch.tensor([0, 0, 1.0])
    directions = torch.randn(2, count, 3, generator=generator) * 0.3 + torch.tensor([0, 0, -1.0])
    return origins.to(DEVICE), torch.nn.functional.normalize(directions, dim=-1).to(DEVICE)


def draws(shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def both(planes, decoder, rays, config, jitter=draws):
    """Return [features, depth, weight_sum] of the kernels and of the reference in float32."""
    return [
        list(render_rays(p, decoder, *rays, config, jitter, impl=impl)[:3])
        for p, impl in ((planes, 'triton'), (planes.float(), 'ref'))
    ]


@pytest.mark.parametrize('options', [
    {}, dict(white_back=True), dict(num_importance=0), dict(num_depths=4, num_importance=1),
    dict(num_depths=17, num_importance=33), dict(plane_axes=EG3D_PLANE_AXES), dict(box_warp=0.7),
    dict(near='auto', far='auto'), dict(use_disparity=True),
], ids=str)
def test_rays_and_their_gradients(options):
    config = SamplingConfig(**dict(num_depths=12, num_importance=10, near=0.2, far=1.8) | options)
    planes, decoder = make_field()
    actual, expected = both(planes, decoder, make_rays(), config)
    for a, e in zip(actual, expected):
        assert deviation(a, e) < 5e-6
    assert 0.1 < expected[2].mean() < 0.99  # Neither empty nor opaque.
    cotangents = [torch.randn(e.shape, generator=torch.Generator().manual_seed(i)).to(DEVICE)
                  for i, e in enumerate(expected)]
    parameters = [planes, *decoder.parameters()]
    gradients = [torch.autograd.grad(out, parameters, cotangents) for out in (actual, expected)]
    for a, e in zip(*gradients):
        assert a.shape == e.shape and deviation(a, e) < 1e-5


@pytest.mark.parametrize('channels, hidden', [(16, 16), (32, 64), (64, 128)])
def test_widths(channels, hidden):
    config = SamplingConfig(num_depths=8, num_importance=8, near=0.2, far=1.8)
    planes, decoder = make_field(channels, hidden, size=(8, 8))
    for a, e in zip(*both(planes, decoder, make_rays(3), config)):
        assert deviation(a, e) < 5e-6


@pytest.mark.parametrize('dtype', [
    torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # The interpreter multiplies its bits.
])
def test_half_precision(dtype):
    config = SamplingConfig(num_depths=12, num_importance=10, near=0.2, far=1.8)
    planes, decoder = make_field(dtype=dtype)
    actual, expected = both(planes, decoder, make_rays(), config)
    assert all(a.dtype == torch.float32 for a in actual)
    for a, e in zip(actual, expected):
        assert deviation(a, e) < TOLERANCE[dtype]
    gradients = [torch.autograd.grad(out[0].square().sum(), planes)[0] for out in (actual, expected)]
    assert gradients[0].dtype == dtype and deviation(*gradients) < 4 * TOLERANCE[dtype]


LAYOUTS = {
    'channels last': lambda p: p.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    'planes of one channels-last picture': lambda p: p.flatten(1, 2).contiguous(
        memory_format=torch.channels_last).unflatten(1, (3, -1)),
    'part of a larger one': lambda p: torch.nn.functional.pad(p, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    'rows and columns exchanged': lambda p: p.mT.contiguous().mT,
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_planes_of_any_layout(layout):
    planes, decoder = make_field()
    config = SamplingConfig(num_depths=6, num_importance=6, near=0.2, far=1.8)
    other = LAYOUTS[layout](planes.detach()).requires_grad_()
    assert torch.equal(other, planes)
    outputs = [render_rays(p, decoder, *make_rays(3), config, draws, impl='triton').features for p in (planes, other)]
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(out.sum(), p)[0] for out, p in zip(outputs, (planes, other))]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('count', [0, 1, 130])
def test_query_and_its_gradients(count):
    planes, decoder = make_field()
    config = SamplingConfig(plane_axes=NEXT3D_PLANE_AXES)
    points = ((torch.rand(2, count, 3, generator=torch.Generator().manual_seed(1)) - 0.5) * 1.3).to(DEVICE)
    actual, expected = (query(planes, decoder, points, config, impl=impl) for impl in ('triton', 'ref'))
    assert [x.shape for x in actual.values()] == [x.shape for x in expected.values()] and list(actual) == list(expected)
    if count == 0:
        return
    cotangents = [torch.randn_like(x) for x in expected.values()]
    parameters = [planes, *decoder.parameters()]
    gradients = [torch.autograd.grad([*out.values()], parameters, cotangents) for out in (actual, expected)]
    for a, e in [*zip(actual.values(), expected.values()), *zip(*gradients)]:
        assert deviation(a, e) < 5e-6
    only = query(planes, decoder, points, config, with_rgb=False, impl='triton')
    assert list(only) == ['sigma'] and torch.equal(only['sigma'], actual['sigma'])
    lone, reference = (query(planes, decoder, points, config, impl=impl)['sigma'] for impl in ('triton', 'ref'))
    assert deviation(*(torch.autograd.grad(s.sum(), planes)[0] for s in (lone, reference))) < 5e-6


def test_points_at_and_beyond_the_border():
    """Zero padding: the outermost half pixel fades, everything beyond is the decoder of zeros; not a number too."""
    planes, decoder = make_field()
    points = torch.tensor([[0.5, 0, 0], [-0.5, 0.5, 0.5], [0.499, 0, 0], [0.6, 9, -9], [1e30, 0, 0]])
    points = points[None].expand(2, -1, -1).to(DEVICE)
    actual, expected = (query(planes, decoder, points, SamplingConfig(), impl=impl) for impl in ('triton', 'ref'))
    for name in actual:
        assert deviation(actual[name], expected[name]) < 5e-6
    for wild in (float('nan'), float('inf')):  # Nothing outside is read.
        query(planes, decoder, points * wild, SamplingConfig(), impl='triton')


def test_empty_rays():
    planes, decoder = make_field()
    origins, directions = (x[:, :0] for x in make_rays())
    out = triplane.render(triplane.Field(planes, decoder.dense_weights(), 2.0, NEXT3D_PLANE_AXES), origins, directions,
                          torch.zeros(2, 0, 8, device=DEVICE), torch.zeros(2, 0, 8, device=DEVICE))[0]
    assert out.features.shape == (2, 0, 16)
    assert torch.autograd.grad(out.features.sum(), planes)[0].abs().sum() == 0


def test_no_second_gradient():
    planes, decoder = make_field()
    out = query(planes, decoder, torch.zeros(2, 3, 3, device=DEVICE), SamplingConfig(), impl='triton')['sigma']
    gradient, = torch.autograd.grad(out.square().sum(), planes, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.square().sum().backward()


class Plain(torch.nn.Module):
    """A decoder of another form."""

    def forward(self, features):
        """Return colours and density."""
        return features, features[..., :1]


REFUSALS = {
    'hidden units: expected a power of two from 16 to 128, got 24': lambda: make_field(hidden=24),
    'channels: expected a power of two from 16 to 64, got 8': lambda: make_field(channels=8),
    'the decoder has no dense_weights': lambda: (make_field()[0], Plain()),
}


@pytest.mark.parametrize('message', REFUSALS)
def test_what_the_kernels_refuse(message):
    planes, decoder = REFUSALS[message]()
    with pytest.raises(RuntimeError, match=f"^volume: impl 'triton' cannot be used: {message}$"):
        query(planes, decoder, torch.zeros(2, 3, 3, device=DEVICE), SamplingConfig(), impl='triton')
    query(planes, decoder, torch.zeros(2, 3, 3, device=DEVICE), SamplingConfig())  # The reference serves.


def test_more_refusals(monkeypatch):
    planes, decoder = make_field()
    rays = make_rays()
    for message, config, more in (
        ('samples: expected at most 256 a ray, got 300', SamplingConfig(num_depths=200, num_importance=100), {}),
        ('it gives no normals and adds no noise', SamplingConfig(density_noise=1.0), {}),
        ('it gives no normals and adds no noise', SamplingConfig(), dict(with_normals=True)),
    ):
        with pytest.raises(RuntimeError, match=message):
            render_rays(planes, decoder, *rays, config, impl='triton', **more)
    with pytest.raises(RuntimeError, match='it gives no gradient to points'):
        points = torch.zeros(2, 3, 3, device=DEVICE, requires_grad=True)
        query(planes, decoder, points, SamplingConfig(), impl='triton')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    field = triplane.Field(planes.cpu(), decoder.cpu().dense_weights(), 2.0, NEXT3D_PLANE_AXES)
    assert triplane.problem(field) == 'it takes CUDA tensors, got cpu'


def test_a_cpu_takes_the_reference(monkeypatch):
    """Even where the interpreter could run: it is a thousand times slower."""
    planes, decoder = make_field()
    monkeypatch.setattr(triplane, 'query', None)
    query(planes.cpu(), decoder.cpu(), torch.zeros(2, 3, 3), SamplingConfig())


@pytest.mark.gpu
def test_cuda_graph_and_repeats():
    planes, decoder = make_field(32, 64, (64, 64))
    rays, config = make_rays(4096), SamplingConfig(near=0.2, far=1.8)
    with torch.no_grad():
        expected = render_rays(planes, decoder, *rays, config, 'center')
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = render_rays(planes, decoder, *rays, config, 'center')
        graph.replay()
    assert torch.equal(captured.features, expected.features) and torch.equal(captured.depth, expected.depth)


@pytest.mark.gpu
def test_full_size_in_both_precisions():
    """The published size against the reference in float32: 64 x 64 rays, 48 + 48 samples, planes of 256."""
    planes, decoder = make_field(32, 64, (256, 256))
    rays, config = make_rays(4096), SamplingConfig(near=0.2, far=1.8)
    expected = render_rays(planes, decoder, *rays, config, draws, impl='ref').features
    assert deviation(render_rays(planes, decoder, *rays, config, draws).features, expected) < 1e-5
    half = planes.detach().half()
    reference = render_rays(half.float(), decoder, *rays, config, draws, impl='ref').features
    assert deviation(render_rays(half, decoder, *rays, config, draws).features, reference) < 3e-3
