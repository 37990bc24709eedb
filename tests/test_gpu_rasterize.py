# SPDX-License-Identifier: Apache-2.0
"""Rasteriser and mouth fill on a CUDA device against the references on the CPU, bit for bit."""

import contextlib

import pytest
import torch
from parity import ROOT
from test_rasterize import quad, random_mesh, triangles

from geometry.meshes import read_obj
from torch_utils.custom_ops import plugin, plugin_problem
from torch_utils.ops.fill_holes import OPAQUE, fill_holes
from torch_utils.ops.rasterize import AREA_EPSILON, RasterResult, interpolate, rasterize
from training.config import Next3DConfig
from training.head_raster import VIEWS, project

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def compiled():
    """On a GPU nothing is skipped: say why there is no kernel."""
    assert plugin_problem('rasterize_cuda') is None, plugin_problem('rasterize_cuda')
    assert plugin_problem('fill_holes_cuda') is None, plugin_problem('fill_holes_cuda')


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def bits(tensor):
    """Bits instead of numbers: NaN equals NaN, and -0 does not equal 0."""
    return tensor.cpu().view(torch.int32) if tensor.dtype == torch.float32 else tensor.cpu()


def assert_same(actual, expected):
    for name, left, right in zip(expected._fields, actual, expected):
        assert left.dtype == right.dtype and torch.equal(bits(left), bits(right)), name


def check(positions, faces, resolution):
    """Rasterise on both devices, compare, and return the result on the CPU."""
    expected = rasterize(positions, faces, resolution, 'ref')
    assert_same(rasterize(positions.cuda(), faces.cuda(), resolution, 'cuda'), expected)
    return expected


def head_views(batch=1):
    """Screen positions [batch * 4, V, 3] of the simple head, turned a bit in each item of the batch, and its faces."""
    mesh = read_obj(ROOT / 'tests' / 'data' / 'simple_head' / 'demo.obj')
    vertices = torch.as_tensor(mesh.vertices, dtype=torch.float32)
    turned = [vertices + 0.02 * i * vertices.roll(1, dims=1) for i in range(batch)]
    config = Next3DConfig()
    views = [project(torch.stack(turned), view, config.orth_scale, config.orth_shift) for view in VIEWS['next3d']]
    return torch.stack(views, dim=1).flatten(0, 1), torch.as_tensor(mesh.faces, dtype=torch.int64)


# ---- Rasteriser


@pytest.mark.parametrize('resolution', [256, (200, 333), 512])
def test_demo_head(resolution):
    result = check(*head_views(batch=2), resolution)
    assert ((result.face >= 0).float().mean((1, 2)) > 0.1).all()


@pytest.mark.parametrize('kind', ['plain', 'small', 'ties', 'wild'])
@pytest.mark.parametrize('resolution', [1, 16, 37, (16, 53), (53, 16), (1, 7), (7, 1), 129])
def test_random_soups(kind, resolution):
    for seed in range(4):
        check(*random_mesh(seed, kind), resolution)


def test_huge_and_tiny_triangles_together():
    generator = torch.Generator().manual_seed(0)
    centre = torch.rand(2, 3000, 1, 3, generator=generator) * 2.4 - 1.2
    size = 10.0 ** (torch.rand(2, 3000, 1, 1, generator=generator) * 4 - 3.5)
    corners = centre + size * (torch.rand(2, 3000, 3, 3, generator=generator) - 0.5)
    result = check(corners.flatten(1, 2), torch.arange(9000).view(-1, 3), (150, 170))
    assert result.face.unique().numel() > 100


@pytest.mark.parametrize('count', [1, 255, 256, 257, 600])
def test_many_faces_that_fill_the_image(count):
    depths = torch.randperm(count, generator=torch.Generator().manual_seed(count)) % 50  # With ties.
    corners = [corner for z in depths.tolist() for corner in quad(z - 25.0, size=3.0)]
    result = check(*triangles(*corners), (33, 70))
    seen = result.depth[result.face >= 0]
    assert len(seen) > 0 and (seen - (depths.min() - 25)).abs().max() < 1e-4


