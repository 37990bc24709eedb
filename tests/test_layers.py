# SPDX-License-Identifier: Apache-2.0
"""Layers and the mapping network: scaling at run time, clamps, noise, truncation."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from training.layers import Conv2dLayer, FullyConnectedLayer, SynthesisLayer, ToRGBLayer, normalize_second_moment
from training.mapping import W_AVG_BETA, MappingNetwork


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_random_biases(module):
    """Give every parameter that starts at zero some value, so that it shows in results."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return module


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_normalize_second_moment():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-1e4, 0.0]])
    rms = math.sqrt(12.5)
    expected = torch.tensor([[3 / rms, 4 / rms], [0, 0], [-math.sqrt(2), 0]])
    assert_close(normalize_second_moment(x), expected)


# ---- Fully connected


@pytest.mark.parametrize('lr_multiplier', [1.0, 0.01])
def test_dense_layer_scales_weight_and_bias_where_they_are_used(lr_multiplier):
    layer = with_random_biases(FullyConnectedLayer(6, 4, lr_multiplier=lr_multiplier))
    x = torch.randn(2, 3, 6)
    gain = lr_multiplier / math.sqrt(6)
    expected = x @ (layer.weight * gain).t() + layer.bias * lr_multiplier
    assert_close(layer(x), expected)
    layer(x[0]).sum().backward()
    assert_close(layer.bias.grad, torch.full([4], 3 * lr_multiplier))
    layer.activation = 'lrelu'
    assert_close(layer(x), math.sqrt(2) * torch.where(expected > 0, expected, 0.2 * expected))


@pytest.mark.parametrize('lr_multiplier', [1.0, 0.01])
def test_dense_layer_starts_with_unit_gain(lr_multiplier):
    layer = FullyConnectedLayer(256, 256, lr_multiplier=lr_multiplier)
    assert layer.weight.detach().std() * lr_multiplier == pytest.approx(1, abs=0.02)
    assert layer(torch.randn(64, 256)).detach().std() == pytest.approx(1, abs=0.05)
    assert FullyConnectedLayer(3, 2, bias_init=1).bias.tolist() == [1, 1]


# ---- Convolution


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('up, down, size', [(1, 1, 8), (2, 1, 16), (1, 2, 4)])
def test_convolution_sizes_and_unit_gain(kernel_size, up, down, size):
    layer = Conv2dLayer(64, 64, kernel_size, up=up, down=down)
    y = layer(torch.randn(4, 64, 8, 8)).detach()
    assert y.shape == (4, 64, size, size)
    if up == down == 1:
        assert y[..., 1:-1, 1:-1].std() == pytest.approx(1, abs=0.05)


def test_gain_of_a_convolution_multiplies_its_clamp_too():
    layer = with_random_biases(Conv2dLayer(3, 4, 3, activation='lrelu', conv_clamp=0.5))
    x = 3 * torch.randn(2, 3, 6, 6)
    whole, half = layer(x), layer(x, gain=0.5)
    assert whole.abs().max() == 0.5  # Not times the root of two of the activation.
    assert_close(half, whole / 2)
    layer.conv_clamp = None
    free = layer(x)
    assert free.abs().max() > 1
    assert_close(whole, free.clamp(-0.5, 0.5))
    assert_close(layer(x, gain=0.5), free / 2)


def test_convolution_without_bias():
    layer = Conv2dLayer(3, 4, 1, bias=False)
    assert layer.bias is None and set(layer.state_dict()) == {'weight', 'resample_filter'}
    assert not layer(torch.zeros(1, 3, 2, 2)).any()


# ---- Synthesis and torgb


@pytest.fixture
def layer():
    return with_random_biases(SynthesisLayer(4, 3, 6, 8)).eval()


def pre_activation(y):
    y = y / math.sqrt(2)
    return torch.where(y > 0, y, y / 0.2)


