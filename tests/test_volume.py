# SPDX-License-Identifier: Apache-2.0
"""Volume rendering against closed forms: rays, depths, compositing, triplane lookup, analytic densities, chunks."""

import math

import pytest
import torch
from torch import nn

from geometry import cameras
from training.volume import march, rays, render, samples
from training.volume.render import SamplingConfig, query, render_rays, sample_planes

AXES = SamplingConfig().plane_axes
EMPTY = -1e3  # Raw density of which the softplus is zero.


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def depths_of(*values):
    return torch.tensor(values, dtype=torch.float64)[None, None, :, None]


def random_depths(num_rays=50, count=20):
    """Sorted depths, some of them equal."""
    depths = (2 + torch.rand(1, num_rays, count, 1, dtype=torch.float64)).sort(dim=2).values
    depths[:, :, 5:7] = depths[:, :, 4:5]
    return depths


# ---- Rays


def test_rays_pass_through_pixel_centres():
    pose = torch.eye(4).repeat(3, 1, 1)
    pose[:, :3, :3] = torch.linalg.qr(torch.randn(3, 3, 3)).Q
    pose[:, :3, 3] = torch.randn(3, 3)
    k = torch.tensor([[4.0, 0.3, 0.45], [0, 3.5, 0.55], [0, 0, 1]]).repeat(3, 1, 1)
    k[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0])
    origins, directions = cameras.camera_rays(pose, k, 5)
    assert origins.shape == directions.shape == (3, 25, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(3, 25))
    torch.testing.assert_close(origins, pose[:, None, :3, 3].expand(3, 25, 3))
    in_camera = (directions * 1.7) @ pose[:, :3, :3]
    assert (in_camera[..., 2] > 0).all()
    u, v, w = (in_camera @ k.transpose(1, 2)).unbind(-1)
    row, column = torch.arange(25).div(5, rounding_mode='floor'), torch.arange(25) % 5
    torch.testing.assert_close(u / w, ((column + 0.5) / 5).expand(3, 25), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v / w, ((row + 0.5) / 5).expand(3, 25), rtol=1e-4, atol=1e-5)


def test_frontal_camera_looks_along_minus_z_with_rows_downwards():
    pose = cameras.look_at_pose(cameras.FRONTAL, cameras.FRONTAL)
    origins, directions = cameras.camera_rays(pose, cameras.intrinsics()[None], 3)
    torch.testing.assert_close(origins[0, 4], torch.tensor([0, 0, 2.7]), atol=1e-6, rtol=0)
    torch.testing.assert_close(directions[0, 4], torch.tensor([0, 0, -1.0]), atol=1e-6, rtol=0)
    assert directions[0, 0, 0] < 0 < directions[0, 2, 0] and directions[0, 0, 1] > 0 > directions[0, 8, 1]


def test_box_limits_against_points_along_the_ray():
    side, step = 1.3, 1e-3
    origins = torch.randn(1, 200, 3)
    origins /= origins.norm(dim=-1, keepdim=True) / 2
    directions = nn.functional.normalize(0.6 * torch.randn(1, 200, 3) - origins, dim=-1)
    directions[0, :3], origins[0, :3] = torch.eye(3), torch.tensor([0.1, -0.2, 0.3])  # Along an axis, from inside.
    origins[0, 3:6], directions[0, 3:6] = 5 * torch.eye(3), torch.eye(3).roll(1, 0)  # Beside the box.
    near, far = rays.box_limits(origins, directions, side)
    t = torch.arange(-6, 6, step)[:, None]
    num_missed = 0
    for i in range(200):
        inside = t[((origins[0, i] + t * directions[0, i]).abs() <= side / 2).all(dim=1)]
        entry, leave = near[0, i].item(), far[0, i].item()
        if len(inside) == 0:  # Missed, but for a corner that lies between two points.
            assert (entry, leave) == (-1, -2) or 0 <= leave - entry < step
            num_missed += (entry, leave) == (-1, -2)
        else:
            assert entry == pytest.approx(inside.min().item(), abs=1.5 * step)
            assert leave == pytest.approx(inside.max().item(), abs=1.5 * step)
    assert 10 < num_missed < 190


