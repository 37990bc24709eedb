# SPDX-License-Identifier: Apache-2.0
"""Inception v3 (Szegedy et al. 2015) as published FIDs use it: the 2015 weights, pool3 features, TensorFlow's resize.

Parameter names are those of the file pt_inception-2015-12-05-6726825d.pth. Its network differs from the paper's in the
pooling branches: border pixels average what is inside alone, and the last block takes maxima.
"""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from torch_utils.tf32 import without_tf32

NUM_FEATURES, INPUT_SIDE = 2048, 299
EPSILON = 0.001


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs, outputs, size=1, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H', W']."""
        return relu(self.bn(self.conv(x)))


def _wide(inputs, outputs, size=7):
    return Conv(inputs, outputs, (1, size), padding=(0, size // 2))


def _tall(inputs, outputs, size=7):
    return Conv(inputs, outputs, (size, 1), padding=(size // 2, 0))


def _mean(x):
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _chain(block, x, *names):
    for name in names:
        x = getattr(block, name)(x)
    return x


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, two 3x3 and pooling side by side."""

    def __init__(self, inputs, pooled):
        super().__init__()
        self.branch1x1 = Conv(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(inputs, pooled)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, 224 + pooled, H, W]."""
        return torch.cat([
            self.branch1x1(x), _chain(self, x, 'branch5x5_1', 'branch5x5_2'),
            _chain(self, x, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3'), self.branch_pool(_mean(x)),
        ], dim=1)  # fmt: skip


class BlockB(nn.Module):
    """35x35 to 17x17."""

    def __init__(self, inputs):
        super().__init__()
        self.branch3x3 = Conv(inputs, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, 480 + inputs, H/2, W/2]."""
        twice = _chain(self, x, 'branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3')
        return torch.cat([self.branch3x3(x), twice, max_pool2d(x, 3, 2)], dim=1)


class BlockC(nn.Module):
    """17x17: 7x7 filters taken apart."""

    def __init__(self, inputs, inner):
        super().__init__()
        self.branch1x1 = Conv(inputs, 192)
        self.branch7x7_1, self.branch7x7_2 = Conv(inputs, inner), _wide(inner, inner)
        self.branch7x7_3 = _tall(inner, 192)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(inputs, inner), _tall(inner, inner)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _wide(inner, inner), _tall(inner, inner)
        self.branch7x7dbl_5 = _wide(inner, 192)
        self.branch_pool = Conv(inputs, 192)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, 768, H, W]."""
        return torch.cat([
            self.branch1x1(x), _chain(self, x, 'branch7x7_1', 'branch7x7_2', 'branch7x7_3'),
            _chain(self, x, *(f'branch7x7dbl_{i}' for i in range(1, 6))), self.branch_pool(_mean(x)),
        ], dim=1)  # fmt: skip


class BlockD(nn.Module):
    """17x17 to 8x8."""

    def __init__(self, inputs):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(inputs, 192), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(inputs, 192), _wide(192, 192)
        self.branch7x7x3_3, self.branch7x7x3_4 = _tall(192, 192), Conv(192, 192, 3, 2)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, 512 + inputs, H/2, W/2]."""
        return torch.cat([
            _chain(self, x, 'branch3x3_1', 'branch3x3_2'),
            _chain(self, x, *(f'branch7x7x3_{i}' for i in range(1, 5))), max_pool2d(x, 3, 2),
        ], dim=1)  # fmt: skip


class BlockE(nn.Module):
    """8x8; pool: how the last branch summarises."""

    def __init__(self, inputs, pool):
        super().__init__()
        self.pool = pool
        self.branch1x1, self.branch3x3_1 = Conv(inputs, 320), Conv(inputs, 384)
        self.branch3x3_2a, self.branch3x3_2b = _wide(384, 384, 3), _tall(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _wide(384, 384, 3), _tall(384, 384, 3)
        self.branch_pool = Conv(inputs, 192)

    def forward(self, x):
        """[N, inputs, H, W] -> [N, 2048, H, W]."""
        once, twice = self.branch3x3_1(x), _chain(self, x, 'branch3x3dbl_1', 'branch3x3dbl_2')
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x)),
        ], dim=1)  # fmt: skip


class InceptionFeatures(nn.Module):
    """Pictures [N, 3, R, R] uint8 -> pool3 features [N, 2048]."""

    num_features = NUM_FEATURES

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (BlockC(768, n) for n in (128, 160, 160, 192))
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, _mean)
        self.Mixed_7c = BlockE(2048, lambda x: max_pool2d(x, 3, 1, 1))

    @without_tf32()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return features of pictures of any size, resized to 299 pixels as TensorFlow 1 does: without smoothing."""
        x = (resize_from_corner(pictures.float(), INPUT_SIDE) - 128) / 128
        x = max_pool2d(_chain(self, x, 'Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3'), 3, 2)
        x = max_pool2d(_chain(self, x, 'Conv2d_3b_1x1', 'Conv2d_4a_3x3'), 3, 2)
        blocks = [f'Mixed_{name}' for name in ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c')]
        return _chain(self, x, *blocks).mean(dim=(2, 3))


def resize_from_corner(x: torch.Tensor, side: int) -> torch.Tensor:
    """Return [N, C, H, W] as [N, C, side, side], bilinear, pixel i of the result at i·H/side of the input."""
    for dim in (2, 3):
        size = x.shape[dim]
        position = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = position.floor().long()
        share = (position - low).view([-1, 1] if dim == 2 else [-1])
        first, second = (x.index_select(dim, i) for i in (low, (low + 1).clamp(max=size - 1)))
        x = first + (second - first) * share
    return x
