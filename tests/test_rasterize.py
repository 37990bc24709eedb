# SPDX-License-Identifier: Apache-2.0
"""The rasteriser: hand-worked triangles, agreement of the implementations bit for bit, and with the published one."""

import sys
import types

import numpy as np
import parity
import pytest
import torch

from torch_utils.custom_ops import plugin, plugin_problem
from torch_utils.ops import rasterize as module
from torch_utils.ops.rasterize import RasterResult, interpolate, rasterize

VIEWS_DEG = [(0, 0, 0), (0, 90, 0), (0, -90, 0), (90, 0, 0)]


def skip_without_plugin():
    if plugin_problem('rasterize') is not None:
        pytest.skip(plugin_problem('rasterize'))


@pytest.fixture(params=['ref', 'cpp'])
def impl(request):
    if request.param == 'cpp':
        skip_without_plugin()
    return request.param


def triangles(*corners):
    """Positions and faces of separate triangles, each a list of three (x', y', z')."""
    positions = torch.tensor(corners, dtype=torch.float32).view(1, -1, 3)
    return positions, torch.arange(positions.shape[1]).view(-1, 3)


def quad(z, size=1.0):
    """Two front-facing triangles over the square [-size, size]."""
    a, b, c, d = (-size, -size, z), (size, -size, z), (size, size, z), (-size, size, z)
    return [[a, b, c], [a, c, d]]


def assert_same(actual, expected):
    for name, left, right in zip(actual._fields, actual, expected):
        assert left.dtype == right.dtype and torch.equal(left, right), name


def test_one_triangle_by_hand(impl):
    positions, faces = triangles([(-1, -1, 1), (1, -1, 2), (-1, 1, 3)])
    result = rasterize(positions, faces, 4, impl)
    # Centres at -0.75, -0.25, 0.25, 0.75; those on the hypotenuse x' + y' = 0 are not inside.
    assert result.face.tolist() == [[[0, 0, 0, -1], [0, 0, -1, -1], [0, -1, -1, -1], [-1, -1, -1, -1]]]
    assert result.barycentric[0, 0, 2].tolist() == [0.25, 0.625, 0.125]
    assert result.barycentric[0, 2, 0].tolist() == [0.25, 0.125, 0.625]
    assert result.depth[0, 0, 2].item() == 0.25 * 1 + 0.625 * 2 + 0.125 * 3
    assert result.barycentric[0, 3, 3].tolist() == [0, 0, 0] and result.depth[0, 3, 3].item() == 0


def test_rows_and_columns_of_an_oblong_image(impl):
    positions, faces = triangles([(0, -1, 1), (1, -1, 1), (1, 0, 1)])  # Top right.
    face = rasterize(positions, faces, (4, 8), impl).face
    assert face.shape == (1, 4, 8)
    assert (face[0] >= 0).nonzero().tolist() == [[0, 5], [0, 6], [0, 7], [1, 7]]


def test_back_faces_and_faces_without_area_are_skipped(impl):
    front, back = [(-1, -1, 1), (1, -1, 1), (-1, 1, 1)], [(-1, -1, 1), (-1, 1, 1), (1, -1, 1)]
    line, point = [(-1, -1, 1), (1, 1, 1), (0, 0, 1)], [(0, 0, 1)] * 3
    assert (rasterize(*triangles(back, line, point), 8, impl).face == -1).all()
    assert (rasterize(*triangles(back, line, point, front), 8, impl).face.unique() == torch.tensor([-1, 3])).all()


@pytest.mark.parametrize('size, is_seen', [(2e-5, False), (1e-4, True)])
def test_the_least_area(impl, size, is_seen):
    # Twice the area is 3 * size ** 2: below and above 1e-8. The one pixel's centre is at 0.
    result = rasterize(*triangles([(-size, -size, 1), (2 * size, -size, 1), (-size / 2, size, 1)]), 1, impl)
    assert (result.face.item() == 0) == is_seen