def test_rays_that_miss_get_the_limits_of_the_others():
    near = torch.tensor([2.0, -1, 1.5, 1.8])[None, :, None]
    far = torch.tensor([3.0, -2, 2.5, 3.8])[None, :, None]
    filled_near, filled_far = rays.fill_missed_limits(near, far)
    assert filled_near.flatten().tolist() == [2.0, 1.5, 1.5, torch.tensor(1.8).item()]
    assert filled_far.flatten().tolist() == [3.0, 2.0, 2.5, torch.tensor(3.8).item()]
    for limits in rays.fill_missed_limits(near[:, 1:2].expand(1, 3, 1), far[:, 1:2].expand(1, 3, 1)):
        assert limits.flatten().tolist() == [0, 0, 0]


# ---- Compositing


@pytest.mark.parametrize('sigma', [-3.0, 0.5, 4.0])
def test_constant_density_gives_the_exponential_law(sigma):
    depths = random_depths()
    weights = march.interval_weights(torch.full_like(depths, sigma), depths)
    length = depths[:, :, -1] - depths[:, :, 0]
    expected = 1 - torch.exp(-math.log(1 + math.exp(sigma - 1)) * length)
    torch.testing.assert_close(weights.sum(dim=2), expected, rtol=1e-8, atol=0)


def test_weights_are_not_negative_and_sum_to_at_most_one():
    depths = random_depths()
    for scale in (1, 100, 1e6):
        sigma = scale * torch.randn_like(depths)
        weights = march.interval_weights(sigma, depths)
        assert weights.min() >= 0 and weights.sum(dim=2).max() <= 1 + 1e-8
        density = nn.functional.softplus((sigma[:, :, 1:] + sigma[:, :, :-1]) / 2 - 1)
        transparency = torch.exp(-density * depths.diff(dim=2))
        torch.testing.assert_close(1 - weights.sum(dim=2), transparency.prod(dim=2), rtol=1e-6, atol=1e-8)


def test_marching_by_hand():
    # softplus(s - 1) = ln 2 where the mean of neighbours is 1: intervals of length 1 and 2 absorb 1/2 and 3/4.
    sigma, depths = torch.ones(1, 1, 3, 1).double(), depths_of(2, 3, 5)
    features = torch.tensor([[1.0, 0], [0, 4], [2, 8]]).double()[None, None]
    out = march.march(features, sigma, depths)
    torch.testing.assert_close(out.weights.flatten(), torch.tensor([0.5, 0.375]).double())
    colour = 0.5 * torch.tensor([0.5, 2]) + 0.375 * torch.tensor([1, 6])
    torch.testing.assert_close(out.features[0, 0], (2 * colour - 1).double())
    assert out.depth.item() == pytest.approx((0.5 * 2.5 + 0.375 * 4) / 0.875)
    white = march.march(features, sigma, depths, white_back=True)
    torch.testing.assert_close(white.features[0, 0], (2 * (colour + 0.125) - 1).double())


def test_empty_space_shows_the_background_and_the_greatest_depth():
    depths = random_depths()
    features = torch.rand(1, 50, 20, 3).double()
    for white_back, background in ((False, -1), (True, 1)):
        out = march.march(features, torch.full_like(depths, EMPTY), depths, white_back)
        assert (out.features == background).all() and out.depth.isnan().all()
        clamped = march.clamp_depth(out.depth, depths.amin(), depths.amax())
        assert (clamped == depths.amax()).all()


