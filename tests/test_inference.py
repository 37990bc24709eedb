# SPDX-License-Identifier: Apache-2.0
"""Styles in place of ws, and the fast path: an avatar equals the plain forward, on a CPU exactly, on a GPU closely."""

import math

import demo_network
import parity
import pytest
import torch
from helpers import HEAD
from test_generator import TINY, meshes, random_weights, topology

from geometry import cameras
from geometry.meshes import read_landmarks, read_obj, stack_mesh
from training.config import Next3DConfig
from training.generator import Next3DGenerator
from training.inference import Synthesizer
from training.pictures import to_uint8
from training.topology import load_topology

pytestmark = pytest.mark.usefixtures('exact_float32')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DEMO = parity.ROOT / 'tests' / 'data' / 'simple_head'
POSES = torch.cat([cameras.look_at_pose(yaw, 1.5) for yaw in (1.2, 1.5, 1.9)])
LABELS = cameras.make_label(POSES, cameras.intrinsics())


@pytest.fixture(scope='module', params=['next3d', 'aligned'])
def tiny(request):
    config = Next3DConfig(**TINY | HEAD, plane_layout=request.param)
    return random_weights(Next3DGenerator(config, *topology())).eval().requires_grad_(False)


def latents(generator, count):
    return torch.randn(count, generator.z_dim, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain(generator, ws, c, v, resolution=None):
    return generator.synthesis(ws, c, v, neural_rendering_resolution=resolution, depth_jitter='center')


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_styles_take_the_place_of_ws(tiny):
    ws = tiny.mapping(latents(tiny, 3), LABELS)
    with torch.no_grad():
        actual, expected = (tiny.synthesis(x, LABELS, meshes()) for x in (tiny.styles(ws), ws))
    assert all(close(actual[name], expected[name]) for name in expected)
    assert not close(actual['image'][0], actual['image'][1])


def test_the_bank_gives_the_styles_of_all_layers(tiny):
    ws = tiny.mapping(latents(tiny, 3), LABELS)
    synthesizer = Synthesizer(tiny)
    with torch.no_grad():
        actual, expected = synthesizer._bank.styles(ws), synthesizer.generator.styles(ws)
    for part, reference in zip(actual, expected):
        assert part.keys() == reference.keys() if isinstance(part, dict) else len(part) == len(reference)
        for block, other in zip(*(list(x.values()) if isinstance(x, dict) else x for x in (part, reference))):
            for style, e in zip(block, other, strict=True):
                assert torch.allclose(style.scale, e.scale, rtol=1e-5, atol=1e-6)
                assert (style.demodulation is None) == (e.demodulation is None)
                assert e.demodulation is None or torch.allclose(style.demodulation, e.demodulation, rtol=1e-5)


@pytest.mark.parametrize('blend_planes', ['all', 'front'])
@pytest.mark.parametrize('layout', ['next3d', 'aligned'])
def test_fused_head_planes(layout, blend_planes, monkeypatch):
    """The kernels, in Triton's interpreter where there is no GPU, against the plain way."""
    pytest.importorskip('triton')
    config = Next3DConfig(**TINY | HEAD, plane_layout=layout, blend_planes=blend_planes)
    generator = random_weights(Next3DGenerator(config, *topology())).eval().requires_grad_(False).to(DEVICE)
    synthesizer = Synthesizer(generator, 'fp32')
    ws = generator.mapping(latents(generator, 2).to(DEVICE), LABELS[:2].to(DEVICE))
    v = meshes()[1:].to(DEVICE)
    with torch.no_grad():
        identity = synthesizer._identity(synthesizer._bank.styles(ws))
        head = generator.rasterize(identity.texture, v)
        front = generator.complete_mouth(head.features[:, 0], v, identity.styles)
        expected = generator.blend(identity.static, front, head).planes
        monkeypatch.setattr(synthesizer, 'device', torch.device('cuda'))
        actual = synthesizer._blend(identity, v).planes
    assert head.alpha.mean() > 0.05 and actual.stride(2) == 1
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_styles_of_other_ws_are_others(tiny):
    """Each network gets the part of ws that drives it."""
    ws = tiny.mapping(latents(tiny, 1), LABELS[:1])
    changed = ws.clone()
    changed[:, tiny.num_style_ws:] += 1
    before, after = tiny.styles(ws), tiny.styles(changed)
    for name in before._fields:
        flat = [torch.cat([s.scale for block in (part.values() if isinstance(part, dict) else part) for s in block], 1)
                for part in (getattr(before, name), getattr(after, name))]
        assert torch.equal(*flat) == (name != 'texture')


@pytest.mark.parametrize('resolution', [None, 4])
def test_avatar_and_synthesizer_on_a_cpu(tiny, resolution):
    ws = tiny.mapping(latents(tiny, 3), LABELS)
    expected = plain(tiny, ws, LABELS, meshes(), resolution)
    synthesizer = Synthesizer(tiny.cpu())
    full = synthesizer.synthesis(ws, LABELS, meshes(), resolution)
    avatar = synthesizer.avatar(ws, resolution)
    drawn = avatar.render(meshes(), LABELS)
    assert all(close(out[name], expected[name]) for out in (full, drawn) for name in expected)
    assert drawn['picture'].numpy().tolist() == to_uint8(drawn['image']).tolist()
    assert (avatar.count, avatar.device) == (3, torch.device('cpu'))


def test_frames_come_in_order(tiny):
    ws = tiny.mapping(latents(tiny, 1), LABELS[:1])
    avatar = Synthesizer(tiny.to(DEVICE)).avatar(ws.to(DEVICE))
    driving = [(v[None], c[None]) for v, c in zip(meshes(), LABELS)] * 3
    expected = [avatar.render(v, c)['picture'].cpu().numpy() for v, c in driving]
    frames = list(avatar.frames(iter(driving)))
    assert len(frames) == len(driving) and all((a == b).all() for a, b in zip(frames, expected))
    assert (frames[0] != frames[1]).any() and list(avatar.frames([])) == []
    tiny.cpu()


def test_people_of_a_grid_may_share_a_mesh_and_a_camera(tiny):
    """Expanded tensors, whose rows lie on each other: they cannot be pinned as they are."""
    avatar = Synthesizer(tiny.to(DEVICE)).avatar(tiny.mapping(latents(tiny, 2).to(DEVICE), LABELS[:2].to(DEVICE)))
    shared = meshes()[:1].expand(2, -1, -1), LABELS[:1].expand(2, -1)
    apart = [x.repeat(2, *[1] * (x.ndim - 1)) for x in (meshes()[:1], LABELS[:1])]
    drawn = [avatar.render(*inputs)['picture'].cpu().clone() for inputs in (shared, apart)]
    assert torch.equal(*drawn) and (drawn[0][0] != drawn[0][1]).any()
    tiny.cpu()


def test_the_generator_is_left_alone(tiny):
    """Weights that change later, and the next training step, are not the synthesizer's business."""
    ws = tiny.mapping(latents(tiny, 1), LABELS[:1])
    synthesizer = Synthesizer(tiny)
    avatar = synthesizer.avatar(ws)
    before = avatar.render(meshes()[:1], LABELS[:1])['image'].clone()
    tiny.texture_backbone.synthesis.b4.const.add_(1)
    after = avatar.render(meshes()[:1], LABELS[:1])['image']
    tiny.texture_backbone.synthesis.b4.const.sub_(1)
    assert torch.equal(before, after)
    assert tiny.backbone.synthesis.b8.conv0.frozen is None


def test_bad_arguments(tiny):
    with pytest.raises(ValueError, match="^dtype: expected one of fp16, bf16, fp32, got 'half'$"):
        Synthesizer(tiny, 'half')
    synthesizer = Synthesizer(tiny)
    with pytest.raises(ValueError, match='^ws: expected'):
        synthesizer.avatar(torch.zeros(1, 3, 8))
    avatar = synthesizer.avatar(tiny.mapping(latents(tiny, 1), LABELS[:1]))
    with pytest.raises(ValueError, match='^v: expected'):
        avatar.render(meshes()[:1, 1:], LABELS[:1])
    avatar.render(meshes()[:1], LABELS[:1])
    with pytest.raises(ValueError, match='^v: expected 1 meshes, one of each person, got 3'):
        avatar.render(meshes(), LABELS)
    with pytest.raises(ValueError, match='^c: expected'):
        synthesizer.avatar(tiny.mapping(latents(tiny, 1), LABELS[:1])).render(meshes()[:1], LABELS)
    ws = tiny.mapping(latents(tiny, 3), LABELS)
    with pytest.raises(ValueError, match='^v: expected 3 meshes like ws, got 2'):
        synthesizer.synthesis(ws, LABELS, meshes()[:2])
    with pytest.raises(ValueError, match='^c: expected'):
        synthesizer.synthesis(ws, LABELS[:2], meshes())
    synthesizer.synthesis(ws, LABELS, meshes())  # What failed left nothing behind.


def psnr(actual, expected):
    return 10 * math.log10(4 / (actual.double() - expected.double()).square().mean().item())


@pytest.fixture(scope='module')
def demo():
    torch.manual_seed(0)
    config = demo_network.CONFIG
    topology = load_topology(DEMO / 'head_template.obj', config.texture_resolution)
    generator = Next3DGenerator(config, *topology).eval().requires_grad_(False).cuda()
    v = stack_mesh(read_obj(DEMO / 'demo.obj').vertices, read_landmarks(DEMO / 'demo_kpt2d.txt'))
    v = torch.from_numpy(v).cuda().repeat(3, 1, 1)
    v[1:] += 0.001 * torch.randn(2, *v.shape[1:], generator=torch.Generator().manual_seed(0)).cuda()
    c = LABELS.cuda()
    return generator, generator.mapping(torch.randn(3, config.z_dim).cuda(), c), c, v


@pytest.mark.gpu
@pytest.mark.parametrize('dtype, least_db', [('fp16', 45), ('bf16', 35), ('fp32', 70)])
@pytest.mark.parametrize('count', [1, 3])
def test_fast_path_agrees_with_the_plain_forward(demo, dtype, least_db, count):
    generator, *inputs = demo
    ws, c, v = (x[:count] for x in inputs)
    expected = plain(generator, ws, c, v)['image'].clone()
    synthesizer = Synthesizer(generator, dtype)
    full = synthesizer.synthesis(ws, c, v)['image'].clone()
    avatar = synthesizer.avatar(ws)
    drawn = avatar.render(v, c)['image'].clone()
    assert psnr(full, expected) > least_db and psnr(drawn, expected) > least_db
    for _ in range(3):
        assert torch.equal(avatar.render(v, c)['image'], drawn)
        assert torch.equal(synthesizer.synthesis(ws, c, v)['image'], full)
    other = synthesizer.avatar(ws).render(v, c)['image']  # Another capture, the same picture.
    assert torch.equal(other, drawn)


@pytest.mark.gpu
def test_inputs_of_the_graph_are_the_callers(demo):
    """Other meshes and cameras give what the plain forward gives for them."""
    generator, ws, c, v = demo
    avatar = Synthesizer(generator).avatar(ws[:1])
    avatar.render(v[:1], c[:1])
    for i in (1, 2):
        expected = plain(generator, ws[:1], c[i:i + 1], v[i:i + 1])['image']
        assert psnr(avatar.render(v[i:i + 1].cpu(), c[i:i + 1].cpu())['image'], expected) > 45
