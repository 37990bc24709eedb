# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2 synthesis with RGB skips (Karras et al. 2020, section 4.1) and its conditional form, the StyleUNet."""

import math

import torch
from torch import nn

from torch_utils.custom_ops import check_shape
from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upsample2d
from training.layers import BINOMIAL_FILTER, Conv2dLayer, SynthesisLayer, ToRGBLayer
from training.mapping import MappingNetwork


def check_power_of_two(name: str, value: int, minimum: int = 4) -> int:
    """Return log2 of a resolution; ValueError with `name` where it is not a power of two from `minimum` on."""
    if not isinstance(value, int) or value < minimum or value & (value - 1):
        raise ValueError(f'{name}: expected a power of two >= {minimum}, got {value!r}')
    return value.bit_length() - 1


def num_ws_of(resolution: int) -> int:
    """Return how many w's a synthesis network of a resolution takes: two a block (the first lacks a convolution,
    the last adds its torgb)."""
    return 2 * (check_power_of_two('resolution', resolution) - 1)


def fp16_from_resolution(resolution: int, num_fp16_res: int) -> int:
    """Return the lowest resolution whose block runs in half precision when the `num_fp16_res` highest do."""
    return max(2 ** (check_power_of_two('resolution', resolution) + 1 - num_fp16_res), 8)


class SynthesisBlock(nn.Module):
    """One resolution: conv0 (absent in the first block), conv1, torgb and the RGB skip.

    in_channels 0 makes the first block, which starts from the learned constant. up: 2, or 1 to stay at the input's
    resolution. Half precision is used on CUDA devices only.
    """

    def __init__(
        self, in_channels, out_channels, w_dim, resolution, img_channels, up=2, use_fp16=False, conv_clamp=None
    ):
        super().__init__()
        self.resolution, self.up, self.use_fp16 = resolution, up, use_fp16
        self.num_conv, self.num_torgb = (1 if in_channels == 0 else 2), 1
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, up=up, conv_clamp=conv_clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, conv_clamp=conv_clamp)
        self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp=conv_clamp)

    def forward(self, x, img, ws, noise_mode):
        """x [N, in, R/up, R/up] or None, img [N, img_channels, R/up, R/up] or None, ws [N, num_conv + 1, w_dim].

        Returns x [N, out, R, R] and img [N, img_channels, R, R] in float32.
        """
        half = self.use_fp16 and ws.device.type == 'cuda'
        dtype = torch.float16 if half else torch.float32
        w_iter = iter(ws.unbind(dim=1))
        if hasattr(self, 'const'):
            x = self.const.to(dtype)[None].expand(len(ws), -1, -1, -1)
        else:
            x = self.conv0(x.to(dtype), next(w_iter), noise_mode)
        x = self.conv1(x, next(w_iter), noise_mode)
        rgb = self.torgb(x, next(w_iter)).float()
        if img is None:
            return x, rgb
        return x, rgb + (upsample2d(img, self.resample_filter) if self.up == 2 else img)


