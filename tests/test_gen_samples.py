# SPDX-License-Identifier: Apache-2.0
"""gen_samples.py as its users meet it: what the files hold, every published flag, and one line for each bad input."""

import dataclasses
import lzma
import math
import os
import pathlib
import pickle
import re
import resource
import subprocess
import sys
import warnings
from types import SimpleNamespace

import demo_network
import mrcfile
import numpy as np
import parity
import pytest
import torch
import trimesh
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage

import gen_samples
from geometry import cameras
from training.checkpoint import save_snapshot
from training.config import EG3D_PLANE_AXES, DiscriminatorConfig, EG3DConfig
from training.discriminator import Discriminator
from training.generator import EG3DGenerator, Next3DGenerator
from training.topology import load_topology
from training.volume.render import SamplingConfig

DEMO = parity.ROOT / 'tests' / 'data' / 'simple_head'
OBJ, LMS = DEMO / 'demo.obj', DEMO / 'demo_kpt2d.txt'
FOCAL = 4.2647
STRIP = ((0.4, -0.2), (0.0, -0.2), (-0.4, -0.2))
RAW_SIDE, SIDE = 16, 256  # Of the test network's raw and final pictures.
SHAPE_RES, BORDER = 24, 2  # BORDER = int(30 * 24 / 256).


# ---------------------------------------------------------------------------------------------------------------------
# Networks, and the pictures they must give, worked out from architecture.md section 7 without gen_samples


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def mesh():
    """Vertices and landmarks [1, V + 68, 3] of the demo head, read with a few lines of numpy."""
    vertices = [line.split()[1:4] for line in OBJ.read_text().splitlines() if line.startswith('v ')]
    return torch.from_numpy(np.concatenate([np.array(vertices, np.float32), np.loadtxt(LMS)])[None].astype(np.float32))


@pytest.fixture(scope='module')
def demo(tmp_path_factory, mesh):
    """A small Next3D snapshot whose density crosses the level of surfaces, with pictures that are not grey."""
    sampling = dataclasses.replace(demo_network.CONFIG.sampling, num_depths=8, num_importance=8)
    sides = dict(plane_resolution=64, texture_resolution=64, mouth_resolution=16, blending_lowest=16)
    config = dataclasses.replace(
        demo_network.CONFIG, neural_rendering_resolution=RAW_SIDE, sampling=sampling, **sides
    )
    torch.manual_seed(5)
    generator = Next3DGenerator(config, *load_topology(DEMO / 'head_template.obj', config.texture_resolution))
    return saved(tmp_path_factory, 'demo.pkl', enlivened(generator.eval().requires_grad_(False), mesh))


@pytest.fixture(scope='module')
def eg3d(tmp_path_factory):
    """A small EG3D snapshot as initialised: its density stays below 1."""
    config = EG3DConfig(
        z_dim=32,
        w_dim=32,
        channel_base=512,
        channel_max=16,
        sr_num_fp16_res=0,
        sr_channels=(16, 8),
        superresolution='SuperresolutionHybrid2X',
        plane_resolution=32,
        neural_rendering_resolution=RAW_SIDE,
        sampling=SamplingConfig(num_depths=8, num_importance=8, plane_axes=EG3D_PLANE_AXES),
    )
    torch.manual_seed(6)
    return saved(tmp_path_factory, 'eg3d.pkl', EG3DGenerator(config).eval().requires_grad_(False))


def saved(tmp_path_factory, name, generator):
    path = tmp_path_factory.mktemp('networks') / name
    save_snapshot(path, {'G_ema': generator})
    return SimpleNamespace(path=path, generator=generator)


def enlivened(generator, mesh):
    """Stretch density to 10 ± 40 and colours to most of their range for seed 0; move the mean w away from zero."""
    generator.backbone.mapping.w_avg.copy_(torch.randn(generator.w_dim) / 2)
    ws = generator.mapping(latent(generator, 0), label(0, 0))
    last = generator.decoder.net[2]
    generator.superresolution.block1.torgb.weight *= 0.5
    out = generator.query(generator.planes(ws, mesh), torch.rand(1, 4000, 3) - 0.5)
    values = torch.cat([out['sigma'], torch.logit((out['rgb'][..., :3] + 0.001) / 1.002)], dim=2)
    scale = torch.tensor([40.0, 1, 1, 1]) / values.std(dim=1)[0]
    last.weight[:4] *= scale[:, None]
    last.bias[:4] = (last.bias[:4] - values.mean(dim=1)[0]) * scale + torch.tensor([10.0, 0, 0, 0])
    return generator


def latent(generator, seed):
    return torch.from_numpy(np.random.RandomState(seed).randn(1, generator.z_dim)).float()


def label(yaw, pitch, focal=FOCAL):
    """Return the label [1, 25] of a camera on the sphere of 2.7 about the origin that looks at (0, 0, .2)."""
    h, v = np.pi / 2 + yaw, np.pi / 2 + pitch
    phi = np.arccos(1 - 2 * v / np.pi)
    origin = 2.7 * np.array([np.sin(phi) * np.cos(np.pi - h), np.cos(phi), np.sin(phi) * np.sin(np.pi - h)])
    forward = np.array([0, 0, 0.2]) - origin
    right = -np.cross([0, 1, 0], forward)
    down = np.cross(forward, right)
    pose = np.eye(4)
    pose[:3] = np.stack([*(x / np.linalg.norm(x) for x in (right, down, forward)), origin], axis=1)
    return torch.from_numpy(np.r_[pose.ravel(), focal, 0, 0.5, 0, focal, 0.5, 0, 0, 1][None]).float()


