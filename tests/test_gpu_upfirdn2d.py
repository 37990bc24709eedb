# SPDX-License-Identifier: Apache-2.0
"""upfirdn2d's CUDA kernels against the reference in double precision: values, gradients, layouts, odd sizes, graphs."""

import itertools

import pytest
import torch

from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

pytestmark = pytest.mark.gpu
DEVICE = 'cuda'

# Largest error relative to the largest value: a few roundings of sums of some ten terms, which are fp32 for the half
# types too. Those round the result once, by at most 2^-11 (fp16) and 2^-8 (bf16) of it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}

BINOMIAL = setup_filter([1, 3, 3, 1])
UNEVEN = torch.arange(16.0).reshape(4, 4).sub(3).div(40)  # Shows a 4x4 filter that is turned or transposed.
OBLONG = torch.tensor([[1.0, 2, 3, 4], [0, -1, 2, 5]]) / 8
SEPARABLE = setup_filter([1, 2, 5, 0, -1], separable=True)
LONG = setup_filter(range(1, 13))
CASES = {
    'identity': dict(f=None),
    'no filter': dict(f=None, up=(2, 3), down=(3, 2), padding=(1, 0, -1, 2), gain=1.5),
    'same size': dict(f=BINOMIAL, padding=(2, 1, 2, 1)),
    'same size, cropped': dict(f=UNEVEN, padding=(-1, 3, 3, -1)),
    'same size, turned': dict(f=UNEVEN, padding=(1, 4, 2, 5), flip_filter=True, gain=0.7),
    'transposed memory': dict(f=UNEVEN.t(), padding=2),
    'up': dict(f=BINOMIAL, up=2, padding=(2, 1, 2, 1), gain=4.0),
    'up, odd before': dict(f=UNEVEN, up=2, padding=(3, 0, 1, 4), flip_filter=True),
    'up, cropped': dict(f=UNEVEN, up=2, padding=(-1, -2, -2, 3), gain=4.0),
    'down': dict(f=BINOMIAL, down=2, padding=(2, 1, 2, 1)),
    'down, lopsided': dict(f=UNEVEN, down=2, padding=(4, -1, 1, 2)),
    'up and down': dict(f=UNEVEN, up=2, down=2, padding=3),
    'one axis': dict(f=UNEVEN, up=(2, 1), down=(1, 2), padding=2),
    'factors by axis': dict(f=OBLONG, up=(3, 2), down=(2, 3), padding=(0, 2, 3, 1), flip_filter=True),
    'separable': dict(f=SEPARABLE, up=(2, 1), down=(1, 2), padding=(4, 0, -1, 6), gain=3.0),
    'long': dict(f=LONG, up=2, padding=(9, 5, 6, 8), flip_filter=True),
}
# Channels: none, odd, and whole vectors of 16 bytes; heights and widths about those of strips and blocks.
SIZES = [(2, 3, 5, 4), (1, 16, 9, 7), (3, 8, 18, 35), (1, 40, 33, 20), (1, 1, 1, 1), (0, 3, 4, 4), (2, 5, 1, 70)]


def misaligned(x):
    """The same values as channels_last, one number off the alignment that memory is allocated with."""
    n, c, h, w = x.shape
    moved = x.new_empty(x.numel() + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    return moved.copy_(x)


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'misaligned': misaligned,
    'cut out': lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
}


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def on_device(case):
    return case | {'f': None if case['f'] is None else case['f'].to(DEVICE)}


def assert_close(actual, expected, dtype, what):
    assert actual.dtype == dtype and actual.shape == expected.shape, what
    if expected.numel() > 0:
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= TOLERANCE[dtype], f'{what}: {error:.2e}'