def test_opaque_wall():
    depths = torch.linspace(2, 3, 101).double()[None, None, :, None]
    wall = 2.4
    sigma = torch.where(depths < wall, EMPTY, 1e4)
    features = torch.where(depths < wall, 0.9, 0.25).expand(-1, -1, -1, 3)
    out = march.march(features, sigma, depths, white_back=True)
    assert out.depth.item() == pytest.approx(wall, abs=0.011)
    assert out.weights.sum().item() == pytest.approx(1)
    # The first opaque interval lies half in front of the wall: its colour is the mean of the two.
    torch.testing.assert_close(out.features.flatten(), torch.full([3], 0.9 + 0.25 - 1).double())
    hidden = torch.where(depths > wall + 0.02, 77.0, features)
    torch.testing.assert_close(march.march(hidden, sigma, depths, True).features, out.features)


def test_depth_is_clamped_to_the_range():
    depth = torch.tensor([1.0, 2.5, 9.0, math.nan, math.inf])
    clamped = march.clamp_depth(depth, torch.tensor(2.0), torch.tensor(3.0))
    assert clamped.tolist() == [2, 2.5, 3, 3, 3]


# ---- Depths


def test_stratified_depths_lie_in_their_strata():
    near = torch.tensor([2.0, 2.2])[None, :, None]
    far = torch.tensor([3.0, 4.2])[None, :, None]
    offsets = torch.rand(1, 2, 11, 1)
    depths = samples.stratified_depths(near, far, 11, offsets)
    step = ((far - near) / 10)[..., None]
    stratum = (depths - near[..., None]) / step
    torch.testing.assert_close(stratum, torch.arange(11.0)[:, None] + offsets, rtol=0, atol=1e-4)
    assert depths.shape == (1, 2, 11, 1) and depths.diff(dim=2).min() > 0
    even = samples.stratified_depths(2.0, 3.0, 11, torch.zeros(1, 1, 11, 1))
    torch.testing.assert_close(even.flatten(), torch.linspace(2, 3, 11))


def test_disparity_spaces_reciprocals_evenly():
    for limits in ((2.0, 4.0), (torch.full([1, 3, 1], 2.0), torch.full([1, 3, 1], 4.0))):
        depths = samples.stratified_depths(*limits, 9, torch.zeros(1, 3, 9, 1), use_disparity=True)
        torch.testing.assert_close(1 / depths, torch.linspace(0.5, 0.25, 9)[:, None].expand(1, 3, 9, 1))


def test_jitter():
    device = torch.device('cpu')
    stratified, importance = samples.jitter_draws('center', device)
    assert stratified([2, 3, 4, 1]).unique().tolist() == [0.5] and stratified([2, 3, 4, 1]).shape == (2, 3, 4, 1)
    assert importance([2, 4]).tolist() == [[0.125, 0.375, 0.625, 0.875]] * 2
    for draw in samples.jitter_draws('random', device):
        assert draw([3, 5]).shape == (3, 5) and not torch.equal(draw([3, 5]), draw([3, 5]))
        assert 0 <= draw([1000]).min() and draw([1000]).max() < 1
    shapes = []
    for draw in samples.jitter_draws(lambda shape: shapes.append(shape) or torch.full(shape, 0.25).double(), device):
        assert draw([2, 2]).dtype == torch.float32
    assert shapes == [[2, 2], [2, 2]]
    with pytest.raises(ValueError, match="depth_jitter: expected 'random', 'center' or a callable, got 'centre'"):
        samples.jitter_draws('centre', device)


def test_histogram_samples_follow_their_weights():
    weights = torch.tensor([[3.0, 0, 1, 4, 2], [1, 1, 1, 1, 1]])
    bins = torch.tensor([[0.0, 1, 3, 4, 4.5, 10], [0, 1, 2, 3, 4, 5]])
    count = 40000
    draws = torch.rand(2, count)
    drawn = samples.sample_histogram(bins, weights, draws)
    share = weights / weights.sum(dim=1, keepdim=True)
    for row in range(2):
        counts = torch.histogram(drawn[row], bins[row]).hist
        spread = (count * share[row] * (1 - share[row])).sqrt()
        assert ((counts - count * share[row]).abs() <= 4 * spread + 1).all()
        for k, width in enumerate(bins[row].diff()):  # Evenly within each bin.
            inside = drawn[row][(drawn[row] >= bins[row, k]) & (drawn[row] < bins[row, k + 1])]
            if share[row, k] > 0:
                centre = bins[row, k] + width / 2
                assert (inside.mean() - centre).abs() < 4 * width / math.sqrt(12 * len(inside))
    order = draws.argsort(dim=1)
    assert drawn.gather(1, order).diff(dim=1).min() >= 0