def expected(network, seed, mesh=None, views=STRIP, psi=1.0, cutoff=None, focal=FOCAL):
    """Return (strip [H, W, 3] uint8, depths [h, w], planes)."""
    g = network.generator
    cutoff = g.backbone.num_ws if cutoff is None else cutoff
    ws = g.mapping(latent(g, seed), label(0, 0, focal), truncation_psi=psi, truncation_cutoff=cutoff)
    planes = g.planes(ws) if mesh is None else g.planes(ws, mesh)
    outs = [g.render(planes, ws, label(yaw, pitch, focal)) for yaw, pitch in views]
    image, depth = (torch.cat([out[k][0] for out in outs], dim=2) for k in ('image', 'image_depth'))
    strip = (127.5 * image + 128).clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return strip, depth[0].numpy(), planes


def assert_same_picture(path, strip):
    """Assert that a PNG holds the strip; a camera computed in another precision may move a value over one step."""
    picture = np.asarray(Image.open(path))
    assert picture.shape == strip.shape and picture.dtype == np.uint8
    difference = np.abs(picture.astype(int) - strip)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.02, difference.max()


# ---------------------------------------------------------------------------------------------------------------------
# Running it


def published_options(network, outdir, /, **changes):
    """Return the command line of a quick run, in the published spelling; a value of None drops the option."""
    options = {
        'network': network,
        'obj_path': OBJ,
        'lms_path': LMS,
        'lms_cond': True,
        'seeds': '0',
        'trunc': 0.7,
        'outdir': outdir,
        'views': 1,
        'device': 'cpu',
    }
    options.update(changes)
    return [f'--{name}={value}' for name, value in options.items() if value is not None]


