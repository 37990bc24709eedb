# SPDX-License-Identifier: Apache-2.0
"""The whole Next3D generator, published pickles and the rasterised planes against the published implementation."""

import dataclasses
import lzma

import numpy as np
import parity
import pytest
import torch
from parity import agrees, fill, rnd

import legacy
from geometry import cameras
from training import head_raster, mouth
from training.config import MappingConfig, Next3DConfig
from training.generator import Next3DGenerator

ABSENT_IN_NEW_NETWORKS = ('dense_faces', 'dataset_label_std')


@pytest.fixture(scope='module')
def generator(topology):
    info, _ = parity.load('full_g_a')
    config = Next3DConfig(
        channel_base=info['kwargs']['channel_base'], channel_max=info['kwargs']['channel_max'], sr_num_fp16_res=0
    )
    g = Next3DGenerator(config, *topology)
    return fill(g, info['state'], info['seed'], ABSENT_IN_NEW_NETWORKS).eval().requires_grad_(False)


def test_full_size_network_has_the_published_names_and_shapes(topology):
    official = parity.json.loads(parity.parity_file('official_state_shapes.json').read_text())
    network = Next3DGenerator(Next3DConfig(), *topology)
    shapes = {name: list(t.shape) for name, t in network.state_dict().items()}
    expected = {name: e['shape'] for name, e in official['G'].items() if name not in ABSENT_IN_NEW_NETWORKS}
    assert shapes == expected


def test_screen_coordinates_and_mouth_boxes(generator, demo_meshes):
    for i, mesh in enumerate(('demo', 'deformed')):
        info, a = parity.load(f'raster_{mesh}')
        v = demo_meshes[i : i + 1]
        for k, view in enumerate(head_raster.VIEWS['next3d']):
            assert list(view.angles_deg) == info['views'][k]
            screen = generator._project(v[:, :5023], view)[0, ::10] * torch.tensor([-1.0, -1.0, 1.0])
            agrees('screen coordinates', screen, a[f'screen_verts{k}'], 'op')
            agrees('screen landmarks', generator._project(v[:, 5023:], view)[0, :, :2], a[f'lm2d{k}'], 'op')
        agrees('mouth boxes', generator.mouth_boxes(v), a['mouth_box'], 'exact')


def test_views_alpha_and_planes(generator, demo_meshes):
    for i, mesh in enumerate(('demo', 'deformed')):
        _, render = parity.load(f'raster_{mesh}_render')
        _, images = parity.load(f'raster_{mesh}_img')
        texture = rnd('ras/tex', (1, 32, 256, 256), 41)
        planes = generator.rasterize(texture, demo_meshes[i : i + 1])
        for k in range(3):
            agrees('rasterised planes', planes.features[0, k, :4, ::2, ::2], render[f'render{k}'], 'image')
            agrees('alpha of planes', planes.alpha[0, k, 0], images[f'alpha_out{k}'], 'image')


def test_whole_generator(generator, demo_meshes):
    info, a = parity.load('full_g_a')
    z, c, cond = (torch.from_numpy(a[name]) for name in ('z', 'c', 'cond'))
    agrees('generator, mapping', generator.mapping(z, cond), a['ws_psi1'], 'network')
    ws = generator.mapping(z, cond, truncation_psi=0.7, truncation_cutoff=14)
    agrees('generator, mapping', ws, a['ws'], 'network')
    planes = generator.planes(ws, demo_meshes)
    out = generator.render(planes, ws, c, info['nrr'], depth_jitter=parity.uniform_seq)
    agrees('generator, image_raw', out['image_raw'], a['image_raw'], 'image')
    agrees('generator, image_depth', out['image_depth'], a['image_depth'], 'image')
    agrees('generator, image', out['image'][..., ::2, ::2], a['image_s2'], 'image')
    agrees('generator, image', out['image'][..., 192:320, 192:320], a['image_crop'], 'image')
    field = generator.query(planes, torch.from_numpy(a['points']))
    agrees('generator, density', field['sigma'], a['sigma'], 'image')
    agrees('generator, density', field['sigma'][:, :200], a['sigma_sample_200'], 'image')
    agrees('generator, colour of points', field['rgb'][:, :100], a['point_rgb_100'], 'image')
    agrees('generator, mouth boxes', generator.mouth_boxes(demo_meshes), a['mouth_boxes'], 'exact')
    with parity.sequence_draws():
        noisy = generator.synthesis(ws, c, demo_meshes, 'random', info['nrr'], parity.uniform_seq)
    agrees('generator, random noise', noisy['image_raw'], a['imageraw_randomnoise'], 'image')


