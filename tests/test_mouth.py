# SPDX-License-Identifier: Apache-2.0
"""The mouth's box, and cropping and pasting it in batches, against plain loops over samples."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn.functional import interpolate

from training import mouth

SIDE = 64
# First row, row after, first column, column after: even, odd, oblong, tiny, touching borders, whole.
BOXES = {
    'minimum': (20, 28, 30, 38),
    'size of the crop': (5, 21, 40, 56),
    'twice the crop': (10, 42, 10, 42),
    'odd': (7, 30, 11, 34),
    'oblong': (3, 60, 20, 29),
    'one pixel': (63, 64, 0, 1),
    'corner': (0, 40, 24, 64),
    'large': (1, 64, 1, 64),
    'whole': (0, 64, 0, 64),
}


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def landmarks_of(points_px, resolution=256):
    """Landmarks [1, 68, 3] with the given mouth points (column, row) in pixels; the others far away."""
    landmarks = torch.full([1, 68, 3], 0.9)
    landmarks[0, 48:60, :2] = torch.as_tensor(points_px).float() * 2 / resolution - 1
    return landmarks


def oval(column, row, width, height):
    """Twelve points of the outer lip: corners first and seventh."""
    angle = torch.arange(12) * (2 * torch.pi / 12) + torch.pi
    return torch.stack([column + width / 2 * angle.cos(), row + height / 2 * angle.sin()], dim=1)


def published_box(landmarks, resolution):
    """The published arithmetic for one sample, without any care for borders."""
    half = resolution / 2
    points = [(x * half + half, y * half + half) for x, y, _ in landmarks.tolist()]
    lips = points[48:60]
    width = max(x for x, _ in lips) - min(x for x, _ in lips)
    height = max(y for _, y in lips) - min(y for _, y in lips)
    side = int(1.2 * max(width, height))
    column, row = ((points[48][i] + points[54][i]) / 2 for i in (0, 1))
    return [int(row - side // 2), int(row + side // 2), int(column - side // 2), int(column + side // 2)]


def test_box_is_the_published_one_where_that_fits():
    for _ in range(200):
        column, row = (60 + 130 * torch.rand(2)).tolist()
        width, height = (15 + 60 * torch.rand(2)).tolist()
        landmarks = landmarks_of(oval(column, row, width, height) + torch.rand(12, 2))
        assert mouth.mouth_boxes(landmarks, 256)[0].tolist() == published_box(landmarks[0], 256)


def test_box_by_hand():
    # Corners at columns 108.3 and 148.9: extent 40.6, side int(48.72) = 48; centre (128.6, 102.2).
    landmarks = landmarks_of(oval(128.6, 102.2, 40.6, 10))
    assert mouth.mouth_boxes(landmarks, 256).tolist() == [[78, 126, 104, 152]]
    assert mouth.mouth_boxes(landmarks, 256).dtype == torch.int64
    # A quarter of it: side int(12.18), centre (32.15, 25.55).
    assert mouth.mouth_boxes(landmarks, 64).tolist() == [[19, 31, 26, 38]]
    other_points = landmarks.clone()
    other_points[:, :48], other_points[:, 60:], other_points[..., 2] = -0.3, 0.1, 7
    assert mouth.mouth_boxes(other_points, 256).tolist() == [[78, 126, 104, 152]]


# Centre (column, row) -> box of side 48.
MOVED_BOXES = {
    (10, 128): [104, 152, 0, 48],
    (250, 128): [104, 152, 208, 256],
    (128, -40): [0, 48, 104, 152],
    (128, 255): [208, 256, 104, 152],
    (900, -900): [0, 48, 208, 256],
}


@pytest.mark.parametrize('centre', MOVED_BOXES)
def test_boxes_that_leave_the_plane_are_moved_inside(centre):
    assert mouth.mouth_boxes(landmarks_of(oval(*centre, 40.6, 10)), 256).tolist() == [MOVED_BOXES[centre]]


def test_boxes_are_at_least_eight_pixels_and_at_most_the_plane():
    for width, side in ((0, 8), (5, 8), (7.5, 8), (8.4, 10), (209, 250), (215, 256), (900, 256)):
        top, bottom, left, right = mouth.mouth_boxes(landmarks_of(oval(128, 128, width, width / 2)), 256)[0].tolist()
        assert bottom - top == right - left == side
        assert 0 <= top < bottom <= 256 and 0 <= left < right <= 256
    batch = torch.cat([landmarks_of(oval(c, r, w, w)) for c, r, w in ((40, 200, 3), (128, 100, 40), (0, 0, 300))])
    boxes = mouth.mouth_boxes(batch, 256)
    assert all(torch.equal(boxes[i], mouth.mouth_boxes(batch[i : i + 1], 256)[0]) for i in range(3))


# Positions of up to 100 pixels in float32, times differences of neighbours.
TOLERANCE = dict(rtol=1e-5, atol=4e-5)


def resize(x, height, width):
    return interpolate(x, size=(height, width), mode='bilinear', align_corners=False, antialias=True)


@pytest.mark.parametrize('size', [4, 16, 33])
def test_crop_equals_a_loop_over_samples(size):
    boxes = torch.tensor(list(BOXES.values()))
    plane = torch.randn(len(boxes), 3, SIDE, SIDE)
    crops = mouth.crop_and_resize(plane, boxes, size)
    assert crops.shape == (len(boxes), 3, size, size)
    for i, (top, bottom, left, right) in enumerate(BOXES.values()):
        expected = resize(plane[i : i + 1, :, top:bottom, left:right], size, size)
        torch.testing.assert_close(crops[i : i + 1], expected, **TOLERANCE)


@pytest.mark.parametrize('size', [4, 16, 64, 100])
def test_paste_equals_a_loop_over_samples(size):
    boxes = torch.tensor(list(BOXES.values()))
    plane, patch = torch.randn(len(boxes), 3, SIDE, SIDE), torch.randn(len(boxes), 3, size, size)
    kept = plane.clone()
    pasted = mouth.resize_and_paste(plane, patch, boxes)
    assert torch.equal(plane, kept)
    for i, (top, bottom, left, right) in enumerate(BOXES.values()):
        expected = plane[i].clone()
        expected[:, top:bottom, left:right] = resize(patch[i : i + 1], bottom - top, right - left)[0]
        torch.testing.assert_close(pasted[i], expected, **TOLERANCE)
        expected[:, top:bottom, left:right] = pasted[i, :, top:bottom, left:right]
        assert torch.equal(pasted[i], expected)  # Not a bit changes outside.


def test_pasting_back_what_was_cut_out_changes_nothing():
    plane = torch.randn(1, 2, SIDE, SIDE)
    for side in (8, 21, 64):
        box = torch.tensor([[0, side, SIDE - side, SIDE]])
        torch.testing.assert_close(mouth.resize_and_paste(plane, mouth.crop_and_resize(plane, box, side), box), plane)


def test_gradients_flow_to_the_box_and_from_outside_it():
    boxes = torch.tensor([[1, 9, 3, 11], [0, 6, 2, 8]])
    plane = torch.randn(2, 1, 12, 12).double().requires_grad_(True)
    patch = torch.randn(2, 1, 5, 5).double().requires_grad_(True)
    assert gradcheck(lambda p: mouth.crop_and_resize(p, boxes, 5), [plane])
    assert gradcheck(lambda p, q: mouth.resize_and_paste(p, q, boxes), [plane, patch])
    mouth.resize_and_paste(plane, patch, boxes).sum().backward()
    outside = torch.ones(2, 1, 12, 12)
    outside[0, :, 1:9, 3:11] = outside[1, :, 0:6, 2:8] = 0
    assert torch.equal(plane.grad, outside.double())
    torch.testing.assert_close(patch.grad.sum(dim=[1, 2, 3]), torch.tensor([64.0, 36.0]).double(), rtol=1e-5, atol=0)


def test_nothing_leaves_the_device_of_the_inputs():
    # The device that computes shapes alone refuses tensors of another device, as any other does.
    plane = torch.zeros(2, 3, SIDE, SIDE, device='meta')
    boxes = mouth.mouth_boxes(torch.zeros(2, 68, 3, device='meta'), SIDE)
    crop = mouth.crop_and_resize(plane, boxes, 16)
    assert crop.shape == (2, 3, 16, 16) and crop.device.type == 'meta'
    assert mouth.resize_and_paste(plane, crop, boxes).shape == plane.shape
