# SPDX-License-Identifier: Apache-2.0
"""Triplane lookup and the two-pass volume renderer (Chan et al. 2022, sections 4.1 and 4.3)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from torch_utils.custom_ops import pick_impl
from torch_utils.ops import triplane
from training.volume import march, rays, samples

# Points decoded at a time where no gradient is kept: bounds memory to about 200 MB for 32 channels and 64 hidden units.
POINTS_PER_CHUNK = 1 << 18


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How rays are sampled. Lengths are world units; near and far may both be 'auto': the box that holds the volume."""

    box_warp: float = 1.0
    near: float | str = 2.25
    far: float | str = 3.3
    num_depths: int = 48
    num_importance: int = 48
    use_disparity: bool = False
    white_back: bool = False
    density_noise: float = 0.0
    plane_axes: tuple = ((0, 1), (0, 2), (2, 1))

    def __post_init__(self):
        if ('auto' in (self.near, self.far)) != (self.near == self.far == 'auto'):
            raise ValueError(f"near, far: expected two numbers or 'auto' twice, got {self.near!r}, {self.far!r}")
        if self.near != 'auto' and not 0 <= self.near < self.far:
            raise ValueError(f'near, far: expected 0 <= near < far, got {self.near}, {self.far}')
        if not self.box_warp > 0:
            raise ValueError(f'box_warp: expected a number above 0, got {self.box_warp}')
        if self.num_depths < 4 or self.num_importance < 0:
            raise ValueError(
                f'num_depths, num_importance: expected at least 4 and 0, got {self.num_depths}, {self.num_importance}'
            )


class RayRender(NamedTuple):
    """features [N, M, C], depth [N, M, 1], weight_sum [N, M, 1] and normals [N, M, 3] or None."""

    features: torch.Tensor
    depth: torch.Tensor
    weight_sum: torch.Tensor
    normals: torch.Tensor | None


def sample_planes(planes: torch.Tensor, points: torch.Tensor, box_warp: float, plane_axes: tuple) -> torch.Tensor:
    """Return the three planes' mean features at world points: planes [N, 3, C, H, W], points [N, M, 3] -> [N, M, C].

    Bilinear, zero outside; plane i reads coordinates plane_axes[i] of 2·point/box_warp as (column, row).
    """
    planes, q = planes.to(points.dtype), points * (2 / box_warp)
    total = 0
    for i, (column, row) in enumerate(plane_axes):
        grid = torch.stack([q[..., column], q[..., row]], dim=-1)[:, None]
        total = total + functional.grid_sample(planes[:, i], grid, padding_mode='zeros', align_corners=False)
    return (total[:, :, 0] / len(plane_axes)).transpose(1, 2)


def query(
    planes, decoder, points, config: SamplingConfig, with_rgb: bool = True, impl: str | None = None
) -> dict[str, torch.Tensor]:
    """Return sigma [N, M, 1] and rgb [N, M, C] at world points [N, M, 3]; in bounded memory where no gradient is kept.

    decoder: features [.., C] -> (rgb [.., C'], sigma [.., 1]). with_rgb: False may leave rgb out. impl: 'triton'
    (fused, for decoders with `dense_weights` on a GPU; no gradient to the points), 'ref', or None: follow the device.
    Raises RuntimeError if the named one cannot be used.
    """
    field = _field(planes, decoder, config)
    if _pick(field, planes, config, impl, points_need_gradient=points.requires_grad) == 'triton':
        sigma, rgb = triplane.query(field, points, with_rgb)
        return {'sigma': sigma, 'rgb': rgb} if with_rgb else {'sigma': sigma}
    return _query_ref(planes, decoder, points, config)


def _query_ref(planes, decoder, points, config):
    parts = [
        decoder(sample_planes(planes, chunk, config.box_warp, config.plane_axes))
        for chunk in points.split(_chunk_length(len(points), points.shape[1]), dim=1)
    ]
    rgb, sigma = zip(*parts)
    sigma = torch.cat(sigma, dim=1)
    if config.density_noise > 0:
        sigma = sigma + torch.randn(sigma.shape, device=sigma.device) * config.density_noise
    return {'sigma': sigma, 'rgb': torch.cat(rgb, dim=1)}


def _field(planes, decoder, config):
    """Return what the fused kernels take; None for decoders of other forms."""
    if not hasattr(decoder, 'dense_weights'):
        return None
    return triplane.Field(planes, decoder.dense_weights(), 2 / config.box_warp, config.plane_axes)


def _pick(field, planes, config, impl, num_samples=1, with_normals=False, points_need_gradient=False):
    def problem(_device):
        if field is None:
            return 'the decoder has no dense_weights'
        if with_normals or config.density_noise > 0:
            return 'it gives no normals and adds no noise'
        if points_need_gradient:
            return 'it gives no gradient to points'
        return triplane.problem(field, num_samples)

    # The interpreter, which makes the kernels run on a CPU, is for tests that name them.
    backends = {'triton': problem} if planes.is_cuda or impl is not None else {}
    return pick_impl('volume', impl, planes.device, backends)


