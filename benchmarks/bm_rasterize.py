# SPDX-License-Identifier: Apache-2.0
"""Time to rasterise four views of the tests' simple head and to fill its mouth: every implementation of the device."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from bench import SIMPLE_HEAD, Benchmark  # noqa: E402  (needs the path above)

from geometry.meshes import read_obj  # noqa: E402
from torch_utils.ops.fill_holes import fill_holes  # noqa: E402
from torch_utils.ops.rasterize import rasterize  # noqa: E402
from training.config import Next3DConfig  # noqa: E402
from training.head_raster import VIEWS, Topology, cover_views, project  # noqa: E402
from training.topology import load_topology  # noqa: E402

RESOLUTION = 256
BATCHES = (1, 4)
IMPLS = {'cpu': ('ref', 'cpp'), 'cuda': ('ref', 'cuda')}


def load_views(batch: int, device: str) -> torch.Tensor:
    """Return the screen positions [batch, 4, V, 3] of the simple head, turned a bit in each item of the batch."""
    vertices = torch.as_tensor(read_obj(SIMPLE_HEAD / 'demo.obj').vertices, dtype=torch.float32, device=device)
    turned = torch.stack([vertices + 0.02 * i * vertices.roll(1, dims=1) for i in range(batch)])
    config = Next3DConfig()
    return torch.stack([project(turned, view, config.orth_scale, config.orth_shift) for view in VIEWS['next3d']], dim=1)


def load_simple_topology(device: str) -> Topology:
    """Return the topology of the simple head, with its mask at the resolution of the texture."""
    mesh = load_topology(SIMPLE_HEAD / 'head_template.obj', RESOLUTION)
    uvs = torch.as_tensor(mesh.uvs, dtype=torch.float32)
    corners = torch.stack([2 * uvs[:, 0] - 1, 1 - 2 * uvs[:, 1], torch.ones(len(uvs))], dim=1)
    faces, uv_faces = (torch.as_tensor(part, dtype=torch.int64) for part in (mesh.faces, mesh.uv_faces))
    return Topology(*(part.to(device) for part in (faces, corners[uv_faces], mesh.uv_face_mask)))


def main():
    """Measure both ops alone, and with what lies between them, at each batch size."""
    bench = Benchmark(__doc__)
    device = bench.parse().device
    topology = load_simple_topology(device)
    for batch in BATCHES:
        screen = load_views(batch, device)
        positions, faces = screen.flatten(0, 1).contiguous(), topology.faces
        visible = (rasterize(positions, faces, RESOLUTION).face >= 0)[:, None].float()
        facts = {'views': len(positions), 'faces': len(faces), 'resolution': RESOLUTION}
        for impl in IMPLS[device]:
            name = f'{impl}/batch{batch}'
            bench.measure(f'rasterize/{name}', lambda: rasterize(positions, faces, RESOLUTION, impl), **facts)
            bench.measure(f'fill_holes/{name}', lambda: fill_holes(visible, impl), **facts)
            bench.measure(f'cover_views/{name}', lambda: cover_views(screen, topology, RESOLUTION, impl), **facts)
    bench.finish()


if __name__ == '__main__':
    main()