@pytest.mark.parametrize('size', [0.05, 3.0])  # Drawn by one thread, and by a block.
def test_of_equal_depths_the_lower_face_wins(size):
    positions, faces = triangles(*quad(0.0, size), *quad(-0.0, size), *quad(0.0, size))
    for order, seen in [([0, 1, 2, 3, 4, 5], [0, 1]), ([3, 2, 5, 4, 1, 0], [0, 1]), ([4, 0, 2, 1], [0, 3])]:
        assert check(positions, faces[order], 64).face.unique().tolist() == [-1, *seen]


def test_a_small_face_behind_and_before_a_large_one():
    for z, is_seen in [(1.0, True), (3.0, False), (-5.0, True)]:
        large, small = quad(2.0, size=3.0), quad(z, size=0.02)
        result = check(*triangles(*large, *small), 128)
        assert (result.face >= 2).any() == is_seen


@pytest.mark.parametrize('scale', [-1.0, -1e30, 1e-42, 3e38])
def test_depths_of_any_sign_and_size(scale):
    positions, faces = random_mesh(3, 'plain')
    positions[..., 2] *= scale
    check(positions, faces, (40, 61))


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_vertices_that_are_not_finite(value, axis):
    positions, faces = random_mesh(11, 'small')
    positions[:, 1::5, axis] = value
    assert (check(positions, faces, 64).face >= 0).any()


def test_faces_without_area_or_turned_away():
    front, back = [(-1, -1, 1), (1, -1, 1), (-1, 1, 1)], [(-1, -1, 1), (-1, 1, 1), (1, -1, 1)]
    line, point = [(-1, -1, 1), (1, 1, 1), (0, 0, 1)], [(0, 0, 1)] * 3
    assert (check(*triangles(back, line, point), 20).face == -1).all()
    assert (check(*triangles(back, line, front, point), 20).face.unique() == torch.tensor([-1, 2])).all()
    outside = [(2, 2, 1), (3, 2, 1), (2, 3, 1)]
    assert (check(*triangles(outside), 20).face == -1).all()


@pytest.mark.parametrize('num_views, num_faces', [(0, 5), (3, 0), (0, 0)])
def test_empty(num_views, num_faces):
    result = check(torch.zeros(num_views, 4, 3), torch.zeros(num_faces, 3, dtype=torch.int64), (5, 6))
    assert result.face.shape == (num_views, 5, 6)


def test_indices_out_of_range_cover_nothing():
    positions, faces = random_mesh(12, 'plain')
    faces[0, 0], faces[7, 1], faces[9, 2], faces[11, 0] = -1, positions.shape[1], 2 ** 62, -2 ** 62
    is_good = ((faces >= 0) & (faces < positions.shape[1])).all(1)
    expected = rasterize(positions, faces[is_good], 64, 'ref')
    renumbered = torch.where(expected.face >= 0, is_good.nonzero().squeeze(1)[expected.face], -1)
    assert_same(rasterize(positions.cuda(), faces.cuda(), 64, 'cuda'), expected._replace(face=renumbered))
    assert (rasterize(positions[:, :0].cuda(), faces.cuda(), 64, 'cuda').face == -1).all()


def test_arguments_may_be_strided():
    positions, faces = (part.cuda() for part in random_mesh(8, 'plain'))
    together = rasterize(positions, faces, 33, 'cuda')
    strided = positions.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert_same(rasterize(strided, faces.mT.contiguous().mT, 33, 'cuda'), together)
    expanded = rasterize(positions[1:2].expand(3, -1, -1), faces, 33, 'cuda')
    assert_same(expanded, RasterResult(*(part[1:2].expand_as(part) for part in together)))


def test_default_is_the_kernel_and_cpu_tensors_are_refused():
    positions, faces = random_mesh(13, 'plain')
    assert_same(rasterize(positions.cuda(), faces.cuda(), 32), rasterize(positions, faces, 32, 'ref'))
    with pytest.raises(RuntimeError, match="^rasterize: impl 'cuda' cannot be used: it takes CUDA tensors, got cpu"):
        rasterize(positions, faces, 32, 'cuda')
    with pytest.raises(RuntimeError, match="^fill_holes: impl 'cuda' cannot be used: it takes CUDA tensors, got cpu"):
        fill_holes(torch.zeros(1, 1, 4, 4), 'cuda')
    with pytest.raises(RuntimeError, match="^rasterize: impl 'cpp' cannot be used: it takes CPU tensors, got cuda"):
        rasterize(positions.cuda(), faces.cuda(), 32, 'cpp')