def test_histogram_at_its_ends_and_without_weight():
    bins = torch.tensor([[1.0, 2, 4]])
    ends = torch.tensor([[0.0, 0.5, 1 - 2**-24, 1.0]])
    drawn = samples.sample_histogram(bins, torch.ones(1, 2), ends)
    torch.testing.assert_close(drawn, torch.tensor([[1.0, 2, 4, 4]]))
    nothing = samples.sample_histogram(bins, torch.zeros(1, 2), ends)
    torch.testing.assert_close(nothing, drawn)


def test_importance_depths_gather_at_the_wall_and_stay_in_range():
    depths = torch.linspace(2, 3, 48).expand(1, 4, 48)[..., None].clone().requires_grad_(True)
    sigma = torch.where((depths > 2.4) & (depths < 2.45), 1e4, EMPTY)
    weights = march.interval_weights(sigma, depths)
    fine = samples.importance_depths(depths, weights, torch.rand(4, 400))
    assert fine.shape == (1, 4, 400, 1) and not fine.requires_grad
    middles = (depths[:, :, 1:] + depths[:, :, :-1]) / 2
    assert (fine >= middles.amin()).all() and (fine <= middles[:, :, -2].amax()).all()
    assert ((fine > 2.32) & (fine < 2.48)).float().mean() > 0.6
    # The 0.01 that is added keeps some of them elsewhere.
    assert (fine < 2.3).float().mean() > 0.02 and (fine > 2.55).float().mean() > 0.02
    merged = torch.cat([depths, fine], dim=2).sort(dim=2).values
    assert merged.diff(dim=2).min() >= 0
    assert march.interval_weights(torch.randn_like(merged), merged).min() >= 0


def test_importance_depths_centre_on_the_start_of_an_interval():
    # Of the published model: the bins are half an interval before the intervals whose weights they have.
    depths = torch.arange(20.0)[None, None, :, None]
    for interval in (3, 10, 16):
        weights = torch.zeros(1, 1, 19, 1)
        weights[0, 0, interval] = 1e4
        fine = samples.importance_depths(depths, weights, (torch.arange(1000) + 0.5)[None] / 1000)
        assert fine.mean() == pytest.approx(interval, abs=0.05)
        assert fine.std() == pytest.approx(math.sqrt(1 / 12 + 1 / 2), abs=0.05)  # Weights 1/4, 1/2, 1/4 of three bins.


# ---- Triplane lookup


def ramp_planes(size=16):
    """Planes [1, 3, 4, size, size] whose mean at a point is the point, in half box sides, and 1 (0 outside the box)."""
    centres = (torch.arange(size) + 0.5) * 2 / size - 1
    columns, rows = centres.expand(size, size), centres[:, None].expand(size, size)
    planes = torch.zeros(1, 3, 4, size, size)
    planes[0, 0, 0], planes[0, 0, 1], planes[0, 1, 2] = 3 * columns, 3 * rows, 3 * rows
    planes[0, :, 3] = 1
    return planes


def test_lookup_of_a_ramp_is_exact():
    for box_warp in (1.0, 1.6):
        points = (torch.rand(1, 500, 3) - 0.5) * box_warp * (1 - 1 / 16)
        found = sample_planes(ramp_planes(), points, box_warp, AXES)[..., :3]
        torch.testing.assert_close(found, points * 2 / box_warp, rtol=0, atol=1e-5)


