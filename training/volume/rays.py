# SPDX-License-Identifier: Apache-2.0
"""Limits of camera rays in the volume."""

import torch


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
