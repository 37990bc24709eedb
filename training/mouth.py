# SPDX-License-Identifier: Apache-2.0
"""The mouth of the front feature plane: where it is, cut out and put back (Sun et al. 2023, section 3.3)."""

import torch

MOUTH = slice(48, 60)  # Outer lip contour of the 68 iBUG landmarks; its corners are the first and the seventh point.
CORNERS = (48, 54)
MARGIN = 1.2  # Side of the box over the mouth's larger extent.
MINIMUM_SIDE_PX = 8


def mouth_boxes(landmarks: torch.Tensor, resolution: int) -> torch.Tensor:
    """Return square boxes [N, 4] int64 (first row, row after last, first column, column after last) in the plane.

    landmarks: [N, 68, 2 or more], x and y of the front view in [-1, 1] (-1: left edge, top row).
    A box that would leave the plane is moved inside with its side kept (the published code failed there); it is at
    least 8 pixels and at most the plane. Runs on the device without a synchronisation.
    """
    points = landmarks[..., :2] * (resolution / 2) + resolution / 2
    extent = points[:, MOUTH].amax(dim=1) - points[:, MOUTH].amin(dim=1)
    centre = (points[:, CORNERS[0]] + points[:, CORNERS[1]]) / 2
    half = (MARGIN * extent.amax(dim=1, keepdim=True)).to(torch.int64) // 2
    half = half.clamp(min=MINIMUM_SIDE_PX // 2, max=resolution // 2)
    low = (centre - half).trunc().to(torch.int64)
    low = torch.minimum(low.clamp(min=0), resolution - 2 * half)
    high = low + 2 * half
    return torch.stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]], dim=1)


def crop_and_resize(plane: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Cut each sample's box out of [N, C, R, R] and resize it to [N, C, size, size], bilinear and antialiased."""
    rows, columns = _box_edges(boxes)
    in_coordinates = torch.arange(plane.shape[-1], device=plane.device)
    out_coordinates = torch.arange(size, device=plane.device)
    weights = [
        _resize_weights(out_coordinates[None], in_coordinates[None] - low, size, high - low)
        for low, high in (rows, columns)
    ]
    return _apply_separable(plane, *weights)


def resize_and_paste(plane: torch.Tensor, patch: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Resize each sample's patch [N, C, S, S] to its box, antialiased, and put it into plane [N, C, R, R] there."""
    in_coordinates = torch.arange(patch.shape[-1], device=plane.device)
    out_coordinates = torch.arange(plane.shape[-1], device=plane.device)
    weights, inside = [], []
    for low, high in _box_edges(boxes):
        weights.append(_resize_weights(out_coordinates[None] - low, in_coordinates[None], high - low, patch.shape[-1]))
        inside.append((out_coordinates >= low) & (out_coordinates < high))
    is_inside = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(is_inside, _apply_separable(patch, *weights), plane)


def _box_edges(boxes):
    """[N, 4] -> ((first row, row after), (first column, column after)), each [N, 1]."""
    return (boxes[:, 0:1], boxes[:, 1:2]), (boxes[:, 2:3], boxes[:, 3:4])


def _resize_weights(out_index, in_index, out_size, in_size):
    """Return weights [N, O, I] of an antialiased bilinear resize of `in_size` to `out_size` pixels.

    out_index, in_index: [N or 1, O], [N or 1, I]; inputs outside [0, in_size) get no weight. The sizes may differ by
    sample: [N, 1]. A triangle of width max(in/out, 1) around each output's centre, normalised over what it covers.
    """
    scale = _as_column(in_size / out_size, in_index.device, torch.float32)
    centre = scale * (out_index[:, :, None] + 0.5)
    distance = (in_index[:, None, :] + 0.5 - centre).abs() / scale.clamp(min=1)
    limit = _as_column(in_size, in_index.device, torch.int64)
    is_inside = (in_index[:, None, :] >= 0) & (in_index[:, None, :] < limit)
    weights = (1 - distance).clamp(min=0) * is_inside
    return weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-8)


def _as_column(size, device, dtype):
    """Return sizes [N, 1], or one number for all, as [N or 1, 1, 1] without a copy from the host."""
    if isinstance(size, torch.Tensor):
        return size.to(dtype).reshape(-1, 1, 1)
    return torch.full([1, 1, 1], size, dtype=dtype, device=device)


def _apply_separable(x, row_weights, column_weights):
    """[N, C, H, W] with weights [N, H', H] and [N, W', W] -> [N, C, H', W']."""
    x = x @ column_weights.to(x.dtype).transpose(1, 2)[:, None]
    return row_weights.to(x.dtype)[:, None] @ x
