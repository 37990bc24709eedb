# SPDX-License-Identifier: Apache-2.0
"""Discriminators: StyleGAN2's residual one, the dual form (Chan et al. 2022, section 4.5), one with a split label."""

import math

import torch
from torch import nn

from torch_utils.custom_ops import check_shape
from torch_utils.ops.upfirdn2d import setup_filter
from torch_utils.randomness import normal
from training.backbone import fp16_from_resolution
from training.config import DiscriminatorConfig
from training.layers import BINOMIAL_FILTER, Conv2dLayer, FullyConnectedLayer, memory_format
from training.mapping import MappingNetwork
from training.superresolution import resize_antialiased

EXPRESSION_EMBEDDING = 32  # Width of the embedding of expression numbers in the split-label discriminator.


class DiscriminatorBlock(nn.Module):
    """Residual block [N, in, R, R] -> [N, out, R/2, R/2]; in_channels 0 makes the first, which reads the picture."""

    def __init__(self, in_channels, tmp_channels, out_channels, img_channels, use_fp16=False, conv_clamp=None):
        super().__init__()
        self.use_fp16 = use_fp16
        self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        if in_channels == 0:
            self.fromrgb = Conv2dLayer(img_channels, tmp_channels, 1, activation='lrelu', conv_clamp=conv_clamp)
        self.conv0 = Conv2dLayer(tmp_channels, tmp_channels, 3, activation='lrelu', conv_clamp=conv_clamp)
        self.conv1 = Conv2dLayer(tmp_channels, out_channels, 3, activation='lrelu', down=2, conv_clamp=conv_clamp)
        self.skip = Conv2dLayer(tmp_channels, out_channels, 1, bias=False, down=2)

    def forward(self, x):
        """Run in half precision on CUDA devices where the block was built so."""
        half = self.use_fp16 and x.device.type == 'cuda'
        dtype = torch.float16 if half else torch.float32
        x = x.to(dtype, memory_format=memory_format(x, dtype))
        if hasattr(self, 'fromrgb'):
            x = self.fromrgb(x)
        skip = self.skip(x, gain=math.sqrt(0.5))
        return skip + self.conv1(self.conv0(x), gain=math.sqrt(0.5))


def append_minibatch_std(x: torch.Tensor, group_size: int, num_channels: int = 1) -> torch.Tensor:
    """Append the mean standard deviation within groups of samples as channels (Karras et al. 2018, section 3).

    x: [N, C, H, W]; groups of min(group_size, N), sample n belongs to group n mod N/group. Returns
    [N, C + num_channels, H, W]. ValueError where groups do not divide N.
    """
    n, c, h, w = x.shape
    group = min(group_size, n)
    if n % group:
        raise ValueError(f'batch: expected a multiple of the group size {group}, got {n}')
    y = x.reshape(group, n // group, num_channels, c // num_channels, h, w)
    std = ((y - y.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt()
    std = std.mean(dim=[2, 3, 4])[:, :, None, None]
    return torch.cat([x, std.repeat(group, 1, h, w)], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """4x4 features [N, C, 4, 4] to out_features numbers."""

    def __init__(self, in_channels, out_features, mbstd_group_size, mbstd_num_channels, conv_clamp=None):
        super().__init__()
        self.mbstd_group_size, self.mbstd_num_channels = mbstd_group_size, mbstd_num_channels
        channels = in_channels + mbstd_num_channels
        self.conv = Conv2dLayer(channels, in_channels, 3, activation='lrelu', conv_clamp=conv_clamp)
        self.fc = FullyConnectedLayer(in_channels * 16, in_channels, activation='lrelu')
        self.out = FullyConnectedLayer(in_channels, out_features)

    def forward(self, x):
        """Return [N, out_features] in float32."""
        x = x.float()
        if self.mbstd_num_channels > 0:
            x = append_minibatch_std(x, self.mbstd_group_size, self.mbstd_num_channels)
        return self.out(self.fc(self.conv(x).flatten(1)))


class Discriminator(nn.Module):
    """Scores {'image': [N, 3, R, R], 'image_raw': [N, 3, r, r]} with a label [N, c_dim (+ c2_dim)] -> logits [N, 1].

    With `render_channels`, 'render' [N, 3, s, s] shows the mesh of each picture under the label.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        self.c_dim = config.c_dim
        sizes = [2**i for i in range(config.img_resolution.bit_length() - 1, 2, -1)]
        channels = {r: min(config.channel_base // r, config.channel_max) for r in sizes + [4]}
        fp16_from = fp16_from_resolution(config.img_resolution, config.num_fp16_res)
        in_channels = config.img_channels * (1 if config.kind == 'single' else 2) + config.render_channels
        if config.kind != 'single':
            self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        for r in sizes:
            block = DiscriminatorBlock(
                channels[r] if r < config.img_resolution else 0,
                channels[r],
                channels[r // 2],
                in_channels,
                use_fp16=r >= fp16_from,
                conv_clamp=config.clamp,
            )
            self.add_module(f'b{r}', block)
        self.block_resolutions = sizes
        self._add_mappings(channels[4])
        group = (config.mbstd_group_size, config.mbstd_num_channels)
        self.b4 = DiscriminatorEpilogue(channels[4], max(self.cmap_dim, 1), *group, conv_clamp=config.clamp)

    def forward(self, img, c):
        """Return logits [N, 1]; c is not modified. `disc_c_noise` draws noise anew in every call."""
        x = self._input(img)
        for r in self.block_resolutions:
            x = getattr(self, f'b{r}')(x)
        x = self.b4(x)
        if self.cmap_dim == 0:
            return x
        if c is not None and len(c) != len(x):
            raise ValueError(f'c: expected {len(x)} labels, one per picture, got {len(c)}')
        return (x * self._embed(self._with_noise(c))).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)

    def _add_mappings(self, width):
        mapping = vars(self.config.mapping)
        self.cmap_dim = 0
        if self.config.c_dim > 0:
            self.mapping = MappingNetwork(0, self.config.c_dim, width, **mapping)
            self.cmap_dim = width
        if self.config.c2_dim > 0:
            self.mapping2 = MappingNetwork(0, self.config.c2_dim, EXPRESSION_EMBEDDING, **mapping)
            self.cmap_dim += EXPRESSION_EMBEDDING

    def _input(self, img):
        image = img['image']
        expected = [self.config.img_channels, self.config.img_resolution, self.config.img_resolution]
        if list(image.shape[1:]) != expected:
            raise ValueError(f'image: expected [N, {", ".join(map(str, expected))}], got {list(image.shape)}')
        parts = [image]
        if self.config.kind != 'single':
            parts.append(self._resized(img, 'image_raw', self.config.img_channels))
        if self.config.render_channels:
            parts.append(self._resized(img, 'render', self.config.render_channels))
        return torch.cat(parts, dim=1)

    def _resized(self, img, name, channels):
        if name not in img:
            raise ValueError(f'{name}: expected pictures beside image, got none')
        check_shape(name, img[name], [len(img['image']), channels, None, None])
        return resize_antialiased(img[name], self.config.img_resolution)

    def _embed(self, c):
        if self.config.c2_dim == 0:
            return self.mapping(None, c)
        split = self.config.c_dim
        return torch.cat([self.mapping(None, c[:, :split]), self.mapping2(None, c[:, split:])], dim=1)

    def _with_noise(self, c):
        if self.config.disc_c_noise == 0 or len(c) < 2:
            return c  # The deviation of a single label is 0.
        return c + normal(c.shape, c.device) * c.std(dim=0) * self.config.disc_c_noise
