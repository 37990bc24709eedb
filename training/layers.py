# SPDX-License-Identifier: Apache-2.0
"""Layers with equalised learning rate and style modulation (Karras et al. 2018, section 4.1; 2020, section 2)."""

import math
from typing import NamedTuple

import torch
from torch import nn

from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.conv2d_resample import conv2d_resample
from torch_utils.ops.modulated_bias_act import modulated_bias_act
from torch_utils.ops.modulated_conv2d import demodulation, limit_styles, limit_weight, modulated_conv2d
from torch_utils.ops.upfirdn2d import setup_filter
from torch_utils.randomness import normal

BINOMIAL_FILTER = (1, 3, 3, 1)
NOISE_MODES = ('random', 'const', 'none')
HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # Of matrix products on tensor cores; the gradient of three colours took ten times as long without.


class Style(NamedTuple):
    """What a w does to a layer: factors of its input channels [N, I] and of its outputs [N, O], or None.

    weight: the layer's weights with all that done to them, of a style that `fold` prepared for many pictures.
    """

    scale: torch.Tensor
    demodulation: torch.Tensor | None
    weight: torch.Tensor | None = None


class FrozenWeights(NamedTuple):
    """A layer's weights as its convolution takes them in one dtype, and what styles and noise need, computed once."""

    weight: torch.Tensor
    squared: torch.Tensor | None = None
    noise: torch.Tensor | None = None


def memory_format(x: torch.Tensor, dtype: torch.dtype) -> torch.memory_format:
    """Return the layout in which convolutions of x in this dtype are fastest: tensor cores want channels last."""
    on_tensor_cores = dtype in HALF or (dtype == torch.float32 and torch.backends.cudnn.allow_tf32)
    return torch.channels_last if x.is_cuda and on_tensor_cores else torch.preserve_format


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
        self.frozen = None
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))

    def freeze(self, dtype):
        """Keep the weights as inputs of this dtype need them; changes of the parameters are not seen any more."""
        weight = (self.weight.detach() * self.weight_gain).to(dtype)
        self.frozen = FrozenWeights(weight.to(memory_format=memory_format(weight, dtype)))

    def forward(self, x, gain=1.0):
        """Apply the layer in the dtype of x; `gain` multiplies the result and its clamp."""
        x = conv2d_resample(
            x,
            (self.weight * self.weight_gain).to(x.dtype) if self.frozen is None else self.frozen.weight,
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
        self.resolution, self.up, self.conv_clamp, self.frozen = resolution, up, conv_clamp, None
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        self.register_buffer('noise_const', torch.randn(resolution, resolution))

    def style(self, w, dtype):
        """Return what w [N, w_dim] does to the layer when it runs in this dtype."""
        scale = self.affine(w)
        if dtype == torch.float16:  # bfloat16 reaches as far as float32.
            scale = limit_styles(scale)
        squared = self._weights(dtype)[1] if self.frozen is None else self.frozen.squared
        return Style(scale, demodulation(squared, scale))

    def freeze(self, dtype):
        """Keep the weights as inputs of this dtype need them; changes of the parameters are not seen any more."""
        weight, squared = (x.detach() for x in self._weights(dtype))
        self.frozen = FrozenWeights(self._arranged(weight), squared, (self.noise_const * self.noise_strength).detach())

    def fold(self, style):
        """Return a style of a frozen layer with all that can be done once; a single picture's goes into the weights."""
        if len(style.scale) > 1:
            return style
        scale, demodulation = style.scale[0, :, None, None], style.demodulation[0, :, None, None, None]
        weight = (self.frozen.weight * scale * demodulation).to(self.frozen.weight.dtype)
        return style._replace(weight=self._arranged(weight))

    def _arranged(self, weight):
        """Return weights in the layout in which the convolution takes them."""
        layout = memory_format(weight, weight.dtype)
        if self.up > 1:  # Transposed convolutions take the input channels first.
            return weight.transpose(0, 1).to(memory_format=layout).transpose(0, 1)
        return weight.to(memory_format=layout)

    def forward(self, x, w, noise_mode):
        """Apply the layer in the dtype of x. w: [N, w_dim], or the Style that `style` made of it.

        noise_mode: 'random' draws anew, 'const' uses the stored picture, 'none' adds nothing.
        """
        noise = self._noise(len(x), noise_mode)
        if not isinstance(w, Style) and not x.is_cuda:
            return self._forward_on_cpu(x, w, noise)
        style = w if isinstance(w, Style) else self.style(w, x.dtype)
        weight, demodulation = style.weight, None
        if weight is None:
            x, demodulation = modulated_bias_act(x, style.scale), style.demodulation
            weight = self._weights(x.dtype)[0] if self.frozen is None else self.frozen.weight
        x = conv2d_resample(
            x, weight, f=self.resample_filter, up=self.up, padding=1, flip_weight=self.up == 1
        )
        return modulated_bias_act(x, demodulation, noise, self.bias, act='lrelu', clamp=self.conv_clamp)

    def _forward_on_cpu(self, x, w, noise):
        x = modulated_conv2d(
            x,
            self.weight,
            self.affine(w),
            noise=noise,
            up=self.up,
            padding=1,
            resample_filter=self.resample_filter,
            flip_weight=self.up == 1,
            fused=not self.training,
        )
        return bias_act(x, self.bias.to(x.dtype), act='lrelu', clamp=self.conv_clamp)

    def _weights(self, dtype):
        """Return the weights that the convolution takes and their squares summed over the kernel [O, I]."""
        weight = limit_weight(self.weight) if dtype == torch.float16 else self.weight
        return weight.to(dtype), weight.square().sum([2, 3])

    def _noise(self, batch, noise_mode):
        if noise_mode not in NOISE_MODES:
            raise ValueError(f'noise_mode: expected one of {", ".join(NOISE_MODES)}, got {noise_mode!r}')
        if noise_mode == 'none':
            return None
        if noise_mode == 'const':
            return self.noise_const * self.noise_strength if self.frozen is None else self.frozen.noise
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

    def style(self, w):
        """Return what w [N, w_dim] does to the layer."""
        return Style(self.affine(w) * self.weight_gain, None)

    def fold(self, style, dtype):
        """Return a style with the weights that it makes, for layers that run in this dtype."""
        return style._replace(weight=self._weight(style).to(dtype))

    def forward(self, x, w):
        """Project the features to colours in the dtype of x. w: [N, w_dim], or the Style that `style` made of it."""
        style = w if isinstance(w, Style) else self.style(w)
        if x.is_cuda or isinstance(w, Style):
            x = _project(x, self._weight(style).to(x.dtype) if style.weight is None else style.weight)
        else:
            x = modulated_conv2d(x, self.weight, style.scale, demodulate=False, fused=not self.training)
        return bias_act(x, self.bias.to(x.dtype), clamp=self.conv_clamp)

    def _weight(self, style):
        return self.weight[:, :, 0, 0] * style.scale[:, None]


def _project(x, weight):
    """Multiply the channels of x [N, I, H, W] by each sample's weight [N, O, I]; the result has x's layout."""
    n, i, h, w = x.shape
    o = weight.shape[1]
    if x.is_cuda and o % ALIGNMENT:
        weight = nn.functional.pad(weight, (0, 0, 0, -o % ALIGNMENT))
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        x = x.permute(0, 2, 3, 1).reshape(n, h * w, i) @ weight.mT
        return x.reshape(n, h, w, -1).permute(0, 3, 1, 2)[:, :o]
    return (weight @ x.reshape(n, i, h * w)).reshape(n, -1, h, w)[:, :o]
