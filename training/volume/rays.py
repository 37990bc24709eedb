# SPDX-License-Identifier: Apache-2.0
"""Camera rays and their limits in the volume."""

import torch


def camera_rays(
    cam2world: torch.Tensor, intrinsics: torch.Tensor, resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return origins and unit directions [N, resolution², 3] in world units of the rays through all pixel centres.

    cam2world:  [N, 4, 4], OpenCV axes (x right, y down, z forward).
    intrinsics: [N, 3, 3] divided by the image size: focal lengths, skew and centre are fractions of a side.
    Rays are in row-major pixel order.
    """
    directions = local_rays(intrinsics, resolution) @ cam2world[:, :3, :3].transpose(1, 2)
    origins = cam2world[:, None, :3, 3].expand_as(directions)
    return origins, torch.nn.functional.normalize(directions, dim=-1)


def local_rays(intrinsics: torch.Tensor, resolution: int) -> torch.Tensor:
    """Return (x, y, 1) [N, resolution², 3] of the rays through all pixel centres in camera coordinates, row by row."""
    centres = (torch.arange(resolution, dtype=torch.float32, device=intrinsics.device) + 0.5) / resolution
    v, u = torch.meshgrid(centres, centres, indexing='ij')
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    fx, fy, cx, cy, skew = (intrinsics[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2), (0, 1)))
    x = (u - cx + cy * skew / fy - skew * v / fy) / fx
    y = (v - cy) / fy
    return torch.stack([x, y.expand_as(x), torch.ones_like(x)], dim=-1)


def box_limits(origins: torch.Tensor, directions: torch.Tensor, side: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances [N, M, 1] at which rays enter and leave the centred cube; -1 and -2 where they miss it."""
    inverse = 1 / directions
    toward_low, toward_high = (-side / 2 - origins) * inverse, (side / 2 - origins) * inverse
    near = torch.minimum(toward_low, toward_high).amax(dim=-1, keepdim=True)
    far = torch.maximum(toward_low, toward_high).amin(dim=-1, keepdim=True)
    is_missed = near > far
    return near.masked_fill(is_missed, -1), far.masked_fill(is_missed, -2)


def fill_missed_limits(near: torch.Tensor, far: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give rays that miss the box limits like the others: near := the least valid near, far := the greatest near.

    Without a valid ray all limits are 0: nothing is seen (the published code marched from -1 to -2). Runs on the
    device without a synchronisation.
    """
    is_valid = far > near
    lowest = near.masked_fill(~is_valid, torch.inf).amin()
    near = torch.where(is_valid, near, lowest.nan_to_num(posinf=0.0))
    return near, torch.where(is_valid, far, near.amax())
