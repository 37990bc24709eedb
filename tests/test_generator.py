# SPDX-License-Identifier: Apache-2.0
"""The whole forward on tiny networks: its parts agree, depend on what they should alone, and change nothing."""

import copy
import dataclasses
import functools
import json
import math

import helpers
import pytest
import torch
from helpers import HEAD
from simple_head import DEMO_HEAD, simple_head, uv_face_mask

from geometry import cameras
from training.config import EG3DConfig, MappingConfig, Next3DConfig
from training.generator import Decoder, EG3DGenerator, Next3DGenerator
from training.volume.render import SamplingConfig

TINY = dict(
    **helpers.TINY,
    mapping=MappingConfig(num_layers=2),
    neural_rendering_resolution=6,
    sampling=SamplingConfig(num_depths=6, num_importance=5),
)
TOLERANCE = dict(rtol=1e-3, atol=2e-4)  # Rounding of other batch sizes, through four networks.


@functools.cache
def topology():
    head = simple_head()
    mask = torch.from_numpy(uv_face_mask()).float()[None, None] / 255
    return head.faces, head.uvs, head.uv_faces, mask


@functools.cache
def meshes():
    """Vertices and landmarks [3, V + 68, 3] of three expressions."""
    heads = simple_head(), simple_head(jaw_open=1.0), simple_head(**DEMO_HEAD)
    return torch.stack([torch.cat([torch.tensor(h.vertices), torch.tensor(h.landmarks)]) for h in heads])