def test_each_plane_reads_its_axes():
    q = (torch.rand(200, 3) - 0.5) * 1.8
    for axes in (AXES, ((0, 1), (0, 2), (2, 0))):
        for plane, pair in enumerate(axes):
            for direction, axis in enumerate(pair):  # A ramp over columns reads the first, over rows the second.
                planes = torch.zeros(1, 3, 1, 16, 16)
                centres = (torch.arange(16) + 0.5) / 8 - 1
                planes[0, plane, 0] = centres.expand(16, 16) if direction == 0 else centres[:, None]
                found = sample_planes(planes, q[None] / 2, 1.0, axes)[0, :, 0]
                torch.testing.assert_close(3 * found, q[:, axis], rtol=0, atol=1e-5)


def test_lookup_is_zero_outside():
    planes = torch.ones(1, 3, 2, 8, 8)
    outside = torch.tensor([[[0.6, 0.6, 0.6], [-0.57, 0.9, -5], [0, 0, 0]]])
    found = sample_planes(planes, outside, 1.0, AXES)
    assert found[0, :2].abs().max() == 0 and found[0, 2].tolist() == [1, 1]
    border = torch.tensor([[[0.5, 0, 0]]])  # Half of the last texel, half of nothing, in the two planes that read x.
    half = sample_planes(planes, border, 1.0, AXES)
    torch.testing.assert_close(half.flatten(), torch.full([2], 2 / 3))


# ---- Rendering of an analytic density


class Ball(nn.Module):
    """A decoder of `ramp_planes`: a ball of radius 0.5 (in half box sides), hard, coloured by position."""

    radius, steepness = 0.5, 4e4

    def forward(self, features):
        q, is_inside = features[..., :3], features[..., 3:] > 0.999
        distance = (q.square().sum(dim=-1, keepdim=True) + 1e-12).sqrt()
        return q * 0.5 + 0.5, torch.where(is_inside, self.steepness * (self.radius - distance), EMPTY)


def frontal_rays(resolution=12, focal=4.2647, yaw=0.0):
    pose = cameras.look_at_pose(cameras.FRONTAL + yaw, cameras.FRONTAL)
    return cameras.camera_rays(pose, cameras.intrinsics(focal)[None], resolution)


def test_depth_colour_and_normals_of_a_ball():
    origins, directions = frontal_rays(yaw=0.5)
    config = SamplingConfig(num_depths=96, num_importance=96)
    out = render_rays(ramp_planes(64), Ball(), origins, directions, config, 'center', with_normals=True)
    radius = Ball.radius / 2
    along = -(origins * directions).sum(dim=-1)
    closest = (origins + along[..., None] * directions).norm(dim=-1)
    hit = closest < 0.9 * radius
    first = along - (radius**2 - closest.square()).clamp(min=0).sqrt()
    assert 20 < hit.sum() < 144 - 20
    torch.testing.assert_close(out.depth[hit][:, 0], first[hit], rtol=0, atol=0.01)
    torch.testing.assert_close(out.weight_sum[hit], torch.ones_like(out.weight_sum[hit]), rtol=0, atol=1e-3)
    surface = (origins + first[..., None] * directions)[hit]
    torch.testing.assert_close(out.features[hit], 2 * surface, rtol=0, atol=0.04)  # q = 2x back from colours.
    cosine = (out.normals[hit] * surface / radius).sum(dim=-1)
    assert cosine.min() > math.cos(math.radians(2))
    missed = closest > 1.1 * radius
    assert (out.weight_sum[missed] < 1e-3).all() and (out.features[missed] + 1).abs().max() < 1e-2
    assert missed.sum() > 20


def test_white_back_and_depth_of_rays_that_see_nothing():
    origins, directions = frontal_rays()
    config = SamplingConfig(white_back=True)
    empty = nn.Module()
    empty.forward = lambda q: (torch.zeros_like(q), q[..., :1] * 0 + EMPTY)
    out = render_rays(ramp_planes(), empty, origins, directions, config, 'center')
    assert (out.features == 1).all() and not out.weight_sum.any()
    assert (out.depth == out.depth.max()).all() and 3.29 < out.depth.max() < 3.33