def test_noise_is_added_before_the_activation(layer):
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    none, const = (pre_activation(layer(x, w, mode)) for mode in ('none', 'const'))
    assert_close(const - none, (layer.noise_const * layer.noise_strength).expand_as(none))
    torch.manual_seed(5)
    random = pre_activation(layer(x, w, 'random'))
    torch.manual_seed(5)
    assert_close(random - none, (torch.randn(2, 1, 8, 8) * layer.noise_strength).expand_as(none))
    with torch.no_grad():
        layer.noise_strength.zero_()
    assert all(torch.equal(layer(x, w, mode), layer(x, w, 'none')) for mode in ('const', 'random'))
    with pytest.raises(ValueError, match='noise_mode: expected one of random, const, none, got'):
        layer(x, w, 'constant')


def test_synthesis_layer_ignores_the_scale_of_its_style(layer):
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    before = layer(x, w, 'const')
    with torch.no_grad():
        layer.affine.weight.mul_(7)
        layer.affine.bias.mul_(7)
    assert_close(layer(x, w, 'const'), before)
    assert not torch.allclose(layer(x, w + torch.randn(6), 'const'), before, atol=1e-2)
    assert SynthesisLayer(4, 3, 6, 8).affine.bias.unique().tolist() == [1]


@pytest.mark.parametrize('up', [1, 2])
def test_training_and_inference_compute_the_same(up):
    layer, torgb = with_random_biases(SynthesisLayer(4, 3, 6, 8, up=up)), with_random_biases(ToRGBLayer(3, 5, 6))
    x, w = torch.randn(2, 4, 8 // up, 8 // up), torch.randn(2, 6)
    trained = layer.train()(x, w, 'const')
    assert trained.shape == (2, 3, 8, 8)
    assert_close(layer.eval()(x, w, 'const'), trained)
    assert_close(torgb.eval()(trained, w), torgb.train()(trained, w))


def test_torgb_is_a_plain_modulated_projection():
    torgb = with_random_biases(ToRGBLayer(4, 3, 6))
    x, w = torch.randn(2, 4, 5, 5), torch.randn(2, 6)
    styles = torgb.affine(w) / 2  # The square root of 4 channels.
    expected = torch.einsum('oi,ni,nihw->nohw', torgb.weight[:, :, 0, 0], styles, x) + torgb.bias[:, None, None]
    assert_close(torgb(x, w), expected)
    torgb.conv_clamp = 0.7
    assert_close(torgb(x, w), expected.clamp(-0.7, 0.7))


def test_synthesis_layer_clamps_after_its_activation():
    layer = with_random_biases(SynthesisLayer(4, 3, 6, 8))
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 6)
    free = layer(x, w, 'const')
    layer.conv_clamp = 0.7
    assert free.abs().max() > 0.7
    assert_close(layer(x, w, 'const'), free.clamp(-0.7, 0.7))


@pytest.mark.parametrize('is_training', [True, False])
def test_first_and_second_gradients_of_layers(is_training):
    x, w = torch.randn(2, 2, 3, 3).double(), torch.randn(2, 3).double()
    layer = with_random_biases(SynthesisLayer(2, 2, 3, 3)).double().train(is_training)
    torgb = with_random_biases(ToRGBLayer(2, 2, 3)).double().train(is_training)
    dense = with_random_biases(FullyConnectedLayer(3, 2, activation='lrelu')).double()
    conv = with_random_biases(Conv2dLayer(2, 2, 3, activation='lrelu', down=2)).double()

    def call(x, w):
        return conv(torgb(layer(x, w, 'const'), w)), dense(w)

    inputs = (x.requires_grad_(True), w.requires_grad_(True))
    assert gradcheck(call, inputs, fast_mode=True) and gradgradcheck(call, inputs, fast_mode=True)


# ---- Mapping


def mapping(**overrides):
    options = dict(z_dim=5, c_dim=4, w_dim=6, num_ws=3, num_layers=2) | overrides
    return with_random_biases(MappingNetwork(**options)).eval()


def test_every_w_is_the_same_and_may_be_written_to():
    network = mapping()
    ws = network(torch.randn(2, 5), torch.randn(2, 4))
    assert ws.shape == (2, 3, 6) and torch.equal(ws[:, :1].expand_as(ws), ws)
    ws = ws.detach()
    kept = ws.clone()
    ws[:, 1] = 0
    assert torch.equal(ws[:, [0, 2]], kept[:, [0, 2]]) and not ws[:, 1].any()


