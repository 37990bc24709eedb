# SPDX-License-Identifier: Apache-2.0
"""Leaky ReLU between an upsampling and a downsampling filter, without aliasing (Karras et al. 2021, section 3.1)."""

import math
from collections.abc import Sequence

import torch

from torch_utils.custom_ops import pick_impl
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import upfirdn2d


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Add a bias, upsample with `fu` (gain up²), apply lrelu with gain and clamp, downsample with `fd`.

    x:       [N, C, H, W]. b: [C] or None. fu, fd: filters as `upfirdn2d` takes them, or None.
    padding: as in `upfirdn2d`, applied to the upsampled signal; nothing is padded between the two filters.
    impl:    'ref' (torch operations, any device) or None: follow the device.
    Returns [N, C, H', W'], H' = (H·up + pads - (taps(fu) - 1) - (taps(fd) - 1) + down - 1) // down.
    Differentiable any number of times with respect to x and b.
    """
    pick_impl('filtered_lrelu', impl, x.device)
    x = bias_act(x, b, impl='ref')
    x = upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter, impl='ref')
    x = bias_act(x, act='lrelu', alpha=slope, gain=gain, clamp=clamp, impl='ref')
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter, impl='ref')
