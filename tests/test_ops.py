# SPDX-License-Identifier: Apache-2.0
"""Element-wise, resampling and convolution operations: hand-worked values, plain loops, gradients, in-place safety."""

import functools
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.modulated_conv2d import modulated_conv2d
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

BINOMIAL = setup_filter([1, 3, 3, 1])
LOPSIDED = setup_filter([1, 2, 5], separable=True)  # Asymmetric and of odd length: shows flips and shifts.
OBLONG = torch.tensor([[1.0, 2, 3, 4], [0, -1, 2, 5]])  # [2, 4], neither separable nor symmetric.

# Largest error by dtype: a few roundings of sums of some ten terms of size 1.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


pytestmark = pytest.mark.usefixtures('one_thread')


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_close(actual, expected, dtype=torch.float64):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def check_gradients(function, *inputs):
    """Check first and second derivatives with respect to all inputs against differences."""
    inputs = [x.detach().requires_grad_(True) for x in inputs]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, atol=1e-4)


# ---- bias_act

SCALAR_ACTIVATIONS = {
    'linear': lambda x: x,
    'relu': lambda x: max(x, 0.0),
    'lrelu': lambda x: x if x > 0 else 0.2 * x,
    'tanh': math.tanh,
    'sigmoid': lambda x: 1 / (1 + math.exp(-x)),
    'elu': lambda x: x if x > 0 else math.exp(x) - 1,
    'selu': lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * (math.exp(x) - 1)),
    'softplus': lambda x: math.log(1 + math.exp(x)),
    'swish': lambda x: x / (1 + math.exp(-x)),
}
# Far from every kink: of the activations at 0 and of the clamp at 0.9 (below).
POINTS = torch.tensor([[-2.3, -0.7, -0.31], [0.23, 0.57, 1.9]], dtype=torch.float64)
CLAMP = 0.9


@pytest.mark.parametrize('act', ACTIVATIONS)
def test_bias_act_is_the_formula(act):
    assert set(ACTIVATIONS) == set(SCALAR_ACTIVATIONS)
    b = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    for gain, clamp in itertools.product((None, 1, 0.5, -2), (None, CLAMP, 0)):
        factor = ACTIVATIONS[act].default_gain if gain is None else gain
        limit = math.inf if clamp is None else clamp
        expected = [
            [min(max(factor * SCALAR_ACTIVATIONS[act](x + y), -limit), limit) for x, y in zip(row, b.tolist())]
            for row in POINTS.tolist()
        ]
        actual = bias_act(POINTS, b, act=act, gain=gain, clamp=clamp)
        assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_default_gain_keeps_the_mean_square_of_normal_input():
    x = draw(10**6)
    for act in ('linear', 'relu', 'lrelu'):
        slack = 0.05 if act == 'lrelu' else 0.01  # 1 + 0.2² and not 1, as published.
        assert bias_act(x, act=act, dim=0).square().mean() == pytest.approx(1, abs=slack)


def test_alpha_is_the_negative_slope_and_changes_no_other_activation():
    assert_close(bias_act(POINTS, act='lrelu', alpha=0.5, gain=1), torch.where(POINTS > 0, POINTS, POINTS / 2))
    assert_close(bias_act(POINTS, act='lrelu', alpha=0, gain=1), POINTS.clamp(min=0))
    for act in set(ACTIVATIONS) - {'lrelu'}:
        assert torch.equal(bias_act(POINTS, act=act, alpha=0.7), bias_act(POINTS, act=act))


@pytest.mark.parametrize('dim', [0, 1, 2, -1, -3])
def test_bias_is_added_along_its_dimension(dim):
    x = draw(2, 3, 4)
    b = draw(x.shape[dim], seed=1)
    expected = x.movedim(dim, -1).add(b).movedim(-1, dim)
    assert torch.equal(bias_act(x, b, dim=dim), expected)