def test_automatic_limits():
    origins, directions = frontal_rays(focal=1.5)  # Wide: the outer rays miss the box.
    config = SamplingConfig(near='auto', far='auto')
    near, far = rays.box_limits(origins, directions, 1.0)
    assert 0 < (near > far).sum() < near.numel()
    out = render_rays(ramp_planes(64), Ball(), origins, directions, config, 'center')
    fixed = render_rays(ramp_planes(64), Ball(), origins, directions, SamplingConfig(), 'center')
    hit = (fixed.weight_sum > 0.999)[..., 0]
    assert hit.sum() >= 4
    torch.testing.assert_close(out.depth[hit], fixed.depth[hit], rtol=0, atol=0.02)
    away = render_rays(ramp_planes(), Ball(), origins + 10, directions.flip(-1), config, 'center')
    assert not away.weight_sum.any() and (away.features == -1).all() and away.depth.isfinite().all()


# ---- Determinism and chunks


@pytest.fixture
def scene():
    decoder = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 4))
    field = nn.Module()
    field.inner = decoder
    field.forward = lambda features: (lambda x: (x[..., 1:], 4 * x[..., :1] + 1))(decoder(features))
    origins, directions = frontal_rays(5)
    planes = torch.randn(2, 3, 4, 8, 8)
    return planes, field, origins.repeat(2, 1, 1), directions.repeat(2, 1, 1)


def test_centred_jitter_is_deterministic_and_random_jitter_is_not(scene):
    config = SamplingConfig(num_depths=8, num_importance=8)
    first, second = (render_rays(*scene, config, 'center').features for _ in range(2))
    assert torch.equal(first, second)
    first, second = (render_rays(*scene, config, 'random').features for _ in range(2))
    assert not torch.equal(first, second)


CONFIGS = {
    'two passes': dict(num_depths=6, num_importance=5),
    'one pass': dict(num_depths=6, num_importance=0),
    'white, automatic, disparity': dict(
        num_depths=6, num_importance=3, near='auto', far='auto', white_back=True, use_disparity=True
    ),
}


