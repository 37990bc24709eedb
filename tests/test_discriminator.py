# SPDX-License-Identifier: Apache-2.0
"""Discriminators: what enters them, the minibatch statistics, the label and its noise, gradients for R1."""

import functools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from training.config import DiscriminatorConfig, MappingConfig
from training.discriminator import EXPRESSION_EMBEDDING, Discriminator, append_minibatch_std
from training.superresolution import resize_antialiased

TINY = dict(img_resolution=16, channel_base=64, channel_max=6, num_fp16_res=0, mapping=MappingConfig(num_layers=2))


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def discriminator(**overrides):
    network = Discriminator(DiscriminatorConfig(**TINY | overrides))
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
    return network


def pictures(count=4, raw_size=8):
    return {'image': torch.randn(count, 3, 16, 16), 'image_raw': torch.randn(count, 3, raw_size, raw_size)}


def label_of(network, count=4):
    return torch.randn(count, network.config.c_dim + network.config.c2_dim)


# ---- Minibatch statistics


def minibatch_std_by_loops(x, group_size, num_channels):
    n, c, h, w = x.shape
    group = min(group_size, n)
    num_groups, width = n // group, c // num_channels
    extra = torch.zeros(n, num_channels, h, w, dtype=x.dtype)
    for sample in range(n):
        members = [m for m in range(n) if m % num_groups == sample % num_groups]
        for k in range(num_channels):
            deviations = []
            for channel in range(k * width, (k + 1) * width):
                for position in range(h * w):
                    values = [x[m, channel].flatten()[position].item() for m in members]
                    mean = sum(values) / len(values)
                    deviations.append(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-8))
            extra[sample, k] = sum(deviations) / len(deviations)
    return torch.cat([x, extra], dim=1)


@pytest.mark.parametrize('batch, group_size, num_channels', [
    (4, 4, 1), (8, 4, 1), (6, 2, 1), (6, 3, 2), (2, 4, 1), (1, 4, 1), (3, 1, 2)
])
def test_minibatch_std_is_a_loop_over_groups(batch, group_size, num_channels):
    x = torch.randn(batch, 4, 2, 3).double()
    actual = append_minibatch_std(x, group_size, num_channels)
    torch.testing.assert_close(actual, minibatch_std_by_loops(x, group_size, num_channels))
    assert torch.equal(actual[:, :4], x)


def test_batches_have_to_be_whole_groups():
    for batch, group_size in ((5, 4), (6, 4), (3, 2)):
        with pytest.raises(ValueError, match=f'batch: expected a multiple of the group size {group_size}, got {batch}'):
            append_minibatch_std(torch.randn(batch, 2, 4, 4), group_size)
    network = discriminator()
    with pytest.raises(ValueError, match='batch: '):
        network(pictures(6), label_of(network, 6))


def test_samples_see_each_other_through_the_statistics_alone():
    network = discriminator(mbstd_num_channels=0)
    inputs, c = pictures(), label_of(network)
    logits = network(inputs, c)
    assert logits.shape == (4, 1)
    for i in range(4):
        alone = network({key: x[i : i + 1] for key, x in inputs.items()}, c[i : i + 1])
        torch.testing.assert_close(alone, logits[i : i + 1], rtol=1e-4, atol=1e-4)
    grouped = discriminator(mbstd_group_size=2)
    logits = grouped(inputs, c)
    changed = {key: x.clone() for key, x in inputs.items()}
    changed['image'][1] *= 20
    difference = (grouped(changed, c) - logits).abs().flatten()
    assert min(difference[1], difference[3]) > 1e-2  # Samples 1 and 3 share a group, 0 and 2 the other.
    assert max(difference[0], difference[2]) < 1e-4


# ---- Pictures


def test_dual_sees_the_raw_picture_resized():
    network = discriminator()
    c = label_of(network)
    for raw_size in (4, 8, 16, 20):
        inputs = pictures(raw_size=raw_size)
        resized = inputs | {'image_raw': resize_antialiased(inputs['image_raw'], 16)}
        torch.testing.assert_close(network(resized, c), network(inputs, c))
        other = inputs | {'image_raw': torch.randn(4, 3, raw_size, raw_size)}
        assert not torch.allclose(network(other, c), network(inputs, c), atol=1e-3)
    assert network.b16.fromrgb.weight.shape[1] == 6


def test_single_ignores_the_raw_picture():
    network = discriminator(kind='single')
    inputs, c = pictures(), label_of(network)
    logits = network(inputs, c)
    assert torch.equal(network({'image': inputs['image']}, c), logits)
    assert torch.equal(network(inputs | {'image_raw': torch.full([4, 3, 2, 2], torch.nan)}, c), logits)
    assert network.b16.fromrgb.weight.shape[1] == 3 and 'resample_filter' not in network.state_dict()