def run(network, outdir, /, *extra, **changes):
    """Run the command in this process; assert that it succeeds and return its result."""
    result = CliRunner().invoke(gen_samples.main, [*published_options(network.path, outdir, **changes), *extra])
    assert result.exit_code == 0, result.output
    return result


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start(script, arguments, file_bytes=None, cwd=None):
    """Start a script as users do, with a limit on the size of the files it may write where one is given."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.Popen(
        [sys.executable, script if script == '-c' else str(parity.ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1', 'OMP_NUM_THREADS': '1'},
        preexec_fn=limit if file_bytes else None,
    )


def without_bars(stderr):
    """Drop the progress bars that a machine slower than expected shows."""
    parts = re.split(r'[\r\n]+', stderr)
    return ''.join(f'{part}\n' for part in parts if not re.search(r'^\W*$|step|slab', part))


def assert_one_line(stderr, *mentioned):
    assert stderr.startswith('Error: ') and stderr.endswith('\n'), stderr
    assert len(stderr.splitlines()) == 1 and '\r' not in stderr, stderr
    for words in mentioned:
        assert words in stderr


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_the_three_views_are_those_of_the_published_script(demo, mesh, tmp_path):
    run(demo, tmp_path / 'out', views=None, trunc=None)
    assert names(tmp_path / 'out') == ['seed0000.png']
    strip, _, _ = expected(demo, 0, mesh)
    assert strip.shape == (SIDE, 3 * SIDE, 3)
    assert_same_picture(tmp_path / 'out' / 'seed0000.png', strip)
    # The comparison above would not see views in another order if they looked alike.
    left, middle, right = (strip[:, i * SIDE : (i + 1) * SIDE].astype(int) for i in range(3))
    assert np.abs(left - right).max() > 20 and np.abs(left - middle).max() > 20
    assert strip.std() > 10 and ((strip > 0) & (strip < 255)).mean() > 0.5


def test_truncation_spares_the_texture_unless_the_cutoff_says_more(demo, mesh, tmp_path):
    assert demo.generator.backbone.num_ws < demo.generator.num_ws
    cases = {'default': (None, demo.generator.backbone.num_ws), 'few': (2, 2), 'all': (demo.generator.num_ws,) * 2}
    pictures = {}
    for name, (option, cutoff) in cases.items():
        run(demo, tmp_path / name, '--trunc', '0.3', **{'trunc': None, 'trunc-cutoff': option})
        picture = tmp_path / name / 'seed0000.png'
        assert_same_picture(picture, expected(demo, 0, mesh, ((0, -0.2),), psi=0.3, cutoff=cutoff)[0])
        pictures[name] = picture.read_bytes()
    assert len(set(pictures.values())) == len(cases)


def test_seeds_are_independent_of_each_other(demo, mesh, tmp_path):
    run(demo, tmp_path / 'list', seeds='0,3,7-9')
    assert names(tmp_path / 'list') == [f'seed000{i}.png' for i in (0, 3, 7, 8, 9)]
    run(demo, tmp_path / 'alone', seeds='8')
    pictures = [(tmp_path / 'list' / name).read_bytes() for name in names(tmp_path / 'list')]
    assert len(set(pictures)) == 5
    assert pictures[3] == (tmp_path / 'alone' / 'seed0008.png').read_bytes()
    assert_same_picture(tmp_path / 'alone' / 'seed0008.png', expected(demo, 8, mesh, ((0, -0.2),), psi=0.7)[0])


def test_views_as_a_number_and_as_angles_in_degrees(demo, mesh, tmp_path):
    cases = {
        '2': ((0.4, -0.2), (-0.4, -0.2)),
        '5': tuple((yaw, -0.2) for yaw in (0.4, 0.2, 0, -0.2, -0.4)),
        '30:0, -20.5:10': ((math.radians(30), 0), (math.radians(-20.5), -math.pi / 2 * math.sin(math.radians(10)))),
    }
    for number, (option, views) in enumerate(cases.items()):
        run(demo, tmp_path / str(number), views=option)
        assert_same_picture(tmp_path / str(number) / 'seed0000.png', expected(demo, 0, mesh, views, psi=0.7)[0])


@pytest.mark.parametrize('yaw_deg, pitch_deg', [(0, 0), (30, 0), (-70, 25), (10, -60), (0, 89)])
def test_views_in_degrees_are_angles_of_the_camera(yaw_deg, pitch_deg):
    """Yaw turns the camera to the right, pitch is its elevation above the horizon: read off its position."""
    ((h, v),) = gen_samples.ViewList().convert(f'{yaw_deg}:{pitch_deg}', None, None)
    x, y, z = cameras.look_at_pose(math.pi / 2 + h, math.pi / 2 + v, radius=2.7)[0, :3, 3].tolist()
    assert math.degrees(math.asin(y / 2.7)) == pytest.approx(pitch_deg, abs=1e-2)
    assert math.degrees(math.atan2(x, z)) == pytest.approx(yaw_deg, abs=1e-2)


def test_field_of_view_is_a_float_along_the_diagonal(demo, mesh, tmp_path):
    for fov in (12.5, 18.837):
        run(demo, tmp_path / str(fov), **{'fov-deg': fov})
        focal = 1 / (math.tan(fov * math.pi / 360) * 1.414)
        strip, _, _ = expected(demo, 0, mesh, ((0, -0.2),), psi=0.7, focal=focal)
        assert_same_picture(tmp_path / str(fov) / 'seed0000.png', strip)
    default, _, _ = expected(demo, 0, mesh, ((0, -0.2),), psi=0.7)
    narrow = np.asarray(Image.open(tmp_path / '12.5' / 'seed0000.png'))
    assert np.abs(narrow.astype(int) - default).max() > 5


def test_depth_maps(demo, mesh, tmp_path):
    run(demo, tmp_path, '--depth', views=3)
    assert names(tmp_path) == ['seed0000.png', 'seed0000_depth.npy', 'seed0000_depth.png']
    depth, (_, wanted, _) = np.load(tmp_path / 'seed0000_depth.npy'), expected(demo, 0, mesh, psi=0.7)
    assert depth.shape == (RAW_SIDE, 3 * RAW_SIDE) and depth.dtype == np.float32
    np.testing.assert_allclose(depth, wanted, atol=2e-3)
    assert 2 < depth.min() < depth.max() < 3.5  # Distances from a camera at 2.7.
    grey = np.asarray(Image.open(tmp_path / 'seed0000_depth.png'))
    assert grey.shape == depth.shape and grey.min() == 0 and grey.max() == 255
    np.testing.assert_allclose(grey, 255 * (depth.max() - depth) / np.ptp(depth), atol=0.51)


def test_eg3d_needs_no_mesh(eg3d, tmp_path):
    run(eg3d, tmp_path, '--shapes', shape_res=SHAPE_RES, obj_path=None, lms_path=None, lms_cond=None, views=3)
    strip, _, planes = expected(eg3d, 0, psi=0.7)
    assert_same_picture(tmp_path / 'seed0000.png', strip)
    assert_density(tmp_path / 'seed0000.mrc', eg3d, planes)


def test_a_snapshot_with_only_g_serves(eg3d, tmp_path):
    save_snapshot(tmp_path / 'g.pkl', {'G': eg3d.generator})
    run(SimpleNamespace(path=tmp_path / 'g.pkl'), tmp_path / 'out', obj_path=None, lms_path=None)
    assert_same_picture(tmp_path / 'out' / 'seed0000.png', expected(eg3d, 0, views=((0, -0.2),), psi=0.7)[0])


def test_same_command_gives_same_bytes_in_either_spelling(demo, tmp_path):
    """The first run is another process, seconds earlier, so that times in files would show."""
    published = published_options(demo.path, tmp_path / 'published', shapes='true', shape_res=SHAPE_RES, fov_deg=18.8)
    process = start('gen_samples.py', [*published, '--reload_modules=False', '--trunc_cutoff=5', '--shape_format=.mrc'])
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    kebab = f'--network {demo.path} --obj-path {OBJ} --lms-path {LMS} --lms-cond --seeds 0 --trunc 0.7 --views 1 '
    kebab += f'--shapes --shape-res {SHAPE_RES} --shape-format .mrc --trunc-cutoff 5 --fov-deg 18.8 --device cpu '
    kebab += f'--reload-modules true --outdir {tmp_path / "kebab"}'
    result = CliRunner().invoke(gen_samples.main, kebab.split())
    assert result.exit_code == 0, result.output
    assert names(tmp_path / 'published') == names(tmp_path / 'kebab') == ['seed0000.mrc', 'seed0000.png']
    for name in names(tmp_path / 'kebab'):
        assert (tmp_path / 'published' / name).read_bytes() == (tmp_path / 'kebab' / name).read_bytes(), name


@pytest.mark.slow
def test_the_published_command_line_on_a_published_pickle(tmp_path):
    pickled = lzma.decompress(parity.parity_file('tiny_next3d.pkl.xz').read_bytes())
    (tmp_path / 'tiny_next3d.pkl').write_bytes(pickled)
    arguments = [
        f'--network={tmp_path / "tiny_next3d.pkl"}',
        f'--obj_path={parity.parity_file("demo.obj")}',
        f'--lms_path={parity.parity_file("demo_kpt2d.txt")}',
        *('--lms_cond=True', '--seeds=166', '--trunc=0.7', '--shapes=true', '--shape-res', '48', '--outdir=out'),
    ]
    process = start('gen_samples.py', arguments, cwd=tmp_path)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert names(tmp_path / 'out') == ['seed0166.mrc', 'seed0166.png']
    assert Image.open(tmp_path / 'out' / 'seed0166.png').size == (3 * 512, 512)
    with mrcfile.open(tmp_path / 'out' / 'seed0166.mrc') as file:
        assert file.data.shape == (48, 48, 48) and file.data[5:-5, 5:-5, 5:-5].std() > 0
        assert (file.data[:5] == -1000).all() and (file.data[5:-5, 5:-5, 5:-5] > -1000).all()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def assert_density(path, network, planes, resolution=SHAPE_RES, border=BORDER):
    """Assert that an .mrc file holds the field of planes: x (descending), y, z on the faces and inside of the box."""
    with mrcfile.open(path) as file:
        grid = np.array(file.data)
        assert file.header.mode == 2
    assert grid.shape == (resolution,) * 3 and grid.dtype == np.float32
    inside = (slice(border, resolution - border),) * 3
    outside = np.ones(grid.shape, bool)
    outside[inside] = False
    assert (grid[outside] == -1000).all()
    i, j, k = np.random.RandomState(1).randint(border, resolution - border, [3, 500])
    x, y, z = (np.array([resolution - 1 - i, j, k]) / (resolution - 1) - 0.5).astype(np.float32)
    sigma = network.generator.query(planes, torch.from_numpy(np.stack([x, y, z], 1))[None])['sigma'][0, :, 0]
    np.testing.assert_allclose(grid[i, j, k], sigma, rtol=1e-4, atol=1e-3)
    return grid


@pytest.fixture(scope='module')
def surfaces(demo, mesh, tmp_path_factory):
    """Every shape file of seed 0, with the field that they show."""
    folder = tmp_path_factory.mktemp('surfaces')
    for suffix in ('.mrc', '.ply', '.obj', '.glb'):
        run(demo, folder, shapes='true', shape_res=SHAPE_RES, **{'shape-format': suffix})
    assert names(folder) == ['seed0000.glb', 'seed0000.mrc', 'seed0000.obj', 'seed0000.ply', 'seed0000.png']
    _, _, planes = expected(demo, 0, mesh, psi=0.7)
    files = {s: trimesh.load_mesh(folder / f'seed0000{s}', process=False) for s in ('.ply', '.obj', '.glb')}
    return SimpleNamespace(folder=folder, planes=planes, **{suffix[1:]: mesh for suffix, mesh in files.items()})


def field(demo, surfaces, world):
    points = torch.from_numpy(np.ascontiguousarray(world, dtype=np.float32))[None]
    return demo.generator.query(surfaces.planes, points)


def to_world(ply_vertices):
    """Undo the published layout: voxels, axes z, y, x with x descending."""
    z, y, x = (ply_vertices / (SHAPE_RES - 1) - 0.5).T
    return np.stack([-x, y, z], axis=1)


def test_mrc_is_the_density_at_known_places(demo, surfaces):
    grid = assert_density(surfaces.folder / 'seed0000.mrc', demo, surfaces.planes)
    inner = grid[grid > -1000]
    assert inner.min() < 10 < inner.max() and inner.std() > 10


def test_ply_is_the_level_10_surface_of_the_transposed_grid_in_voxels(surfaces):
    with mrcfile.open(surfaces.folder / 'seed0000.mrc') as file:
        grid = np.transpose(file.data, (2, 1, 0))
    # Vertices lie on edges of the grid, where interpolation along the edge and within the cube are the same.
    on_edge = np.isclose(surfaces.ply.vertices, np.round(surfaces.ply.vertices), atol=1e-5).sum(axis=1) >= 2
    assert on_edge.mean() > 0.98  # The others settle ambiguous cubes.
    level = ndimage.map_coordinates(grid.astype(np.float64), surfaces.ply.vertices[on_edge].T, order=1)
    np.testing.assert_allclose(level, 10, atol=0.02)
    assert len(surfaces.ply.vertices) > 500


def test_obj_and_glb_are_the_same_surface_in_the_world(surfaces):
    for mesh in (surfaces.obj, surfaces.glb):
        np.testing.assert_allclose(mesh.vertices, to_world(surfaces.ply.vertices), atol=2e-6)
        assert np.array_equal(mesh.faces, surfaces.ply.faces)


def test_surfaces_are_closed_and_face_outwards(demo, surfaces):
    for mesh in (surfaces.ply, surfaces.obj, surfaces.glb):
        assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    assert surfaces.ply.volume == pytest.approx(surfaces.obj.volume * (SHAPE_RES - 1) ** 3, rel=1e-4)
    mesh = surfaces.obj
    step = 0.25 / (SHAPE_RES - 1) * mesh.face_normals
    inner, outer = (field(demo, surfaces, mesh.triangles_center + s)['sigma'][0, :, 0] for s in (-step, step))
    limit = 0.5 - (BORDER + 1) / (SHAPE_RES - 1)  # The emptied border makes surfaces of its own.
    is_free = torch.from_numpy((np.abs(mesh.triangles_center) < limit).all(axis=1))
    assert is_free.sum() > 500
    assert (inner > outer)[is_free].float().mean() > 0.85  # Half where the surface lies elsewhere.


def test_vertex_colours_are_those_of_the_field(demo, surfaces):
    for mesh, world in (
        (surfaces.ply, to_world(surfaces.ply.vertices)),
        (surfaces.obj, surfaces.obj.vertices),
        (surfaces.glb, surfaces.glb.vertices),
    ):
        colours = mesh.visual.vertex_colors
        assert (colours[:, 3] == 255).all()
        rgb = field(demo, surfaces, world)['rgb'][0, :, :3].numpy()
        np.testing.assert_allclose(colours[:, :3], np.clip(255 * rgb, 0, 255), atol=1.1)
        assert colours[:, :3].std(axis=0).min() > 5


def test_an_untrained_networks_surface_lies_where_the_head_does(mesh, tmp_path):
    """From the script's files alone: as wide and high as the mesh in the world, right way up, nose to the front."""
    save_snapshot(tmp_path / 'net.pkl', {'G_ema': demo_network.untrained(DEMO / 'head_template.obj')})
    resolution = 40
    options = dict(shapes='true', shape_res=resolution, shape_format='.glb', obj_path=DEMO / 'demo.obj')
    run(SimpleNamespace(path=tmp_path / 'net.pkl'), tmp_path / 'out', **options)
    surface = trimesh.load_mesh(tmp_path / 'out' / 'seed0000.glb', process=False)
    head = 2.5 * mesh[0, :-68].numpy() + [0, 0.025, 0]
    voxel, border = 1 / (resolution - 1), int(30 * resolution / 256)
    lowest, highest = surface.bounds
    assert surface.is_watertight and surface.volume > 0 and surface.body_count == 1
    assert (lowest > head.min(axis=0) - voxel).all() and (highest < head.max(axis=0) + voxel).all()
    np.testing.assert_allclose(highest[1:], head.max(axis=0)[1:], atol=2 * voxel)  # Crown and nose.
    assert lowest[1] == pytest.approx(border * voxel - 0.5, abs=voxel)  # The neck runs into the emptied border.
    np.testing.assert_allclose(lowest[0], -highest[0], atol=voxel / 2)  # The ears are too thin for so few samples.
    assert highest[0] > 0.7 * head[:, 0].max()


