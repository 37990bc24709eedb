# SPDX-License-Identifier: Apache-2.0
"""2-D convolution with FIR up- or downsampling folded into its stride (Karras et al. 2020, appendix B)."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from torch_utils.ops.conv2d import conv2d, conv_transpose2d
from torch_utils.ops.upfirdn2d import filter_size, parse_padding, upfirdn2d


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> torch.Tensor:
    """Convolve [N, C, H, W] with w [O, C/groups, k, k], upsampling before or downsampling after it.

    f:           FIR filter of `upfirdn2d.setup_filter`, used only when up or down is above 1; None: no filtering.
    padding:     of the upsampled image, as in `upfirdn2d`; k // 2 keeps H·up/down.
    flip_weight: True: correlation, torch's convention; False: convolution.
    Upsampling by 2 runs as a transposed convolution, downsampling by 2 as a strided one: the multiplications with
    inserted zeros and of dropped pixels are not done. Differentiable any number of times in x and w.
    """
    if x.ndim != 4 or w.ndim != 4 or x.shape[1] != w.shape[1] * groups:
        raise ValueError(f'x, w: expected [N, C, H, W] and [O, C/{groups}, k, k], got {list(x.shape)}, {list(w.shape)}')
    pads = _pads_with_filter(padding, f, up, down)
    is_pointwise = w.shape[2] == w.shape[3] == 1
    if up == 1 and down == 1:
        return _conv(x, w, groups=groups, flip_weight=flip_weight, pads=pads)
    if is_pointwise and up == 1:
        x = upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter)
        return _conv(x, w, groups=groups, flip_weight=flip_weight)
    if is_pointwise and down == 1:
        x = _conv(x, w, groups=groups, flip_weight=flip_weight)
        return upfirdn2d(x, f, up=up, padding=pads, gain=up**2, flip_filter=flip_filter)
    if up == 1:
        x = upfirdn2d(x, f, padding=pads, flip_filter=flip_filter)
        return _conv(x, w, stride=down, groups=groups, flip_weight=flip_weight)
    x = _transposed_conv_then_filter(x, w, f, up, pads, groups, flip_weight, flip_filter)
    return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x


def _pads_with_filter(padding, f, up, down):
    """Widen the padding by what the FIR filter needs to keep the picture centred."""
    (fw, fh), (px0, px1, py0, py1) = filter_size(f), parse_padding(padding)
    if up > 1:
        px0, px1 = px0 + (fw + up - 1) // 2, px1 + (fw - up) // 2
        py0, py1 = py0 + (fh + up - 1) // 2, py1 + (fh - up) // 2
    if down > 1:
        px0, px1 = px0 + (fw - down + 1) // 2, px1 + (fw - down) // 2
        py0, py1 = py0 + (fh - down + 1) // 2, py1 + (fh - down) // 2
    return px0, px1, py0, py1


def _conv(x, w, stride=1, groups=1, flip_weight=True, pads=(0, 0, 0, 0)):
    if not flip_weight:
        w = w.flip([2, 3])
    if pads[0] == pads[1] >= 0 and pads[2] == pads[3] >= 0:
        return conv2d(x, w, stride, (pads[2], pads[0]), groups)
    return conv2d(functional.pad(x, pads), w, stride, groups=groups)


def _transposed_conv_then_filter(x, w, f, up, pads, groups, flip_weight, flip_filter):
    """Upsample with a transposed convolution, then filter.

    The transposed convolution of the zero-inserted image pads it by k-1 before and by k-up after each axis, counted
    against the padding that the filtered result has to have in all.
    """
    k_h, k_w = w.shape[2:]
    w = _swap_in_and_out(w, groups)
    if flip_weight:
        w = w.flip([2, 3])
    x = conv_transpose2d(x, w, stride=up, groups=groups)
    px0, px1, py0, py1 = pads
    pads = (px0 - (k_w - 1), px1 - (k_w - up), py0 - (k_h - 1), py1 - (k_h - up))
    return upfirdn2d(x, f, padding=pads, gain=up**2, flip_filter=flip_filter)


def _swap_in_and_out(w, groups):
    """[O, I/groups, k, k] -> [I, O/groups, k, k], the order that transposed convolutions take."""
    if groups == 1:
        return w.transpose(0, 1)
    out_channels, in_per_group, k_h, k_w = w.shape
    w = w.reshape(groups, out_channels // groups, in_per_group, k_h, k_w).transpose(1, 2)
    return w.reshape(groups * in_per_group, out_channels // groups, k_h, k_w)