class SynthesisNetwork(nn.Module):
    """ws [N, num_ws, w_dim] -> picture [N, img_channels, R, R]; runs its blocks from `first_resolution` on."""

    first_resolution = 4

    def __init__(
        self,
        w_dim,
        img_resolution,
        img_channels,
        channel_base=32768,
        channel_max=512,
        num_fp16_res=0,
        conv_clamp=None,
    ):
        super().__init__()
        log2 = check_power_of_two('img_resolution', img_resolution)
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.block_resolutions = [2**i for i in range(2, log2 + 1)]
        self.channels = {r: min(channel_base // r, channel_max) for r in self.block_resolutions}
        fp16_from = fp16_from_resolution(img_resolution, num_fp16_res)
        for r in self.block_resolutions:
            block = SynthesisBlock(
                self.channels[r // 2] if r > 4 else 0,
                self.channels[r],
                w_dim,
                r,
                img_channels,
                use_fp16=r >= fp16_from,
                conv_clamp=conv_clamp,
            )
            self.add_module(f'b{r}', block)
        self.num_ws = num_ws_of(img_resolution)

    def forward(self, ws, noise_mode='const'):
        """Run all blocks from the learned constant."""
        self._check_ws(ws)
        return self._run_blocks(None, ws, noise_mode)

    def _run_blocks(self, x, ws, noise_mode, inject=lambda x, resolution: x):
        """Run the blocks; `inject` may replace the features that enter each of them."""
        img, first_w = None, 0
        for r in self.block_resolutions:
            block = getattr(self, f'b{r}')
            if r >= self.first_resolution:
                block_ws = ws[:, first_w : first_w + block.num_conv + block.num_torgb]
                x, img = block(inject(x, r), img, block_ws, noise_mode)
            first_w += block.num_conv
        return img

    def _check_ws(self, ws):
        if ws.ndim != 3 or ws.shape[1] != self.num_ws or ws.shape[2] != self.w_dim:
            raise ValueError(f'ws: expected [N, {self.num_ws}, {self.w_dim}], got {list(ws.shape)}')


class EncoderStage(nn.Module):
    """One resolution of the StyleUNet's encoder: adds the condition, halves the resolution; no residual."""

    def __init__(self, cond_channels, in_channels, out_channels, is_first, conv_clamp=None):
        super().__init__()
        self.is_first = is_first
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        self.fromrgb = Conv2dLayer(cond_channels, in_channels, 1, bias=False, conv_clamp=conv_clamp)
        self.conv1 = Conv2dLayer(in_channels, in_channels, 3, activation='lrelu', conv_clamp=conv_clamp)
        self.conv2 = Conv2dLayer(in_channels, out_channels, 3, activation='lrelu', down=2, conv_clamp=conv_clamp)

    def forward(self, x, condition):
        """x [N, in, R, R] or None, condition [N, cond, R or 2R] -> features [N, out, R/2, R/2], condition at R."""
        if not self.is_first:
            condition = downsample2d(condition, self.resample_filter)
        y = self.fromrgb(condition)
        y = y if x is None else x + y
        return self.conv2(self.conv1(y)), condition


class StyleUNetSynthesis(SynthesisNetwork):
    """Synthesis that starts from, and is guided by, an encoded condition image.

    in_size: the condition's resolution. final_size: lowest resolution of the encoder. cond_channels: its channels.
    num_cond_res: encoder outputs below this resolution enter the synthesis.
    """

    def __init__(self, *args, in_size, final_size, cond_channels, num_cond_res, conv_clamp=None, **kwargs):
        super().__init__(*args, conv_clamp=conv_clamp, **kwargs)
        check_power_of_two('in_size', in_size, minimum=8)
        check_power_of_two('final_size', final_size)
        if not final_size < in_size <= self.img_resolution:
            raise ValueError(f'in_size: expected above {final_size}, at most {self.img_resolution}, got {in_size}')
        self.in_size, self.final_size, self.num_cond_res = in_size, final_size, num_cond_res
        self.cond_channels, self.first_resolution = cond_channels, 2 * final_size
        num_stages = int(math.log2(in_size // final_size))
        stage_sizes = [in_size >> i for i in range(num_stages)]
        self.encoder = nn.ModuleList(
            EncoderStage(cond_channels, self.channels[r], self.channels[r // 2], r == in_size, conv_clamp)
            for r in stage_sizes
        )
        # One layer more than is used: the last exists in published files and never gets a gradient.
        fused = [self.channels[final_size << i] for i in range(num_stages + 1)]
        self.fusion = nn.ModuleList(
            Conv2dLayer(c * (2 if i else 1), c, 3, conv_clamp=conv_clamp) for i, c in enumerate(fused)
        )

    def forward(self, condition, ws, noise_mode='const'):
        """condition [N, cond_channels, in_size, in_size], ws [N, num_ws, w_dim] -> [N, img_channels, R, R]."""
        self._check_ws(ws)
        check_shape('condition', condition, [len(ws), self.cond_channels, self.in_size, self.in_size])
        encoded = {features.shape[-1]: features for features in self.encode(condition)}

        def inject(x, block_resolution):
            size = block_resolution // 2
            layer = self.fusion[int(math.log2(size // self.final_size))] if size in encoded else None
            if size == self.final_size:
                return layer(encoded[size])
            if size in encoded and size < self.num_cond_res:
                return layer(torch.cat([x.float(), encoded[size]], dim=1))
            return x

        return self._run_blocks(None, ws, noise_mode, inject)

    def encode(self, condition):
        """Return the encoder's outputs, from in_size/2 down to final_size."""
        features, outputs = None, []
        for stage in self.encoder:
            features, condition = stage(features, condition)
            outputs.append(features)
        return outputs


class Backbone(nn.Module):
    """A synthesis network with its own mapping, as published files store it.

    mapping_ws: how many w's the mapping emits, at least as many as the synthesis takes; None: just as many.
    """

    def __init__(self, z_dim, c_dim, w_dim, synthesis, mapping_ws=None, mapping_kwargs=None):
        super().__init__()
        self.synthesis = synthesis
        self.num_ws = synthesis.num_ws
        if mapping_kwargs is not None:
            self.mapping = MappingNetwork(z_dim, c_dim, w_dim, num_ws=mapping_ws or self.num_ws, **mapping_kwargs)
