# SPDX-License-Identifier: Apache-2.0
"""Perspective pictures of head meshes under camera labels: what a rendering-conditioned discriminator compares with."""

from typing import NamedTuple

import torch
from torch.nn import functional

from geometry.cameras import project_points
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT, vertex_normals
from torch_utils.custom_ops import check_shape
from torch_utils.ops.rasterize import rasterize
from training.config import LABEL_LENGTH

RENDER_COLOURS = ('normal', 'uv', 'waves')
WAVES = 16  # Periods of 'waves' over the UV square: a pupil's way is half of one, a face in 256 pixels shows all.
BACKGROUND = -1.0
NEAR = 0.01  # World units in front of the camera; faces that come nearer are not drawn.


class MeshView(NamedTuple):
    """What the pixels of N cameras see; where there is nothing, face is -1 and the rest 0.

    face: [N, R, R] int64. weights: [N, R, R, 3] of the face's corners on the surface, not on the screen; their sum is
    1. depth: [N, R, R], distance along the camera's axis in world units.
    """

    face: torch.Tensor
    weights: torch.Tensor
    depth: torch.Tensor


class MeshRenderer:
    """Draws meshes of one topology; no gradient flows.

    faces: [F, 3] int64, counter-clockwise seen from outside. face_uvcoords: [F, 3, 3] of (2u - 1, 1 - 2v, 1) per
    corner, on the same device. colour: 'normal', unit normals in the head's frame; 'uv', face_uvcoords; 'waves', sines
    of both UVs and the normal's z, in which eyeballs are seen to turn: their normals stay and their UVs hardly differ.
    resolution: side in pixels. scale, shift: mesh to world units.
    """

    def __init__(
        self,
        faces: torch.Tensor,
        face_uvcoords: torch.Tensor,
        colour: str = 'normal',
        resolution: int = 256,
        scale: float = WORLD_SCALE,
        shift: tuple[float, float, float] = WORLD_SHIFT,
    ):
        if colour not in RENDER_COLOURS:
            raise ValueError(f'colour: expected one of {RENDER_COLOURS}, got {colour!r}')
        check_shape('faces', faces, [None, 3])
        check_shape('face_uvcoords', face_uvcoords, [len(faces), 3, 3])
        # Rows of a picture grow downwards, where counter-clockwise corners have a negative area: the rasteriser would
        # draw the inside of the head.
        self.faces, self.face_uvcoords = (x[:, [0, 2, 1]].contiguous() for x in (faces, face_uvcoords))
        self.colour, self.resolution, self.scale = colour, resolution, scale
        self.shift = torch.tensor(shift, device=faces.device)  # Once: a copy from the host would end a graph's capture.

    @torch.no_grad()
    def __call__(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Return pictures [N, 3, R, R] in [-1, 1], -1 where there is no mesh.

        v: [N, V, 3] in mesh units; landmarks after the vertices are not looked at. c: labels [N, 25 or more].
        """
        view = self.look(v, c)
        if self.colour == 'uv':
            return _with_background(view, _mix(view, self.face_uvcoords[view.face.clamp(min=0)]))
        normals = functional.normalize(self._mix_vertices(view, self.normals(v)), dim=-1)
        if self.colour == 'normal':
            return _with_background(view, normals)
        waves = (torch.pi * WAVES * _mix(view, self.face_uvcoords[view.face.clamp(min=0)])[..., :2]).sin()
        return _with_background(view, torch.cat([waves, normals[..., 2:]], dim=-1))

    @torch.no_grad()
    def look(self, v: torch.Tensor, c: torch.Tensor) -> MeshView:
        """Return what the cameras of labels c [N, 25 or more] see of meshes v [N, V or V + 68, 3]."""
        check_shape('v', v, [None, None, 3])
        if c.ndim != 2 or len(c) != len(v) or c.shape[1] < LABEL_LENGTH:
            raise ValueError(f'c: expected [{len(v)}, {LABEL_LENGTH} or more], got {list(c.shape)}')
        screen = project(v * self.scale + self.shift.to(v.dtype), c)
        result = rasterize(screen, self.faces, self.resolution)
        # On the screen b/Z and 1/Z are linear, not b: z' of `project` is -1/Z.
        is_seen = result.face >= 0
        inverse = self._at_corners(result.face, -screen[..., 2:]).squeeze(-1)
        weights = result.barycentric * torch.where(is_seen[..., None], inverse, 0)
        total = torch.where(is_seen, weights.sum(dim=-1), 1)
        return MeshView(result.face, weights / total[..., None], result.barycentric.sum(dim=-1) / total)

    @torch.no_grad()
    def paint(self, view: MeshView, values: torch.Tensor) -> torch.Tensor:
        """Return values of vertices [N, V or more, C] as pictures [N, C, R, R], -1 where there is no mesh."""
        return _with_background(view, self._mix_vertices(view, values))

    @torch.no_grad()
    def normals(self, v: torch.Tensor) -> torch.Tensor:
        """Return outward unit normals [N, V, 3] of meshes [N, V, 3]: means over a vertex's faces, weighted by area."""
        return -vertex_normals(v, self.faces)  # Two corners of these faces are swapped.

    def _mix_vertices(self, view, values):
        return _mix(view, self._at_corners(view.face, values))

    def _at_corners(self, face, values):
        """Return values [N, V, C] of vertices at the corners of each pixel's face [N, H, W, 3, C]; face 0 for -1."""
        sample = torch.arange(len(face), device=face.device)[:, None, None, None]
        return values[sample, self.faces[face.clamp(min=0)]]


def project(world: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return screen coordinates [N, M, 3] of world points [N, M, 3] under labels c [N, 25 or more].

    x right, y down, [-1, 1] over the picture; the third is -1/Z, which grows with the depth Z and is linear on the
    screen where Z is not. Points less than NEAR in front of the camera become infinite: no face with them is drawn.
    """
    places, z = project_points(world, c)
    screen = torch.cat([places, -1 / z[..., None]], dim=-1)
    return torch.where((z > NEAR)[..., None], screen, torch.inf)


def _mix(view, corners):
    """Return the weighted means [N, H, W, C] of values at the corners of each pixel's face [N, H, W, 3, C]."""
    return (corners * view.weights[..., None]).sum(dim=-2)


def _with_background(view, picture):
    return torch.where(view.face[..., None] >= 0, picture, BACKGROUND).permute(0, 3, 1, 2).contiguous()
