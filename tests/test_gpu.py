# SPDX-License-Identifier: Apache-2.0
"""The networks on a CUDA device against the same on the CPU; half precision against single."""

import copy
import dataclasses

import demo_network
import numpy as np
import parity
import pytest
import torch
from click.testing import CliRunner

import gen_samples
from geometry import cameras, meshes, shapes
from training.checkpoint import save_snapshot
from training.config import DiscriminatorConfig
from training.discriminator import Discriminator
from training.generator import Next3DGenerator
from training.topology import load_topology

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('exact_float32')]
DEMO = parity.ROOT / 'tests' / 'data' / 'simple_head'


@pytest.fixture(scope='module')
def demo_inputs():
    torch.manual_seed(0)
    mesh = meshes.read_obj(DEMO / 'demo.obj')
    v = torch.from_numpy(meshes.stack_mesh(mesh.vertices, meshes.read_landmarks(DEMO / 'demo_kpt2d.txt')))
    c = cameras.make_label(cameras.look_at_pose(1.2, 1.5), cameras.intrinsics())
    return torch.randn(2, demo_network.CONFIG.z_dim), c.repeat(2, 1), v.repeat(2, 1, 1)


def demo_generator(**changes):
    torch.manual_seed(0)
    config = dataclasses.replace(demo_network.CONFIG, **changes)
    topology = load_topology(DEMO / 'head_template.obj', config.texture_resolution)
    return Next3DGenerator(config, *topology).eval().requires_grad_(False)


def run(generator, inputs, device):
    generator = copy.deepcopy(generator).to(device)
    z, c, v = (x.to(device) for x in inputs)
    ws = generator.mapping(z, c)
    planes = generator.planes(ws, v)
    return {'planes': planes.planes.cpu(), **{k: x.cpu() for k, x in generator.render(planes, ws, c).items()}}


def deviation(actual, expected):
    return ((actual - expected).abs().max() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize('layout', ['next3d', 'aligned'])
def test_generator_on_cuda_equals_cpu(demo_inputs, layout):
    generator = demo_generator(plane_layout=layout)
    on_cpu, on_cuda = (run(generator, demo_inputs, device) for device in ('cpu', 'cuda'))
    for name, expected in on_cpu.items():
        assert deviation(on_cuda[name], expected) < 1e-3, name


def test_half_precision_superresolution_stays_close(demo_inputs):
    exact, half = (run(demo_generator(sr_num_fp16_res=n), demo_inputs, 'cuda') for n in (0, 4))
    assert deviation(half['image_raw'], exact['image_raw']) < 1e-5  # cuDNN may take another algorithm each time.
    assert 0 < deviation(half['image'], exact['image']) < 2e-2


def test_half_precision_backbones_stay_close(demo_inputs):
    exact, half = (run(demo_generator(num_fp16_res=n, conv_clamp=256), demo_inputs, 'cuda') for n in (0, 4))
    assert 0 < deviation(half['planes'], exact['planes']) < 5e-2


def test_half_precision_discriminator_stays_close():
    torch.manual_seed(0)
    images = {'image': torch.randn(4, 3, 128, 128).cuda(), 'image_raw': torch.randn(4, 3, 64, 64).cuda()}
    logits = []
    for n in (0, 4):
        torch.manual_seed(1)
        config = DiscriminatorConfig(img_resolution=128, channel_base=2048, channel_max=64, num_fp16_res=n)
        logits.append(Discriminator(config).cuda()(images, torch.randn(4, 25).cuda() * 0 + 0.1))
    assert deviation(logits[1], logits[0]) < 2e-2


def test_gen_samples_on_cuda(tmp_path, demo_inputs):
    save_snapshot(tmp_path / 'net.pkl', {'G_ema': demo_generator()})
    arguments = [f'--network={tmp_path}/net.pkl', f'--obj_path={DEMO}/demo.obj', '--seeds=0', '--shapes=true']
    arguments += [f'--lms_path={DEMO}/demo_kpt2d.txt', '--shape-res=32', '--depth', '--views=1']
    depths = []
    for device in ('cpu', 'cuda'):
        out = tmp_path / device
        result = CliRunner().invoke(gen_samples.main, [*arguments, f'--outdir={out}', f'--device={device}'])
        assert result.exit_code == 0, result.output
        endings = ('.mrc', '.png', '_depth.npy', '_depth.png')
        assert sorted(p.name for p in out.iterdir()) == [f'seed0000{ending}' for ending in endings]
        depths.append(np.load(out / 'seed0000_depth.npy'))
    assert np.abs(depths[0] - depths[1]).max() < 1e-3


def test_density_grid_on_cuda_equals_cpu():
    """Slabs arrive in host memory one behind the other, in buffers that are used again."""
    def query(points):
        return points.square().sum(dim=-1, keepdim=True).where(points[..., :1] > 0, -points[..., 1:2])

    grids = [shapes.density_grid(query, 64, 1.0, device=device) for device in ('cpu', 'cuda')]
    np.testing.assert_allclose(*grids, rtol=1e-6)