def test_a_density_below_the_level_gives_a_message_and_no_mesh(eg3d, tmp_path):
    options = dict(obj_path=None, lms_path=None, shapes='true', shape_res=SHAPE_RES, seeds='4')
    for suffix in ('.ply', '.obj', '.glb'):
        result = run(eg3d, tmp_path / suffix[1:], **{'shape-format': suffix}, **options)
        assert len(without_bars(result.stderr).splitlines()) == 1
        assert f'seed0004{suffix}' in result.stderr and 'level 10' in result.stderr
        assert names(tmp_path / suffix[1:]) == ['seed0004.png']


def test_planes_are_built_once_per_seed_and_points_come_in_slabs(demo, tmp_path, monkeypatch):
    calls, sizes = [], []
    planes, query = Next3DGenerator.planes, Next3DGenerator.query
    monkeypatch.setattr(Next3DGenerator, 'planes', lambda *a, **k: (calls.append(1), planes(*a, **k))[1])
    monkeypatch.setattr(
        Next3DGenerator, 'query', lambda g, p, x, **k: (sizes.append(x.shape[1]), query(g, p, x, **k))[1]
    )
    run(demo, tmp_path, '--depth', seeds='0-2', views=3, shapes='true', shape_res=SHAPE_RES)
    assert len(calls) == 3
    assert max(sizes) <= SHAPE_RES**2


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_grows_by_little_more_than_the_grid(demo, tmp_path):
    small, large = (
        published_options(demo.path, tmp_path, shapes='true', shape_res=resolution) for resolution in (8, 144)
    )
    code = (
        'import re, gen_samples\n'
        f'for arguments in ({small!r}, {large!r}):\n'
        '    gen_samples.main(arguments, standalone_mode=False)\n'
        '    print("peak", re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])\n'
    )
    process = start('-c', [code], cwd=parity.ROOT)
    stdout, _ = process.communicate()
    first, second = (int(line.split()[1]) * 1024 for line in stdout.splitlines() if line.startswith('peak'))
    # All points at once would take over 100 bytes a sample; 512³ samples must fit in 3 GB, 22 a sample.
    assert second - first < 12 * 144**3 + 24e6, (second - first) / 1e6


