# SPDX-License-Identifier: Apache-2.0
"""Cameras and labels: agreement with the published samplers, and what every pose must satisfy."""

import math

import numpy as np
import pytest
import torch
from parity import agrees, load, sequence_draws

from geometry import cameras

HALF_PI = math.pi / 2
PIVOT = (0.0, 0.0, 0.2)
SPREAD = dict(horizontal_std=0.3, vertical_std=0.155, batch=3)


@pytest.fixture(scope='module')
def reference():
    """Cases and arrays of the published samplers."""
    return load('camera_utils')


def angles(case):
    return cameras.FRONTAL + case['yaw'], cameras.FRONTAL + case['pitch']


def random_poses(count=200, seed=0):
    """Poses all around the head, with the angles that made them."""
    random = np.random.RandomState(seed)
    h = torch.from_numpy(random.uniform(-math.pi, math.pi, [count, 1])).float()
    v = torch.from_numpy(random.uniform(0.1, math.pi - 0.1, [count, 1])).float()
    return h, v, cameras.look_at_pose(h, v, PIVOT, 2.7)


def test_look_at(reference):
    info, a = reference
    for case in info['cases']:
        pose = cameras.look_at_pose(*angles(case), info['pivot'], case['radius'])
        agrees('cameras, look-at', pose, a[f'lookat{case["i"]}'], 'op')


def test_look_at_with_normal_spread(reference):
    info, a = reference
    for case in info['cases']:
        with sequence_draws():
            pose = cameras.look_at_pose(*angles(case), info['pivot'], case['radius'], **SPREAD)
        agrees('cameras, look-at with spread', pose, a[f'lookat_std{case["i"]}'], 'op')


def test_gaussian_sampler_is_the_look_at_of_the_origin(reference):
    info, a = reference
    for case in info['cases']:
        pose = cameras.look_at_pose(*angles(case), radius=case['radius'])
        agrees('cameras, Gaussian', pose, a[f'gauss{case["i"]}'], 'op')


def test_uniform_sampler(reference):
    info, a = reference
    for case in info['cases']:
        with sequence_draws():
            pose = cameras.look_at_pose(*angles(case), radius=case['radius'], spread='uniform', **SPREAD)
        agrees('cameras, uniform', pose, a[f'uniform{case["i"]}'], 'op')


def test_intrinsics_of_a_field_of_view(reference):
    _, a = reference
    for fov in (18.837, 18):
        agrees('cameras, field of view', cameras.intrinsics(cameras.focal_from_fov(fov)), a[f'fov_{fov}'], 'op')


def test_cam2world_from_forward(reference):
    _, a = reference
    forward, origin = torch.from_numpy(a['c2w_fwd']), torch.from_numpy(a['c2w_org'])
    agrees('cameras, from forward', cameras.cam2world_from_forward(forward, origin), a['c2w'], 'op')


def test_label(reference):
    info, a = reference
    pose = cameras.look_at_pose(cameras.FRONTAL + 0.4, cameras.FRONTAL - 0.2, info['pivot'], 2.7)
    agrees('cameras, label', cameras.make_label(pose, cameras.intrinsics()), a['label25'], 'op')


def test_frontal_camera_by_hand():
    pose = cameras.look_at_pose(HALF_PI, HALF_PI, PIVOT, 2.7)[0]
    expected = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    expected[2, 3] = 2.7
    torch.testing.assert_close(pose, expected, atol=1e-6, rtol=0)
    assert cameras.FOCAL == 4.2647
    assert cameras.focal_from_fov(18.837) == pytest.approx(4.26339, abs=1e-5)
    assert cameras.focal_from_fov(90) == pytest.approx(1 / 1.414)


def test_larger_angles_move_the_camera_right_and_down():
    right = cameras.look_at_pose(HALF_PI + 0.4, HALF_PI, PIVOT, 2.7)[0, :3, 3]
    low = cameras.look_at_pose(HALF_PI, HALF_PI + 0.4, PIVOT, 2.7)[0, :3, 3]
    assert right[0] > 0.5 and abs(right[1]) < 1e-6
    assert low[1] < -0.5 and abs(low[0]) < 1e-6


def test_rotations_are_orthonormal_and_right_handed():
    _, _, pose = random_poses()
    rotation = pose[:, :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(len(pose)), atol=2e-6, rtol=0)
    assert torch.equal(pose[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(len(pose), 4))


def test_cameras_lie_on_the_sphere_look_at_the_pivot_and_stay_upright():
    _, v, pose = random_poses()
    origin, right, down, forward = pose[:, :3, 3], pose[:, :3, 0], pose[:, :3, 1], pose[:, :3, 2]
    torch.testing.assert_close(origin.norm(dim=1), torch.full([len(pose)], 2.7))
    to_pivot = torch.tensor(PIVOT) - origin
    torch.testing.assert_close(forward, to_pivot / to_pivot.norm(dim=1, keepdim=True), atol=2e-6, rtol=0)
    assert right[:, 1].abs().max() < 1e-6 and (down[:, 1] < 0).all()
    torch.testing.assert_close(origin[:, 1] / 2.7, 1 - 2 * v[:, 0] / math.pi, atol=2e-6, rtol=0)


def test_vertical_angles_stop_short_of_the_poles():
    for v in (-1.0, 0.0, math.pi, 5.0):
        rotation = cameras.look_at_pose(HALF_PI, v, PIVOT, 2.7)[0, :3, :3]
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-5, rtol=0)


def test_spread_of_the_draws():
    torch.manual_seed(0)
    for spread, std in (('normal', 0.1), ('uniform', 0.1 / math.sqrt(3))):
        pose = cameras.look_at_pose(HALF_PI, HALF_PI, horizontal_std=0.1, batch=4000, spread=spread)
        yaw = torch.atan2(pose[:, 0, 3], pose[:, 2, 3])
        assert yaw.std().item() == pytest.approx(std, rel=0.05) and abs(yaw.mean()) < 0.01
        assert pose[:, 1, 3].abs().max() < 1e-6
        assert (yaw.abs().max() <= 0.1001) == (spread == 'uniform')


def test_labels_round_trip_whatever_follows_them():
    _, _, pose = random_poses(5)
    k = cameras.intrinsics(3.5)
    for matrix in (k, k.repeat(5, 1, 1)):
        label = cameras.make_label(pose, matrix)
        assert label.shape == (5, 25)
        for length in (25, 75):
            longer = torch.cat([label, torch.full([5, length - 25], 7.0)], dim=1)
            back, intrinsics = cameras.split_label(longer)
            assert torch.equal(back, pose) and torch.equal(intrinsics, k.expand(5, 3, 3))


def test_bad_calls():
    for fov in (0, 180, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match='fov_deg: expected a number between 0 and 180, got'):
            cameras.focal_from_fov(fov)
    with pytest.raises(ValueError, match="spread: expected 'normal' or 'uniform', got 'even'"):
        cameras.look_at_pose(HALF_PI, HALF_PI, spread='even')
