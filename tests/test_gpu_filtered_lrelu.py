# SPDX-License-Identifier: Apache-2.0
"""filtered_lrelu's CUDA kernel against the reference in double precision: values, gradients, odd sizes, graphs."""

import pytest
import torch

from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

pytestmark = pytest.mark.gpu
DEVICE = 'cuda'

# Largest error relative to the largest value: all sums are fp32, of some hundred terms in two filters one after the
# other. The half types round the result once, by at most 2^-11 (fp16) and 2^-8 (bf16) of it.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}

BINOMIAL = setup_filter([1, 3, 3, 1])
OBLONG = torch.tensor([[1.0, 2, 3, 4], [0, -1, 2, 5]]) / 8
# Uneven taps: with whole ones, samples that are 0 but for rounding would be common.
SEPARABLE = setup_filter([1, 2.7, 5.3, 0.1, -1.9], separable=True)
LONG = setup_filter([i**0.5 for i in range(1, 13)])
LONGEST = setup_filter([1 + i**0.5 % 1 for i in range(32)])
CASES = {
    'no filters': dict(fu=None, fd=None),
    'no filters, cropped': dict(fu=None, fd=None, up=2, down=3, padding=(1, -1, 0, 2)),
    'same size': dict(fu=BINOMIAL, fd=BINOMIAL, padding=(3, 3, 3, 3)),
    'up': dict(fu=LONG, fd=SEPARABLE, up=2, padding=(10, 5, 8, 9)),
    'up and down': dict(fu=LONG, fd=LONG, up=2, down=2, padding=(12, 9, 10, 11)),
    'up and down, turned': dict(fu=SEPARABLE, fd=OBLONG, up=4, down=2, padding=(-1, 9, 8, -2), flip_filter=True),
    'down': dict(fu=OBLONG, fd=LONG, down=4, padding=(12, 13, 9, 14)),
    'areas': dict(fu=OBLONG, fd=BINOMIAL, up=3, down=2, padding=(4, 5, 6, 2)),
    'largest': dict(fu=LONGEST, fd=LONGEST, up=4, down=4, padding=(40, 38, 41, 37)),
    'largest tiles': dict(fu=LONGEST, fd=LONGEST, down=4, padding=(40, 38, 41, 37)),
}
KINK_DISTANCE = 2e-6  # A sample nearer to a kink of the activation may fall on its other side by rounding.
SIZES = [(2, 3, 7, 9), (1, 1, 33, 66), (3, 2, 40, 5), (0, 3, 8, 8)]


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def on_device(case):
    return case | {name: None if case[name] is None else case[name].to(DEVICE) for name in ('fu', 'fd')}


def draw_off_the_kinks(size, dtype, case):
    """Return x and b for which no sample between the filters is near to where the slope changes."""
    for _ in range(100):
        x, b = draw(*size, dtype=dtype), draw(size[1], dtype=dtype)
        up = case.get('up', 1)
        sample = upfirdn2d(x.double() + b.double()[:, None, None], case['fu'], up=up, padding=case.get('padding', 0),
                           gain=up**2, flip_filter=case.get('flip_filter', False), impl='ref')
        sample = sample[sample != 0]  # Those that meet no input are 0 in every precision.
        distances = [sample.abs()]
        if case['clamp'] is not None:
            value = case['gain'] * torch.where(sample > 0, sample, sample * case['slope'])
            distances.append((value.abs() - case['clamp']).abs())
        if x.numel() == 0 or all((distance > KINK_DISTANCE).all() for distance in distances):
            return x, b
    raise AssertionError('no picture without a sample on a kink')


def results(x, b, cotangent, direction, case, impl):
    """Return the value, the gradients of x and b at the cotangent, and the gradient of the first with respect to it."""
    x, b, cotangent = (tensor.detach().requires_grad_(True) for tensor in (x, b, cotangent))
    y = filtered_lrelu(x, b=b, **case, impl=impl)
    first = torch.autograd.grad(y, (x, b), cotangent, create_graph=True)
    (second,) = torch.autograd.grad(first[0], cotangent, direction)
    return {'value': y.detach(), 'first gradient': first[0].detach(), 'second gradient': second,
            'bias gradient': first[1].detach()}