def test_bars_show_only_what_takes_over_two_seconds(demo, tmp_path, monkeypatch):
    assert gen_samples.BAR_AFTER_SECONDS <= 2
    monkeypatch.setattr(gen_samples, 'BAR_AFTER_SECONDS', 1000)
    quick = run(demo, tmp_path, seeds='0-1', shapes='true', shape_res=SHAPE_RES)
    assert quick.stderr == ''
    monkeypatch.setattr(gen_samples, 'BAR_AFTER_SECONDS', 0)
    shown = run(demo, tmp_path, seeds='0-1', shapes='true', shape_res=SHAPE_RES).stderr
    assert 'seed 1: 100%' in shown and '6/6' in shown
    assert 'density seed0001.mrc: 100%' in shown and f'{SHAPE_RES}/{SHAPE_RES}' in shown


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def assert_refused(arguments, outdir, *mentioned):
    """Assert one line on stderr, a non-zero exit, no warning, no traceback, and no output folder."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = CliRunner().invoke(gen_samples.main, arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code in (1, 2)
    assert_one_line(result.stderr, *mentioned)
    assert not outdir.exists()


BAD_OPTIONS = {
    'no network': (dict(network=None), '--network'),
    'empty network': (dict(network=''), '--network'),
    'missing network': (dict(network='nowhere/net.pkl'), 'nowhere/net.pkl'),
    'network is a folder': (dict(network='.'), '.: Is a directory'),
    'network is a mesh': (dict(network=OBJ), 'demo.obj'),
    'network of another scheme': (dict(network='ftp://example.org/net.pkl'), '--network'),
    'URL without host': (dict(network='http:///net.pkl'), '--network'),
    'no mesh': (dict(obj_path=None), '--obj_path', 'expected a file'),
    'no landmarks': (dict(lms_path=None), '--lms_path', 'expected a file'),
    'empty mesh path': (dict(obj_path=''), '--obj_path'),
    'empty landmark path': (dict(lms_path=''), '--lms_path'),
    'missing mesh': (dict(obj_path='nowhere/head.obj'), 'nowhere/head.obj'),
    'missing landmarks': (dict(lms_path='nowhere/head.txt'), 'nowhere/head.txt'),
    'mesh is a folder': (dict(obj_path=DEMO), str(DEMO)),
    'landmarks are a folder': (dict(lms_path=DEMO), str(DEMO)),
    'files swapped': (dict(obj_path=LMS, lms_path=OBJ), str(LMS), 'found 0 vertices'),
    'no seeds': (dict(seeds=None), '--seeds'),
    'empty seeds': (dict(seeds=''), '--seeds'),
    'seeds end in a comma': (dict(seeds='0,'), '--seeds', "'0,'"),
    'seeds of words': (dict(seeds='zero'), '--seeds', 'zero'),
    'negative seed': (dict(seeds='-1'), '--seeds', '-1'),
    'falling seeds': (dict(seeds='9-7'), '--seeds', '9-7'),
    'seed above 32 bits': (dict(seeds=2**32), '--seeds', str(2**32 - 1)),
    'seed of 5000 digits': (dict(seeds='9' * 5000), '--seeds'),
    'four billion seeds': (dict(seeds=f'0-{2**32 - 1}'), '--seeds', 'at most'),
    'trunc nan': (dict(trunc='nan'), '--trunc', 'finite', 'nan'),
    'trunc inf': (dict(trunc='-inf'), '--trunc', 'finite'),
    'trunc beyond float': (dict(trunc='1e300'), '--trunc', '1e300'),
    'trunc of words': (dict(trunc='much'), '--trunc', 'much'),
    'negative cutoff': (dict(trunc_cutoff=-1), '--trunc_cutoff', '-1'),
    'no outdir': (dict(outdir=None), '--outdir'),
    'empty outdir': (dict(outdir=''), '--outdir'),
    'shape-res 0': (dict(shapes='true', shape_res=0), '--shape-res', '0'),
    'shape-res 0 without shapes': (dict(shape_res=0), '--shape-res', '0'),
    'shape-res 1': (dict(shapes='true', shape_res=1), '--shape-res', '1'),
    'shape-res huge': (dict(shapes='true', shape_res=10**6), '--shape-res', '1000000', '1024'),
    'shape-res float': (dict(shapes='true', shape_res='64.5'), '--shape-res', '64.5'),
    'shape format': (dict(shapes='true', shape_format='.stl'), '--shape-format', '.stl', '.glb'),
    'shapes of words': (dict(shapes='maybe'), '--shapes', 'maybe'),
    'fov 0': (dict(fov_deg=0), '--fov-deg', 'between 0 and 180'),
    'fov 180': (dict(fov_deg=180), '--fov-deg', 'between 0 and 180'),
    'fov nan': (dict(fov_deg='nan'), '--fov-deg', 'nan'),
    'fov of words': (dict(fov_deg='wide'), '--fov-deg', 'wide'),
    'no views': (dict(views=0), '--views'),
    'view from the pole': (dict(views='0:90'), '--views', 'pitch within'),
    'too many views': (dict(views=1000), '--views'),
    'views of words': (dict(views='front'), '--views', 'front'),
    'half a view': (dict(views='30:'), '--views', '30:'),
    'nan view': (dict(views='nan:0'), '--views'),
    'view beyond float': (dict(views='9' * 400 + ':0'), '--views'),
    'unknown device': (dict(device='abacus'), '--device', 'abacus'),
    'device of 30 digits': (dict(device='cuda:' + '9' * 30), '--device'),
    'unknown option': (dict(seed=3), '--seed'),
}


@pytest.mark.parametrize('case', BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option(case, demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, *mentioned = case
    assert_refused(published_options(demo.path, tmp_path / 'out', **changes), tmp_path / 'out', *mentioned)
    assert names(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason='CUDA is there')
@pytest.mark.parametrize('device', ['cuda', 'cuda:0'])
def test_cuda_asked_for_and_absent(device, demo, tmp_path):
    arguments = published_options(demo.path, tmp_path / 'out', device=device)
    assert_refused(arguments, tmp_path / 'out', '--device', repr(device), 'no CUDA')


def changed(first, text):
    """Return an edit of lines that replaces the first one starting with `first`."""

    def edit(lines):
        at = next(i for i, line in enumerate(lines) if line.startswith(first))
        return [*lines[:at], text, *lines[at + 1 :]]

    return edit


def without(start):
    return lambda lines: [line for line in lines if not line.startswith(start)]


def without_uvs(lines):
    corners = (' '.join(part.split('/')[0] for part in line.split()) for line in without('vt')(lines))
    return list(corners)


def flame_sized(lines):
    """5023 vertices and a face, like FLAME's in number."""
    return [*[line for line in lines if line.startswith('v ')][:5023], 'vt 0 0', 'f 1/1 2/1 3/1']