def same_draws(shape):
    """Draws that differ by ray, but not by call."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('points_per_chunk', [1, 60, 170, 24 * 7])
def test_chunks_do_not_change_what_is_rendered(scene, name, points_per_chunk, monkeypatch):
    config = SamplingConfig(**CONFIGS[name])
    expected = render_rays(*scene, config, same_draws, with_normals=True)
    calls = []
    whole = render._render_chunk
    monkeypatch.setattr(render, 'POINTS_PER_CHUNK', points_per_chunk)
    monkeypatch.setattr(render, '_render_chunk', lambda *a: calls.append(a[2].shape[1]) or whole(*a))
    with torch.no_grad():
        actual = render_rays(*scene, config, same_draws, with_normals=True)
    assert sum(calls) == 25 and len(calls) > 1
    assert expected.features.requires_grad and not actual.features.requires_grad
    for part, a, b in zip(actual._fields, actual, expected):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5, msg=f'{{}} in {part}'.format)
    calls.clear()
    assert torch.equal(render_rays(*scene, config, same_draws).features, expected.features) and calls == [25]


@pytest.mark.parametrize('sigma', [EMPTY, 1e4])
@pytest.mark.parametrize('order', [1, -1])
def test_depth_is_clamped_to_the_range_of_all_chunks(sigma, order, monkeypatch):
    origins, directions = frontal_rays(5)
    field = nn.Module()
    field.forward = lambda features: (features, features[..., :1] * 0 + sigma)

    def draws(shape):  # Ray by ray later, or earlier.
        later = torch.linspace(0, 0.9, 25)
        return (later if order > 0 else later.flip(0)).reshape(1, 25, 1, 1).expand(shape)

    config = SamplingConfig(num_depths=6, num_importance=0)
    expected = render_rays(ramp_planes(), field, origins, directions, config, draws).depth
    monkeypatch.setattr(render, 'POINTS_PER_CHUNK', 30)
    with torch.no_grad():
        actual = render_rays(ramp_planes(), field, origins, directions, config, draws).depth
    torch.testing.assert_close(actual, expected)
    assert (expected.std() < 1e-5) == (sigma == EMPTY)


@pytest.mark.parametrize('points_per_chunk', [1, 7, 100])
def test_chunks_do_not_change_what_is_queried(scene, points_per_chunk, monkeypatch):
    planes, field, *_ = scene
    points = torch.rand(2, 23, 3) - 0.5
    expected = query(planes, field, points, SamplingConfig())
    monkeypatch.setattr(render, 'POINTS_PER_CHUNK', points_per_chunk)
    sizes = []
    field.inner.register_forward_hook(lambda module, x, y: sizes.append(len(x[0]) * x[0].shape[1]))
    with torch.no_grad():
        actual = query(planes, field, points, SamplingConfig())
        assert max(sizes) <= max(points_per_chunk, 2) and sum(sizes) == 46
        nothing = query(planes, field, points[:, :0], SamplingConfig())
    assert expected['sigma'].requires_grad and not actual['sigma'].requires_grad
    for key, shape in (('sigma', (2, 23, 1)), ('rgb', (2, 23, 3))):
        assert actual[key].shape == shape and nothing[key].shape == (2, 0, shape[-1])
        torch.testing.assert_close(actual[key], expected[key].detach(), rtol=1e-4, atol=1e-5)


def test_density_noise_is_drawn_once_for_all_points(scene, monkeypatch):
    planes, field, *_ = scene
    noisy = SamplingConfig(num_depths=6, num_importance=5, density_noise=0.5)
    torch.manual_seed(1)
    expected = render_rays(*scene, noisy, 'center').features.detach()
    points = torch.rand(2, 500, 3) - 0.5
    plain = query(planes, field, points, SamplingConfig())['sigma']
    monkeypatch.setattr(render, 'POINTS_PER_CHUNK', 30)
    with torch.no_grad():
        noise = query(planes, field, points, SamplingConfig(density_noise=0.5))['sigma'] - plain
        torch.manual_seed(1)
        actual = render_rays(*scene, noisy, 'center').features
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert noise.std() == pytest.approx(0.5, rel=0.1) and noise.mean() == pytest.approx(0, abs=0.06)


def test_gradients_flow_to_planes_and_decoder(scene):
    planes, field, origins, directions = scene
    planes.requires_grad_(True)
    out = render_rays(planes, field, origins, directions, SamplingConfig(num_depths=8, num_importance=8), 'center')
    (out.features.square().sum() + out.depth.sum()).backward()
    gradients = [planes.grad, *(p.grad for p in field.parameters())]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)


def test_rendering_stays_on_the_device_of_its_inputs(scene):
    # The device that computes shapes alone refuses tensors of another device, as any other does.
    planes, field, origins, directions = (x.to('meta') for x in scene)
    for options in CONFIGS.values():
        for jitter in ('center', 'random'):
            out = render_rays(planes, field, origins, directions, SamplingConfig(**options), jitter, with_normals=True)
            assert {x.device.type for x in out} == {'meta'}
    pose = cameras.look_at_pose(cameras.FRONTAL, cameras.FRONTAL).to('meta')
    assert cameras.camera_rays(pose, cameras.intrinsics(device='meta')[None], 4)[1].device.type == 'meta'


BAD_CONFIGS = {
    "near, far: expected two numbers or 'auto' twice, got 'auto', 3.3": dict(near='auto'),
    'near, far: expected 0 <= near < far, got 3, 2': dict(near=3, far=2),
    'near, far: .* got -1': dict(near=-1),
    'box_warp: expected a number above 0, got 0': dict(box_warp=0),
    'num_depths, num_importance: expected at least 4 and 0, got 3, 48': dict(num_depths=3),
    'num_depths, num_importance: .* got 48, -1': dict(num_importance=-1),
}


@pytest.mark.parametrize('message', BAD_CONFIGS)
def test_messages_of_bad_configs(message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**BAD_CONFIGS[message])
