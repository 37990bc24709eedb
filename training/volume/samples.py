# SPDX-License-Identifier: Apache-2.0
"""Depths along rays: stratified, and more where a first pass found density (Mildenhall et al. 2020, section 5.2)."""

from collections.abc import Callable

import torch
from torch.nn import functional

Jitter = Callable[[list[int]], torch.Tensor]


def jitter_draws(kind: str | Jitter, device: torch.device) -> tuple[Jitter, Jitter]:
    """Return (draw for stratified offsets, draw for importance samples): functions of a shape to numbers in [0, 1).

    kind: 'random'; 'center', offsets 0.5 and importance samples (j + 0.5)/n, deterministic; or a callable for both.
    """
    if kind == 'random':
        return (lambda shape: torch.rand(shape, device=device),) * 2
    if kind == 'center':
        return lambda shape: torch.full(shape, 0.5, device=device), lambda shape: _centred(shape, device)
    if callable(kind):
        return (lambda shape: torch.as_tensor(kind(shape), dtype=torch.float32, device=device),) * 2
    raise ValueError(f"depth_jitter: expected 'random', 'center' or a callable, got {kind!r}")


def _centred(shape, device):
    n = shape[-1]
    return ((torch.arange(n, dtype=torch.float32, device=device) + 0.5) / n).expand(shape)


def stratified_depths(
    near: torch.Tensor, far: torch.Tensor, count: int, offsets: torch.Tensor, use_disparity: bool = False
) -> torch.Tensor:
    """Return depths near + (i + u)(far - near)/(count - 1); the last may pass far.

    near, far: [N, M, 1] or scalars. offsets: u in [0, 1), [N, M, count, 1]; the result has its shape.
    use_disparity: spaced evenly in 1/depth instead.
    """
    near, far = (limit[..., None] if isinstance(limit, torch.Tensor) else limit for limit in (near, far))
    steps = torch.linspace(0, 1, count, device=offsets.device)[:, None]
    if use_disparity:
        s = steps + offsets / (count - 1)
        return 1 / ((1 - s) / near + s / far)
    return near + steps * (far - near) + offsets * ((far - near) / (count - 1))


def importance_depths(depths: torch.Tensor, weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return depths drawn where the weights of a first pass are large, without gradient.

    depths: [N, M, S, 1]. weights: [N, M, S - 1, 1] of the marched intervals. draws: [N·M, n] in [0, 1).
    Returns [N, M, n, 1]. Quirk of the published model: the bins are the first S - 2 of the S - 1 mid-points.
    """
    n, m, s, _ = depths.shape
    with torch.no_grad():
        w = functional.max_pool1d(weights.reshape(n * m, 1, s - 1), 2, stride=1, padding=1)
        w = functional.avg_pool1d(w, 2, stride=1)[:, 0] + 0.01
        t = depths.reshape(n * m, s)
        bins = 0.5 * (t[:, :-1] + t[:, 1:])
        return sample_histogram(bins, w[:, 1:-1], draws).reshape(n, m, -1, 1)


def sample_histogram(bins: torch.Tensor, weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative histogram at `draws`, linear within its bins.

    bins: [R, K + 1 or more] edges. weights: [R, K], not negative. draws: [R, n]. Returns [R, n].
    """
    weights = weights + 1e-5
    cdf = functional.pad((weights / weights.sum(dim=-1, keepdim=True)).cumsum(dim=-1), (1, 0))
    index = torch.searchsorted(cdf, draws.contiguous(), right=True)
    below = (index - 1).clamp(min=0)
    above = index.clamp(max=weights.shape[-1])
    cdf_below, cdf_above = cdf.gather(1, below), cdf.gather(1, above)
    bin_below, bin_above = bins.gather(1, below), bins.gather(1, above)
    width = cdf_above - cdf_below
    width = torch.where(width < 1e-5, torch.ones_like(width), width)
    return bin_below + (draws - cdf_below) / width * (bin_above - bin_below)