BAD_MESHES = {
    'wrong vertex count': (flame_sized, '5258', '5023'),
    'nan vertex': (changed('v ', 'v 0 nan 0'), 'line 1', 'finite', 'nan'),
    'vertex beyond float': (changed('v ', 'v 1e39 0 0'), 'line 1', 'finite', '1e39'),
    'vertex of two numbers': (changed('v ', 'v 0 1'), 'line 1', '3 numbers', '0 1'),
    'vertex of words': (changed('v ', 'v a b c'), 'line 1', '3 numbers', 'a b c'),
    'no UVs': (without_uvs, 'no UVs'),
    'UVs of other faces': (changed('f ', 'f 1/1 2/2 3/9999'), 'line 10732', 'UV', '9999'),
    'quads': (changed('f ', 'f 1/1 2/2 3/3 4/4'), 'line 10732', 'triangle', '4 corners'),
    'absent vertex': (changed('f ', 'f 1/1 2/2 9999/3'), 'line 10732', '5258', '9999'),
    'vertex 0': (changed('f ', 'f 0/1 2/2 3/3'), 'line 10732', 'from 1'),
    'vertex beyond integers': (changed('f ', f'f 1/1 2/2 {10**30}/3'), '5258'),
    'face of words': (changed('f ', 'f a b c'), 'line 10732', 'a b c'),
    'endless word': (changed('f ', 'f 1 2 ' + 'x' * 100000), 'line 10732'),
    'no faces': (without('f '), '0 faces'),
    'no vertices': (without('v '), 'line 5474', 'from 1 to 0'),
    'empty': (lambda lines: [], '0 vertices'),
}


