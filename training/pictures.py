# SPDX-License-Identifier: Apache-2.0
"""The sheets of pictures that a run writes: reals, fakes, raw renderings, depth, and the driving mesh over them."""

import os
import pathlib

import numpy as np
import torch
from PIL import Image

from dnnlib.util import atomic_path
from training.dataset import HeadDataset
from training.generator import Next3DGenerator
from training.mesh_render import MeshRenderer

SHEET_PIXELS = 4096, 2304  # A sheet is about so wide and high.
LARGEST_SHEET = 8, 4  # Columns and rows.
MESH_OPACITY = 0.5


class SheetMaker:
    """Draws the same people, meshes and cameras every time: items spread evenly over the data set.

    data: gives the items. seed: of the latents. batch: pictures drawn at a time.
    """

    def __init__(self, data: HeadDataset, z_dim: int, seed: int, batch: int, device: torch.device):
        self.columns, self.rows = (
            min(max(side // data.resolution, 1), most) for side, most in zip(SHEET_PIXELS, LARGEST_SHEET)
        )
        count = self.columns * self.rows
        self.indices = [i * len(data) // count for i in range(count)]
        labels, meshes = zip(*(data.camera_and_mesh(i) for i in self.indices))
        self.c = torch.from_numpy(np.stack(labels)).to(device)
        self.v = torch.from_numpy(np.stack(meshes)).to(device)
        draws = np.random.RandomState(seed).randn(count, z_dim)
        self.z = torch.from_numpy(draws).float().to(device)
        self.data, self.batch = data, batch

    def reals(self) -> np.ndarray:
        """Return the sheet of the items' pictures [H, W, 3] uint8."""
        images = np.stack([self.data[i].image for i in self.indices])
        return self._arrange(images.transpose(0, 2, 3, 1))

    @torch.no_grad()
    def fakes(self, generator: Next3DGenerator, rendering_resolution: int) -> dict[str, np.ndarray]:
        """Return sheets by the ending of their names: '' (pictures), '_raw', '_depth' (near is white), '_mesh'."""
        renderer = MeshRenderer(generator.faces[0], generator.face_uvcoords[0], 'normal', generator.img_resolution)
        parts = {'': [], '_raw': [], '_depth': [], '_mesh': []}
        for z, c, v in zip(*(x.split(self.batch) for x in (self.z, self.c, self.v))):
            ws = generator.mapping(z, c)
            out = generator.synthesis(ws, c, v, 'const', rendering_resolution)
            parts[''].append(out['image'])
            parts['_raw'].append(out['image_raw'])
            parts['_depth'].append(-out['image_depth'])
            parts['_mesh'].append(overlay(out['image'], renderer(v, c)))
        images = {name: torch.cat(part) for name, part in parts.items()}
        images['_depth'] = _stretch(images['_depth'])
        return {name: self._arrange(to_uint8(image)) for name, image in images.items()}

    def _arrange(self, images):
        """[N, H, W, C] -> [rows·H, columns·W, C]."""
        _, h, w, c = images.shape
        grid = images.reshape(self.rows, self.columns, h, w, c).transpose(0, 2, 1, 3, 4)
        return grid.reshape(self.rows * h, self.columns * w, c)


def save_sheet(path: str | os.PathLike, sheet: np.ndarray) -> None:
    """Write a sheet [H, W, 1 or 3] uint8 as PNG, whole or not at all."""
    with atomic_path(pathlib.Path(path)) as temporary:
        Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet).save(temporary, format='PNG')


def overlay(image: torch.Tensor, rendering: torch.Tensor) -> torch.Tensor:
    """Lay a rendering over pictures [N, 3, R, R], half transparent; -1 in all channels is its background."""
    is_mesh = (rendering > -1).any(dim=1, keepdim=True)
    return torch.where(is_mesh, image + (rendering - image) * MESH_OPACITY, image)


def _stretch(x):
    low, high = x.min(), x.max()
    return (x - low) / (high - low).clamp(min=1e-6) * 2 - 1


def to_bytes(image: torch.Tensor) -> torch.Tensor:
    """Return pictures [..., C, H, W] in [-1, 1] as bytes [..., H, W, C], rounded down as published; on their device."""
    return (image * 127.5 + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Return `to_bytes` as an array."""
    return to_bytes(image).cpu().numpy()