def with_rendering(inputs, size=12):
    return inputs | {'render': torch.randn(len(inputs['image']), 3, size, size)}


@pytest.mark.parametrize('kind, c2_dim, channels', [('single', 0, 6), ('dual', 0, 9), ('dual_label', 50, 9)])
def test_a_rendering_comes_last(kind, c2_dim, channels):
    network = discriminator(kind=kind, c2_dim=c2_dim, render_channels=3)
    weight = network.b16.fromrgb.weight
    assert weight.shape[1] == channels
    inputs, c = with_rendering(pictures()), label_of(network)
    logits = network(inputs, c)
    resized = inputs | {'render': resize_antialiased(inputs['render'], 16)}
    torch.testing.assert_close(network(resized, c), logits)
    assert not torch.allclose(network(with_rendering(inputs), c), logits, atol=1e-3)
    plain = discriminator(kind=kind, c2_dim=c2_dim)
    with torch.no_grad():
        weight[:, -3:] = 0
        # A layer scales its weights by the root of the number of its inputs.
        state = network.state_dict() | {'b16.fromrgb.weight': weight[:, :-3] * math.sqrt((channels - 3) / channels)}
    plain.load_state_dict(state)
    torch.testing.assert_close(network(inputs, c), plain(inputs, c))


def test_configs_without_renderings_load_as_before():
    old = {name: value for name, value in DiscriminatorConfig(**TINY).to_dict().items() if name != 'render_channels'}
    assert DiscriminatorConfig.from_dict(old) == DiscriminatorConfig(**TINY)
    new = DiscriminatorConfig(**TINY, render_channels=3)
    assert DiscriminatorConfig.from_dict(new.to_dict()) == new


@pytest.mark.parametrize('message, change', [
    (r'render: .* \[4, 3, \*, \*\], got \[4, 1, 12, 12\]', lambda x: x | {'render': x['render'][:, :1]}),
    (r'render: .* \[4, 3, \*, \*\], got \[2, 3, 12, 12\]', lambda x: x | {'render': x['render'][:2]}),
    (r'render: expected pictures beside image, got none', lambda x: {'image': x['image'], 'image_raw': x['image_raw']}),
    (r'image_raw: expected pictures beside image, got none', lambda x: {'image': x['image'], 'render': x['render']}),
])
def test_messages_of_missing_and_odd_renderings(message, change):
    network = discriminator(render_channels=3)
    with pytest.raises(ValueError, match=message):
        network(change(with_rendering(pictures())), label_of(network))


# ---- Labels


def test_logit_is_the_projection_on_the_embedded_label():
    network = discriminator()
    inputs, c = pictures(), label_of(network)
    features = []
    network.b4.register_forward_hook(lambda module, x, y: features.append(y))
    logits = network(inputs, c)
    embedded = network.mapping(None, c)
    assert embedded.shape == features[0].shape == (4, 6)
    torch.testing.assert_close(logits, (features[0] * embedded).sum(dim=1, keepdim=True) / math.sqrt(6))
    unconditional = discriminator(c_dim=0)
    assert unconditional(inputs, None).shape == (4, 1) and not hasattr(unconditional, 'mapping')


def test_split_label():
    network = discriminator(kind='dual_label', c2_dim=50)
    inputs, c = pictures(), label_of(network)
    embedded = network._embed(c)
    assert network.cmap_dim == 6 + EXPRESSION_EMBEDDING and embedded.shape == (4, network.cmap_dim)
    torch.testing.assert_close(embedded[:, :6], network.mapping(None, c[:, :25]))
    torch.testing.assert_close(embedded[:, 6:], network.mapping2(None, c[:, 25:]))
    logits = network(inputs, c)
    for part in (slice(0, 25), slice(25, 75)):
        changed = c.clone()
        changed[:, part] = torch.randn_like(changed[:, part])
        assert not torch.allclose(network(inputs, changed), logits, atol=1e-3)