@pytest.mark.parametrize('case', BAD_MESHES.values(), ids=BAD_MESHES)
def test_bad_mesh(case, demo, tmp_path):
    edit, *mentioned = case
    (tmp_path / 'bad.obj').write_text('\n'.join(edit(OBJ.read_text().splitlines())))
    arguments = published_options(demo.path, tmp_path / 'out', obj_path=tmp_path / 'bad.obj')
    assert_refused(arguments, tmp_path / 'out', str(tmp_path / 'bad.obj'), *mentioned)


def scaled(factor):
    return lambda lines: [' '.join(f'{factor * float(x):.3f}' for x in line.split()) for line in lines]


BAD_LANDMARKS = {
    '67 lines': (lambda lines: lines[1:], '68 lines', '67 lines'),
    '69 lines': (lambda lines: [*lines, lines[0]], '68 lines', '69 lines'),
    'two columns': (lambda lines: [line.rsplit(' ', 1)[0] for line in lines], '3 numbers', 'of 2'),
    'one short line': (lambda lines: [lines[0].rsplit(' ', 1)[0], *lines[1:]], 'of 2 or 3'),
    'commas': (lambda lines: [line.replace(' ', ',') for line in lines], '3 numbers'),
    'pixels': (scaled(2000), 'metres', 'pixels'),
    'nan': (lambda lines: ['nan 0 0', *lines[1:]], 'line 1', 'finite'),
    'words': (lambda lines: [*lines[:-1], 'a b c'], 'line 68', 'a b c'),
    'empty': (lambda lines: [], '68 lines', '0 lines'),
}


@pytest.mark.parametrize('case', BAD_LANDMARKS.values(), ids=BAD_LANDMARKS)
def test_bad_landmarks(case, demo, tmp_path):
    edit, *mentioned = case
    (tmp_path / 'bad.txt').write_text('\n'.join(edit(LMS.read_text().splitlines())))
    arguments = published_options(demo.path, tmp_path / 'out', lms_path=tmp_path / 'bad.txt')
    assert_refused(arguments, tmp_path / 'out', str(tmp_path / 'bad.txt'), *mentioned)


@pytest.mark.parametrize('option', ['obj_path', 'lms_path', 'network'])
def test_binary_garbage(option, demo, tmp_path):
    for seed in range(3):
        garbage = tmp_path / 'garbage'
        garbage.write_bytes(np.random.RandomState(seed).bytes(20000))
        arguments = published_options(demo.path, tmp_path / 'out', **{option: garbage})
        assert_refused(arguments, tmp_path / 'out', str(garbage))


