# SPDX-License-Identifier: Apache-2.0
"""ResNet-50 (He et al. 2015) as the face networks contain it, and the reading of a part of a published checkpoint.

Parameter names and the stride in the 3x3 convolution are those of the published files.
"""

import pathlib
import pickle

import torch
from torch import nn
from torch.nn import functional

from dataset_preprocessing.ffhq.files import PreprocessError
from torch_utils.restricted_pickle import one_line

STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))  # Inner channels, blocks, stride of the first.
EXPANSION = 4
NUM_FEATURES = STAGES[-1][0] * EXPANSION
# What torch raises for files that are cut, of another kind, or name anything but tensors and plain data.
DAMAGE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError)
COUNTER = 'num_batches_tracked'  # Of batch norm, in training only: files may lack it.


class Bottleneck(nn.Module):
    """A block: 1x1, 3x3, 1x1 convolutions, added to the input or its projection."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [N, 4·channels, H / stride, W / stride] of [N, in_channels, H, W]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + shortcut)


class ResNet50(nn.Module):
    """The network up to the mean over pixels."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        in_channels = 64
        for number, (channels, blocks, stride) in enumerate(STAGES, start=1):
            stage = [Bottleneck(in_channels, channels, stride)]
            in_channels = EXPANSION * channels
            stage += [Bottleneck(in_channels, channels, 1) for _ in range(blocks - 1)]
            self.add_module(f'layer{number}', nn.Sequential(*stage))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [N, 2048] of RGB images [N, 3, H, W] in [0, 1]."""
        x = functional.relu(self.bn1(self.conv1(images)))
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for number in range(1, len(STAGES) + 1):
            x = self.get_submodule(f'layer{number}')(x)
        return x.mean(dim=(2, 3))


def load_part(network: nn.Module, path: pathlib.Path, part: str, kind: str) -> nn.Module:
    """Give a network the tensors of one part of a torch file, and return it in eval mode.

    Only tensors and plain data are read, never code; further parts and entries are ignored. Raises PreprocessError
    for a file that is missing, of another kind, or lacks a tensor of the network.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise PreprocessError(f'{path}: expected {kind}, found no file') from None
    except DAMAGE as error:
        reason = one_line(ValueError(str(error).split('\n')[0][:200]))
        raise PreprocessError(f'{path}: expected {kind}, found a file that cannot be read: {reason}') from error
    weights = content.get(part) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise PreprocessError(f'{path}: expected {kind} with the entry {part}, found none')
    own = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(COUNTER)}
    for name, tensor in own.items():
        found = weights.get(name)
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape or not found.is_floating_point():
            shape = list(found.shape) if isinstance(found, torch.Tensor) else 'none'
            raise PreprocessError(f'{path}: expected {kind} with {part}.{name} {list(tensor.shape)}, found {shape}')
        if not found.isfinite().all():
            raise PreprocessError(f'{path}: {part}.{name}: expected finite numbers, found others')
    network.load_state_dict({name: weights[name] for name in own}, strict=False)
    return network.eval().requires_grad_(False)
