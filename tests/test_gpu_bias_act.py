# SPDX-License-Identifier: Apache-2.0
"""bias_act and modulated_bias_act on a CUDA device against their references in double precision."""

import functools
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torch_utils.ops.bias_act import ACTIVATIONS, PIECEWISE_LINEAR, bias_act
from torch_utils.ops.modulated_bias_act import modulated_bias_act

pytestmark = pytest.mark.gpu
DEVICE = 'cuda'

# Largest error by dtype, relative to the largest entry: a few units in the last place of the single rounding at the
# end, and for fp32 and fp64, in which the kernels compute, of exp and its like.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SUM_SLACK = 4  # For sums, of terms that were rounded and may cancel.
GIBIBYTE = 2**30


def draw(*shape, seed=0, dtype=torch.float32):
    """The same numbers on every device, some of them beyond a clamp of 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def shifted(x):
    """The same tensor, beginning one element into its memory: not aligned to 16 bytes."""
    memory = x.new_empty(x.numel() + 1)[1:]
    return memory.as_strided(x.shape, x.stride()).copy_(x)


# Inputs x [.., dimension of the bias, ..] by name, with that dimension.
LAYOUTS = {
    'contiguous': (1, lambda dtype: draw(2, 5, 4, 6, dtype=dtype)),
    'many blocks': (1, lambda dtype: draw(3, 7, 33, 29, dtype=dtype)),
    'channels last': (1, lambda dtype: channels_last(draw(2, 16, 3, 5, dtype=dtype))),
    'odd channels last': (1, lambda dtype: channels_last(draw(2, 3, 5, 7, dtype=dtype))),
    'one channel': (1, lambda dtype: channels_last(draw(2, 1, 5, 7, dtype=dtype))),
    'one entry': (1, lambda dtype: draw(1, 1, 1, 1, dtype=dtype)),
    'empty': (1, lambda dtype: draw(0, 3, 4, 4, dtype=dtype)),
    'without channels': (1, lambda dtype: draw(2, 0, 4, 4, dtype=dtype)),
    'shifted': (1, lambda dtype: shifted(draw(2, 3, 4, 8, dtype=dtype))),
    'shifted channels last': (1, lambda dtype: shifted(channels_last(draw(2, 8, 3, 3, dtype=dtype)))),
    'slice': (1, lambda dtype: draw(2, 3, 9, 8, dtype=dtype)[:, :, ::2, 1:]),
    'expanded': (1, lambda dtype: draw(1, 3, 4, 5, dtype=dtype).expand(2, -1, -1, -1)),
    'transposed': (2, lambda dtype: draw(2, 3, 16, 8, dtype=dtype).transpose(1, 3)),
    'first of two': (0, lambda dtype: draw(7, 24, dtype=dtype)),
    'last of two': (-1, lambda dtype: draw(6, 13, dtype=dtype)),
    'last of three': (2, lambda dtype: draw(2, 3, 8, dtype=dtype)),
    'vector': (0, lambda dtype: draw(21, dtype=dtype)),
}
SETTINGS = [
    dict(),
    dict(clamp=0.8),
    dict(gain=-1.3, alpha=0.3, clamp=0.9),
    dict(gain=0.7, alpha=-0.4),
    dict(gain=0, clamp=0),
]


def assert_near(actual, expected, dtype, slack=1):
    """None, a gradient that is zero by construction, is as good as zeros."""
    if actual is None or expected is None:
        assert all(x is None or not x.any() for x in (actual, expected))
        return
    assert actual.shape == expected.shape and actual.dtype == dtype
    if expected.numel() > 0:
        limit = slack * TOLERANCE[dtype] * max(1, expected.abs().max().item())
        assert (actual.double() - expected).abs().max().item() <= limit


def assert_results_near(function, inputs, order):
    """Compare value and gradients of function(*inputs, impl) by 'cuda' with 'ref' in fp64; return y and gx."""
    expected = value_and_gradients(lambda *i: function(*i, impl='ref'), [t.double() for t in inputs], order)
    actual = value_and_gradients(lambda *i: function(*i, impl='cuda'), inputs, order)
    for one, other in zip(actual, expected, strict=True):
        is_sum = other is not None and other.numel() < expected[0].numel()
        assert_near(one, other, inputs[0].dtype, SUM_SLACK if is_sum else 1)
    return actual[:2]


def value_and_gradients(function, inputs, order):
    """Return y, the gradients of <y, g> and, with order 2, those of their product with cotangents; all cotangents are
    drawn alike for every dtype."""
    dtype = inputs[0].dtype
    inputs = [x.detach().requires_grad_(True) for x in inputs]
    y = function(*inputs)
    g = draw(*y.shape, seed=10).half().to(dtype).requires_grad_(True)
    first = torch.autograd.grad(y, inputs, g, create_graph=order > 1)
    if order == 1:
        return [y, *first]
    cotangents = [draw(*x.shape, seed=11 + i).half().to(dtype) for i, x in enumerate(inputs)]
    second = torch.autograd.grad(first, [g, *inputs], cotangents, allow_unused=True)
    return [y, *first, *second]


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('act', ACTIVATIONS)
def test_bias_act_equals_the_reference(act, dtype):
    for (dim, make), settings in itertools.product(LAYOUTS.values(), SETTINGS):
        x = make(dtype)
        b = draw(x.shape[dim], seed=1, dtype=dtype)
        call = functools.partial(bias_act, dim=dim, act=act, **settings)
        for inputs in ([x], [x, b]):
            tracked, _ = assert_results_near(call, inputs, order=2)
            plain = call(*inputs)
            assert torch.equal(plain, tracked) and not plain.requires_grad


@pytest.mark.parametrize('dtype', TOLERANCE)
def test_layout_and_inputs_are_kept(dtype):
    for _, make in LAYOUTS.values():
        x = make(dtype)
        before = x.clone()
        y = bias_act(x, act='lrelu', clamp=1)
        is_dense = x.is_contiguous() or x.transpose(1, -1).is_contiguous() or x.movedim(1, -1).is_contiguous()
        assert not is_dense or y.stride() == x.stride()
        assert torch.equal(x, before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('act', ACTIVATIONS)
def test_kinks_limits_and_values_that_are_not_finite(act, dtype):
    points = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 21.0, 200.0, -200.0, math.inf, -math.inf, math.nan]
    x = torch.tensor(points, device=DEVICE, dtype=dtype)
    for gain, clamp in itertools.product((1, 2, -2, 0), (None, 0, 1, 2)):
        results = []
        for impl in ('cuda', 'ref'):
            leaf = x.clone().requires_grad_(True)
            y = bias_act(leaf, dim=0, act=act, alpha=0.5, gain=gain, clamp=clamp, impl=impl)
            results += [(y, *torch.autograd.grad(y, leaf, torch.full_like(y, 3)))]
        for actual, expected in zip(*results):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_half_types_saturate_where_the_clamp_is_not_a_number_of_the_type():
    x = torch.tensor([180.9, 181.1, 250.0, -250.0], device=DEVICE, dtype=torch.float16, requires_grad=True)
    clamp = 256 * math.sqrt(0.5)
    y = bias_act(x, act='linear', dim=0, clamp=clamp, impl='cuda')
    (gx,) = torch.autograd.grad(y.sum(), x)
    assert y.abs().max() == torch.tensor(clamp).half() and gx.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_derivatives_of_any_order(act):
    x = torch.tensor([[-2.3, -0.7, 0.31], [0.23, 0.57, 1.9]], device=DEVICE, dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.1, -0.2, 0.05], device=DEVICE, dtype=torch.float64, requires_grad=True)
    g = draw(2, 3, dtype=torch.float64).requires_grad_(True)

    def call(x, b):
        return bias_act(x, b, act=act, gain=1.3, clamp=1.7, impl='cuda')

    def gradients(x, b, g):
        return torch.autograd.grad(call(x, b), (x, b), g, create_graph=True)

    assert gradcheck(call, (x, b)) and gradgradcheck(call, (x, b))
    assert gradgradcheck(gradients, (x, b, g))  # The third.


def test_the_first_gradient_keeps_little_memory():
    x = draw(1, 8, 64, 64).requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bias_act(x, x[0, :, 0, 0], act='lrelu', clamp=1, impl='cuda')
    sizes = [t.numel() * t.element_size() for t in kept if t.dtype == torch.uint8]
    assert sizes == [x.numel() // 4]


def test_an_input_changed_in_place_is_noticed_or_not_needed():
    for act in ('lrelu', 'tanh'):
        x = draw(2, 3).requires_grad_(True)
        inner = x * 1
        y = bias_act(inner, act=act, impl='cuda')
        inner.zero_()
        if act in PIECEWISE_LINEAR:
            expected = torch.autograd.grad(bias_act(x, act=act, impl='ref').sum(), x)[0]
            assert_near(torch.autograd.grad(y.sum(), x)[0], expected.double(), x.dtype)
        else:
            with pytest.raises(RuntimeError, match='modified by an inplace operation'):
                torch.autograd.grad(y.sum(), x)


def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 32 * GIBIBYTE:
        pytest.skip('needs 32 GiB of GPU memory')
    x = torch.zeros(2, 2**31 + 8, device=DEVICE, dtype=torch.float16).requires_grad_(True)
    b = torch.tensor([-1.0, 1.0], device=DEVICE, dtype=torch.float16)
    y = bias_act(x, b, dim=0, act='relu', gain=2, impl='cuda')
    assert [row.aminmax() for row in y.detach()] == [(0, 0), (2, 2)]
    (gx,) = torch.autograd.grad(y, x, y.detach())
    assert [row.aminmax() for row in gx] == [(0, 0), (4, 4)]


# ---- modulated_bias_act

MODULATED_SHAPES = [
    (2, 3, 4, 6), (2, 16, 4, 8), (3, 5, 3, 5), (1, 8, 9, 7), (2, 64, 33, 32), (0, 3, 4, 4), (2, 3, 0, 4),
]
MODULATED_LAYOUTS = {
    'contiguous': lambda x: x,
    'channels last': channels_last,
    'shifted': shifted,
    'slice': lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}
MODULATED_SETTINGS = [dict(), dict(clamp=0.8), dict(gain=-1.3, alpha=0.3, clamp=0.9)]


def modulated_cases(shape, dtype):
    """Yield (scale, noise, b), act and settings: each set of terms once, each setting with all terms."""
    n, c, h, w = shape
    scale, b = draw(n, c, seed=1, dtype=dtype), draw(c, seed=2, dtype=dtype)
    noises = [draw(*size, seed=3, dtype=dtype) for size in ((n, 1, h, w), (1, 1, h, w), (h, w))]
    for terms in itertools.product((None, scale), (None, *noises), (None, b)):
        yield terms, 'lrelu', {}
    for act, settings in itertools.product(('linear', 'lrelu', 'swish'), MODULATED_SETTINGS):
        yield (scale, noises[0], b), act, settings


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('layout', MODULATED_LAYOUTS)
@pytest.mark.parametrize('shape', MODULATED_SHAPES)
def test_modulated_bias_act_equals_the_reference(shape, layout, dtype):
    x = MODULATED_LAYOUTS[layout](draw(*shape, dtype=dtype))
    for terms, act, settings in modulated_cases(shape, dtype):
        def call(x, *present, **options):
            rest = iter(present)
            filled = [None if term is None else next(rest) for term in terms]
            return modulated_bias_act(x, *filled, act=act, **settings, **options)

        inputs = [x, *(term for term in terms if term is not None)]
        y, gx = assert_results_near(call, inputs, order=1)
        plain = call(*inputs)
        assert torch.equal(plain, y) and not plain.requires_grad
        if layout == 'channels last':
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (plain, gx))


def test_modulated_bias_act_of_mixed_types():
    x, noise = draw(2, 16, 4, 8, dtype=torch.float16), draw(2, 1, 4, 8, seed=1)
    scale, b = draw(2, 16, seed=2).bfloat16(), draw(16, seed=3, dtype=torch.float64)
    terms = [term.requires_grad_(True) for term in (scale, noise, b)]
    y = modulated_bias_act(x, *terms, act='lrelu', impl='cuda')
    expected = modulated_bias_act(x.double(), *(term.double() for term in terms), act='lrelu', impl='ref')
    assert_near(y, expected, torch.float16)
    gradients = torch.autograd.grad(y.sum(), terms)
    assert [g.dtype for g in gradients] == [term.dtype for term in terms]


@pytest.mark.parametrize('act', ['lrelu', 'swish'])
def test_modulated_bias_act_passes_gradcheck_and_refuses_a_second_gradient(act):
    inputs = [draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(2, 3, 2, 2), (2, 3), (2, 2), (3,)])]
    inputs = [x.requires_grad_(True) for x in inputs]

    def call(*inputs):
        return modulated_bias_act(*inputs, act=act, clamp=1.5, impl='cuda')

    assert gradcheck(call, inputs)
    (gx,) = torch.autograd.grad(call(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gx.sum().backward()


def test_the_cuda_implementation_refuses_tensors_of_the_cpu():
    for call in (bias_act, modulated_bias_act):
        with pytest.raises(RuntimeError, match='it takes CUDA tensors, got cpu'):
            call(torch.zeros(1, 2, 3, 4), impl='cuda')
