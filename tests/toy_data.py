# SPDX-License-Identifier: Apache-2.0
"""A small data set of shaded heads in the published layout: pictures whose cameras and meshes are exactly right."""

import functools
import json
import multiprocessing
import pathlib

import numpy as np
import torch
from PIL import Image
from simple_head import (
    EYE_WIDTH,
    EYE_X,
    EYE_Y,
    HALF_COLUMNS,
    LOWER_LIP_ROW,
    MOUTH_X,
    MOUTH_Y,
    UPPER_LIP_ROW,
    SimpleHead,
    simple_head,
)
from torch.nn.functional import avg_pool2d

from geometry import cameras
from training.mesh_render import MeshRenderer

YAW_STD, PITCH_STD = 0.3, 0.155  # Radians, as in FFHQ.
PIVOT, RADIUS = (0.0, 0.0, 0.2), 2.7
SUPERSAMPLING = 2
SMALLEST_SHAPE, LARGEST_SHAPE = 0.88, 1.12  # Factors of width, chin and nose.
LIGHT = (0.45, 0.45, 0.77)  # Where the light comes from: the viewer's upper right, fixed to the head.
AMBIENT = 0.35  # Share of the light that comes from everywhere.
DARKEST_SKIN, LIGHTEST_SKIN = (0.42, 0.27, 0.18), (0.98, 0.80, 0.68)
DARKEST_HAIR, LIGHTEST_HAIR = (0.06, 0.04, 0.03), (0.75, 0.58, 0.30)
WHITE, IRIS, LIP_TINT, THROAT = (0.93, 0.93, 0.95), (0.10, 0.09, 0.12), (0.80, 0.50, 0.52), (0.20, 0.05, 0.05)
LIP_HEIGHT, IRIS_RADIUS, EYE_HEIGHT = 0.0130, 0.0055, 0.0055


def make_toy_data(root: pathlib.Path, count: int, resolution: int = 128, seed: int = 0, workers: int = 1) -> None:
    """Write `count` items of random shape, expression, colours and camera into images, meshes and lms folders of root.

    Item i depends on seed and i alone. The meshes' topology is that of `simple_head`.
    """
    size = f'{resolution}x{resolution}'
    folders = {kind: pathlib.Path(root) / f'{kind}{size}' / '00000' for kind in ('images', 'meshes', 'lms')}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    write = functools.partial(_write_item, folders, resolution, seed)
    if workers == 1:
        labels = [write(i) for i in range(count)]
    else:
        with multiprocessing.get_context('spawn').Pool(workers, torch.set_num_threads, [1]) as pool:
            labels = pool.map(write, range(count), chunksize=8)
    (folders['images'].parent / 'dataset.json').write_text(json.dumps({'labels': labels}))


def _write_item(folders, resolution, seed, i):
    """Write the files of item i and return its entry of dataset.json."""
    rng = np.random.default_rng([seed, i])
    head, label = random_head(rng), random_label(rng)
    stem = f'img{i:08d}'
    Image.fromarray(draw(rng, head, label, resolution)).save(folders['images'] / f'{stem}.png')
    (folders['meshes'] / f'{stem}.obj').write_text(obj_text(head), encoding='ascii')
    np.savetxt(folders['lms'] / f'{stem}.txt', head.landmarks, fmt='%.8f')
    return [f'00000/{stem}.png', label[0].tolist()]


def random_head(rng: np.random.Generator) -> SimpleHead:
    """Return a head of random shape and expression; half of the mouths are closed."""
    width, chin, nose = rng.uniform(SMALLEST_SHAPE, LARGEST_SHAPE, 3)
    jaw_open, smile = rng.uniform(0, 1, 2) * (rng.uniform(size=2) < 0.5)
    return simple_head(jaw_open=jaw_open, smile=smile, width=width, chin=chin, nose=nose)


def random_label(rng: np.random.Generator) -> torch.Tensor:
    """Return a label [1, 25] of a camera about the front."""
    yaw, pitch = rng.standard_normal(2) * (YAW_STD, PITCH_STD)
    pose = cameras.look_at_pose(cameras.FRONTAL + yaw, torch.tensor(cameras.FRONTAL + pitch), PIVOT, RADIUS)
    return cameras.make_label(pose, cameras.intrinsics())


