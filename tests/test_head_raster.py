# SPDX-License-Identifier: Apache-2.0
"""From mesh to planes: views against the conventions, and that planes hold a point where the volume looks it up."""

import copy
import functools

import pytest
import torch
from simple_head import DEMO_HEAD, simple_head, uv_face_mask
from torch.nn.functional import grid_sample

from torch_utils.ops.rasterize import interpolate, rasterize
from training import head_raster
from training.config import NEXT3D_PLANE_AXES, Next3DConfig
from training.head_raster import Topology, assemble_planes, cover_views, project, sample_texture

SIZE = 256
PIXEL = 2 / SIZE  # In half box sides, the unit of lookups.
SCALE, SHIFT = Next3DConfig().orth_scale, Next3DConfig().orth_shift


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- Views


@pytest.mark.parametrize('view, column, row, nearness', [
    (head_raster.FRONT, (5, 0, 0, 0), (0, 5, 0, 0.05), (0, 0, 1)),
    (head_raster.SIDE_A, (0, 0, -5, 0), (0, 5, 0, 0.05), (1, 0, 0)),
    (head_raster.SIDE_B, (0, 0, 5, 0), (0, 5, 0, 0.05), (-1, 0, 0)),
    (head_raster.TOP, (5, 0, 0, 0), (0, 0, -5, 0.05), (0, 1, 0)),
    (head_raster.TOP_UNSHIFTED, (5, 0, 0, 0), (0, 0, -5, 0), (0, 1, 0)),
])
def test_views_are_those_of_the_table(view, column, row, nearness):
    points = torch.rand(2, 100, 3) * 0.4 - 0.2
    screen = project(points, view, SCALE, SHIFT)
    with_one = torch.cat([points, torch.ones(2, 100, 1)], dim=-1)
    for axis, expected in enumerate((column, row)):
        torch.testing.assert_close(screen[..., axis], with_one @ torch.tensor(expected).float(), rtol=0, atol=2e-6)
    depth_and_nearness = screen[..., 2] + 5 * points @ torch.tensor(nearness).float()
    assert depth_and_nearness.std() < 1e-5 and screen[..., 2].min() > 0


def test_scale_and_shift_are_arguments():
    points = torch.rand(1, 20, 3)
    screen = project(points, head_raster.FRONT, 2.0, (0.1, 0.2, 0.3))
    torch.testing.assert_close(screen[..., 0], 2 * (points[..., 0] + 0.1))
    torch.testing.assert_close(screen[..., 1], 2 * (points[..., 1] - 0.2))
    assert project(points.to('meta'), head_raster.SIDE_A, 2.0, SHIFT).device.type == 'meta'