def _chunk_length(batch, count):
    return max(count, 1) if torch.is_grad_enabled() else max(POINTS_PER_CHUNK // max(batch, 1), 1)


def render_rays(
    planes: torch.Tensor,
    decoder: torch.nn.Module,
    origins: torch.Tensor,
    directions: torch.Tensor,
    config: SamplingConfig,
    depth_jitter='random',
    with_normals: bool = False,
    impl: str | None = None,
) -> RayRender:
    """Render rays [N, M, 3] through planes [N, 3, C, H, W] in two passes.

    depth_jitter: see `samples.jitter_draws`; drawn as [N, M, num_depths, 1], then [N·M, num_importance].
    Differentiable in planes and decoder. Where no gradient is kept, rays are taken in chunks of bounded memory; the
    fused kernels (impl 'triton', see `query`) need none per point, with or without gradient, but no second gradient.
    """
    n, m = origins.shape[:2]
    draw_stratified, draw_importance = samples.jitter_draws(depth_jitter, origins.device)
    near, far = _limits(origins, directions, config)
    offsets = draw_stratified([n, m, config.num_depths, 1])
    depths = samples.stratified_depths(near, far, config.num_depths, offsets, config.use_disparity)
    draws = draw_importance([n * m, config.num_importance]) if config.num_importance else None
    field = _field(planes, decoder, config)
    num_samples = config.num_depths + config.num_importance
    if _pick(field, planes, config, impl, num_samples, with_normals) == 'triton':
        return _render_fused(field, origins, directions, depths, draws, config)
    rows = m if config.density_noise > 0 else _chunk_length(n * 2 * config.num_depths, m)
    parts = []
    for start in range(0, m, rows):
        at = slice(start, start + rows)
        chunk_draws = None if draws is None else draws.reshape(n, m, -1)[:, at].flatten(0, 1)
        chunk = (origins[:, at], directions[:, at], depths[:, at], chunk_draws)
        parts.append(_render_chunk(planes, decoder, *chunk, config, with_normals))
    features, depth, weight_sum, normals, lowest, highest = zip(*parts)
    depth = march.clamp_depth(torch.cat(depth, 1), torch.stack(lowest).amin(), torch.stack(highest).amax())
    normals = torch.cat(normals, 1) if with_normals else None
    return RayRender(torch.cat(features, 1), depth, torch.cat(weight_sum, 1), normals)


def _render_fused(field, origins, directions, depths, draws, config):
    draws = None if draws is None else draws.reshape(*depths.shape[:2], -1)
    rendered, depths = triplane.render(field, origins, directions, depths[..., 0], draws, config.white_back)
    depth = march.clamp_depth(rendered.depth, depths[..., 0].amin(), depths[..., -1].amax())
    return RayRender(rendered.features, depth, rendered.total, None)


def _limits(origins, directions, config):
    if config.near != 'auto':
        return config.near, config.far
    return rays.fill_missed_limits(*rays.box_limits(origins, directions, config.box_warp))


def _render_chunk(planes, decoder, origins, directions, depths, draws, config, with_normals):
    rgb, sigma = _sample_rays(planes, decoder, origins, directions, depths, config)
    if draws is not None:
        weights = march.interval_weights(sigma.detach(), depths)
        fine = samples.importance_depths(depths, weights, draws)
        fine_rgb, fine_sigma = _sample_rays(planes, decoder, origins, directions, fine, config)
        depths, order = torch.cat([depths, fine], dim=2).sort(dim=2)
        rgb = torch.cat([rgb, fine_rgb], dim=2).gather(2, order.expand(-1, -1, -1, rgb.shape[-1]))
        sigma = torch.cat([sigma, fine_sigma], dim=2).gather(2, order)
    marched = march.march(rgb, sigma, depths, config.white_back)
    normals = None
    if with_normals:
        normals = _normals(planes, decoder, origins, directions, depths, marched.weights, config)
    return (
        marched.features,
        marched.depth,
        marched.weights.sum(dim=2),
        normals,
        depths.amin(),
        depths.amax(),
    )


def _sample_rays(planes, decoder, origins, directions, depths, config):
    """Query the points origins + depths·directions; depths [N, M, S, 1] -> rgb [N, M, S, C], sigma [N, M, S, 1]."""
    n, m, s, _ = depths.shape
    points = origins[:, :, None] + depths * directions[:, :, None]
    out = _query_ref(planes, decoder, points.reshape(n, m * s, 3), config)
    return out['rgb'].reshape(n, m, s, -1), out['sigma'].reshape(n, m, s, 1)


def _normals(planes, decoder, origins, directions, depths, weights, config):
    """Return -normalise(Σ w · mean of the neighbouring density gradients) [N, M, 3]."""
    n, m, s, _ = depths.shape
    points = (origins[:, :, None] + depths * directions[:, :, None]).detach().reshape(n, m * s, 3)
    with torch.enable_grad():
        points.requires_grad_(True)
        _, sigma = decoder(sample_planes(planes, points, config.box_warp, config.plane_axes))
        (gradient,) = torch.autograd.grad(sigma.sum(), points, create_graph=weights.requires_grad)
    gradient = gradient.reshape(n, m, s, 3)
    mean = (weights * ((gradient[:, :, :-1] + gradient[:, :, 1:]) / 2)).sum(dim=2)
    return -functional.normalize(mean, dim=-1)