def random_weights(network, seed=0):
    """Give a network random weights, those that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            scale = 0.3 if parameter.ndim <= 1 else 100 if '.mapping.fc' in name else 1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            if name.endswith('affine.bias'):
                parameter.add_(1)
        for name, buffer in network.named_buffers():
            if name.endswith(('noise_const', 'w_avg')):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return network


def next3d(**overrides):
    return random_weights(Next3DGenerator(Next3DConfig(**TINY | HEAD | overrides), *topology())).eval()


def eg3d(**overrides):
    return random_weights(EG3DGenerator(EG3DConfig(**TINY | overrides))).eval()


@pytest.fixture(scope='module')
def shared():
    """A network that tests only read."""
    return next3d()


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def labels(count=3):
    yaws = torch.linspace(-0.4, 0.4, count)
    poses = torch.cat([cameras.look_at_pose(cameras.FRONTAL + float(yaw), cameras.FRONTAL - 0.1) for yaw in yaws])
    return cameras.make_label(poses, cameras.intrinsics())


def random_ws(network, count=3):
    return torch.randn(count, network.num_ws, network.w_dim)


def assert_same(actual, expected, **tolerance):
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor, **tolerance, msg=f'{{}} in {key}'.format)


# ---- The parts agree


def test_sizes(shared):
    z, c, v = torch.randn(3, 8), labels(), meshes()
    assert (shared.z_dim, shared.c_dim, shared.w_dim, shared.num_ws, shared.num_style_ws) == (8, 25, 8, 16, 8)
    assert shared.num_vertices == v.shape[1] - 68 and shared.img_resolution == 128
    ws = shared.mapping(z, c)
    planes = shared.planes(ws, v)
    assert ws.shape == (3, 16, 8) and planes.planes.shape == (3, 3, 4, 32, 32)
    out = shared.render(planes, ws, c)
    assert {k: tuple(x.shape) for k, x in out.items()} == {
        'image': (3, 3, 128, 128), 'image_raw': (3, 3, 6, 6), 'image_depth': (3, 1, 6, 6)
    }
    field = shared.query(planes, torch.zeros(3, 7, 3))
    assert field['sigma'].shape == (3, 7, 1) and field['rgb'].shape == (3, 7, 4)


def test_synthesis_is_render_of_planes_and_forward_of_mapping(shared):
    z, c, v = torch.randn(2, 8), labels(2), meshes()[:2]
    ws = shared.mapping(z, c, 0.7, 3)
    expected = shared.render(shared.planes(ws, v, 'none'), ws, c, 5, 'center')
    assert_same(shared.synthesis(ws, c, v, 'none', 5, 'center'), expected, rtol=0, atol=0)
    options = dict(noise_mode='none', neural_rendering_resolution=5, depth_jitter='center')
    assert_same(shared(z, c, v, 0.7, 3, **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize('build', [next3d, eg3d])
def test_query_and_render_see_the_same_field(build):
    sampling = SamplingConfig(num_depths=7, num_importance=0, near=2.2, far=3.2, box_warp=1.1)
    network = build(sampling=sampling)
    c, ws = labels(2), random_ws(network, 2)
    planes = network.planes(ws, meshes()[:2]) if build is next3d else network.planes(ws)
    out = network.render(planes, ws, c, 3)
    poses, k = cameras.split_label(c)
    for sample, (row, column) in ((0, (0, 0)), (0, (1, 1)), (1, (2, 0)), (1, (0, 2))):
        focal = k[sample, 0, 0]
        local = torch.stack([((column + 0.5) / 3 - 0.5) / focal, ((row + 0.5) / 3 - 0.5) / focal, torch.ones([])])
        direction = poses[sample, :3, :3] @ local / local.norm()
        depths = [2.2 + (i + 0.5) / 6 for i in range(7)]
        points = torch.stack([poses[sample, :3, 3] + t * direction for t in depths])
        field = network.query(planes, points[None].expand(2, -1, -1))
        sigma, rgb = field['sigma'][sample, :, 0].tolist(), field['rgb'][sample]
        colour, depth, total, passed = torch.zeros(4), 0.0, 0.0, 1.0
        for i in range(6):
            density = math.log1p(math.exp((sigma[i] + sigma[i + 1]) / 2 - 1))
            alpha = 1 - math.exp(-density * (depths[i + 1] - depths[i]))
            colour = colour + passed * alpha * (rgb[i] + rgb[i + 1]) / 2
            depth += passed * alpha * (depths[i] + depths[i + 1]) / 2
            total += passed * alpha
            passed *= 1 - alpha
        torch.testing.assert_close(out['image_raw'][sample, :, row, column], 2 * colour[:3] - 1, **TOLERANCE)
        assert out['image_depth'][sample, 0, row, column].item() == pytest.approx(depth / total, abs=1e-3)


@pytest.mark.parametrize('layout', ['next3d', 'aligned'])
def test_batch_equals_loop(layout):
    network = next3d(plane_layout=layout)
    ws, c, v = random_ws(network), labels(), meshes()
    batch = network.synthesis(ws, c, v)
    assert (batch['image'][0] - batch['image'][1]).abs().max() > 0.1
    for i in range(3):
        alone = network.synthesis(ws[i : i + 1], c[i : i + 1], v[i : i + 1])
        assert_same(alone, {key: x[i : i + 1] for key, x in batch.items()}, **TOLERANCE)


def test_inference_is_deterministic_and_training_draws(shared):
    ws, c, v = random_ws(shared), labels(), meshes()
    assert_same(shared.synthesis(ws, c, v), shared.synthesis(ws, c, v), rtol=0, atol=0)
    planes = shared.planes(ws, v)
    assert torch.equal(shared.planes(ws, v).planes, planes.planes)
    assert not torch.equal(shared.planes(ws, v, 'random').planes, planes.planes)
    assert not torch.equal(*(shared.render(planes, ws, c, depth_jitter='random')['image_raw'] for _ in range(2)))
    network = copy.deepcopy(shared).train()
    assert not torch.equal(*(network.render(planes, ws, c)['image_raw'] for _ in range(2)))
    assert_same(network.render(planes, ws, c, depth_jitter='center'), shared.render(planes, ws, c), **TOLERANCE)
    draws = []
    shared.render(planes, ws, c, depth_jitter=lambda shape: draws.append(list(shape)) or torch.rand(shape))
    assert draws == [[3, 36, 6, 1], [3 * 36, 5]]


@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize('build', [next3d, eg3d])
def test_no_forward_changes_the_network_or_its_inputs(build, is_training):
    network = build().train(is_training)
    z, c, v = torch.randn(2, 8), labels(2), meshes()[:2].clone()
    mesh = (v,) if build is next3d else ()
    before, inputs = copy.deepcopy(network.state_dict()), [x.clone() for x in (z, c, v)]
    attributes = {name: repr(value) for name, value in vars(network).items() if not name.startswith('_')}
    ws = network.mapping(z, c, 0.5)
    kept = ws.clone()
    planes = network.planes(ws, *mesh, 'random')
    network.render(planes, ws, c, 4)
    network.query(planes, torch.zeros(2, 3, 3))
    network(z, c, *mesh, noise_mode='random', neural_rendering_resolution=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(torch.equal(x, y) for x, y in zip((z, c, v, ws), (*inputs, kept)))
    assert {name: repr(value) for name, value in vars(network).items() if not name.startswith('_')} == attributes
    assert network.training is is_training


# ---- What depends on what


def test_halves_of_ws(shared):
    ws, v, c = random_ws(shared, 1), meshes()[:1], labels(1)
    style, texture = ws.clone(), ws.clone()
    style[:, :8] = torch.randn(1, 8, 8)
    texture[:, 8:] = torch.randn(1, 8, 8)
    assert torch.equal(shared.texture(style), shared.texture(ws))
    assert not torch.allclose(shared.texture(texture), shared.texture(ws), atol=0.1)
    front = torch.randn(1, 4, 32, 32)
    for call in (
        shared.static_planes,
        lambda ws: shared.complete_mouth(front, v, ws),
        lambda ws: shared.superresolution(front[:, :3], front, shared._ws_of('superresolution', ws)),
    ):
        assert torch.equal(call(texture), call(ws))
        assert not torch.allclose(call(style), call(ws), atol=0.1)
    planes = shared.planes(ws, v)
    assert_same(shared.render(planes, texture, c), shared.render(planes, ws, c), rtol=0, atol=0)
    assert not torch.allclose(shared.planes(texture, v).planes, planes.planes, atol=0.1)


def test_each_texture_layer_has_a_w_of_its_own(shared):
    ws = random_ws(shared, 1).requires_grad_(True)
    shared.texture(ws).square().sum().backward()
    used = ws.grad.abs().sum(dim=[0, 2]) > 0
    assert used.tolist() == [False] * 8 + [True] * 8
    ws.grad = None
    shared.static_planes(ws).square().sum().backward()
    assert (ws.grad.abs().sum(dim=[0, 2]) > 0).tolist() == [True] * 8 + [False] * 8


def test_superresolution_reads_the_last_style_w_alone(shared):
    ws = random_ws(shared, 1).requires_grad_(True)
    planes = shared.planes(ws.detach(), meshes()[:1])
    shared.render(planes, ws, labels(1))['image'].square().sum().backward()
    assert (ws.grad.abs().sum(dim=[0, 2]) > 0).nonzero().tolist() == [[7]]


def test_truncation_cutoff(shared):
    z, c = torch.randn(2, 8), labels(2)
    full, half = shared.mapping(z, c), shared.mapping(z, c, 0.5, shared.num_style_ws)
    mean = shared.backbone.mapping.w_avg
    torch.testing.assert_close(half[:, :8], (mean + full[:, :8]) / 2)
    assert torch.equal(half[:, 8:], full[:, 8:])  # The texture is not truncated.
    torch.testing.assert_close(shared.mapping(z, c, 0.5), (mean + full) / 2)


def test_only_the_first_25_numbers_of_a_label_count(shared):
    z, c, v = torch.randn(2, 8), labels(2), meshes()[:2]
    longer = torch.cat([c, torch.randn(2, 50)], dim=1)
    ws = shared.mapping(z, c)
    assert torch.equal(shared.mapping(z, longer), ws)
    assert_same(shared.synthesis(ws, longer, v), shared.synthesis(ws, c, v), rtol=0, atol=0)


def test_conditioning():
    z, c = torch.randn(2, 8), labels(2)
    other = c + torch.randn(2, 25)
    plain = next3d()
    assert not torch.allclose(plain.mapping(z, other), plain.mapping(z, c))
    scaled = next3d(c_scale=0.25)
    assert torch.equal(scaled.mapping(z, c), plain.mapping(z, c * 0.25))
    unconditional = next3d(c_gen_conditioning_zero=True)
    assert torch.equal(unconditional.mapping(z, other), unconditional.mapping(z, c))
    assert torch.equal(unconditional.mapping(z, c), plain.mapping(z, torch.zeros_like(c)))
    without = next3d(c_dim=0)
    assert torch.equal(without.mapping(z, None), without.mapping(z, c))


def test_planes_blend_by_alpha():
    networks = {kind: next3d(blend_planes=kind, plane_layout='aligned') for kind in ('all', 'front')}
    whole = networks['all']
    ws, v = random_ws(whole, 2), meshes()[:2]
    static, head = whole.static_planes(ws), whole.rasterize(whole.texture(ws), v)
    front = whole.complete_mouth(head.features[:, 0], v, ws)
    planes = {kind: network.planes(ws, v).planes for kind, network in networks.items()}
    assert torch.equal(planes['front'][:, 1:], static[:, 1:])
    torch.testing.assert_close(planes['front'][:, 0], planes['all'][:, 0])
    dynamic = torch.stack([front, head.features[:, 1], head.features[:, 2]], dim=1)
    assert head.alpha.min() == 0 and head.alpha.max() == 1
    for where, expected in ((0, static), (1, dynamic)):
        mask = (head.alpha == where).expand_as(static)
        assert mask.float().mean() > 0.02
        torch.testing.assert_close(planes['all'][mask], expected[mask])
    torch.testing.assert_close(planes['all'], static + head.alpha * (dynamic - static), rtol=1e-4, atol=1e-5)


def test_landmarks_place_the_mouth_and_vertices_the_head(shared):
    ws, v = random_ws(shared, 1), meshes()[:1]
    moved = v.clone()
    moved[:, -68:, 1] += 0.05
    before, after = shared.planes(ws, v).planes, shared.planes(ws, moved).planes
    assert torch.equal(before[:, 1:], after[:, 1:]) and not torch.allclose(before[:, 0], after[:, 0], atol=1e-3)
    top, bottom, *columns = shared.mouth_boxes(v)[0].tolist()
    shift = 0.05 * 5 * 16  # Rows grow with y: 5 screen units a metre, 16 pixels a unit.
    new_top, _, *new_columns = shared.mouth_boxes(moved)[0].tolist()
    assert abs(new_top - top - shift) <= 1 and new_columns == columns and bottom - top == 8
    opened = meshes()[1:2]
    assert not torch.allclose(shared.planes(ws, opened).planes[:, 0], before[:, 0], atol=1e-3)


def test_resolution_of_the_raw_picture_is_an_argument(shared):
    ws, c, v = random_ws(shared, 1), labels(1), meshes()[:1]
    planes = shared.planes(ws, v)
    for resolution in (1, 3, 6, 64, 70):
        out = shared.render(planes, ws, c, resolution)
        assert out['image_raw'].shape == (1, 3, resolution, resolution) and out['image'].shape == (1, 3, 128, 128)
        assert out['image_depth'].shape == (1, 1, resolution, resolution)
    assert_same(shared.render(planes, ws, c, 6), shared.render(planes, ws, c), rtol=0, atol=0)
    # The rays of every third pixel's centre are those of a picture of a third of the size.
    coarse, fine = (shared.render(planes, ws, c, r)['image_raw'] for r in (2, 6))
    torch.testing.assert_close(fine[..., 1::3, 1::3], coarse, **TOLERANCE)


def test_depth_is_the_distance_along_the_ray(shared):
    ws, c, v = random_ws(shared, 2), labels(2), meshes()[:2]
    depth = shared.synthesis(ws, c, v)['image_depth']
    assert depth.min() > 2.25 and depth.max() < 3.3 + 1.05 / 5


def test_decoder_ranges():
    decoder = random_weights(Decoder(4, 8, 1.0))
    rgb, sigma = decoder(100 * torch.randn(2, 50, 4))
    assert rgb.shape == (2, 50, 4) and sigma.shape == (2, 50, 1)
    assert -0.00101 < rgb.min() < 0 and 1 < rgb.max() < 1.00101


# ---- EG3D


def test_eg3d_has_the_same_calls_without_a_mesh():
    network = eg3d()
    z, c = torch.randn(2, 8), labels(2)
    assert network.num_ws == network.num_style_ws == 8
    assert network.config.sampling == TINY['sampling'] and EG3DConfig().sampling.plane_axes[2] == (2, 0)
    ws = network.mapping(z, c, 0.7, 3)
    planes = network.planes(ws, 'none')
    assert torch.equal(planes.planes, network.static_planes(ws, 'none'))
    expected = network.render(planes, ws, c, 5, 'center')
    assert_same(network.synthesis(ws, c, 'none', 5, 'center'), expected, rtol=0, atol=0)
    assert_same(network(z, c, 0.7, 3, noise_mode='none', neural_rendering_resolution=5), expected, rtol=0, atol=0)
    assert network.query(planes, torch.zeros(2, 4, 3))['sigma'].shape == (2, 4, 1)


# ---- Configurations, names, gradients

CONFIGS = {
    'smallest': dict(plane_resolution=8, texture_resolution=4, mouth_resolution=8, blending_lowest=4),
    'large texture': dict(texture_resolution=128, plane_resolution=64, mouth_resolution=32, mouth_lowest=8),
    'mouth as large as the plane': dict(mouth_resolution=32, mouth_lowest=16, blending_lowest=16),
    'aligned, front only': dict(plane_layout='aligned', blend_planes='front'),
    'clamped, no unused mappings': dict(conv_clamp=3.0, has_unused_mappings=False, num_fp16_res=2, sr_num_fp16_res=4),
    'deep mapping': dict(mapping=MappingConfig(num_layers=4, embed_features=5, layer_features=6)),
    'one pass, white, automatic': dict(
        sampling=SamplingConfig(num_depths=5, num_importance=0, near='auto', far='auto', white_back=True)
    ),
    'noisy super-resolution': dict(superresolution='SuperresolutionHybrid4X', superresolution_noise_mode='random'),
}


def never_trained(config, names):
    """Names of parameters that no loss on the pictures reaches."""
    unets = {'mouth_backbone': (config.mouth_lowest, config.mouth_resolution)}
    unets['neural_blending'] = (config.blending_lowest, config.plane_resolution)
    prefixes = [f'{part}.mapping.' for part in ('texture_backbone', *unets)]
    for part, (lowest, in_size) in unets.items():
        prefixes += [f'{part}.synthesis.b{2**i}.' for i in range(2, lowest.bit_length())]
        prefixes += [f'{part}.synthesis.fusion.{(in_size // lowest).bit_length() - 1}.']
    found = {name for name in names if name.startswith(tuple(prefixes))}
    if config.superresolution_noise_mode == 'none':
        found |= {name for name in names if name.startswith('superresolution') and name.endswith('noise_strength')}
    return found


@pytest.mark.parametrize('name', CONFIGS)
def test_configurations_run_and_train(name):
    network = next3d(**CONFIGS[name]).train()
    z, c, v = torch.randn(2, 8), labels(2), meshes()[:2].clone().requires_grad_(True)
    ws = network.mapping(z, c)
    out = network.synthesis(ws, c, v)
    size = network.img_resolution
    assert out['image'].shape == (2, 3, size, size) and all(x.isfinite().all() for x in out.values())
    (out['image'].square().sum() + out['image_raw'].square().sum()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == never_trained(network.config, set(gradients))
    assert all(gradients[name].isfinite().all() for name in set(gradients) - without)
    if 'clamped' not in name:  # A clamp may stop all gradient to some.
        dead = {name for name in set(gradients) - without if not gradients[name].any()}
        assert dead == set()
    assert v.grad is None


def test_names_follow_the_published_scheme():
    config = Next3DConfig(**TINY | HEAD)
    names = set(Next3DGenerator(config, *topology()).state_dict())
    parts = {'texture_backbone', 'mouth_backbone', 'neural_blending', 'backbone', 'decoder', 'superresolution'}
    buffers = {'faces', 'raw_uvcoords', 'uvcoords', 'uvfaces', 'face_uvcoords'}
    assert {name.split('.')[0] for name in names} == parts | buffers
    assert {name for name in names if name.startswith('decoder')} == {
        f'decoder.net.{i}.{kind}' for i in (0, 2) for kind in ('weight', 'bias')
    }
    layer = {'weight', 'bias', 'affine.weight', 'affine.bias'}
    noisy = layer | {'noise_strength', 'noise_const', 'resample_filter'}
    block = {f'conv1.{n}' for n in noisy} | {f'torgb.{n}' for n in layer} | {'resample_filter'}
    first, later = block | {'const'}, block | {f'conv0.{n}' for n in noisy}
    synthesis = {f'backbone.synthesis.b4.{n}' for n in first}
    synthesis |= {f'backbone.synthesis.b{r}.{n}' for r in (8, 16, 32) for n in later}
    mapping = {f'backbone.mapping.{n}.{kind}' for n in ('embed', 'fc0', 'fc1') for kind in ('weight', 'bias')}
    assert {n for n in names if n.startswith('backbone')} == synthesis | mapping | {'backbone.mapping.w_avg'}
    convolution = {'weight', 'bias', 'resample_filter'}
    stage = {f'{conv}.{n}' for conv in ('conv1', 'conv2') for n in convolution}
    stage |= {'fromrgb.weight', 'fromrgb.resample_filter', 'resample_filter'}
    unet = {f'encoder.0.{n}' for n in stage} | {f'fusion.{i}.{n}' for i in (0, 1) for n in convolution}
    prefix = 'mouth_backbone.synthesis.'
    found = {n.removeprefix(prefix) for n in names if n.startswith((f'{prefix}encoder', f'{prefix}fusion'))}
    assert found == unet
    lean = set(Next3DGenerator(dataclasses.replace(config, has_unused_mappings=False), *topology()).state_dict())
    assert lean == {n for n in names if '.mapping.' not in n or n.startswith('backbone.')}


def test_topology_buffers(shared):
    faces, uvs, uv_faces, mask = topology()
    assert shared.faces.shape == (1, *faces.shape) and shared.faces.dtype == torch.int64
    u, v = torch.tensor(uvs).unbind(dim=1)
    expected = torch.stack([2 * u - 1, 1 - 2 * v, torch.ones_like(u)], dim=1)
    torch.testing.assert_close(shared.uvcoords[0], expected)
    torch.testing.assert_close(shared.raw_uvcoords[0], torch.tensor(uvs))
    assert torch.equal(shared.face_uvcoords[0], shared.uvcoords[0][torch.tensor(uv_faces).long()])
    assert torch.equal(shared.uv_face_mask, mask) and 'uv_face_mask' not in shared.state_dict()


def test_buffers_are_no_views_of_the_arrays_they_were_made_of():
    arrays = [array.copy() for array in topology()[:3]] + [topology()[3].clone()]
    arrays[0], arrays[2] = arrays[0].astype('int64'), arrays[2].astype('int64')
    network = Next3DGenerator(Next3DConfig(**TINY | HEAD), *arrays)
    for name in ('faces', 'raw_uvcoords', 'uvfaces', 'uv_face_mask'):
        network.get_buffer(name).zero_()
    assert all((a == b).all() for a, b in zip(arrays, topology()))


@pytest.mark.parametrize('index', range(3))
def test_configs_survive_json(index):
    config = (Next3DConfig(**TINY | HEAD), Next3DConfig(), EG3DConfig(sr_channels=(8, 4)))[index]
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again) == hash(config)
    with pytest.raises(ValueError, match='unknown entries colour'):
        type(config).from_dict(config.to_dict() | {'colour': 1})


# ---- Bad calls

BAD_CONFIGS = {
    'plane_resolution: expected a power of two >= 4, got 48': dict(plane_resolution=48),
    'texture_resolution: expected a power of two': dict(texture_resolution=100),
    'plane_layout: expected one of next3d, aligned': dict(plane_layout='straight'),
    'blend_planes: expected one of all, front': dict(blend_planes='none'),
    'superresolution: expected one of': dict(superresolution='8X'),
    'superresolution_noise_mode: expected': dict(superresolution_noise_mode='zero'),
    'plane_channels: expected at least 3': dict(plane_channels=2),
    'mouth_lowest, mouth_resolution: .* <= 32, got 8, 8': dict(mouth_lowest=8),
    'mouth_lowest, mouth_resolution: .* <= 32, got 4, 64': dict(mouth_resolution=64),
    'blending_lowest: expected below plane_resolution 32, got 32': dict(blending_lowest=32),
}


@pytest.mark.parametrize('message', BAD_CONFIGS)
def test_messages_of_bad_configs(message):
    with pytest.raises(ValueError, match=message):
        Next3DConfig(**TINY | HEAD | BAD_CONFIGS[message])


BAD_CALLS = {
    r'z: expected \[N, 8\], got \[2, 7\]': lambda g, z, c, v, ws, p: g.mapping(z[:, :7], c),
    r'c: expected \[N, 25\], got \[2, 24\]': lambda g, z, c, v, ws, p: g.mapping(z, c[:, :24]),
    r'c: expected \[N, 25\], got \[25\]': lambda g, z, c, v, ws, p: g.mapping(z, c[0]),
    r'c: expected \[N, 25\], got None': lambda g, z, c, v, ws, p: g.mapping(z, None),
    r'c: expected \[2, 25\] like z, got \[1, 25\]': lambda g, z, c, v, ws, p: g.mapping(z, c[:1]),
    r'ws: expected \[\*, 16, 8\], got \[2, 8, 8\]': lambda g, z, c, v, ws, p: g.planes(ws[:, :8], v),
    r'ws: expected \[\*, 16, 8\], got \[2, 8\]': lambda g, z, c, v, ws, p: g.planes(ws[:, 0], v),
    r'v: expected \[2, .*, 3\] \(\d+ vertices, 68 landmarks\), got \[2, 68, 3\]':
        lambda g, z, c, v, ws, p: g.planes(ws, v[:, -68:]),
    r'v: expected \[2, .*got \[1, ': lambda g, z, c, v, ws, p: g.planes(ws, v[:1]),
    r'v: expected .*, 2\]$': lambda g, z, c, v, ws, p: g.planes(ws, v[..., :2]),
    r'v: expected \[2, ': lambda g, z, c, v, ws, p: g.planes(ws, v[0]),
    r'ws: expected \[2, 16, 8\], got \[1, 16, 8\]': lambda g, z, c, v, ws, p: g.render(p, ws[:1], c),
    r'ws: expected \[2, 16, 8\], got \[2, 3, 8\]': lambda g, z, c, v, ws, p: g.render(p, ws[:, :3], c),
    r'c: expected \[2, 25 or more\], got \[1, 25\]': lambda g, z, c, v, ws, p: g.render(p, ws, c[:1]),
    r'c: expected \[2, 25 or more\], got \[2, 16\]': lambda g, z, c, v, ws, p: g.render(p, ws, c[:, :16]),
    'neural_rendering_resolution: expected at least 1, got 0': lambda g, z, c, v, ws, p: g.render(p, ws, c, 0),
    'depth_jitter: ': lambda g, z, c, v, ws, p: g.render(p, ws, c, depth_jitter='uniform'),
    'noise_mode: ': lambda g, z, c, v, ws, p: g.planes(ws, v, 'zero'),
    r'points: expected \[2, M, 3\], got \[5, 3\]': lambda g, z, c, v, ws, p: g.query(p, torch.zeros(5, 3)),
    r'points: expected \[2, M, 3\], got \[1, 5, 3\]': lambda g, z, c, v, ws, p: g.query(p, torch.zeros(1, 5, 3)),
}


def test_messages_of_bad_calls(shared):
    z, c, v = torch.randn(2, 8), labels(2), meshes()[:2]
    ws = random_ws(shared, 2)
    with torch.no_grad():
        planes = shared.planes(ws, v)
        for message, call in BAD_CALLS.items():
            with pytest.raises(ValueError, match=message):
                call(shared, z, c, v, ws, planes)