def with_gradients(x, cotangent, direction, case, impl):
    """Return the result, its gradient at the cotangent, and the gradient of that with respect to the cotangent."""
    x, cotangent = x.detach().requires_grad_(True), cotangent.detach().requires_grad_(True)
    y = upfirdn2d(x, **case, impl=impl)
    (first,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    (second,) = torch.autograd.grad(first, cotangent, direction)
    return y.detach(), first.detach(), second


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_equal_the_reference(name, dtype):
    torch.manual_seed(0)
    case = on_device(CASES[name])
    pads = case.get('padding', 0)
    for size, layout in itertools.product(SIZES, LAYOUTS):
        if min(size[2:]) < 4 and min([pads] if isinstance(pads, int) else pads) < 0:
            continue  # Nothing would be left.
        x, direction = LAYOUTS[layout](draw(*size, dtype=dtype)), draw(*size, dtype=dtype)
        y = upfirdn2d(x, **case, impl='cuda')
        cotangent = LAYOUTS[layout](draw(*y.shape, dtype=dtype))
        actual = with_gradients(x, cotangent, direction, case, 'cuda')
        if x.numel() == 0:
            assert all(tensor.numel() == 0 for tensor in (y, *actual))
            continue
        assert torch.equal(y, actual[0])  # With and without a gradient to keep.
        expected = with_gradients(x.double(), cotangent.double(), direction.double(), case, 'ref')
        for part, a, e in zip(('value', 'first gradient', 'second gradient'), actual, expected):
            assert_close(a, e, dtype, f'{part}, {size}, {layout}')


@pytest.mark.parametrize('batch', [2, 4])  # The 4x4 kernel makes strips of 8 and of 16 steps.
@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('name', ['same size, turned', 'up, odd before', 'up', 'down, lopsided'])
def test_large_pictures(name, layout, batch):
    torch.manual_seed(0)
    x, case = LAYOUTS[layout](draw(batch, 256, 260, 131, dtype=torch.float16)), on_device(CASES[name])
    actual, expected = upfirdn2d(x, **case, impl='cuda'), upfirdn2d(x.double(), **case, impl='ref')
    assert_close(actual, expected, torch.float16, layout)


@pytest.mark.parametrize('name', ['up', 'down', 'same size', 'long', 'identity'])
def test_layout_is_kept(name):
    x, case = draw(2, 16, 9, 7), on_device(CASES[name])
    assert upfirdn2d(x, **case, impl='cuda').is_contiguous()
    for tensor in (x.contiguous(memory_format=torch.channels_last), misaligned(x)):
        assert upfirdn2d(tensor, **case, impl='cuda').is_contiguous(memory_format=torch.channels_last)
    assert upfirdn2d(x.transpose(2, 3), **case, impl='cuda').is_contiguous()


@pytest.mark.parametrize('wrapper', [filter2d, upsample2d, downsample2d])
def test_wrappers_pass_the_implementation_on(wrapper):
    x, f = draw(2, 4, 10, 6), BINOMIAL.to(DEVICE)
    assert_close(wrapper(x, f, impl='cuda'), wrapper(x.double(), f, impl='ref'), torch.float32, wrapper.__name__)
    assert torch.equal(wrapper(x, f), wrapper(x, f, impl='cuda'))  # The default on this device.


def test_empty_batches_and_empty_pictures():
    f = BINOMIAL.to(DEVICE)
    assert upfirdn2d(draw(0, 3, 4, 4), f, up=2, padding=2, impl='cuda').shape == (0, 3, 9, 9)
    assert upfirdn2d(draw(2, 0, 4, 4), f, padding=2, impl='cuda').shape == (2, 0, 5, 5)
    padding_only = upfirdn2d(draw(1, 2, 0, 3), f, padding=3, impl='cuda')
    assert padding_only.shape == (1, 2, 3, 6) and padding_only.eq(0).all()


def test_what_the_kernels_do_not_take_is_refused():
    for f in (BINOMIAL.to(DEVICE).double(), BINOMIAL):
        with pytest.raises(RuntimeError, match="f: expected fp32 on x's device"):
            upfirdn2d(draw(1, 1, 4, 4), f, impl='cuda')
    with pytest.raises(RuntimeError, match='it takes CUDA tensors, got cpu'):
        upfirdn2d(torch.zeros(1, 1, 4, 4), BINOMIAL, impl='cuda')


def step(x, cotangent, f):
    y = upsample2d(x, f, impl='cuda')
    return y, *torch.autograd.grad(y, x, cotangent)


@pytest.mark.parametrize('f', [BINOMIAL, LONG], ids=['4x4', 'separable'])
def test_host_never_waits_and_graphs_replay(f):
    f, x, cotangent = f.to(DEVICE), draw(2, 8, 16, 16).requires_grad_(True), draw(2, 8, 32, 32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # As capture asks for: once before, off the default stream.
        step(x, cotangent, f)
        torch.cuda.set_sync_debug_mode('error')
        try:
            step(x, cotangent, f)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, cotangent, f)
    with torch.no_grad():
        x.normal_()
        cotangent.normal_()
    graph.replay()
    for replayed, eager in zip(captured, step(x, cotangent, f)):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('taps', [4, 3])
def test_more_than_2_to_the_31_numbers(taps, layout):
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip('needs 16 GiB of free GPU memory')
    f = setup_filter([1] * taps).to(DEVICE)
    x = torch.empty(3, 16, 8192, 8192, device=DEVICE, dtype=torch.float16, memory_format=layout).zero_()
    end = x[2:, :, -32:, -32:].normal_()
    y = filter2d(x, f, impl='cuda')
    assert y.numel() > 2**31
    expected = filter2d(end.double(), f, impl='ref')
    inner = (..., slice(4, None), slice(4, None))
    assert_close(y[2:, :, -32:, -32:][inner], expected[inner], torch.float16, 'end')
    assert not y[:2].any()