def test_pixel_centres_are_those_passed_in():
    positions, faces = random_mesh(14, 'plain')
    rows, columns = torch.tensor([-0.9, -0.1, 0.0, 0.05, 1.0]), torch.linspace(-1.2, 0.4, 19) ** 3
    expected = plugin('rasterize').forward(positions, faces, rows, columns, AREA_EPSILON)
    actual = plugin('rasterize_cuda').forward(*(t.cuda() for t in (positions, faces, rows, columns)), AREA_EPSILON)
    assert_same(actual, RasterResult(*expected))


def test_the_compiled_modules_check_for_themselves():
    positions, faces = (part.cuda() for part in triangles(*quad(1.0)))
    centres = torch.zeros(4, device='cuda')
    for bad in [(positions[0], faces, centres, centres), (positions.double(), faces, centres, centres),
                (positions, faces[0], centres, centres), (positions, faces.int(), centres, centres),
                (positions.cpu(), faces, centres, centres), (positions, faces.cpu(), centres, centres),
                (positions, faces, centres.cpu(), centres), (positions[:0], faces, centres, centres),
                (positions, faces[:0], centres, centres), (positions, faces, centres[:0], centres),
                (positions, faces, centres, centres[None])]:
        with pytest.raises(RuntimeError, match='expected'):
            plugin('rasterize_cuda').forward(*bad, AREA_EPSILON)
    for bad in (torch.zeros(1, 2, 3, 3), torch.zeros(3, 3), torch.zeros(1, 1, 0, 3), torch.zeros(1, 1, 3, 3).double()):
        with pytest.raises(RuntimeError, match='^alpha: expected'):
            plugin('fill_holes_cuda').forward(bad.cuda(), OPAQUE)
    with pytest.raises(RuntimeError, match='^alpha: expected'):
        plugin('fill_holes_cuda').forward(torch.zeros(1, 1, 3, 3), OPAQUE)


# ---- Mouth fill


def check_fill(alpha):
    expected = fill_holes(alpha, 'ref')
    actual = fill_holes(alpha.cuda(), 'cuda')
    assert actual.is_contiguous() and actual.shape == alpha.shape and torch.equal(bits(actual), bits(expected))
    return expected


