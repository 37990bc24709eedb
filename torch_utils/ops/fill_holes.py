# SPDX-License-Identifier: Apache-2.0
"""Close the holes of a soft coverage mask: the mouth and eye openings of a rasterised head."""

import torch

from torch_utils.custom_ops import check_shape, cpu_backend, cuda_backend, pick_impl, plugin

OPAQUE = 254 / 255  # A pixel above this blocks the flood; compared in fp32.

_BACKENDS = {'cuda': cuda_backend('fill_holes_cuda'), 'cpp': cpu_backend('fill_holes')}


@torch.no_grad()
def fill_holes(alpha: torch.Tensor, impl: str | None = None) -> torch.Tensor:
    """Set to 1 each pixel that a 4-connected flood from the top-left corner through pixels <= OPAQUE cannot reach.

    alpha: [B, 1, H, W] fp32 in [0, 1], any device. Reached pixels keep their value; NaN blocks. Where the corner
           itself blocks, the flood starts from every open pixel of the border instead.
    impl:  'cuda' (CUDA tensors; never waits for the device), 'cpp' (CPU tensors), 'ref' (any device; same result bit
           for bit), or None: follow the device.
    Returns a new tensor like alpha; no gradient flows.
    Raises ValueError for another shape or type, RuntimeError if the named implementation cannot be used.
    """
    check_shape('alpha', alpha, [None, 1, None, None])
    if alpha.dtype != torch.float32:
        raise ValueError(f'alpha: expected torch.float32, got {alpha.dtype}')
    chosen = pick_impl('fill_holes', impl, alpha.device, _BACKENDS)
    if alpha.numel() == 0:
        return alpha.clone()
    if chosen == 'ref':
        return _fill_holes_ref(alpha)
    return plugin('fill_holes_cuda' if chosen == 'cuda' else 'fill_holes').forward(alpha, OPAQUE)


def _fill_holes_ref(alpha: torch.Tensor) -> torch.Tensor:
    """Flood whole runs of open pixels: every open pixel joins one horizontal and one vertical run."""
    is_open = alpha[:, 0] <= OPAQUE
    pixel = is_open.flatten().nonzero().squeeze(1)
    row_run = _run_index(is_open).flatten()[pixel]
    column_run = _run_index(is_open.mT).mT.flatten()[pixel]
    row_reached = torch.zeros_like(is_open.flatten())
    column_reached = torch.zeros_like(row_reached)
    row_reached[row_run[_seeds(is_open).flatten()[pixel]]] = True

    edge_row, edge_column = row_run, column_run
    while edge_row.numel() > 0:  # Each turn goes round one more corner of the way, in both directions.
        column_reached[edge_column[row_reached[edge_row]]] = True
        row_reached[edge_row[column_reached[edge_column]]] = True
        is_pending = ~column_reached[edge_column]
        if not (is_pending & row_reached[edge_row]).any():
            break
        edge_row, edge_column = edge_row[is_pending], edge_column[is_pending]

    filled = torch.ones_like(alpha, memory_format=torch.contiguous_format).flatten()
    reached = pixel[row_reached[row_run]]
    filled[reached] = alpha.flatten()[reached]
    return filled.view(alpha.shape)


def _run_index(is_open: torch.Tensor) -> torch.Tensor:
    """Number the horizontal runs of open pixels from 0, over the whole batch; blocked pixels get no useful number."""
    is_start = is_open.clone(memory_format=torch.contiguous_format)
    is_start[..., 1:] &= ~is_open[..., :-1]
    return is_start.flatten().cumsum(0).view(is_open.shape) - 1


def _seeds(is_open: torch.Tensor) -> torch.Tensor:
    # Deviation: where the corner is covered, the published code has nowhere to start and fills the whole image.
    from_border = ~is_open[:, :1, :1]
    seeds = is_open & from_border
    seeds[:, 1:-1, 1:-1] = False
    seeds[:, 0, 0] = is_open[:, 0, 0]
    return seeds