def test_the_nearest_face_wins_whatever_the_order(impl):
    near, far = quad(1.0, size=0.5), quad(2.0)
    for corners, near_faces in ((near + far, [0, 1]), (far + near, [2, 3])):
        result = rasterize(*triangles(*corners), 8, impl)
        is_near = torch.isin(result.face[0], torch.tensor(near_faces))
        on_diagonal = torch.eye(8, dtype=torch.bool)  # Its centres lie on the edge that the two halves share.
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[2:6, 2:6] = True
        assert torch.equal(is_near, expected & ~on_diagonal)
        torch.testing.assert_close(result.depth[0][~on_diagonal], torch.where(expected, 1.0, 2.0)[~on_diagonal])
        assert (result.face[0][on_diagonal] == -1).all()


def test_of_equal_depths_the_lower_face_wins(impl):
    # The same corners, turned: at the centre of the one pixel the depths are equal to the bit.
    corners = [(-1, -1, 1), (1, -1, 1), (0, 1, 1)]
    turned = [corners[1:] + corners[:1], corners, corners]
    positions, faces = triangles(*turned)
    first = rasterize(positions, faces, 1, impl)
    flipped = rasterize(positions, faces.flip(0), 1, impl)
    assert first.depth.item() == flipped.depth.item()
    assert first.face.item() == 0 and flipped.face.item() == 0
    assert rasterize(positions, faces[1:], 1, impl).face.item() == 0


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('axis', [0, 1, 2])
@pytest.mark.parametrize('corner', [0, 1, 2])
def test_a_vertex_that_is_not_finite_covers_nothing(impl, value, axis, corner):
    positions, faces = triangles([(-3, -3, 1), (3, -3, 1), (0, 3, 1)], [(-1, -1, 5), (1, -1, 5), (0, 1, 5)])
    positions[0, corner, axis] = value
    result = rasterize(positions, faces, 8, impl)
    assert_same(result, rasterize(positions, faces[[1, 1]], 8, impl)._replace(face=result.face))
    assert set(result.face.unique().tolist()) == {-1, 1}


@pytest.mark.parametrize('num_views, num_faces', [(0, 5), (3, 0), (0, 0)])
def test_empty(impl, num_views, num_faces):
    result = rasterize(torch.zeros(num_views, 4, 3), torch.zeros(num_faces, 3, dtype=torch.int64), (5, 6), impl)
    assert result.face.shape == result.depth.shape == (num_views, 5, 6)
    assert result.barycentric.shape == (num_views, 5, 6, 3)
    assert (result.face == -1).all() and (result.barycentric == 0).all() and (result.depth == 0).all()
    assert interpolate(result, torch.zeros(num_faces, 3, 2)).shape == (num_views, 5, 6, 2)


def test_everything_outside_the_image(impl):
    positions, faces = triangles([(2, 2, 1), (3, 2, 1), (2, 3, 1)])
    assert (rasterize(positions, faces, 8, impl).face == -1).all()