def test_intermediate_planes(generator, demo_meshes):
    _, whole = parity.load('full_g_a')
    _, a = parity.load('full_g_a_planes')
    ws = torch.from_numpy(whole['ws'])

    def check(part, x, name):
        agrees(f'planes, {part}', x[..., ::8, ::8], a[f'{name}_s8'], 'image')
        if f'{name}_stat' in a:
            stat = torch.stack([x.mean(dim=[-2, -1]), x.std(dim=[-2, -1])])
            agrees(f'planes, {part}', stat, a[f'{name}_stat'], 'image')

    static, texture = generator.static_planes(ws), generator.texture(ws)
    check('static', static, 'static')
    check('texture', texture, 'textures')
    head = generator.rasterize(texture, demo_meshes)
    for k in range(3):
        check('rasterised', head.features[:, k], f'render{k}')
        bytes_ = (head.alpha[:, k] * 255).to(torch.uint8)
        differs = np.abs(bytes_.numpy().astype(int) - a[f'alpha{k}'].astype(int)) > 1
        assert not differs.any()
    boxes = generator.mouth_boxes(demo_meshes)
    condition = mouth.crop_and_resize(head.features[:, 0], boxes, generator.config.mouth_resolution)
    agrees('planes, mouth crop', condition[..., ::2, ::2], a['mouth_in_s2'], 'image')
    mouth_plane = generator.mouth_backbone.synthesis(condition, ws[:, :14])
    check('mouth network', mouth_plane, 'mouth_plane')
    stitched = mouth.resize_and_paste(head.features[:, 0], mouth_plane, boxes)
    check('stitched', stitched, 'stitch_in')
    front = generator.complete_mouth(head.features[:, 0], demo_meshes, ws)
    check('blending network', front, 'neural_blending')
    planes = generator.blend(static, front, head).planes
    check('blended', planes, 'blended')
    agrees('planes, blended', planes[..., 112:144, 112:144], a['blended_crop'], 'image')


@pytest.fixture(scope='module')
def tiny_next3d(tmp_path_factory):
    return decompress('tiny_next3d', tmp_path_factory)


def decompress(name, tmp_path_factory):
    path = tmp_path_factory.mktemp('pickles') / f'{name}.pkl'
    path.write_bytes(lzma.decompress(parity.parity_file(f'{name}.pkl.xz').read_bytes()))
    return path


def test_published_pickle_loads_with_its_weights(tiny_next3d, demo_meshes):
    info, a = parity.load('pkl_io')
    nets = legacy.load_network_pkl(tiny_next3d)
    assert sorted(nets) == ['D', 'G', 'G_ema']
    for key, seed in (('G', 401), ('G_ema', 402)):
        weights = parity.table_weights(info['g_state'], seed)
        state = nets[key].state_dict()
        assert set(state) == {e['name'] for e in info['g_state']}
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    g = nets['G_ema']
    assert (g.z_dim, g.c_dim, g.num_ws, g.num_vertices) == (512, 25, 28, 5023)
    assert g.config.plane_layout == 'next3d' and g.config.blend_planes == 'all'
    assert g.config.mapping == MappingConfig(num_layers=2, embed_features=32, layer_features=32)
    d = nets['D']
    image, raw = rnd('pkl/dimg', (2, 3, 512, 512), 403, 0.5), rnd('pkl/draw', (2, 3, 64, 64), 403, 0.5)
    d.config = dataclasses.replace(d.config, disc_c_noise=0.0)
    logits = d({'image': image, 'image_raw': raw}, torch.from_numpy(a['c']))
    agrees('discriminator of a published pickle', logits, a['d_logits'], 'network')


def test_eg3d_pickle_loads_and_renders(tmp_path_factory):
    g = legacy.load_network_pkl(decompress('tiny_eg3d', tmp_path_factory), only=('G_ema',))['G_ema']
    assert g.config.sampling.plane_axes == ((0, 1), (0, 2), (2, 0))
    c = cameras.make_label(cameras.look_at_pose(cameras.FRONTAL, cameras.FRONTAL), cameras.intrinsics())
    ws = g.mapping(torch.zeros(1, 512), c)
    out = g.synthesis(ws, c, neural_rendering_resolution=16)
    assert out['image'].shape == (1, 3, 512, 512) and out['image_raw'].shape == (1, 3, 16, 16)
    assert all(torch.isfinite(x).all() for x in out.values())