@pytest.mark.parametrize('kind, c2_dim', [('dual', 0), ('single', 0), ('dual_label', 50)])
def test_label_noise(kind, c2_dim):
    network, plain = (discriminator(kind=kind, c2_dim=c2_dim, disc_c_noise=noise) for noise in (0.7, 0.0))
    plain.load_state_dict(network.state_dict())
    inputs, c = pictures(), label_of(network) * torch.linspace(0, 3, 25 + c2_dim)
    kept = c.clone()
    torch.manual_seed(3)
    noisy = network(inputs, c)
    again = network(inputs, c)
    assert torch.equal(c, kept)
    torch.manual_seed(3)
    expected = plain(inputs, c + torch.randn(c.shape) * c.std(dim=0) * 0.7)
    torch.testing.assert_close(noisy, expected)
    assert not torch.allclose(noisy, again) and not torch.allclose(noisy, plain(inputs, c))
    one = {key: x[:1] for key, x in inputs.items()}
    assert torch.equal(network(one, c[:1]), plain(one, c[:1])) and plain(one, c[:1]).isfinite().all()


# ---- Gradients

INPUTS = {
    'random': lambda count: pictures(count),
    'all the same': lambda count: {key: x[:1].expand(count, -1, -1, -1) for key, x in pictures(1).items()},
    'black': lambda count: {key: torch.zeros_like(x) for key, x in pictures(count).items()},
}


@pytest.mark.parametrize('count', [1, 4])
@pytest.mark.parametrize('name', INPUTS)
def test_second_gradients_are_finite_and_reach_every_parameter(name, count):
    network = discriminator(disc_c_noise=0.1)
    inputs = {key: x.detach().requires_grad_(True) for key, x in INPUTS[name](count).items()}
    logits = network(inputs, label_of(network, count))
    first = torch.autograd.grad(logits.sum(), list(inputs.values()), create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    assert penalty > 0
    (penalty + torch.nn.functional.softplus(logits).sum()).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        if name == 'random':
            assert parameter.grad.any(), parameter_name


def test_gradients_of_minibatch_std():
    x = torch.randn(4, 2, 2, 1).double().requires_grad_(True)
    for group_size in (2, 4):
        function = functools.partial(append_minibatch_std, group_size=group_size)
        assert gradcheck(function, [x]) and gradgradcheck(function, [x])


# ---- Names and bad calls


def test_names_of_parameters():
    layer = {'weight', 'bias', 'resample_filter'}
    block = {f'{conv}.{n}' for conv in ('conv0', 'conv1') for n in layer}
    block |= {'skip.weight', 'skip.resample_filter', 'resample_filter'}
    expected = {f'b{r}.{n}' for r in (16, 8) for n in block} | {f'b16.fromrgb.{n}' for n in layer}
    dense = ('b4.fc', 'b4.out', 'mapping.embed', 'mapping.fc0', 'mapping.fc1')
    expected |= {f'b4.conv.{n}' for n in layer} | {f'{fc}.{kind}' for fc in dense for kind in ('weight', 'bias')}
    assert set(discriminator().state_dict()) == expected | {'resample_filter'}


BAD_CALLS = {
    r'image: expected \[N, 3, 16, 16\], got \[4, 3, 8, 8\]': lambda d, x, c: d(x | {'image': x['image_raw']}, c),
    r'image: expected \[N, 3, 16, 16\], got \[4, 2, 16, 16\]': lambda d, x, c: d(x | {'image': x['image'][:, :2]}, c),
    r'image_raw: .* \[4, 3, \*, \*\], got \[2, 3, 8, 8\]': lambda d, x, c: d(x | {'image_raw': x['image_raw'][:2]}, c),
    r'image_raw: .* got \[4, 1, 8, 8\]': lambda d, x, c: d(x | {'image_raw': x['image_raw'][:, :1]}, c),
    r'c: expected \[N, 25\], got \[4, 24\]': lambda d, x, c: d(x, c[:, :24]),
    r'c: expected \[N, 25\], got None': lambda d, x, c: d(x, None),
    r'c: expected 4 labels, one per picture, got 1': lambda d, x, c: d(x, c[:1]),
}


@pytest.mark.parametrize('message', BAD_CALLS)
def test_messages_of_bad_calls(message):
    network = discriminator()
    with pytest.raises(ValueError, match=message):
        BAD_CALLS[message](network, pictures(), label_of(network))


BAD_CONFIGS = {
    'kind: expected one of single, dual, dual_label': dict(kind='triple'),
    "c2_dim: expected above 0 for kind 'dual_label' alone, got 50 for 'dual'": dict(c2_dim=50),
    "c2_dim: .* got 0 for 'dual_label'": dict(kind='dual_label'),
    'img_resolution: expected a power of two >= 8, got 4': dict(img_resolution=4),
    'render_channels: expected 0 or 3, got 1': dict(render_channels=1),
}


@pytest.mark.parametrize('message', BAD_CONFIGS)
def test_messages_of_bad_configs(message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorConfig(**TINY | BAD_CONFIGS[message])