def test_the_length_of_z_does_not_matter_and_its_direction_does():
    network = mapping()
    z, c = torch.randn(2, 5), torch.randn(2, 4)
    assert_close(network(9 * z, c), network(z, c), 1e-4)
    assert (network(-z, c) - network(z, c)).abs().max() > 0.1
    assert (network(z, -c) - network(z, c)).abs().max() > 0.1


def test_z_and_the_embedded_label_enter_with_mean_square_one():
    network = mapping()
    entered = []
    network.fc0.register_forward_hook(lambda module, x, y: entered.append(x[0]))
    z, c = 7 * torch.randn(2, 5), 0.1 * torch.randn(2, 4)
    network(z, c)
    embedded = network.embed(c)
    expected = [x / x.square().mean(dim=1, keepdim=True).sqrt() for x in (z, embedded)]
    assert_close(entered[0], torch.cat(expected, dim=1))


def test_truncation():
    network = mapping()
    network.w_avg.normal_()
    z, c = torch.randn(2, 5), torch.randn(2, 4)
    full = network(z, c)
    for psi in (0.0, 0.3, 1.0, 1.5):
        expected = network.w_avg + psi * (full - network.w_avg)
        assert_close(network(z, c, psi), expected)
        for cutoff in (0, 1, 3):
            truncated = network(z, c, psi, cutoff)
            assert_close(truncated[:, :cutoff], expected[:, :cutoff])
            assert torch.equal(truncated[:, cutoff:], full[:, cutoff:])
    assert torch.equal(network(z, c, 0.0), network.w_avg.expand(2, 3, 6))


def test_mean_w_moves_by_track_alone():
    network = mapping().train()
    before = network.w_avg.clone()
    w = network(torch.randn(8, 5), torch.randn(8, 4))[:, 0]
    assert torch.equal(network.w_avg, before)
    network.track(w)
    assert_close(network.w_avg, (1 - W_AVG_BETA) * w.mean(dim=0), 1e-7)
    network.track(w)
    assert_close(network.w_avg, (1 - W_AVG_BETA**2) * w.mean(dim=0), 1e-7)
    assert not network.w_avg.requires_grad
    for _ in range(3000):
        network.track(w)
    assert_close(network.w_avg, w.mean(dim=0).detach(), 0.01)


def test_inputs_of_width_zero_are_left_out():
    z, c = torch.randn(2, 5), torch.randn(2, 4)
    assert mapping(c_dim=0)(z, None).shape == (2, 3, 6)
    assert mapping(z_dim=0)(None, c).shape == (2, 3, 6)
    assert mapping(num_ws=None)(z, c).shape == (2, 6)
    assert 'w_avg' not in mapping(num_ws=None).state_dict()


def test_widths_of_hidden_layers():
    state = mapping(num_layers=3, embed_features=7, layer_features=8).state_dict()
    weights = {name: tuple(tensor.shape) for name, tensor in state.items() if name.endswith('weight')}
    assert weights == {'embed.weight': (7, 4), 'fc0.weight': (8, 12), 'fc1.weight': (8, 8), 'fc2.weight': (6, 8)}


BAD_INPUTS = {
    r'z: expected \[N, 5\], got \[2, 4\]': lambda z, c: (z[:, :4], c),
    r'z: expected \[N, 5\], got \[5\]': lambda z, c: (z[0], c),
    r'z: expected \[N, 5\], got None': lambda z, c: (None, c),
    r'c: expected \[N, 4\], got \[2, 3\]': lambda z, c: (z, c[:, :3]),
    r'c: expected \[N, 4\], got None': lambda z, c: (z, None),
    r'c: expected \[2, 4\] like z, got \[1, 4\]': lambda z, c: (z, c[:1]),
}


@pytest.mark.parametrize('message', BAD_INPUTS)
def test_messages_of_bad_inputs(message):
    with pytest.raises(ValueError, match=message):
        mapping()(*BAD_INPUTS[message](torch.randn(2, 5), torch.randn(2, 4)))