def random_mesh(seed, kind):
    """A random soup of triangles in three views: arbitrary, on a coarse grid (many ties), or of wild magnitude."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(3, 60, 3, generator=generator) * 2.6 - 1.3
    faces = torch.randint(0, 60, (150, 3), generator=generator)
    if kind == 'small':
        offsets = torch.rand(3, 150, 3, 3, generator=generator) * 0.4
        return (positions[:, faces[:, :1]] + offsets).flatten(1, 2), torch.arange(450).view(-1, 3)
    if kind == 'ties':
        positions = (positions * 8).round() / 8
        positions[..., 2] = (positions[..., 2] * 2).round()
    if kind == 'wild':
        positions *= 10.0 ** torch.randint(-40, 39, positions.shape, generator=generator)
        positions[0, ::7, 1] = torch.nan
        positions[1, ::5, 0] = torch.inf
    return positions, faces


@pytest.mark.parametrize('kind', ['plain', 'small', 'ties', 'wild'])
@pytest.mark.parametrize('resolution', [1, 16, 37, (16, 53), (53, 16), (1, 7)])
def test_implementations_agree_bit_for_bit(kind, resolution):
    skip_without_plugin()
    for seed in range(4):
        positions, faces = random_mesh(seed, kind)
        compiled = rasterize(positions, faces, resolution, 'cpp')
        assert_same(compiled, rasterize(positions, faces, resolution, 'ref'))
        assert kind == 'wild' or resolution in (1, (1, 7)) or (compiled.face >= 0).sum() > 30


def test_against_brute_force(impl):
    """Every face at every pixel, in float64: only pixels on an edge may differ."""
    positions, faces = random_mesh(5, 'plain')
    result = rasterize(positions, faces, (23, 31), impl)
    corners = positions.double()[:, faces][:, :, :, None, None, :]
    y = ((torch.arange(23).double() + 0.5) * 2 / 23 - 1)[:, None]
    x = (torch.arange(31).double() + 0.5) * 2 / 31 - 1
    (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (corners[:, :, corner].unbind(-1) for corner in range(3))
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    weights = torch.stack([(bx - x) * (cy - y) - (by - y) * (cx - x), (cx - x) * (ay - y) - (cy - y) * (ax - x),
                           (ax - x) * (by - y) - (ay - y) * (bx - x)], -1) / area[..., None]
    depth = (weights * torch.stack([az, bz, cz], -1)).sum(-1)
    depth[(area <= 1e-8).expand_as(depth) | (weights <= 0).any(-1)] = torch.inf
    nearest, face = depth.min(1)
    face[nearest.isinf()] = -1
    is_same = face == result.face
    assert (~is_same).float().mean() < 1e-3
    is_hit = is_same & (face >= 0)
    torch.testing.assert_close(result.depth[is_hit], nearest[is_hit].float(), rtol=0, atol=1e-4)
    chosen = weights.gather(1, face.clamp(min=0)[:, None, :, :, None].expand(-1, -1, -1, -1, 3))[:, 0]
    torch.testing.assert_close(result.barycentric[is_hit], chosen[is_hit].float(), rtol=0, atol=1e-3)


def test_the_reference_does_not_depend_on_its_slices(monkeypatch):
    positions, faces = random_mesh(6, 'ties')
    whole = rasterize(positions, faces, (29, 31), 'ref')
    for size in (10007, 331):  # The second is smaller than many a face.
        monkeypatch.setattr(module, '_MAX_CANDIDATES', size)
        assert_same(rasterize(positions, faces, (29, 31), 'ref'), whole)


def test_the_compiled_one_does_not_depend_on_the_threads():
    skip_without_plugin()
    positions, faces = random_mesh(7, 'small')
    num_threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 64):
            torch.set_num_threads(count)
            results.append(rasterize(positions[:1], faces, 41, 'cpp'))
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert_same(result, results[0])


def test_views_do_not_meet_and_arguments_may_be_strided(impl):
    positions, faces = random_mesh(8, 'plain')
    together = rasterize(positions, faces, 33, impl)
    alone = [rasterize(view[None], faces, 33, impl) for view in positions]
    assert_same(together, [torch.cat(parts) for parts in zip(*alone)])
    strided = positions.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    assert_same(rasterize(strided, faces.mT.contiguous().mT, 33, impl), together)
    assert_same(rasterize(positions[1:2].expand(3, -1, -1), faces, 33, impl), [part[1:2].expand_as(part)
                                                                              for part in together])


def test_no_gradient(impl):
    positions, faces = triangles(*quad(1.0))
    assert not any(part.requires_grad for part in rasterize(positions.requires_grad_(), faces, 4, impl))


def test_bad_calls(monkeypatch):
    positions, faces = triangles(*quad(1.0))
    cases = [
        ((positions[0], faces, 4), r'^positions: expected \[\*, \*, 3\], got \[6, 3\]$'),
        ((positions, faces[0], 4), r'^faces: expected \[\*, 3\], got \[3\]$'),
        ((positions.double(), faces, 4), '^positions: expected torch.float32, got torch.float64$'),
        ((positions, faces.int(), 4), '^faces: expected torch.int64, got torch.int32$'),
        ((positions, faces.to('meta'), 4), '^faces: expected to be on cpu like positions, got meta$'),
        ((positions, faces + 1, 4), r'^faces: expected indices in \[0, 6\), got 1 to 6$'),
        ((positions, faces - 1, 4), r'^faces: expected indices in \[0, 6\), got -1 to 4$'),
        ((positions, faces, 0), '^resolution: expected a positive int or .height, width., got 0$'),
        ((positions, faces, (4, 4, 4)), '^resolution: expected'),
        ((positions, faces, (4, 2.5)), '^resolution: expected'),
        ((positions, faces, 4, 'vulkan'),
         "^rasterize: expected impl to be one of 'ref', 'cuda', 'cpp', 'pytorch3d' or None, got 'vulkan'$"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            rasterize(*arguments)
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(RuntimeError, match="^rasterize: impl 'pytorch3d' cannot be used: PyTorch3D is not installed"):
        rasterize(positions, faces, 4, 'pytorch3d')
    result = rasterize(positions, faces, 4)
    with pytest.raises(ValueError, match=r'^corner_values: expected \[\*, 3, \*\], got \[2, 3\]$'):
        interpolate(result, torch.zeros(2, 3))
    with pytest.raises(ValueError, match='^corner_values: expected torch.float32, got torch.int64$'):
        interpolate(result, torch.zeros(2, 3, 1, dtype=torch.int64))


def test_the_compiled_module_checks_for_itself():
    skip_without_plugin()
    positions, faces = triangles(*quad(1.0))
    centres = torch.zeros(4)
    for bad in [(positions[0], faces, centres, centres), (positions.double(), faces, centres, centres),
                (positions, faces[0], centres, centres), (positions, faces.int(), centres, centres),
                (positions, faces + 1, centres, centres), (positions, faces - 1, centres, centres),
                (positions, faces, centres[:0], centres), (positions, faces, centres, centres[None])]:
        with pytest.raises(RuntimeError, match='expected'):
            plugin('rasterize').forward(*bad, 1e-8)


def test_pytorch3d_gets_and_gives_its_own_conventions(monkeypatch):
    """A stand-in for PyTorch3D that, in its frame (x left, y up, shorter side 2 long), calls the reference."""
    def rasterize_meshes(meshes, image_size, blur_radius, faces_per_pixel, **_):
        assert blur_radius == 0 and faces_per_pixel == 1
        height, width = image_size
        shrink = torch.tensor([-min(1, height / width), -min(1, width / height), 1])
        result = rasterize(meshes.verts * shrink, meshes.faces[0][:, [0, 2, 1]], image_size, 'ref')
        is_hit = result.face >= 0
        packed = result.face + torch.arange(len(meshes.verts))[:, None, None] * meshes.faces.shape[1]
        weights = torch.where(is_hit[..., None], result.barycentric[..., [0, 2, 1]], -1)
        return (torch.where(is_hit, packed, -1)[..., None], torch.where(is_hit, result.depth, -1)[..., None],
                weights[..., None, :], None)

    fake = {name: types.ModuleType(name) for name in ('pytorch3d', 'pytorch3d.renderer', 'pytorch3d.renderer.mesh',
                                                      'pytorch3d.structures')}
    fake['pytorch3d.renderer.mesh'].rasterize_meshes = rasterize_meshes
    fake['pytorch3d.structures'].Meshes = lambda verts, faces: types.SimpleNamespace(verts=verts, faces=faces)
    for name, stand_in in fake.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setattr(module.importlib.util, 'find_spec', lambda name: fake.get(name))
    positions, faces = random_mesh(9, 'plain')
    for resolution in (16, (16, 32), (32, 16)):
        expected = rasterize(positions, faces, resolution, 'ref')
        assert_same(rasterize(positions, faces, resolution, 'pytorch3d'), expected)


def test_interpolate():
    positions, faces = triangles([(-1, -1, 1), (1, -1, 2), (-1, 1, 3)])
    result = rasterize(positions, faces, 4)
    values = torch.tensor([[[0.0, 1.0], [8.0, 1.0], [16.0, 1.0]]], requires_grad=True)
    image = interpolate(result, values)
    assert image[0, 0, 2].tolist() == [0.625 * 8 + 0.125 * 16, 1] and image[0, 3, 3].tolist() == [0, 0]
    image.sum().backward()
    torch.testing.assert_close(values.grad[0, :, 0], result.barycentric.sum((0, 1, 2)))
    unseen = torch.full((1, 3, 1), torch.inf)
    assert (interpolate(result, unseen)[result.face < 0] == 0).all()


@pytest.mark.gpu
def test_the_reference_on_a_gpu_equals_the_cpu():
    for kind in ('plain', 'small', 'ties', 'wild'):
        positions, faces = random_mesh(10, kind)
        on_gpu = rasterize(positions.cuda(), faces.cuda(), (37, 41), 'ref')
        assert_same(RasterResult(*(part.cpu() for part in on_gpu)), rasterize(positions, faces, (37, 41), 'ref'))


def rotation(angles_deg):
    (cx, cy, cz), (sx, sy, sz) = (function(torch.deg2rad(torch.tensor(angles_deg, dtype=torch.float32)))
                                  for function in (torch.cos, torch.sin))
    about_x = torch.tensor([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = torch.tensor([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


@pytest.fixture(params=['demo', 'deformed'])
def published(request):
    """Name, arrays, and screen positions and faces of the published rasteriser's input."""
    _, arrays = parity.load(f'raster_{request.param}')
    _, _, faces, _ = parity.recipe.load_obj(parity.parity_file('head_template.obj'))
    flipped = torch.from_numpy(arrays['vertices']) * torch.tensor([1.0, -1.0, 1.0])
    views = [(flipped @ rotation(angles) + torch.tensor([0, -0.01, -0.01])) * 5 for angles in VIEWS_DEG]
    positions = torch.stack(views) * torch.tensor([1.0, -1.0, -1.0]) + torch.tensor([0.0, 0.0, 10.0])
    return request.param, arrays, positions, torch.from_numpy(faces)


