# SPDX-License-Identifier: Apache-2.0
"""Sub-networks against the published implementation: StyleGAN2, StyleUNets, super-resolution, discriminators."""

import parity
import pytest
import torch
from parity import agrees, agrees_in_some_rounding, fill, last_bits_moved, rnd

from training.backbone import Backbone, StyleUNetSynthesis, SynthesisNetwork
from training.config import DiscriminatorConfig, MappingConfig
from training.discriminator import Discriminator
from training.superresolution import Superresolution, resize_antialiased

UNET_ARGUMENTS = ('in_size', 'final_size', 'cond_channels', 'num_cond_res')


def backbone(kwargs):
    """Build a backbone from published constructor arguments."""
    unet = {k: kwargs[k] for k in UNET_ARGUMENTS if k in kwargs}
    network = StyleUNetSynthesis if unet else SynthesisNetwork
    synthesis = network(
        kwargs['w_dim'],
        kwargs['img_resolution'],
        kwargs['img_channels'],
        channel_base=kwargs['channel_base'],
        channel_max=kwargs['channel_max'],
        conv_clamp=kwargs['conv_clamp'],
        **unet,
    )
    return Backbone(
        kwargs['z_dim'], kwargs['c_dim'], kwargs['w_dim'], synthesis, mapping_kwargs=kwargs['mapping_kwargs']
    )


def discriminator(kwargs, kind='dual', **overrides):
    """Build a discriminator from published constructor arguments."""
    return Discriminator(
        DiscriminatorConfig(
            kind=kind,
            c_dim=kwargs['c_dim'],
            c2_dim=kwargs.get('c2_dim', 0),
            img_resolution=kwargs['img_resolution'],
            channel_base=kwargs['channel_base'],
            channel_max=kwargs['channel_max'],
            num_fp16_res=kwargs['num_fp16_res'],
            mbstd_group_size=kwargs['epilogue_kwargs']['mbstd_group_size'],
            mapping=MappingConfig(num_layers=8),
            **{'conv_clamp': kwargs['conv_clamp'], 'disc_c_noise': kwargs.get('disc_c_noise', 0), **overrides},
        )
    )


def test_stylegan2():
    info, a = parity.load('net_stylegan2')
    g = fill(backbone(info['kwargs']), info['state'], info['seed']).eval()
    z, c = torch.from_numpy(a['z']), torch.from_numpy(a['c'])
    agrees('mapping', g.mapping(z, c), a['ws'], 'network')
    agrees('mapping, truncated', g.mapping(z, c, 0.7), a['ws_t07'], 'network')
    agrees('mapping, truncated', g.mapping(z, c, 0.7, 5), a['ws_t07_c5'], 'network')
    agrees('mapping, truncated', g.mapping(z, c, 0.0), a['ws_t0'], 'network')
    g.mapping.track(g.mapping(z, c)[:, 0])
    agrees('w_avg update', g.mapping.w_avg, a['w_avg_after_update'], 'network')
    ws = torch.from_numpy(a['ws_in']).requires_grad_(True)
    for mode in ('const', 'none', 'random'):
        if f'img_{mode}' in a:
            with parity.sequence_draws():
                agrees(f'StyleGAN2 synthesis, noise {mode}', g.synthesis(ws, mode), a[f'img_{mode}'], 'network')
    g.train()
    image = g.synthesis(ws, 'const')
    (image * rnd('sg2/dy', image.shape, info['seed'])).sum().backward()
    agrees('StyleGAN2 synthesis, gradient of w', ws.grad, a['dws'], 'gradient')
    for name, parameter in g.named_parameters():
        if name in info['grad_norms']:
            agrees('StyleGAN2 synthesis, gradient norms', parameter.grad.norm(), info['grad_norms'][name], 'gradient')
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize('part', ['mouth', 'blend'])
def test_styleunet(part):
    info, a = parity.load(f'net_styleunet_{part}')
    g = fill(backbone(info['kwargs']), info['state'], info['seed']).eval()
    side = info['kwargs']['in_size']
    inputs = rnd(f'unet/{part}/x', (2, 32, side, side), info['input_seed'])
    ws = torch.from_numpy(a['ws']).requires_grad_(True)
    label = f'StyleUNet ({part})'
    y = g.synthesis(inputs, ws, 'const')
    agrees(label, y[:, :, 100:132, 90:122], a['y_crop'], 'network')
    agrees(label, y.mean(dim=[2, 3]), a['y_mean'], 'network')
    if 'y_s4' in a:  # Not in the subset of a bare clone.
        agrees(label, y[..., ::4, ::4], a['y_s4'], 'network')
        agrees(label, g.synthesis(inputs, ws, 'none')[..., ::8, ::8], a['ynone_s8'], 'network')
    for i, features in enumerate(g.synthesis.encode(inputs)):
        step = features.shape[-1] // a[f'enc{i}'].shape[-1]
        agrees(f'{label}, encoder', features[..., ::step, ::step], a[f'enc{i}'], 'network')
    g.train()

    def check_gradients(seed):
        for tensor in (ws, *g.parameters()):
            tensor.grad = None
        x = last_bits_moved(inputs, seed).clone().requires_grad_(True)
        (g.synthesis(x, ws, 'const') * rnd(f'unet/{part}/dy', y.shape, info['input_seed'])).sum().backward()
        for name, dx in (('dx', x.grad), ('dx_s4', x.grad[..., ::4, ::4])):
            if name in a:
                agrees(f'{label}, gradients', dx, a[name], 'gradient')
        agrees(f'{label}, gradients', ws.grad, a['dws'], 'gradient')
        for name, norm in info['grad_norms'].items():
            agrees(f'{label}, gradient norms', g.get_parameter(name).grad.norm(), norm, 'gradient')

    agrees_in_some_rounding(check_gradients)
    without = {name for name, p in g.named_parameters() if p.grad is None}
    assert without == set(info['params_without_grad'])