def draw(rng: np.random.Generator, head: SimpleHead, label: torch.Tensor, resolution: int) -> np.ndarray:
    """Return a picture [R, R, 3] uint8 of a head in random colours before a plain background."""
    renderer = _renderer(resolution * SUPERSAMPLING)
    v = torch.from_numpy(head.vertices)[None]
    view = renderer.look(v, label)
    colours = renderer.paint(view, torch.from_numpy(_vertex_colours(rng)).float()[None])
    normals = renderer(v, label)
    light = torch.tensor(LIGHT)[:, None, None]
    shade = AMBIENT + (1 - AMBIENT) * (normals * light).sum(dim=1, keepdim=True).clamp(min=0)
    background = torch.from_numpy(rng.uniform(0.2, 0.9, 3)).float()[:, None, None]
    picture = torch.where(view.face[:, None] >= 0, colours * shade, background)
    picture = avg_pool2d(picture, SUPERSAMPLING)[0].permute(1, 2, 0)
    return (picture * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def obj_text(head: SimpleHead) -> str:
    """Return vertices, UVs and faces as the text of an OBJ file with six decimals."""
    line = 'v %.6f %.6f %.6f\n'
    return line * len(head.vertices) % tuple(head.vertices.ravel().tolist()) + _constant_lines()


@functools.cache
def _constant_lines():
    """Return UV and face lines, which all heads share."""
    head = simple_head()
    uvs = 'vt %.6f %.6f\n' * len(head.uvs) % tuple(head.uvs.ravel().tolist())
    corners = np.stack([head.faces, head.uv_faces], axis=-1) + 1
    return uvs + 'f %d/%d %d/%d %d/%d\n' * len(corners) % tuple(corners.ravel().tolist())


@functools.cache
def _renderer(resolution):
    head = simple_head()
    uvs = torch.from_numpy(head.uvs[head.uv_faces]) * torch.tensor([2.0, -2.0]) + torch.tensor([-1.0, 1.0])
    return MeshRenderer(
        torch.tensor(head.faces).long(),
        torch.cat([uvs, torch.ones_like(uvs[..., :1])], dim=-1),
        resolution=resolution,
    )


def _vertex_colours(rng):
    """Return colours [V, 3] in [0, 1]: random skin and hair, lips, eyes, brows."""
    tone, fairness, tint = rng.uniform(size=3)
    skin = _between(DARKEST_SKIN, LIGHTEST_SKIN, tone) * (1 + 0.06 * (tint - 0.5) * np.array([1, 0, -1]))
    hair = _between(DARKEST_HAIR, LIGHTEST_HAIR, fairness)
    colours = np.broadcast_to(skin, (len(simple_head().vertices), 3)).copy()
    painted = {'lips': skin * LIP_TINT, 'throat': THROAT, 'white': WHITE, 'iris': IRIS, 'brows': hair, 'hair': hair}
    for name, colour in painted.items():
        colours[_regions()[name]] = colour
    return colours


def _between(low, high, share):
    return np.array(low) + share * (np.array(high) - np.array(low))


@functools.cache
def _regions():
    """Return which vertices [V] of the neutral head belong to what has a colour of its own."""
    x, y, z = simple_head().vertices.T
    row = 1 + (np.arange(len(x)) - 1) // (2 * HALF_COLUMNS)
    across, up = abs(x) - EYE_X, y - EYE_Y
    is_front = z > 0
    lips = is_front & (np.hypot(x / MOUTH_X, (y - MOUTH_Y) / LIP_HEIGHT) < 1)
    return {
        'lips': lips,
        'throat': lips & (row > UPPER_LIP_ROW) & (row < LOWER_LIP_ROW),
        'white': is_front & (np.hypot(across / EYE_WIDTH, up / EYE_HEIGHT) < 1),
        'iris': is_front & (np.hypot(across, up) < IRIS_RADIUS),
        'brows': is_front & (abs(across) < 1.2 * EYE_WIDTH) & (abs(y - 0.0425) < 0.0045),
        'hair': y > np.interp(z, [-0.10, -0.06, 0.0, 0.03], [-0.09, 0.045, 0.06, 0.078]),
    }
