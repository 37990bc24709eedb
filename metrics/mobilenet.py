# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 (Sandler et al. 2018) up to its mean-pooled features, with the parameter names of torchvision's file."""

import torch
from torch import nn
from torch.nn.functional import interpolate

from torch_utils.tf32 import without_tf32

NUM_FEATURES, INPUT_SIDE = 1280, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Of ImageNet, as the weights were trained with.
# Table 2 of the paper: expansion, channels, blocks, stride of the first.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
FIRST = 32


def _conv(inputs, outputs, size=1, stride=1, groups=1):
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow without activation; added to the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        widen = [_conv(inputs, hidden)] if expansion > 1 else []
        narrow = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*widen, _conv(hidden, hidden, 3, stride, hidden), *narrow)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H/stride, W/stride]."""
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetFeatures(nn.Module):
    """Pictures [N, 3, R, R] uint8 -> features [N, 1280]."""

    num_features = NUM_FEATURES

    def __init__(self):
        super().__init__()
        layers, channels = [_conv(3, FIRST, 3, 2)], FIRST
        for expansion, outputs, blocks, stride in STAGES:
            for number in range(blocks):
                layers.append(InvertedResidual(channels, outputs, stride if number == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, _conv(channels, NUM_FEATURES))
        self.register_buffer('mean', torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer('std', torch.tensor(STD)[:, None, None], persistent=False)

    @without_tf32()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return features of pictures of any size, resized to 224 pixels with smoothing."""
        x = interpolate(pictures.float() / 255, size=INPUT_SIDE, mode='bilinear', antialias=True)
        return self.features((x - self.mean) / self.std).mean(dim=(2, 3))