@pytest.mark.parametrize('act', ACTIVATIONS)
@pytest.mark.parametrize('clamp', [None, CLAMP])
def test_gradients_of_bias_act(act, clamp):
    b = torch.tensor([0.02, -0.01, 0.03], dtype=torch.float64)
    kinks = [(POINTS + b).abs().min()]
    if clamp:
        kinks.append((bias_act(POINTS, b, act=act, gain=1.3).abs() - clamp).abs().min())
    assert min(kinks) > 1e-3
    check_gradients(lambda x, b: bias_act(x, b, act=act, gain=1.3, clamp=clamp), POINTS, b)
    check_gradients(lambda x: bias_act(x, act=act, clamp=clamp), POINTS)


LAYOUTS = {
    'contiguous': lambda x: x,
    'expanded': lambda x: x[:1].expand(2, -1, -1, -1),
    'transposed': lambda x: x.transpose(2, 3),
    'channels_last': lambda x: x.contiguous(memory_format=torch.channels_last),
    'strided': lambda x: x[:, :, ::2, 1:],
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('act', ACTIVATIONS)
def test_path_without_gradient_leaves_inputs_alone_and_gives_the_same_bits(act, layout):
    memory = draw(2, 3, 4, 5, dtype=torch.float32)
    bias = draw(3, seed=1, dtype=torch.float32)
    kept = memory.clone(), bias.clone()
    for b, gain, clamp in itertools.product((None, bias), (None, 1, 0.5), (None, 0.3)):
        x = LAYOUTS[layout](memory)
        arguments = dict(act=act, gain=gain, clamp=clamp)
        tracked = bias_act(x.detach().requires_grad_(True), b, **arguments)
        only_bias = tracked if b is None else bias_act(x, b.detach().requires_grad_(True), **arguments)
        own = bias_act(x, b, **arguments)
        with torch.no_grad():
            switched_off = bias_act(x.detach().requires_grad_(True), b, **arguments)
        assert tracked.requires_grad and not own.requires_grad
        assert all(torch.equal(own, other) for other in (tracked, only_bias, switched_off))
        assert torch.equal(memory, kept[0]) and torch.equal(bias, kept[1])
        assert own.shape == x.shape
        if layout == 'channels_last':
            assert own.is_contiguous(memory_format=torch.channels_last)


def test_the_clamp_keeps_nan():
    assert bias_act(torch.tensor([[math.nan, 5.0]]), act='relu', clamp=1).isnan().tolist() == [[True, False]]


# ---- upfirdn2d and its wrappers


def upfirdn2d_by_loops(x, f, up, down, pads, flip_filter, gain):
    """The definition, a scalar at a time."""
    f = torch.ones(1, 1) if f is None else f
    f = f.double()
    f = (f.ger(f) if f.ndim == 1 else f) * gain
    f = f.flip([0, 1]) if flip_filter else f
    n, c, h, w = x.shape
    wide = torch.zeros(n, c, h * up[1], w * up[0], dtype=x.dtype)
    wide[:, :, :: up[1], :: up[0]] = x
    padded = functional.pad(wide, pads)
    fh, fw = f.shape
    rows = range(0, padded.shape[2] - fh + 1, down[1])
    columns = range(0, padded.shape[3] - fw + 1, down[0])
    out = torch.zeros(n, c, len(rows), len(columns), dtype=x.dtype)
    for (i, r), (j, s) in itertools.product(enumerate(rows), enumerate(columns)):
        for p, q in itertools.product(range(fh), range(fw)):
            out[:, :, i, j] += f[fh - 1 - p, fw - 1 - q] * padded[:, :, r + p, s + q]
    return out


UPFIRDN_CASES = {
    'identity': dict(f=None),
    'no filter': dict(f=None, up=(2, 3), down=(3, 2), padding=(1, 0, -1, 2), gain=1.5),
    'same size': dict(f=BINOMIAL, padding=(2, 1, 2, 1)),
    'up': dict(f=BINOMIAL, up=2, padding=(2, 1, 2, 1), gain=4.0),
    'down': dict(f=BINOMIAL, down=2, padding=1),
    'factors by axis': dict(f=OBLONG, up=(3, 2), down=(2, 1), padding=(0, 2, 3, 1)),
    'flipped': dict(f=OBLONG, up=(1, 2), padding=(2, 1), flip_filter=True, gain=0.5),
    'cropped': dict(f=OBLONG, up=(2, 1), padding=(-1, -2, 1, -1)),
    'cropped evenly': dict(f=BINOMIAL, up=2, padding=-1),
    'cropped across, padded along': dict(f=BINOMIAL, up=2, padding=(-1, 1)),
    'padded across, cropped along': dict(f=BINOMIAL, up=2, padding=(1, -1)),
    'separable': dict(f=LOPSIDED, up=(2, 1), down=(1, 2), padding=(2, 0, -1, 3), gain=3.0),
    'separable, flipped': dict(f=LOPSIDED, up=2, down=3, padding=2, flip_filter=True),
    'long and separable': dict(f=setup_filter(range(1, 9)), padding=(5, 4)),
}


def normalised(case):
    """All options of a case spelled out, factors and padding in full."""
    options = dict(up=1, down=1, padding=0, flip_filter=False, gain=1.0) | case
    pair = {name: (options[name],) * 2 if isinstance(options[name], int) else options[name] for name in ('up', 'down')}
    pads = options['padding']
    pads = (pads,) * 4 if isinstance(pads, int) else pads
    pads = (pads[0], pads[0], pads[1], pads[1]) if len(pads) == 2 else pads
    return options['f'], pair['up'], pair['down'], pads, options['flip_filter'], options['gain']


@pytest.mark.parametrize('name', UPFIRDN_CASES)
def test_upfirdn2d_is_its_definition(name):
    case = UPFIRDN_CASES[name]
    x = draw(2, 3, 5, 4)
    expected = upfirdn2d_by_loops(x, *normalised(case))
    assert_close(upfirdn2d(x, **case), expected)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        actual = upfirdn2d(x.to(dtype), **case)
        assert actual.dtype == dtype
        scale = expected.abs().max()
        assert_close(actual / scale, expected / scale, dtype)


@pytest.mark.parametrize('name', UPFIRDN_CASES)
def test_gradients_of_upfirdn2d(name):
    check_gradients(lambda x: upfirdn2d(x, **UPFIRDN_CASES[name]), draw(1, 2, 4, 4))


def test_upfirdn2d_by_hand():
    x = torch.tensor([[[[1.0, 2.0]]]])
    f = torch.tensor([[1.0, 10.0, 100.0]])
    up = upfirdn2d(x, f, up=(2, 1), padding=(2, 1, 0, 0))
    assert up.tolist() == [[[[1, 10, 102, 20, 200]]]]  # A true convolution of 1 0 2 0.
    flipped = upfirdn2d(x, f, up=(2, 1), padding=(2, 1, 0, 0), flip_filter=True)
    assert flipped.tolist() == [[[[100, 10, 201, 20, 2]]]]
    assert upfirdn2d(x, f, up=(2, 1), down=(2, 1), padding=(2, 1, 0, 0)).tolist() == [[[[1, 102, 200]]]]


def test_setup_filter():
    assert BINOMIAL.shape == (4, 4) and BINOMIAL.dtype == torch.float32
    assert BINOMIAL.tolist() == (torch.tensor([1.0, 3, 3, 1]).ger(torch.tensor([1.0, 3, 3, 1])) / 64).tolist()
    assert setup_filter(range(1, 9)).shape == (8,) and setup_filter(range(1, 8)).shape == (7, 7)
    assert setup_filter(None).tolist() == [[1]]
    assert setup_filter([[1, 2], [3, 4]], normalize=False).tolist() == [[1, 2], [3, 4]]
    assert setup_filter([[1, 2], [3, 4]], normalize=False, flip_filter=True).tolist() == [[4, 3], [2, 1]]
    assert setup_filter([1, 3], gain=3).sum() == pytest.approx(3)
    separable = setup_filter([1, 3], gain=3, separable=True)
    assert separable.ger(separable).sum() == pytest.approx(3)


@pytest.mark.parametrize('taps', [[1, 3, 3, 1], [1, 2, 5], [1, 4], [1, 2, 3, 2, 1]])
@pytest.mark.parametrize('wrapper', [filter2d, upsample2d, downsample2d])
def test_separable_filters_equal_their_outer_product(wrapper, taps):
    x = draw(1, 2, 7, 6)
    for flip in (False, True):
        options = dict(flip_filter=flip, gain=2.0, padding=(1, 0))
        flat, full = (wrapper(x, setup_filter(taps, separable=s), **options) for s in (True, False))
        assert_close(flat, full, torch.float32)  # The filters themselves are float32.


@pytest.mark.parametrize('taps', range(1, 7))
def test_wrappers_keep_their_sizes(taps):
    f = setup_filter([1] * taps)
    x = draw(1, 1, 6, 12)
    assert filter2d(x, f).shape == (1, 1, 6, 12)
    for factor in (2, 3, (3, 2)):
        fx, fy = (factor, factor) if isinstance(factor, int) else factor
        if taps >= max(fx, fy):  # A shorter filter leaves gaps between samples.
            assert upsample2d(x, f, up=factor).shape == (1, 1, 6 * fy, 12 * fx)
            assert downsample2d(x, f, down=factor).shape == (1, 1, 6 // fy, 12 // fx)


@pytest.mark.parametrize('width, height', [(1, 2), (2, 3), (4, 4), (5, 4), (3, 6)])
def test_padding_of_wrappers(width, height):
    x, f = draw(1, 1, 6, 12), draw(height, width, seed=1).float()
    px, py = (2, 1), (0, 3)
    assert_close(
        filter2d(x, f, padding=(*px, *py)),
        upfirdn2d(x, f, padding=(px[0] + width // 2, px[1] + (width - 1) // 2, height // 2, 3 + (height - 1) // 2)),
    )
    for factor in (1, 2, 3):
        before, after = ([(t + factor - 1) // 2 for t in (width, height)], [(t - factor) // 2 for t in (width, height)])
        pads = (px[0] + before[0], px[1] + after[0], py[0] + before[1], py[1] + after[1])
        expected = upfirdn2d(x, f, up=factor, padding=pads, gain=factor**2)
        assert_close(upsample2d(x, f, up=factor, padding=(*px, *py)), expected)
        before = [(t - factor + 1) // 2 for t in (width, height)]
        pads = (px[0] + before[0], px[1] + after[0], py[0] + before[1], py[1] + after[1])
        assert_close(downsample2d(x, f, down=factor, padding=(*px, *py)), upfirdn2d(x, f, down=factor, padding=pads))


def test_resampling_keeps_constants_and_smooth_pictures():
    constant = torch.full([1, 1, 8, 8], 0.75, dtype=torch.float64)
    assert upsample2d(constant, BINOMIAL)[..., 2:-2, 2:-2].unique().tolist() == [0.75]
    assert upsample2d(constant, BINOMIAL, gain=2.0)[..., 2:-2, 2:-2].unique().tolist() == [1.5]
    assert downsample2d(constant, BINOMIAL)[..., 1:-1, 1:-1].unique().tolist() == [0.75]
    assert filter2d(constant, BINOMIAL)[..., 2:-2, 2:-2].unique().tolist() == [0.75]
    y, x = torch.meshgrid(*[torch.arange(32, dtype=torch.float64)] * 2, indexing='ij')
    smooth = (torch.sin(x / 6) * torch.cos(y / 7))[None, None]
    again = downsample2d(upsample2d(smooth, BINOMIAL), BINOMIAL)
    inner = (..., slice(3, -3), slice(3, -3))
    assert (again - smooth)[inner].abs().max() < 0.03
    ramp = (x + 2 * y)[None, None]  # Ramps keep their place: no half-pixel shift.
    assert_close(downsample2d(upsample2d(ramp, BINOMIAL), BINOMIAL)[inner], ramp[inner])
    place = (torch.arange(64, dtype=torch.float64) + 0.5) / 2 - 0.5
    assert_close(upsample2d(ramp, BINOMIAL)[0, 0][3:-3, 3:-3], (place + 2 * place[:, None])[3:-3, 3:-3])


# ---- filtered_lrelu


def test_filtered_lrelu_is_its_four_steps():
    x, b = draw(2, 3, 6, 5), draw(3, seed=1)
    for up, down, clamp, flip in itertools.product((1, 2), (1, 2), (None, 0.5), (False, True)):
        options = dict(up=up, down=down, padding=(3, 2, 4, 1), gain=1.2, slope=0.3, clamp=clamp, flip_filter=flip)
        actual = filtered_lrelu(x, OBLONG, LOPSIDED, b, **options)
        y = upfirdn2d_by_loops(x + b[:, None, None], OBLONG, (up, up), (1, 1), (3, 2, 4, 1), flip, up**2)
        y = 1.2 * torch.where(y > 0, y, 0.3 * y)
        y = y if clamp is None else y.clamp(-clamp, clamp)
        assert_close(actual, upfirdn2d_by_loops(y, LOPSIDED, (1, 1), (down, down), (0, 0, 0, 0), flip, 1))
        height, width = ((s * up + 5 - (t - 1) - 2 + down - 1) // down for s, t in ((6, 2), (5, 4)))
        assert actual.shape == (2, 3, height, width)


def test_filtered_lrelu_without_filters_is_bias_act_and_leaves_its_input_alone():
    x, b = draw(2, 3, 4, 4), draw(3, seed=1)
    kept = x.clone()
    assert torch.equal(filtered_lrelu(x, b=b, clamp=0.4), bias_act(x, b, act='lrelu', clamp=0.4))
    assert torch.equal(filtered_lrelu(x), bias_act(x, act='lrelu'))
    assert torch.equal(x, kept)


def test_gradients_of_filtered_lrelu():
    for clamp in (None, 0.5):
        function = functools.partial(filtered_lrelu, up=2, down=2, padding=4, clamp=clamp)
        x, b = draw(1, 2, 3, 3), draw(2, seed=1)
        check_gradients(lambda x, b, f=function: f(x, BINOMIAL, BINOMIAL, b), x, b)


# ---- conv2d_resample

CONV_CASES = {
    'plain': dict(),
    'plain, convolution': dict(flip_weight=False, padding=1),
    'plain, lopsided padding': dict(padding=(2, -1, 0, 1)),
    'up': dict(up=2, padding=1),
    'up, convolution': dict(up=2, padding=1, flip_weight=False),
    'up by 3, lopsided padding': dict(up=3, padding=(2, -1, 0, 1)),
    'up, groups': dict(up=2, padding=1, groups=2),
    'down': dict(down=2, padding=1),
    'down, groups, convolution': dict(down=2, padding=1, groups=2, flip_weight=False),
    'down by 3': dict(down=3, padding=(2, 1)),
    'up and down': dict(up=2, down=2, padding=1),
    'up 3, down 2, groups': dict(up=3, down=2, padding=1, groups=2),
}


def conv_by_steps(x, w, f, up=1, down=1, padding=0, groups=1, flip_weight=True, flip_filter=False):
    """Insert zeros, pad, filter, convolve; filter, drop pixels: one step after the other, all in full."""
    fh, fw = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    px0, px1, py0, py1 = normalised(dict(f=f, padding=padding))[3]
    grow = [0, 0, 0, 0]
    if up > 1:
        grow = [(fw + up - 1) // 2, (fw - up) // 2, (fh + up - 1) // 2, (fh - up) // 2]
    if down > 1:
        more = [(fw - down + 1) // 2, (fw - down) // 2, (fh - down + 1) // 2, (fh - down) // 2]
        grow = [a + b for a, b in zip(grow, more)]
    pads = [p + g for p, g in zip((px0, px1, py0, py1), grow)]
    w = w if flip_weight else w.flip([2, 3])
    if up > 1 or down > 1:
        x = upfirdn2d(x, f, up=up, padding=pads, gain=up**2, flip_filter=flip_filter)
    else:
        x = functional.pad(x, pads)
    x = functional.conv2d(x, w, groups=groups)
    if up > 1 and down > 1:
        return upfirdn2d(x, f, down=down, flip_filter=flip_filter)
    return x[:, :, ::down, ::down]


@pytest.mark.parametrize('name', CONV_CASES)
@pytest.mark.parametrize('kernel', [1, 2, 3])
def test_conv2d_resample_equals_its_steps(name, kernel):
    case = CONV_CASES[name]
    x = draw(2, 4, 7, 6)
    w = draw(6, 4 // case.get('groups', 1), kernel, kernel, seed=1)
    for f, flip_filter in ((None, False), (BINOMIAL, False), (OBLONG, True), (LOPSIDED, False)):
        expected = conv_by_steps(x, w, f, flip_filter=flip_filter, **case)
        assert_close(conv2d_resample(x, w, f, flip_filter=flip_filter, **case), expected)


@pytest.mark.parametrize('name', CONV_CASES)
def test_gradients_of_conv2d_resample(name):
    case = CONV_CASES[name]
    w = draw(2, 2 // case.get('groups', 1), 3, 3, seed=1)
    check_gradients(lambda x, w: conv2d_resample(x, w, BINOMIAL, **case), draw(1, 2, 4, 3), w)


@pytest.mark.parametrize('kernel', [1, 3])
@pytest.mark.parametrize('up, down', [(1, 1), (2, 1), (1, 2)])
def test_same_padding_keeps_the_size_and_the_place(kernel, up, down):
    w = torch.zeros(1, 1, kernel, kernel, dtype=torch.float64)
    w[0, 0, kernel // 2, kernel // 2] = 1
    ramp = (torch.arange(16.0)[:, None] + 2 * torch.arange(16.0)).double()[None, None]
    y = conv2d_resample(ramp, w, BINOMIAL, up=up, down=down, padding=kernel // 2)
    assert y.shape == (1, 1, 16 * up // down, 16 * up // down)
    place = (torch.arange(16 * up // down) + 0.5) * down / up - 0.5
    assert_close(y[0, 0, 3:-3, 3:-3], (place[:, None] + 2 * place)[3:-3, 3:-3])


# ---- modulated_conv2d

MODULATION_CASES = [
    dict(zip(('up', 'down', 'demodulate', 'flip_weight', 'has_noise'), case))
    for case in (
        (1, 1, True, True, True),
        (1, 1, False, True, False),
        (2, 1, True, False, True),
        (2, 1, False, True, True),
        (1, 2, True, True, False),
    )
]


def modulation_inputs(case, batch=3, kernel=3):
    x, w = draw(batch, 4, 6, 6), draw(5, 4, kernel, kernel, seed=1)
    styles = 1 + draw(batch, 4, seed=2)
    size = 6 * case['up'] // case['down']
    noise = draw(batch, 1, size, size, seed=3) if case['has_noise'] else None
    options = {k: v for k, v in case.items() if k != 'has_noise'}
    return x, w, styles, noise, dict(options, padding=kernel // 2, resample_filter=BINOMIAL)


@pytest.mark.parametrize('case', MODULATION_CASES, ids=str)
@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('kernel', [1, 3])
def test_modulated_conv2d_is_a_convolution_per_sample(case, fused, kernel):
    x, w, styles, noise, options = modulation_inputs(case, kernel=kernel)
    actual = modulated_conv2d(x, w, styles, noise, fused=fused, **options)
    for i in range(len(x)):
        own = w * styles[i][None, :, None, None]
        if case['demodulate']:
            own = own / (own.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        expected = conv2d_resample(
            x[i : i + 1], own, BINOMIAL, case['up'], case['down'], kernel // 2, flip_weight=case['flip_weight']
        )
        expected = expected if noise is None else expected + noise[i]
        assert_close(actual[i : i + 1], expected)


@pytest.mark.parametrize('case', MODULATION_CASES, ids=str)
@pytest.mark.parametrize('fused', [True, False])
def test_gradients_of_modulated_conv2d(case, fused):
    _, w, styles, noise, options = modulation_inputs(case, batch=2)
    x, w, styles = draw(2, 2, 4, 4), w[:2, :2], styles[:, :2]
    size = 4 * case['up'] // case['down']
    noise = noise if noise is None else noise[..., :size, :size]
    inputs = [x, w, styles] if noise is None else [x, w, styles, noise]
    check_gradients(lambda *tensors: modulated_conv2d(*tensors, fused=fused, **options), *inputs)


@pytest.mark.parametrize('fused', [True, False])
def test_demodulation_gives_unit_variance(fused):
    x = draw(4, 16, 66, 66)
    w, styles = 7 * draw(8, 16, 3, 3, seed=1), (10 ** draw(4, 1, seed=2)) * (1 + draw(4, 16, seed=3))
    variance = modulated_conv2d(x, w, styles, fused=fused).var(dim=[2, 3])
    assert variance.mean() == pytest.approx(1, abs=0.02)
    assert (variance - 1).abs().max() < 0.25  # 4096 neighbouring samples share 9 in 9 of their inputs.


@pytest.mark.parametrize('fused', [True, False])
def test_half_precision_does_not_overflow(fused):
    x = draw(2, 64, 5, 5, dtype=torch.float16)
    w, styles = 3e3 * draw(4, 64, 3, 3, seed=1).float(), 1e4 * draw(2, 64, seed=2).float()
    expected = modulated_conv2d(x.float(), w, styles, padding=1, fused=fused)
    actual = modulated_conv2d(x, w, styles, padding=1, fused=fused)
    assert actual.dtype == torch.float16
    assert_close(actual / 4, expected / 4, torch.float16)


# ---- What all have in common

FILTER_CALLS = {
    'bias_act': lambda x, **kw: bias_act(x, torch.arange(3).to(x.dtype), act='lrelu', clamp=1, **kw),
    'upfirdn2d': lambda x, **kw: upfirdn2d(x, BINOMIAL, up=2, down=2, padding=3, **kw),
    'upfirdn2d, separable': lambda x, **kw: upfirdn2d(x, LOPSIDED, up=2, down=2, padding=3, **kw),
    'filter2d': lambda x, **kw: filter2d(x, LOPSIDED, **kw),
    'upsample2d': lambda x, **kw: upsample2d(x, BINOMIAL, **kw),
    'downsample2d': lambda x, **kw: downsample2d(x, LOPSIDED, padding=1, **kw),
    'filtered_lrelu': lambda x, **kw: filtered_lrelu(x, BINOMIAL, BINOMIAL, up=2, down=2, padding=3, clamp=1, **kw),
}
WEIGHT = draw(5, 3, 3, 3)
CONV_CALLS = {
    'conv2d_resample': lambda x: conv2d_resample(x, WEIGHT.to(x), BINOMIAL.to(x.device), up=2, padding=1),
    'conv2d_resample, down': lambda x: conv2d_resample(x, WEIGHT.to(x), BINOMIAL.to(x.device), down=2, padding=2),
    'modulated_conv2d': lambda x: modulated(x, fused=True),
    'modulated_conv2d, unfused': lambda x: modulated(x, fused=False),
}


def modulated(x, fused):
    styles = torch.linspace(0.5, 1.5, 3).expand(len(x), 3)
    return modulated_conv2d(x, WEIGHT.float(), styles, padding=1, fused=fused)


ALL_CALLS = FILTER_CALLS | CONV_CALLS


@pytest.mark.parametrize('name', FILTER_CALLS)
def test_impl_is_obeyed_or_refused(name):
    x = draw(1, 3, 4, 4)
    assert torch.equal(FILTER_CALLS[name](x, impl='ref'), FILTER_CALLS[name](x))
    with pytest.raises(ValueError, match="expected impl to be one of 'ref'(, 'cuda')? or None, got 'fastest'"):
        FILTER_CALLS[name](x, impl='fastest')


@pytest.mark.parametrize('name', ALL_CALLS)
@pytest.mark.parametrize('size', [(0, 4, 5), (1, 1, 1), (3, 5, 1), (2, 1, 7)])
def test_odd_tiny_and_empty_sizes(name, size):
    batch, height, width = size
    x = draw(batch, 3, height, width, dtype=torch.float32)
    y = ALL_CALLS[name](x)
    assert len(y) == batch and y.isfinite().all()
    for i in range(batch):  # Samples do not see each other.
        assert_close(y[i : i + 1], ALL_CALLS[name](x[i : i + 1]), torch.float32)


@pytest.mark.parametrize('name', ALL_CALLS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_are_kept(name, dtype):
    x = draw(2, 3, 6, 5, dtype=dtype)
    y, expected = ALL_CALLS[name](x), ALL_CALLS[name](x.float())
    assert y.dtype == dtype
    scale = expected.abs().max()
    assert_close(y / scale, expected / scale, max(dtype, torch.float32, key=TOLERANCE.get))


BAD_CALLS = {
    'act: expected one of linear, ': lambda x: bias_act(x, act='gelu'),
    'clamp: expected a number >= 0 or None, got -1': lambda x: bias_act(x, clamp=-1),
    'clamp: .* got nan': lambda x: bias_act(x, clamp=math.nan),
    r'b: expected one number per entry of dimension 1 of \[2, 3, 4, 4\], got \[4\]': lambda x: bias_act(x, x[0, 0, 0]),
    r'b: .* got \[3, 1, 1\]': lambda x: bias_act(x, x[0, :, :1, :1]),
    'b: .* dimension 4': lambda x: bias_act(x, x[0, 0, 0], dim=4),
    'b: expected torch.float32 like x, got torch.float64': lambda x: bias_act(x, torch.zeros(3).double()),
    r'x: expected \[N, C, H, W\], got \[3, 4, 4\]': lambda x: upfirdn2d(x[0], BINOMIAL),
    r'f: expected \[fh, fw\], \[taps\] or None': lambda x: upfirdn2d(x, BINOMIAL[None]),
    'f: expected a 1-D or 2-D filter': lambda x: setup_filter([[[1.0]]]),
    'f: .* at least one tap': lambda x: setup_filter([]),
    'up: expected an int >= 1 or two of them, got 0': lambda x: upfirdn2d(x, BINOMIAL, up=0),
    r'up: .* got \(1, 2, 3\)': lambda x: upfirdn2d(x, BINOMIAL, up=(1, 2, 3)),
    'down: .* got 1.5': lambda x: upfirdn2d(x, BINOMIAL, down=1.5),
    'down: .* got None': lambda x: downsample2d(x, BINOMIAL, down=None),
    r'padding: expected 1, 2 or 4 ints, got \[1, 2, 3\]': lambda x: upfirdn2d(x, BINOMIAL, padding=[1, 2, 3]),
    'padding: .* got 0.5': lambda x: filter2d(x, BINOMIAL, padding=0.5),
    r'smaller than the filter \[4, 4\]': lambda x: upfirdn2d(x[..., :3], BINOMIAL),
    r'smaller than the filter \[4, 4\], got \[2, 3, 4, 4\]': lambda x: upfirdn2d(x, BINOMIAL, padding=-5),
    r'x, w: .* got \[2, 3, 4, 4\], \[5, 2, 3, 3\]': lambda x: conv2d_resample(x, WEIGHT[:, :2]),
    r'weight, styles: expected \[O, 3, k, k\]': lambda x: modulated_conv2d(x, WEIGHT[:, :2], torch.ones(2, 3)),
    r'and \[2, 3\], got .* and \[1, 3\]': lambda x: modulated_conv2d(x, WEIGHT, torch.ones(1, 3)),
}


@pytest.mark.parametrize('message', BAD_CALLS)
def test_messages_of_bad_calls(message):
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](torch.zeros(2, 3, 4, 4))
