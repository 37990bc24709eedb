# SPDX-License-Identifier: Apache-2.0
"""Eyeballs: found in heads of several kinds, turned as the head model's own gaze turns them."""

import numpy as np
import pytest
import torch
from parity import parity_file
from simple_head import simple_head

from geometry.eyeballs import find_eyeballs, turn_eyeballs
from geometry.head_model import load_embedded_head
from geometry.meshes import read_obj


@pytest.fixture(scope='module')
def head():
    return load_embedded_head()


@pytest.fixture(scope='module')
def eyeballs(head):
    return [torch.from_numpy(x) for x in find_eyeballs(head.mean.numpy(), head.faces.numpy())]


def test_the_embedded_heads_eyeballs_are_its_regions(head, eyeballs):
    expected = [head.regions[name].nonzero()[:, 0] for name in ('eye_left', 'eye_right')]
    assert {tuple(x.tolist()) for x in eyeballs} == {tuple(x.tolist()) for x in expected}


def test_flame_has_two_on_either_side():
    mesh = read_obj(parity_file('head_template.obj'))
    left, right = find_eyeballs(mesh.vertices, mesh.faces)
    assert len(left) == len(right) == 546
    assert abs(mesh.vertices[left, 0].mean() + mesh.vertices[right, 0].mean()) < 1e-5
    assert 0.02 < abs(mesh.vertices[left, 0].mean()) < 0.04


def test_heads_without_any_and_other_parts():
    mesh = simple_head()
    assert find_eyeballs(mesh.vertices, mesh.faces) == []
    rng = np.random.default_rng(0)
    points = rng.standard_normal([40, 3])
    ball = points / np.linalg.norm(points, axis=1, keepdims=True) + 5
    faces = np.stack([np.arange(38), np.arange(1, 39), np.arange(2, 40)], axis=1)
    assert [len(x) for x in find_eyeballs(ball, faces)] == [40]
    assert find_eyeballs(ball * [1, 1, 1.4], faces) == []  # An egg.
    cap = ball.copy()
    cap[:, 2] = 5 + np.abs(cap[:, 2] - 5)  # Half a ball: lids.
    assert find_eyeballs(cap, faces) == []
    assert find_eyeballs(ball[:8], faces[:6]) == []


@pytest.mark.parametrize('weights, angles', [
    (dict(eyeLookOutLeft=1.0, eyeLookInRight=1.0), (25, 0)), (dict(eyeLookOutRight=0.5, eyeLookInLeft=0.5), (-12.5, 0)),
    (dict(eyeLookUpLeft=1.0, eyeLookUpRight=1.0), (0, 18)), (dict(eyeLookDownLeft=0.5, eyeLookDownRight=0.5), (0, -11)),
])
def test_turns_are_those_of_the_gaze(head, eyeballs, weights, angles):
    """The head's own shapes are straight lines to the turned places, so half a turn lies a little inside the ball."""
    straight, expected = (
        head(torch.zeros(1, head.num_identity), head.expression(w)).vertices for w in ({}, weights)
    )
    turned = turn_eyeballs(straight, eyeballs, torch.deg2rad(torch.tensor([angles], dtype=torch.float32)))
    is_eye = head.regions['eyes']
    assert (expected - straight)[0, is_eye].norm(dim=-1).max() > 0.003
    assert (turned - expected)[0, is_eye].norm(dim=-1).max() < 0.0008
    assert torch.equal(turned[:, ~is_eye], straight[:, ~is_eye])


def test_turning_is_rigid_and_each_mesh_has_its_own_angle(head, eyeballs):
    v = head.mean[None].repeat(3, 1, 1)
    before = v.clone()
    angles = torch.tensor([[0.0, 0.0], [0.5, -0.3], [-0.4, 0.2]])
    turned = turn_eyeballs(v, eyeballs, angles)
    assert torch.equal(v, before)
    torch.testing.assert_close(turned[0], v[0], rtol=0, atol=1e-7)
    for indices in eyeballs:
        distances = [torch.pdist(x[number, indices]) for number in range(3) for x in (v, turned)]
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(distances[::2], distances[1::2]))
        front = indices[v[0, indices, 2].argmax()]
        moved = (turned - v)[:, front, :2]
        assert moved[1, 0] > 0.005 and moved[1, 1] < -0.003 and moved[2, 0] < -0.005 and moved[2, 1] > 0.003
