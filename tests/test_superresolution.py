# SPDX-License-Identifier: Apache-2.0
"""Super-resolution: sizes of all variants, when the input is resized, and which w is used."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from torch_utils.ops.upfirdn2d import upsample2d
from training.layers import SynthesisLayer, ToRGBLayer
from training.superresolution import FP16_CLAMP, VARIANTS, Superresolution, resize_antialiased

W_DIM = 4
SMALL = dict(channels=4, w_dim=W_DIM, block_channels=(3, 2))

# Output side; side of the input to block0 for raw pictures of some sides; whether block0 upsamples.
EXPECTED = {
    'SuperresolutionHybrid8XDC': (512, {64: 128, 128: 128, 160: 128}, True),
    'SuperresolutionHybrid8X': (512, {64: 128, 128: 128, 160: 128}, True),
    'SuperresolutionHybrid4X': (256, {64: 128, 128: 128}, False),
    'SuperresolutionHybrid2X': (128, {16: 64, 64: 64, 100: 64}, False),
}


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(side, count=1):
    return torch.randn(count, 3, side, side), torch.randn(count, 4, side, side), torch.randn(count, 7, W_DIM)


def record(module, kind):
    """Note inputs and output of all layers of a kind, by name."""
    calls = {}
    for name, layer in module.named_modules():
        if isinstance(layer, kind):
            layer.register_forward_hook(lambda m, x, y, name=name: calls.update({name: (x, y)}))
    return calls


@pytest.mark.parametrize('variant', VARIANTS)
def test_sizes_and_what_enters_the_first_block(variant):
    size, sides, is_up = EXPECTED[variant]
    network = Superresolution(variant, **SMALL).eval()
    calls = record(network, SynthesisLayer)
    for side, resized in sides.items():
        rgb, features, ws = inputs(side)
        with torch.no_grad():
            assert network(rgb, features, ws).shape == (1, 3, size, size)
        entering = calls['block0.conv0'][0][0]
        expected = features if side == resized else resize_antialiased(features, resized)
        torch.testing.assert_close(entering, expected)
        assert calls['block0.conv0'][1].shape[-1] == resized * (2 if is_up else 1) == size // 2


def test_4x_enlarges_its_input_but_never_reduces_it():
    network = Superresolution('SuperresolutionHybrid4X', **SMALL)
    for side, expected in ((32, 128), (127, 128), (128, 128), (130, 130), (256, 256)):
        x = torch.randn(1, 4, side, side)
        resized = network._resize_input(x)
        assert resized.shape[-1] == expected
        if side >= 128:
            assert resized is x
    other = Superresolution('SuperresolutionHybrid8X', **SMALL)
    assert other._resize_input(torch.zeros(1, 4, 256, 256)).shape[-1] == 128


@pytest.mark.parametrize('variant', ['SuperresolutionHybrid2X', 'SuperresolutionHybrid4X'])
def test_picture_is_the_raw_one_plus_torgbs(variant):
    network = Superresolution(variant, **SMALL).eval()
    side = VARIANTS[variant].input_resolution
    rgb, features, ws = inputs(side)
    calls = record(network, ToRGBLayer)
    image = network(rgb, features, ws)
    first = rgb + calls['block0.torgb'][1]
    expected = upsample2d(first, network.block1.resample_filter) + calls['block1.torgb'][1]
    torch.testing.assert_close(image, expected)


def test_every_layer_reads_the_last_w():
    network = Superresolution('SuperresolutionHybrid2X', **SMALL).eval()
    calls = record(network, (SynthesisLayer, ToRGBLayer))
    rgb, features, ws = inputs(64, count=2)
    image = network(rgb, features, ws)
    assert len(calls) == 6 and all(torch.equal(x[1], ws[:, -1]) for x, _ in calls.values())
    assert torch.equal(network(rgb, features, ws[:, -1:]), image)


def test_noise_modes():
    network = Superresolution('SuperresolutionHybrid2X', **SMALL).eval()
    for layer in network.modules():
        if isinstance(layer, SynthesisLayer):
            torch.nn.init.ones_(layer.noise_strength)
    x = inputs(64)
    none, const, random = (network(*x, mode) for mode in ('none', 'const', 'random'))
    assert torch.equal(network(*x), none)  # The default.
    assert not torch.allclose(none, const, atol=1e-2) and not torch.allclose(const, random, atol=1e-2)
    with pytest.raises(ValueError, match='noise_mode'):
        network(*x, 'zero')


def test_clamp_comes_with_half_precision():
    for use_fp16, clamp in ((True, FP16_CLAMP), (False, None)):
        network = Superresolution('SuperresolutionHybrid2X', **SMALL, use_fp16=use_fp16)
        layers = [m for m in network.modules() if isinstance(m, (SynthesisLayer, ToRGBLayer))]
        assert len(layers) == 6 and {layer.conv_clamp for layer in layers} == {clamp}


def test_antialiasing_is_an_option():
    x = torch.randn(1, 4, 100, 100)
    for antialias in (True, False):
        network = Superresolution('SuperresolutionHybrid2X', **SMALL, antialias=antialias)
        expected = interpolate(x, size=(64, 64), mode='bilinear', antialias=antialias)
        assert torch.equal(network._resize_input(x), expected)
    assert not torch.allclose(resize_antialiased(x, 64), resize_antialiased(x, 64, antialias=False), atol=0.1)


def test_resize():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(resize_antialiased(x, 8), x)
    torch.testing.assert_close(resize_antialiased(torch.full([1, 1, 9, 9], 0.3), 5), torch.full([1, 1, 5, 5], 0.3))
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    torch.testing.assert_close(resize_antialiased(ramp, 8)[..., 1:-1], avg_pool2d(ramp, 2)[..., 1:-1])
    noise = torch.randn(1, 1, 256, 256)
    assert resize_antialiased(noise, 64).std() < 0.3 < 0.45 < resize_antialiased(noise, 64, antialias=False).std()


def test_widths_and_names():
    widths = {name: Superresolution(name, 32, 8) for name in ('SuperresolutionHybrid8XDC', 'SuperresolutionHybrid2X')}
    assert widths['SuperresolutionHybrid8XDC'].block0.conv0.weight.shape[:2] == (256, 32)
    assert widths['SuperresolutionHybrid8XDC'].block1.conv1.weight.shape[:2] == (128, 128)
    assert widths['SuperresolutionHybrid2X'].block1.conv0.weight.shape[:2] == (64, 128)
    assert {n.split('.')[0] for n in widths['SuperresolutionHybrid8XDC'].state_dict()} == {'block0', 'block1'}
    assert 'resample_filter' in widths['SuperresolutionHybrid2X'].state_dict()
    with pytest.raises(ValueError, match="superresolution: expected one of .*, got 'SuperresolutionHybrid16X'"):
        Superresolution('SuperresolutionHybrid16X', **SMALL)