class Hostile:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_bad_networks(demo, tmp_path):
    data = demo.path.read_bytes()
    discriminator = Discriminator(DiscriminatorConfig(img_resolution=16, channel_base=256, channel_max=16))
    save_snapshot(tmp_path / 'only_d.pkl', {'D': discriminator})
    save_snapshot(tmp_path / 'd_as_g.pkl', {'G_ema': discriminator})
    files = {
        'hostile.pkl': pickle.dumps({'G_ema': Hostile(tmp_path / 'pwned')}),
        'list.pkl': pickle.dumps({'G_ema': [1, 2, 3]}),
        'empty.pkl': b'',
        'zip.pkl': b'PK\x03\x04' + bytes(100),
        **{f'cut{length}.pkl': data[:length] for length in (1, 100, 5000, len(data) // 2, len(data) - 1)},
        'only_d.pkl': None,
        'd_as_g.pkl': None,
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        arguments = published_options(tmp_path / name, tmp_path / 'out')
        assert_refused(arguments, tmp_path / 'out', str(tmp_path / name))
    assert not (tmp_path / 'pwned').exists()


def test_bad_input_in_a_real_process(demo, tmp_path):
    (tmp_path / 'cut.pkl').write_bytes(demo.path.read_bytes()[:-100])
    (tmp_path / 'nan.obj').write_text(OBJ.read_text().replace('v ', 'v nan ', 1))
    cases = [
        (dict(trunc='nan'), '--trunc'),
        (dict(network=tmp_path / 'cut.pkl'), 'cut.pkl'),
        (dict(obj_path=tmp_path / 'nan.obj'), 'nan.obj, line 1'),
        (dict(lms_path=tmp_path / 'none.txt'), 'none.txt'),
    ]
    arguments = [published_options(demo.path, tmp_path / 'out', **changes) for changes, _ in cases]
    for begin in range(0, len(cases), 2):  # Two at a time: most of the seconds are imports.
        processes = [start('gen_samples.py', words) for words in arguments[begin : begin + 2]]
        for process, (_, mentioned) in zip(processes, cases[begin : begin + 2], strict=True):
            _, stderr = process.communicate()
            assert process.returncode in (1, 2)
            assert_one_line(stderr, mentioned)
    assert not (tmp_path / 'out').exists()


# ---------------------------------------------------------------------------------------------------------------------
# Output that cannot be written


def refused_output(demo, outdir, /, **changes):
    """Run with an output that fails; return the line of the error."""
    result = CliRunner().invoke(gen_samples.main, published_options(demo.path, outdir, **changes))
    assert isinstance(result.exception, SystemExit) and result.exit_code in (1, 2), repr(result.exception)
    return result.stderr


def test_outdir_that_is_a_file_or_lies_under_one(demo, tmp_path):
    (tmp_path / 'file').write_text('mine')
    assert_one_line(refused_output(demo, tmp_path / 'file'), '--outdir', str(tmp_path / 'file'), 'a folder')
    assert_one_line(refused_output(demo, tmp_path / 'file' / 'out'), str(tmp_path / 'file' / 'out'), 'Not a directory')
    assert names(tmp_path) == ['file'] and (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_outdir_that_is_not_writable(demo, tmp_path):
    tmp_path.chmod(0o500)
    assert_one_line(refused_output(demo, tmp_path / 'out'), str(tmp_path / 'out'), 'Permission denied')
    assert_one_line(refused_output(demo, tmp_path), str(tmp_path / 'seed0000.png'), 'Permission denied')
    assert names(tmp_path) == []


def test_a_folder_where_a_file_should_go(demo, tmp_path):
    (tmp_path / 'seed0000.png').mkdir()
    assert_one_line(refused_output(demo, tmp_path), str(tmp_path / 'seed0000.png'), 'a regular file')
    assert names(tmp_path) == ['seed0000.png'] and names(tmp_path / 'seed0000.png') == []


def test_nothing_partial_is_left_when_writing_fails(demo, tmp_path, monkeypatch):
    """Whatever ends the writer half-way, also what is no error of files."""

    def interrupted(self, path, **_):
        pathlib.Path(path).write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(trimesh.Trimesh, 'export', interrupted)
    result = CliRunner().invoke(
        gen_samples.main, published_options(demo.path, tmp_path, shapes='true', shape_res=24, shape_format='.glb')
    )
    assert result.exit_code != 0 and names(tmp_path) == ['seed0000.png']


@pytest.mark.parametrize('suffix', ['.mrc', '.glb'])
def test_disk_full_while_a_shape_is_written(suffix, demo, tmp_path):
    """Files that may not grow beyond a limit stand in for the full disk: the picture fits, the shape does not."""
    old = tmp_path / f'seed0000{suffix}'
    old.write_text('from before')
    options = dict(shapes='true', shape_res=48, shape_format=suffix)
    process = start('gen_samples.py', published_options(demo.path, tmp_path, **options), file_bytes=60000)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert_one_line(without_bars(stderr), str(old), 'cannot be written: ', 'large')
    assert names(tmp_path) == sorted([old.name, 'seed0000.png']) and old.read_text() == 'from before'


@pytest.mark.parametrize('with_old', [False, True])
def test_disk_full_while_a_picture_is_written(with_old, demo, tmp_path):
    picture = tmp_path / 'seed0000.png'
    if with_old:
        picture.write_text('from before')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        stderr = refused_output(demo, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(without_bars(stderr), str(picture), 'cannot be written: File too large')
    assert names(tmp_path) == ([picture.name] if with_old else [])
    assert not with_old or picture.read_text() == 'from before'