def random_alpha(shape, density, seed=0):
    """Values in [0, 1], of which this share is 1."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator).round(decimals=1)
    return torch.where(torch.rand(shape, generator=generator) < density, 1.0, values)


SHAPES = [(1, 1, 1, 1), (2, 1, 1, 9), (2, 1, 1, 700), (2, 1, 700, 1), (3, 1, 2, 2), (5, 1, 17, 23), (2, 1, 33, 64),
          (2, 1, 64, 33), (3, 1, 31, 32), (1, 1, 100, 1100), (1, 1, 2000, 40)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('density', [0.05, 0.3, 0.38, 0.6])
def test_random_masks(shape, density):
    alpha = random_alpha(shape, density)
    check_fill(alpha)
    alpha[:, 0, 0, 0] = 0
    assert (check_fill(alpha)[:, 0, 0, 0] == 0).all()
    alpha[:, 0, 0, 0] = 1  # Then the flood comes from the whole border.
    check_fill(alpha)


@pytest.mark.parametrize('batch, size, density', [(16, 256, 0.3), (2, 512, 0.3), (1, 1500, 0.05)])
def test_large_random_masks(batch, size, density):
    check_fill(random_alpha((batch, 1, size, size), density))


def spiral(size):
    """A corridor of one pixel that winds from the corner to the middle."""
    walls = torch.ones(1, 1, size, size)
    row, column = 0, 0
    lengths = [size - 1, *(length for length in range(size - 1, 0, -2) for _ in range(2))]
    for turn, length in enumerate(lengths):
        down, right = [(0, 1), (1, 0), (0, -1), (-1, 0)][turn % 4]
        end_row, end_column = row + down * length, column + right * length
        walls[..., min(row, end_row):max(row, end_row) + 1, min(column, end_column):max(column, end_column) + 1] = 0
        row, column = end_row, end_column
    return walls


@pytest.mark.parametrize('size', [61, 256, 641, 1500])
def test_spirals(size):
    alpha = spiral(size)
    assert (alpha == 0).float().mean() < 0.52
    turned = torch.cat([alpha, alpha.mT, alpha.flip(2), alpha.flip(3), alpha.flip(2, 3)])
    assert torch.equal(fill_holes(turned.cuda(), 'cuda').cpu(), turned)
    blocked, expected = alpha.clone(), torch.ones_like(alpha)
    blocked[..., 0, 5] = 1
    expected[..., 0, :5] = 0
    assert torch.equal(fill_holes(blocked.cuda(), 'cuda').cpu(), expected)


@pytest.mark.parametrize('height, width', [(41, 40), (257, 255), (900, 901)])
def test_serpentines(height, width):
    alpha = torch.zeros(1, 1, height, width)
    alpha[..., 1::4, :-1] = 1
    alpha[..., 3::4, 1:] = 1
    for passable in (alpha, alpha.mT):
        assert torch.equal(fill_holes(passable.cuda(), 'cuda').cpu(), passable)


def test_all_blocked_all_open_and_not_a_number():
    for value in (0.0, 1.0, OPAQUE, torch.nan, -torch.inf):
        check_fill(torch.full((3, 1, 45, 67), value))
    alpha = random_alpha((4, 1, 50, 70), 0.2)
    alpha[random_alpha(alpha.shape, 0.3, seed=1) == 1] = torch.nan
    check_fill(alpha)
    opaque = torch.tensor(254, dtype=torch.float32) / 255
    assert (check_fill(opaque.expand(1, 1, 3, 3)) == opaque).all()
    assert (check_fill(torch.nextafter(opaque, torch.tensor(2.0)).expand(1, 1, 3, 3)) == 1).all()


@pytest.mark.parametrize('shape', [(0, 1, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0)])
def test_no_pixels(shape):
    assert fill_holes(torch.zeros(shape, device='cuda'), 'cuda').shape == shape


def test_masks_may_be_strided_and_are_not_changed():
    alpha = random_alpha((4, 30, 2, 26), 0.3).permute(0, 2, 3, 1)[:, :1, ::2, 1:]
    on_gpu = random_alpha((4, 30, 2, 26), 0.3).cuda().permute(0, 2, 3, 1)[:, :1, ::2, 1:].requires_grad_()
    filled = fill_holes(on_gpu, 'cuda')
    assert filled.is_contiguous() and not filled.requires_grad
    assert torch.equal(filled.cpu(), fill_holes(alpha, 'ref')) and torch.equal(on_gpu.cpu(), alpha)


# ---- Both


def cover(positions, faces, corner_values):
    """What `cover_views` does with the two ops."""
    result = rasterize(positions, faces, 256, 'cuda')
    alpha = interpolate(result, corner_values)[..., :1].permute(0, 3, 1, 2)
    return [*result, alpha, fill_holes(alpha, 'cuda')]


@pytest.fixture
def scene():
    """Views and faces of the demo head and values of its corners such that some of it is opaque."""
    positions, faces = (part.cuda() for part in head_views(batch=4))
    values = torch.rand(len(faces), 1, 2, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1) * 2
    return positions, faces, values.cuda()


def test_repeats_give_the_same_bits(scene):
    first = cover(*scene)
    for _ in range(10):
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(cover(*scene), first))


def test_nothing_waits_for_the_device(scene):
    cover(*scene)  # Compiled, and pixel centres computed.
    with no_synchronisation():
        cover(*scene)


def test_a_graph_replays_with_other_inputs(scene):
    positions, faces, values = scene
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cover(*scene)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = cover(positions, faces, values)
    for shift in (0.0, 0.1, -0.3):
        positions.add_(shift)
        graph.replay()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(recorded, cover(positions, faces, values)))


def test_another_stream(scene):
    expected = cover(*scene)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = cover(*scene)
    stream.synchronize()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(actual, expected))
