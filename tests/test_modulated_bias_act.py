# SPDX-License-Identifier: Apache-2.0
"""modulated_bias_act by torch operations: its formula, gradients, types and messages."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.modulated_bias_act import _plain_sums, fused_sums, modulated_bias_act

pytestmark = pytest.mark.usefixtures('one_thread')
SHAPES = {'x': (2, 3, 4, 5), 'scale': (2, 3), 'noise': (2, 1, 4, 5), 'b': (3,)}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(**changes):
    return {name: draw(*shape, seed=i) for i, (name, shape) in enumerate((SHAPES | changes).items())}


@pytest.mark.parametrize('given', [*itertools.product([False, True], repeat=3)])
def test_it_is_the_formula(given):
    terms = arguments()
    x, scale, noise, b = terms.values()
    for name, is_given in zip(['scale', 'noise', 'b'], given):
        terms[name] = terms[name] if is_given else None
    actual = modulated_bias_act(**terms, act='lrelu', alpha=0.3, gain=1.5, clamp=0.8)
    for n, c, i, j in itertools.product(*map(range, x.shape)):
        p = x[n, c, i, j] * (scale[n, c] if given[0] else 1) + given[1] * noise[n, 0, i, j] + given[2] * b[c]
        expected = (1.5 * (p if p > 0 else 0.3 * p)).clamp(-0.8, 0.8)
        assert actual[n, c, i, j].item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize('shape', [(2, 1, 4, 5), (1, 1, 4, 5), (1, 4, 5), (4, 5), (5,), (), (2, 1, 1, 1), (4, 1)])
def test_noise_broadcasts(shape):
    terms = arguments(noise=shape)
    full = terms | {'noise': terms['noise'].expand(2, 1, 4, 5)}
    assert torch.equal(modulated_bias_act(**terms), modulated_bias_act(**full))


@pytest.mark.parametrize('act', ['linear', 'lrelu', 'swish'])
@pytest.mark.parametrize('noise', [(2, 1, 2, 2), (2, 2)])
def test_first_and_second_gradients(act, noise):
    inputs = [x.requires_grad_(True) for x in arguments(x=(2, 3, 2, 2), noise=noise).values()]

    def call(*inputs):
        return modulated_bias_act(*inputs, act=act, clamp=2.5)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs, atol=1e-4)


def test_without_terms_it_is_bias_act():
    x = draw(2, 3, 4, 5, dtype=torch.float32)
    assert torch.equal(modulated_bias_act(x, act='lrelu', clamp=1), bias_act(x, act='lrelu', clamp=1))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_type_and_layout_of_x_are_kept_whatever_the_others_have(dtype, memory_format):
    terms = arguments()
    expected = modulated_bias_act(**terms, act='lrelu')
    x = terms.pop('x').to(dtype).contiguous(memory_format=memory_format)
    others = {name: term.to(kind) for (name, term), kind in zip(terms.items(), [torch.float32, torch.float64, dtype])}
    before = [t.clone() for t in (x, *others.values())]
    actual = modulated_bias_act(x, **others, act='lrelu')
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(actual.double(), expected, rtol=0.05, atol=0.05)
    assert all(torch.equal(t, kept) for t, kept in zip((x, *others.values()), before))


BAD_CALLS = {
    r'x: expected \[\*, \*, \*, \*\], got \[3, 4, 5\]': dict(x=(3, 4, 5)),
    r'scale: expected \[2, 3\], got \[3\]': dict(scale=(3,)),
    r'b: expected \[3\], got \[4\]': dict(b=(4,)),
    r'noise: expected a shape that broadcasts to \[2, 1, 4, 5\], got \[3, 1, 4, 5\]': dict(noise=(3, 1, 4, 5)),
    r'noise: .* got \[2, 3, 4, 5\]': dict(noise=(2, 3, 4, 5)),
    r'noise: .* got \[1, 1, 1, 4, 5\]': dict(noise=(1, 1, 1, 4, 5)),
}


@pytest.mark.parametrize('message', BAD_CALLS)
def test_messages_of_bad_calls(message):
    with pytest.raises(ValueError, match=message):
        modulated_bias_act(**arguments(**BAD_CALLS[message]))


def test_impl_is_obeyed_or_refused():
    terms = arguments()
    assert torch.equal(modulated_bias_act(**terms, impl='ref'), modulated_bias_act(**terms))
    with pytest.raises(ValueError, match="expected impl to be one of 'ref', 'cuda' or None, got 'fastest'"):
        modulated_bias_act(**terms, impl='fastest')
    for function in (bias_act, modulated_bias_act):
        with pytest.raises(RuntimeError, match="impl 'cuda' cannot be used: it takes CUDA tensors, got cpu"):
            function(terms['x'], impl='cuda')


@pytest.mark.parametrize('shape', [(2, 5, 3, 4), (1, 32, 17, 33), (3, 512, 4, 4), (2, 4, 0, 3)])
@pytest.mark.parametrize('with_scale, with_noise', [(True, True), (False, True), (True, False), (False, False)])
def test_sums_of_the_gradient(shape, with_scale, with_noise):
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip('triton')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    g, x = (torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2))
    g, x = (t.contiguous(memory_format=torch.channels_last) for t in (g, x))
    actual, expected = (f(g, x, with_scale, with_noise) for f in (fused_sums, _plain_sums))
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None) and (a is None or torch.allclose(a, e, rtol=1e-4, atol=1e-4))