def assert_close(actual, expected, dtype, scale, what):
    assert actual.dtype == dtype and actual.shape == expected.shape, what
    error = (actual.double() - expected).abs().max() / scale.clamp(min=1e-3)
    assert error <= TOLERANCE[dtype], f'{what}: {error:.2e}'


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('clamp', [None, 0.5])
@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_equal_the_reference(name, clamp, dtype):
    torch.manual_seed(0)
    case = on_device(CASES[name]) | dict(gain=1.3, slope=0.3, clamp=clamp)
    for size in SIZES:
        (x, b), direction = draw_off_the_kinks(size, dtype, case), draw(*size, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if size[0] == 3 else x
        y = filtered_lrelu(x, b=b, **case, impl='cuda')
        cotangent = draw(*y.shape, dtype=dtype)
        actual = results(x, b, cotangent, direction, case, 'cuda')
        assert torch.equal(y, actual['value'])  # With and without a gradient to keep.
        if x.numel() == 0:
            continue
        inputs = [tensor.double() for tensor in (x, b, cotangent, direction)]
        expected = results(*inputs, case, 'ref')
        for part, value in expected.items():
            scale = value.abs().max()
            if part == 'bias gradient':  # A sum of many terms that cancel.
                scale = expected['first gradient'].abs().sum((0, 2, 3)).max()
            assert_close(actual[part], value, dtype, scale, f'{part}, {size}')


def test_third_gradients_come_from_the_same_kernel():
    x, case = draw(1, 2, 9, 8).requires_grad_(True), on_device(CASES['up and down'])
    cotangent = torch.randn_like(filtered_lrelu(x, **case, impl='cuda')).requires_grad_(True)
    (first,) = torch.autograd.grad(filtered_lrelu(x, **case, impl='cuda'), x, cotangent, create_graph=True)
    direction = torch.randn_like(x).requires_grad_(True)
    (second,) = torch.autograd.grad(first, cotangent, direction, create_graph=True)
    (third,) = torch.autograd.grad(second, direction, cotangent)
    assert torch.equal(third, first)  # The adjoint of the adjoint's adjoint.


@pytest.mark.parametrize('change, message', [
    (dict(up=5), 'factors up to 4, got up 5 and down 1'),
    (dict(fu=setup_filter(range(1, 34))), 'filters of up to 32 taps, got 33'),
])
def test_what_the_kernel_does_not_take_is_refused_or_left_to_the_reference(change, message):
    x, case = draw(1, 1, 9, 9), on_device(dict(fu=None, fd=None, padding=33) | change)
    with pytest.raises(ValueError, match=f"impl 'cuda' takes {message}"):
        filtered_lrelu(x, **case, impl='cuda')
    assert torch.equal(filtered_lrelu(x, **case), filtered_lrelu(x, **case, impl='ref'))


def test_double_precision_is_left_to_the_reference():
    x = draw(1, 1, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match='takes fp16, bf16 and fp32, got torch.float64'):
        filtered_lrelu(x, impl='cuda')
    assert torch.equal(filtered_lrelu(x), filtered_lrelu(x, impl='ref'))
    assert torch.equal(filtered_lrelu(x.float()), filtered_lrelu(x.float(), impl='cuda'))  # The default.


BAD_CALLS = {
    r'x: expected \[\*, \*, \*, \*\], got \[4, 4\]': lambda x: filtered_lrelu(x[0, 0], impl='cuda'),
    r'b: expected \[1\], got \[2\]': lambda x: filtered_lrelu(x, b=draw(2), impl='cuda'),
    'up: expected an int >= 1': lambda x: filtered_lrelu(x, up=0, impl='cuda'),
    'clamp: expected a number >= 0 or None, got -1': lambda x: filtered_lrelu(x, clamp=-1, impl='cuda'),
    'smaller than the filters': lambda x: filtered_lrelu(x, LONG.to(DEVICE), impl='cuda'),
}


@pytest.mark.parametrize('message', BAD_CALLS)
def test_messages_of_bad_calls(message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](draw(1, 1, 4, 4))


def step(x, b, cotangent, case):
    y = filtered_lrelu(x, b=b, **case, clamp=1, impl='cuda')
    return y, *torch.autograd.grad(y, (x, b), cotangent)


def test_host_never_waits_and_graphs_replay():
    case = on_device(CASES['up and down'])
    x, b = draw(2, 8, 16, 16).requires_grad_(True), draw(8).requires_grad_(True)
    cotangent = torch.randn_like(filtered_lrelu(x, b=b, **case))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # As capture asks for: once before, off the default stream.
        step(x, b, cotangent, case)
        torch.cuda.set_sync_debug_mode('error')
        try:
            step(x, b, cotangent, case)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, b, cotangent, case)
    with torch.no_grad():
        x.normal_()
        cotangent.normal_()
    graph.replay()
    for replayed, eager in zip(captured, step(x, b, cotangent, case)):
        assert torch.equal(replayed, eager)