def test_rotations():
    right_handed = {
        (90, 0, 0): [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
        (0, 90, 0): [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
        (0, 0, 90): [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    }
    for angles, matrix in right_handed.items():
        torch.testing.assert_close(head_raster.rotation_matrix(angles), torch.tensor(matrix).float(), rtol=0, atol=1e-6)
    x, y, z = (head_raster.rotation_matrix(a) for a in ((20, 0, 0), (0, 30, 0), (0, 0, 40)))
    torch.testing.assert_close(head_raster.rotation_matrix((20, 30, 40)), z @ y @ x)


# ---- The head with its position in the box as texture


def world_of(points):
    return 2.5 * points + torch.tensor([0, 0.025, 0])


class Scene:
    """The demo head, or the faces of it that `keep` selects, with a texture of (qx, qy, qz, 1), q = 2·world."""

    def __init__(self, keep=lambda centres: centres[:, 0] > -9):
        head = simple_head(**DEMO_HEAD)
        vertices, faces, uvs, uv_faces = (
            torch.tensor(a) for a in (head.vertices, head.faces, head.uvs, head.uv_faces)
        )
        faces, uv_faces = faces.long(), uv_faces.long()
        is_kept = keep(vertices[faces].mean(dim=1))
        self.vertices, self.faces, self.uv_faces = vertices, faces[is_kept], uv_faces[is_kept]
        self.q = 2 * world_of(vertices)
        uv_positions = torch.cat([2 * uvs - 1, torch.ones_like(uvs[:, :1])], dim=1)
        corners = (uv_positions * torch.tensor([1.0, -1, 1]))[self.uv_faces]
        mask = torch.from_numpy(uv_face_mask()).float()[None, None] / 255
        self.topology = Topology(self.faces, corners, mask)
        # Seen in UV space with v upwards, the first row of the texture is at v = 1.
        painted = rasterize(uv_positions[None], self.uv_faces, SIZE)
        values = torch.cat([self.q, torch.ones_like(self.q[:, :1])], dim=1)[self.faces]
        self.texture = interpolate(painted, values).flip(1).permute(0, 3, 1, 2)

    def coverage(self, layout, vertices=None):
        v = self.vertices[None] if vertices is None else vertices
        screen = torch.stack([project(v, view, SCALE, SHIFT) for view in head_raster.VIEWS[layout]], dim=1)
        return cover_views(screen, self.topology, SIZE)

    def planes(self, layout):
        """Return HeadPlanes whose features are the texture's and a fifth channel: 1 where a view sees a face."""
        coverage = self.coverage(layout)
        seen = torch.cat([sample_texture(self.texture, coverage), coverage.visible[:, :, None]], dim=2)
        return assemble_planes(seen, coverage, layout)

    def surface_points(self, count):
        """Random points q [count, 3] of the surface, evenly by area."""
        triangles = self.q[self.faces]
        area = torch.linalg.cross(*(triangles[:, i] - triangles[:, 0] for i in (1, 2))).norm(dim=1)
        weights = torch.distributions.Dirichlet(torch.ones(3)).sample([count])
        return (triangles[torch.multinomial(area, count, replacement=True)] * weights[..., None]).sum(dim=1)

    def is_visible(self, points, axis, sign):
        """Whether no triangle lies beyond each point along an axis: every triangle is tried."""
        across = [a for a in range(3) if a != axis]
        a, b, c = self.q[self.faces].unbind(dim=1)
        ab, ac, ap = (b - a)[:, across], (c - a)[:, across], points[:, None, across] - a[None, :, across]
        area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
        s = (ap[..., 0] * ac[:, 1] - ap[..., 1] * ac[:, 0]) / area
        t = (ab[:, 0] * ap[..., 1] - ab[:, 1] * ap[..., 0]) / area
        height = a[:, axis] + s * (b - a)[:, axis] + t * (c - a)[:, axis]
        is_over = (s >= 0) & (t >= 0) & (s + t <= 1) & (sign * (height - points[:, None, axis]) > 1e-3)
        return ~is_over.any(dim=1)


@functools.cache
def whole_head():
    return Scene()


HALVES = {'right': lambda centres: centres[:, 0] > 0.004, 'left': lambda centres: centres[:, 0] < -0.004}


@functools.cache
def half_head(side):
    return Scene(HALVES[side])


def lookup(planes, plane, q):
    """Read one of planes [1, 3, C, R, R] at points q [M, 3] as the volume does: [M, C]."""
    column, row = NEXT3D_PLANE_AXES[plane]
    grid = torch.stack([q[:, column], q[:, row]], dim=-1)[None, None]
    return grid_sample(planes[:, plane], grid, align_corners=False)[0, :, 0].T


def assert_holds_its_points(planes, plane, points, min_share=0.8):
    """Check that a plane's texture at points is the points' own two coordinates, where all of it is painted."""
    found = lookup(planes, plane, points)
    is_painted = (found[:, 3:] > 0.999).all(dim=1)
    assert len(points) > 100 and is_painted.float().mean() > min_share
    axes = list(NEXT3D_PLANE_AXES[plane])
    error = (found[is_painted][:, axes] - points[is_painted][:, axes]).abs()
    assert error.median() < 0.03 * PIXEL
    assert error.quantile(0.98) < 0.3 * PIXEL and error.max() < PIXEL
    return found[is_painted], points[is_painted]


def test_the_texture_holds_the_surface():
    scene = whole_head()
    assert scene.texture.shape == (1, 4, SIZE, SIZE)
    assert scene.texture[0, 3].mean() > 0.5
    top, middle = scene.texture[0, 1, 20], scene.texture[0, 1, SIZE // 2]
    assert top.max() > middle.max()  # v = 1 is the crown.


# Layout, plane, axis and sign of the direction that the plane is seen from.
ALIGNED_VIEWS = [
    ('aligned', 0, 2, 1), ('aligned', 1, 1, 1), ('aligned', 2, 0, 1), ('aligned', 2, 0, -1), ('next3d', 0, 2, 1)
]


@pytest.mark.parametrize('layout, plane, axis, sign', ALIGNED_VIEWS)
def test_planes_hold_surface_points_where_the_volume_looks_them_up(layout, plane, axis, sign):
    scene = whole_head()
    points = scene.surface_points(500)
    points = points[scene.is_visible(points, axis, sign)]
    found, points = assert_holds_its_points(scene.planes(layout).features, plane, points)
    if plane != 2:  # It is this surface and not one behind: the third coordinate agrees too. (Sides are averaged.)
        distance = (found[:, axis] - points[:, axis]).abs()
        assert distance.median() < PIXEL and (distance < 0.05).float().mean() > 0.9


@pytest.mark.parametrize('side', HALVES)
def test_a_side_that_one_view_sees_is_not_mixed_with_the_other(side):
    scene = half_head(side)
    sign = 1 if side == 'right' else -1
    points = scene.surface_points(400)
    points = points[scene.is_visible(points, 0, sign)]
    planes = scene.planes('aligned')
    found, points = assert_holds_its_points(planes.features, 2, points)
    distance = (found[:, 0] - points[:, 0]).abs()
    assert distance.median() < PIXEL and (distance < 0.05).float().mean() > 0.9
    assert (planes.alpha[0, 2] > 0).float().mean() > 0.05


def test_sides_that_both_views_see_are_averaged():
    scenes = whole_head(), half_head('right'), half_head('left')
    both, right, left = (scene.planes('aligned').features[0, 2] for scene in scenes)
    is_painted = (torch.stack([both, right, left])[:, 3:] > 0.999).all(dim=0).all(dim=0)
    assert is_painted.sum() > 0.8 * (both[4] == 1).sum()
    assert (right[0, is_painted] - left[0, is_painted]).mean() > 0.2  # They differ in x.
    error = (both - (right + left) / 2)[:, is_painted].abs()
    assert error.median() < 1e-4 and error.quantile(0.95) < PIXEL


def test_published_layout_draws_planes_one_and_two_elsewhere():
    scene = whole_head()
    planes, coverage = scene.planes('next3d'), scene.coverage('next3d')
    seen = sample_texture(scene.texture, coverage)
    expected = torch.stack([seen[:, 0], seen[:, 1] + seen[:, 2], seen[:, 3]], dim=1)
    assert torch.equal(planes.features[:, :, :4], expected)
    assert torch.equal(planes.alpha[:, 1, 0], (coverage.alpha[:, 1] > 0).float())
    assert torch.equal(planes.alpha[:, 2, 0], coverage.alpha[:, 3])
    points = scene.surface_points(300)
    for plane in (1, 2):  # So the checks above would notice.
        with pytest.raises(AssertionError):
            assert_holds_its_points(planes.features, plane, points, min_share=0.2)


@pytest.mark.parametrize('layout', head_raster.PLANE_LAYOUTS)
def test_alpha_is_an_opacity_and_covers_the_face(layout):
    scene = whole_head()
    planes = scene.planes(layout)
    assert planes.features.shape == (1, 3, 5, SIZE, SIZE) and planes.alpha.shape == (1, 3, 1, SIZE, SIZE)
    assert planes.alpha.min() == 0 and planes.alpha.max() == 1
    points = scene.surface_points(2000)
    face = points[(points[:, 2] > 0.05) & (points[:, 1].abs() < 0.3)]
    assert len(face) > 200
    for plane in range(3 if layout == 'aligned' else 1):
        alpha = lookup(planes.alpha, plane, face)
        assert (alpha > 0.5).float().mean() > 0.95
    outside = torch.tensor([[0.95, 0.95, 0.95], [-0.95, -0.95, -0.95]])
    assert all(not lookup(planes.alpha, plane, outside).any() for plane in range(3))


@pytest.mark.parametrize('keep', [None, *HALVES])
@pytest.mark.parametrize('layout', head_raster.PLANE_LAYOUTS)
def test_alpha_lies_where_the_faces_are(keep, layout):
    scene = whole_head() if keep is None else half_head(keep)
    scene = copy.copy(scene)
    scene.topology = scene.topology._replace(eye_mask=torch.ones_like(scene.topology.eye_mask))
    planes = scene.planes(layout)
    is_seen, alpha = planes.features[0, :, 4] > 0, planes.alpha[0, :, 0]
    assert set(alpha.unique().tolist()) <= {0, 1}
    for plane in (0, 1, 2) if layout == 'aligned' else (0, 2):
        assert alpha[plane][is_seen[plane]].min() == 1
        if keep is None:  # But for the closed mouth, there is no hole to fill.
            assert alpha[plane][~is_seen[plane]].mean() < 1e-3


def test_mask_hides_and_holes_are_filled():
    scene = whole_head()
    coverage = scene.coverage('next3d')
    hidden = scene.topology._replace(eye_mask=torch.zeros_like(scene.topology.eye_mask))
    screen = project(scene.vertices[None], head_raster.FRONT, SCALE, SHIFT)[:, None]
    bare = cover_views(screen, hidden, SIZE)
    assert not bare.alpha.any() and torch.equal(bare.visible[:, 0], coverage.visible[:, 0])
    pierced = scene.topology._replace(eye_mask=torch.ones_like(scene.topology.eye_mask))
    full = cover_views(screen, pierced, SIZE).alpha
    pierced.eye_mask[..., 120:124, 126:130] = 0  # In the middle of the face: an island that no flood reaches.
    assert torch.equal(cover_views(screen, pierced, SIZE).alpha, full)


def test_batch_equals_loop():
    scene = whole_head()
    open_mouth = torch.from_numpy(simple_head(jaw_open=1.0).vertices)
    batch = torch.stack([scene.vertices, open_mouth])
    coverage = scene.coverage('aligned', batch)
    for i in range(2):
        for together, alone in zip(coverage, scene.coverage('aligned', batch[i : i + 1])):
            assert torch.equal(together[i : i + 1], alone)
    textures = torch.randn(2, 3, 32, 32)
    planes = assemble_planes(sample_texture(textures, coverage), coverage, 'aligned')
    for i in range(2):
        one = type(coverage)(*(t[i : i + 1] for t in coverage))
        alone = assemble_planes(sample_texture(textures[i : i + 1], one), one, 'aligned')
        torch.testing.assert_close(planes.features[i : i + 1], alone.features)


@pytest.mark.parametrize('layout', head_raster.PLANE_LAYOUTS)
def test_gradient_is_the_adjoint_and_flows_to_the_texture_alone(layout):
    scene = whole_head()
    vertices = scene.vertices[None].clone().requires_grad_(True)
    coverage = scene.coverage(layout, vertices)
    assert not any(t.requires_grad for t in coverage)
    texture = torch.randn(1, 2, 64, 64, requires_grad=True)
    planes = assemble_planes(sample_texture(texture, coverage), coverage, layout)
    assert not planes.alpha.requires_grad
    cotangent = torch.randn_like(planes.features)
    (gradient,) = torch.autograd.grad((planes.features * cotangent).sum(), texture)
    other = torch.randn_like(texture)  # The planes are linear in the texture: <J t, d> = <t, J' d>.
    image = assemble_planes(sample_texture(other, coverage), coverage, layout).features
    left, right = (image.double() * cotangent).sum(), (other.double() * gradient).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-2)