def test_published_rasteriser(impl, published):
    name, arrays, positions, faces = published
    result = rasterize(positions, faces, 256, impl)
    for view in range(4):
        screen = positions[view, ::10] * torch.tensor([-1.0, -1.0, 1.0])
        parity.agrees('rasteriser, screen positions', screen, arrays[f'screen_verts{view}'], 'op')
        face = torch.from_numpy(arrays[f'pix_to_face{view}'].astype(np.int64))
        is_flipped = result.face[view] != face
        on_edge = result.barycentric[view].amin(-1) < 1e-3
        assert is_flipped.sum() <= 0.001 * (face >= 0).sum() and on_edge[is_flipped].all(), name
        is_same = (~is_flipped & (face >= 0))[::4, ::4]
        weights, depth = result.barycentric[view, ::4, ::4, [0, 2, 1]], result.depth[view, ::4, ::4]
        parity.agrees('rasteriser, barycentrics', weights[is_same], arrays[f'bary{view}_sample'][is_same], 'op')
        parity.agrees('rasteriser, depth', depth[is_same], arrays[f'zbuf{view}_s4'][is_same], 'op')


@pytest.mark.parametrize('published', ['demo'], indirect=True)
def test_published_uv_images(impl, published):
    _, _, positions, faces = published
    _, arrays = parity.load('raster_demo_uv')
    _, uvs, _, uv_faces = parity.recipe.load_obj(parity.parity_file('head_template.obj'))
    u, v = torch.from_numpy(uvs).float().unbind(1)
    corner_values = torch.stack([2 * u - 1, -(2 * v - 1)], 1)[torch.from_numpy(uv_faces)]
    result = rasterize(positions, faces, 256, impl)
    image = interpolate(result, corner_values).permute(0, 3, 1, 2)
    for view in range(4):
        is_flipped = (result.face[view] >= 0).numpy() != (arrays[f'vis{view}'] > 0)
        assert is_flipped.sum() <= 0.001 * arrays[f'vis{view}'].sum()
        expected = np.where(is_flipped, image[view].numpy(), arrays[f'uv{view}'])
        parity.agrees('rasteriser, UV image', image[view], expected, 'op')
