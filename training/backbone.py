# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2 synthesis with RGB skips (Karras et al. 2020, section 4.1) and its conditional form, the StyleUNet."""

import math

import torch
from torch import nn

from torch_utils.custom_ops import check_shape
from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upsample2d
from training.layers import BINOMIAL_FILTER, Conv2dLayer, SynthesisLayer, ToRGBLayer, memory_format
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
    resolution. Half precision is used on CUDA devices only; see `set_compute_dtype`.
    """

    compute_dtype = None

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

        ws may also be the Styles that `styles` made of it. Returns x [N, out, R, R] and img [N, img_channels, R, R] in
        float32.
        """
        w_iter = iter(ws if isinstance(ws, list) else ws.unbind(dim=1))
        if hasattr(self, 'const'):
            batch = len(ws[0].scale) if isinstance(ws, list) else len(ws)
            x = self.const.to(self._dtype(self.const))[None].expand(batch, -1, -1, -1)
        else:
            dtype = self._dtype(x)
            x = self.conv0(x.to(dtype, memory_format=memory_format(x, dtype)), next(w_iter), noise_mode)
        x = self.conv1(x, next(w_iter), noise_mode)
        rgb = self.torgb(x, next(w_iter)).float()
        if img is None:
            return x, rgb
        return x, rgb + (upsample2d(img, self.resample_filter) if self.up == 2 else img)

    @property
    def convolutions(self) -> list[SynthesisLayer]:
        """The layers before torgb, in order."""
        return [self.conv1] if hasattr(self, 'const') else [self.conv0, self.conv1]

    def styles(self, ws):
        """Return what ws [N, num_conv + 1, w_dim] do to the layers, for `forward`."""
        *ws, last = ws.unbind(dim=1)
        dtype = self._dtype(last)
        return [*(x.style(w, dtype) for x, w in zip(self.convolutions, ws, strict=True)), self.torgb.style(last)]

    def fold(self, styles):
        """Return styles of a frozen block for many pictures: what can be done once is done."""
        *styles, last = styles
        folded = [layer.fold(style) for layer, style in zip(self.convolutions, styles, strict=True)]
        return [*folded, self.torgb.fold(last, self._dtype(last.scale))]

    def freeze(self):
        """Keep the weights of the convolutions as they are needed; changes of the parameters are not seen any more."""
        for layer in self.convolutions:
            layer.freeze(self._dtype(layer.weight))

    def _dtype(self, x):
        return _dtype_of(self, x, torch.float16 if self.use_fp16 else torch.float32)


def _dtype_of(module, x, default):
    """Return the dtype in which a module's convolutions of x run: its own choice on CUDA devices only."""
    if not x.is_cuda:
        return torch.float32
    return module.compute_dtype or default


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
        img = None
        for r, block_ws in (ws if isinstance(ws, dict) else self.split(ws)).items():
            x, img = getattr(self, f'b{r}')(inject(x, r), img, block_ws, noise_mode)
        return img

    def styles(self, ws):
        """Return what ws do to each block; `forward` takes it in place of ws, for as many pictures as one likes."""
        self._check_ws(ws)
        return {r: getattr(self, f'b{r}').styles(block_ws) for r, block_ws in self.split(ws).items()}

    def fold(self, styles):
        """Return styles of a frozen network for many pictures (see `SynthesisBlock.fold`)."""
        return {r: getattr(self, f'b{r}').fold(block_styles) for r, block_styles in styles.items()}

    def split(self, ws):
        """Return the ws of each block that runs; a block's last, its torgb's, is the first of the next."""
        parts, first_w = {}, 0
        for r in self.block_resolutions:
            block = getattr(self, f'b{r}')
            if r >= self.first_resolution:
                parts[r] = ws[:, first_w : first_w + block.num_conv + block.num_torgb]
            first_w += block.num_conv
        return parts

    def _check_ws(self, ws):
        if isinstance(ws, dict):
            return
        if ws.ndim != 3 or ws.shape[1] != self.num_ws or ws.shape[2] != self.w_dim:
            raise ValueError(f'ws: expected [N, {self.num_ws}, {self.w_dim}], got {list(ws.shape)}')


class EncoderStage(nn.Module):
    """One resolution of the StyleUNet's encoder: adds the condition, halves the resolution; no residual."""

    compute_dtype = None

    def __init__(self, cond_channels, in_channels, out_channels, is_first, conv_clamp=None):
        super().__init__()
        self.is_first = is_first
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        self.fromrgb = Conv2dLayer(cond_channels, in_channels, 1, bias=False, conv_clamp=conv_clamp)
        self.conv1 = Conv2dLayer(in_channels, in_channels, 3, activation='lrelu', conv_clamp=conv_clamp)
        self.conv2 = Conv2dLayer(in_channels, out_channels, 3, activation='lrelu', down=2, conv_clamp=conv_clamp)

    def forward(self, x, condition):
        """x [N, in, R, R] or None, condition [N, cond, R or 2R] -> features [N, out, R/2, R/2], condition at R."""
        dtype = self._dtype(condition)
        condition = condition.to(dtype, memory_format=memory_format(condition, dtype))
        if not self.is_first:
            condition = downsample2d(condition, self.resample_filter)
        y = self.fromrgb(condition)
        y = y if x is None else x + y
        return self.conv2(self.conv1(y)), condition

    def freeze(self):
        """Keep the weights of the convolutions as they are needed; changes of the parameters are not seen any more."""
        for layer in (self.fromrgb, self.conv1, self.conv2):
            layer.freeze(self._dtype(layer.weight))

    def _dtype(self, x):
        return _dtype_of(self, x, torch.float32)


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
        """condition [N, cond_channels, in_size, in_size], ws [N, num_ws, w_dim] or styles -> [N, channels, R, R]."""
        self._check_ws(ws)
        batch = None if isinstance(ws, dict) else len(ws)
        check_shape('condition', condition, [batch, self.cond_channels, self.in_size, self.in_size])
        encoded = {features.shape[-1]: features for features in self.encode(condition)}

        def inject(x, block_resolution):
            size = block_resolution // 2
            layer = self.fusion[int(math.log2(size // self.final_size))] if size in encoded else None
            if size == self.final_size:
                return layer(encoded[size])
            if size in encoded and size < self.num_cond_res:
                return layer(torch.cat([x.to(encoded[size].dtype), encoded[size]], dim=1))
            return x

        return self._run_blocks(None, ws, noise_mode, inject)

    def freeze(self):
        """Keep the weights of the fusion layers as the encoder's outputs need them."""
        for layer in self.fusion:
            layer.freeze(self.encoder[0]._dtype(layer.weight))

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


def set_compute_dtype(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Make the convolutions of all blocks in a network run in one dtype on CUDA devices; None: as configured.

    Sums over blocks (the RGB skips) stay float32. float16 has no clamp here unless the network was built with one.
    """
    for module in network.modules():
        if isinstance(module, (SynthesisBlock, EncoderStage)):
            module.compute_dtype = dtype


def freeze(network: nn.Module) -> None:
    """Make all blocks keep their weights in the form in which they are needed, for inference.

    Changes of the parameters, the device or the dtype are not seen any more.
    """
    for module in network.modules():
        if isinstance(module, (SynthesisBlock, EncoderStage, StyleUNetSynthesis)):
            module.freeze()
