# SPDX-License-Identifier: Apache-2.0
"""Weight-modulated convolution (Karras et al. 2020, section 2.2)."""

import torch

from torch_utils.ops.conv2d_resample import conv2d_resample

DEMODULATION_EPSILON = 1e-8


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    noise: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int = 0,
    resample_filter: torch.Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused: bool = True,
) -> torch.Tensor:
    """Convolve each sample with the weight whose input channels its style scales.

    x:          [N, I, H, W]. weight: [O, I, k, k]. styles: [N, I].
    noise:      added to the result, broadcast to [N, O, H', W'], or None.
    up, down, padding, resample_filter, flip_weight: as in `conv2d_resample`.
    demodulate: divide each output channel by the norm of its scaled weight.
    fused:      True scales the weights and runs one grouped convolution, cheaper for small batches and large
                images; False scales the activations before and after one plain convolution, cheaper to
                differentiate. Both give the same numbers to rounding.
    Differentiable any number of times in x, weight, styles and noise.
    """
    n, in_channels = x.shape[:2]
    out_channels = weight.shape[0]
    if weight.ndim != 4 or weight.shape[1] != in_channels or list(styles.shape) != [n, in_channels]:
        raise ValueError(
            f'weight, styles: expected [O, {in_channels}, k, k] and [{n}, {in_channels}], '
            f'got {list(weight.shape)} and {list(styles.shape)}'
        )
    if x.dtype == torch.float16 and demodulate:
        weight, styles = limit_weight(weight), limit_styles(styles)
    resample = dict(f=resample_filter, up=up, down=down, padding=padding, flip_weight=flip_weight)
    if not fused or n == 0:  # A grouped convolution needs at least one group.
        x = conv2d_resample(x * styles.to(x.dtype)[:, :, None, None], weight.to(x.dtype), **resample)
        if demodulate:
            x = x * demodulation(weight.square().sum([2, 3]), styles).to(x.dtype)[:, :, None, None]
        return x if noise is None else x + noise.to(x.dtype)
    w = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        w = w * demodulation(weight.square().sum([2, 3]), styles)[:, :, None, None, None]
    w = w.reshape(n * out_channels, *weight.shape[1:]).to(x.dtype)
    x = conv2d_resample(x.reshape(1, n * in_channels, *x.shape[2:]), w, groups=n, **resample)
    x = x.reshape(n, out_channels, *x.shape[2:])
    return x if noise is None else x + noise.to(x.dtype)


def demodulation(squared: torch.Tensor, styles: torch.Tensor) -> torch.Tensor:
    """Return 1/‖weight[o]·style‖ [N, O]; squared [O, I]: the weight's squares summed over the kernel."""
    return (styles.square() @ squared.t() + DEMODULATION_EPSILON).rsqrt()


def limit_weight(weight: torch.Tensor) -> torch.Tensor:
    """Scale each output channel's weights to at most 1/√fan-in, which demodulation undoes.

    With styles of at most 1 (`limit_styles`) no product in half precision can overflow. No gradient flows through the
    divisors of the two: the result does not depend on them.
    """
    fan_in = weight[0].numel()
    return weight / (weight.detach().abs().amax([1, 2, 3], keepdim=True) * fan_in**0.5)


def limit_styles(styles: torch.Tensor) -> torch.Tensor:
    """Scale each sample's styles to at most 1, which demodulation undoes."""
    return styles / styles.detach().abs().amax(1, keepdim=True).clamp(min=DEMODULATION_EPSILON)