def superresolution_cases():
    keys = ('8XDC_64', '8XDC_128', '8XDC_160', '8X_64', '4X_64', '4X_128', '2X_64', '2X_32')
    return [f'SuperresolutionHybrid{key}' for key in keys]


@pytest.mark.parametrize('key', superresolution_cases())
def test_superresolution(key):
    info, a = parity.load('net_superresolution')
    case = next(v for v in info['variants'] if v['key'] == key)
    s = Superresolution(case['cls'], 32, 512, antialias=case['kwargs']['sr_antialias'])
    fill(s, case['state'], info['seed']).eval().requires_grad_(False)
    r = case['rin']
    rgb = rnd(f'sr/rgb{r}', (1, 3, r, r), info['input_seed'], 0.5)
    x = rnd(f'sr/x{r}', (1, 32, r, r), info['input_seed'])
    x[:, :3] = rgb
    ws = torch.from_numpy(a['ws'])
    for mode in ('none', 'const') if r == 64 else ('none',):
        y = s(rgb, x, ws, mode)
        if f'{key}_{mode}' in a:
            agrees(f'{case["cls"]}', y[..., :: case['stride'], :: case['stride']], a[f'{key}_{mode}'], 'network')
        if mode == 'none':
            agrees(f'{case["cls"]}', y[..., :32, :32], a[f'{key}_crop'], 'network')


def r1(d, images, c):
    """Return logits, gradients of their sum with respect to the images, and the penalty per sample."""
    logits = d(images, c)
    gradients = torch.autograd.grad(logits.sum(), list(images.values()), create_graph=True)
    return logits, gradients, sum(g.square().sum([1, 2, 3]) for g in gradients)


def check_gradient_norms(label, d, norms, sums=()):
    """Compare norms of gradients; `sums`: how names of those begin that are summed over a million pixels."""
    for name, norm in norms.items():
        grad = d.get_parameter(name).grad
        # A bias in front of the last layer leaves the penalty as it is: the reference has an exact zero or no gradient.
        value = torch.zeros([]) if grad is None else grad.norm()
        agrees(label, value, norm, 'sum' if name.startswith(tuple(sums)) else 'gradient')


def test_discriminator():
    info, a = parity.load('net_discriminator64')
    d = fill(discriminator(info['kwargs'], 'single'), info['state'], info['seed']).train()
    img = torch.from_numpy(a['img']).requires_grad_(True)
    logits, (gradient,), penalty = r1(d, {'image': img}, torch.from_numpy(a['c']))
    agrees('discriminator (single)', logits, a['logits'], 'network')
    agrees('discriminator (single), R1', gradient, a['r1_grad'], 'gradient')
    agrees('discriminator (single), R1', penalty, a['r1_penalty'], 'gradient')
    penalty.mean().backward()
    agrees('discriminator (single), R1 second gradient', img.grad, a['img_grad2'], 'gradient')
    check_gradient_norms('discriminator (single), R1 second gradient', d, info['grad_norms'])


