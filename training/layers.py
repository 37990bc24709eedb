# SPDX-License-Identifier: Apache-2.0
"""Layers with equalised learning rate and style modulation (Karras et al. 2018, section 4.1; 2020, section 2)."""

import math

import torch
from torch import nn

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.modulated_conv2d import modulated_conv2d
from torch_utils.ops.upfirdn2d import setup_filter
from torch_utils.randomness import normal

BINOMIAL_FILTER = (1, 3, 3, 1)
NOISE_MODES = ('random', 'const', 'none')


def normalize_second_moment(x: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """Scale each row of [N, D] to a mean square of one."""
    return x * (x.square().mean(dim=1, keepdim=True) + epsilon).rsqrt()


class FullyConnectedLayer(nn.Module):
    """Dense layer [.., in_features] -> [.., out_features] whose weights are scaled where they are used."""

    def __init__(self, in_features, out_features, activation='linear', lr_multiplier=1.0, bias_init=0.0):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init)))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x):
        """Apply the layer in the dtype of x."""
        weight = self.weight.to(x.dtype) * self.weight_gain
        bias = self.bias.to(x.dtype) * self.bias_gain
        if self.activation == 'linear':
            return nn.functional.linear(x, weight, bias)
        return bias_act(nn.functional.linear(x, weight), bias, dim=-1, act=self.activation)


class Conv2dLayer(nn.Module):
    """Convolution [N, in, H, W] -> [N, out, H·up/down, W·up/down] with resampling, bias, activation and clamp."""

    def __init__(
        self, in_channels, out_channels, kernel_size, bias=True, activation='linear', up=1, down=1, conv_clamp=None
    ):
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = math.sqrt(2) if activation == 'lrelu' else 1.0
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))

    def forward(self, x, gain=1.0):
        """Apply the layer in the dtype of x; `gain` multiplies the result and its clamp."""
        x = conv2d_resample(
            x,
            (self.weight * self.weight_gain).to(x.dtype),
            f=self.resample_filter,
            up=self.up,
            down=self.down,
            padding=self.weight.shape[-1] // 2,
            flip_weight=self.up == 1,
        )
        bias = None if self.bias is None else self.bias.to(x.dtype)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


class SynthesisLayer(nn.Module):
    """3x3 modulated convolution with noise, bias and lrelu: [N, in, R/up, R/up], w [N, w_dim] -> [N, out, R, R]."""

    def __init__(self, in_channels, out_channels, w_dim, resolution, up=1, conv_clamp=None):
        super().__init__()
        self.resolution, self.up, self.conv_clamp = resolution, up, conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        self.register_buffer('noise_const', torch.randn(resolution, resolution))

    def forward(self, x, w, noise_mode):
        """noise_mode: 'random' draws anew, 'const' uses the stored picture, 'none' adds nothing."""
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=self._noise(len(x), noise_mode),
            up=self.up,
            padding=1,
            resample_filter=self.resample_filter,
            flip_weight=self.up == 1,
            fused=not self.training,
        )
        return bias_act(x, self.bias.to(x.dtype), act='lrelu', clamp=self.conv_clamp)

    def _noise(self, batch, noise_mode):
        if noise_mode not in NOISE_MODES:
            raise ValueError(f'noise_mode: expected one of {", ".join(NOISE_MODES)}, got {noise_mode!r}')
        if noise_mode == 'none':
            return None
        if noise_mode == 'const':
            return self.noise_const * self.noise_strength
        shape = [batch, 1, self.resolution, self.resolution]
        return normal(shape, self.noise_const.device) * self.noise_strength


class ToRGBLayer(nn.Module):
    """1x1 modulated convolution without demodulation: [N, in, R, R], w [N, w_dim] -> [N, out, R, R]."""

    def __init__(self, in_channels, out_channels, w_dim, conv_clamp=None):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x, w):
        """Project the features to colours in the dtype of x."""
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, demodulate=False, fused=not self.training)
        return bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)
