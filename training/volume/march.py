# SPDX-License-Identifier: Apache-2.0
"""Compositing along rays (Max 1995), over intervals between samples as in mip-NeRF (Barron et al. 2021, section 3)."""

from typing import NamedTuple

import torch
from torch.nn import functional


class Marched(NamedTuple):
    """Composited rays: features [N, M, C] in 2x-1 scale, depth [N, M, 1] (not clamped), weights [N, M, S-1, 1]."""

    features: torch.Tensor
    depth: torch.Tensor
    weights: torch.Tensor


def interval_weights(sigma: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """Return the opacity that each of the S-1 intervals contributes.

    sigma: raw density [N, M, S, 1]; softplus(mean of the neighbours - 1) is the interval's. depths: like sigma.
    """
    density = functional.softplus((sigma[:, :, :-1] + sigma[:, :, 1:]) / 2 - 1)
    alpha = 1 - torch.exp(-density * (depths[:, :, 1:] - depths[:, :, :-1]))
    passed = torch.cat([torch.ones_like(alpha[:, :, :1]), 1 - alpha + 1e-10], dim=2)
    # Torch's gradient of cumprod looks for zeros, for which the host waits.
    products = passed.log().cumsum(dim=2).exp() if passed.is_cuda else passed.cumprod(dim=2)
    return alpha * products[:, :, :-1]


def march(features: torch.Tensor, sigma: torch.Tensor, depths: torch.Tensor, white_back: bool = False) -> Marched:
    """Composite samples sorted by depth: features [N, M, S, C], sigma and depths [N, M, S, 1].

    The depth of a ray without any weight is NaN; `clamp_depth` gives it a value.
    """
    weights = interval_weights(sigma, depths)
    total = weights.sum(dim=2)
    colours = (weights * ((features[:, :, :-1] + features[:, :, 1:]) / 2)).sum(dim=2)
    depth = (weights * ((depths[:, :, :-1] + depths[:, :, 1:]) / 2)).sum(dim=2) / total
    if white_back:
        colours = colours + 1 - total
    return Marched(colours * 2 - 1, depth, weights)


def clamp_depth(depth: torch.Tensor, lowest: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """Limit depths to what was sampled in the whole batch; rays without weight (NaN) take the highest."""
    depth = torch.nan_to_num(depth, nan=torch.inf, posinf=torch.inf)
    return torch.minimum(torch.maximum(depth, lowest), highest)