def test_dual_discriminator():
    info, a = parity.load('net_dual_discriminator')
    d = fill(discriminator(info['kwargs']), info['state'], info['seed']).train()
    seed, c = info['seed'], torch.from_numpy(a['c'])
    image = rnd('d/img', (4, 3, 512, 512), seed, 0.5).requires_grad_(True)
    raw = rnd('d/raw', (4, 3, 64, 64), seed, 0.5).requires_grad_(True)
    logits, (d_image, d_raw), penalty = r1(d, {'image': image, 'image_raw': raw}, c)
    agrees('discriminator (dual)', logits, a['logits'], 'network')
    agrees('discriminator (dual), R1', d_image[..., ::4, ::4], a['r1_image_s4'], 'gradient')
    agrees('discriminator (dual), R1', d_image[..., 250:282, 240:272], a['r1_image_crop'], 'gradient')
    agrees('discriminator (dual), R1', d_raw, a['r1_raw'], 'gradient')
    agrees('discriminator (dual), R1', penalty, a['r1_penalty'], 'gradient')
    (penalty * 2).mean().backward()
    sums = ['b512.fromrgb', 'b512.conv0']
    check_gradient_norms('discriminator (dual), R1 second gradient', d, info['grad_norms'], sums)
    d.requires_grad_(False)
    pair = {'image': image.detach(), 'image_raw': raw.detach()}
    agrees('discriminator (dual)', d({k: v[:2] for k, v in pair.items()}, c[:2]), a['logits_b2'], 'network')
    raw128 = rnd('d/raw128', (4, 3, 128, 128), seed, 0.5)
    agrees('discriminator (dual)', d({**pair, 'image_raw': raw128}, c), a['logits_raw128'], 'network')
    resized = resize_antialiased(image.detach()[:1, :, :256, :256], 64)
    agrees('antialiased resize', resized[..., ::2, ::2], a['resize_antialiased'], 'op')
    agrees('antialiased resize', resize_antialiased(pair['image_raw'][:1], 256)[..., ::4, ::4], a['resize_up'], 'op')


def test_label_noise_is_the_published_one_but_leaves_the_label_alone():
    info, a = parity.load('net_dual_discriminator')
    d = fill(discriminator(info['kwargs'], disc_c_noise=1), info['state'], info['seed']).eval()
    image = rnd('d/img', (4, 3, 512, 512), info['seed'], 0.5)
    raw = rnd('d/raw', (4, 3, 64, 64), info['seed'], 0.5)
    c = torch.from_numpy(a['c'])
    with parity.sequence_draws(), torch.no_grad():
        agrees('discriminator, label noise', d._with_noise(c), a['c_after_cnoise1'], 'op')
        agrees('discriminator, label noise', d({'image': image, 'image_raw': raw}, c), a['logits_cnoise1'], 'network')
    assert torch.equal(c, torch.from_numpy(a['c']))


@pytest.mark.parametrize('cls, kind', [('SingleDiscriminator', 'single'), ('DualLabelDualDiscriminator', 'dual_label')])
def test_discriminator_variants(cls, kind):
    info, a = parity.load('net_discriminator_variants')
    _, inputs = parity.load('net_dual_discriminator')
    case = next(v for v in info['variants'] if v['cls'] == cls)
    d = fill(discriminator(case['kwargs'], kind), case['state'], info['seed']).eval()
    c = torch.from_numpy(inputs['c'])
    if kind == 'dual_label':
        c = torch.cat([c, rnd('d/exp', (4, 50), info['input_seed'])], dim=1)
    image = rnd('d/img', (4, 3, 512, 512), info['input_seed'], 0.5)
    raw = rnd('d/raw', (4, 3, 64, 64), info['input_seed'], 0.5)
    with torch.no_grad():
        agrees(f'discriminator ({kind})', d({'image': image, 'image_raw': raw}, c), a[cls], 'network')


def test_clamps_and_minibatch_groups():
    info, a = parity.load('net_clamp_groups')
    c, seed = torch.from_numpy(a['c']), info['seed']
    image = rnd('x/img', (8, 3, 64, 64), seed, 3).requires_grad_(True)
    raw = rnd('x/raw', (8, 3, 64, 64), seed, 3)
    for clamp, expected in ((2.0, 'logits'), (None, 'logits_no_clamp')):
        d = fill(discriminator(info['kwargs'], conv_clamp=clamp), info['state'], seed).eval()
        logits = d({'image': image, 'image_raw': raw}, c)
        agrees('clamps and minibatch-std groups', logits, a[expected], 'network')
        if clamp:
            (gradient,) = torch.autograd.grad(logits.sum(), image)
            agrees('clamps, gradient', gradient[..., ::2, ::2], a['d_image_s2'], 'gradient')
    synthesis = SynthesisNetwork(32, 32, 3, channel_base=512, channel_max=16, conv_clamp=1)
    fill(synthesis, info['synthesis_state'], seed + 1).eval()
    ws = rnd('x/ws', (2, synthesis.num_ws, 32), seed + 1)
    agrees('clamps in synthesis', synthesis(ws, 'const'), a['synthesis'], 'network')
