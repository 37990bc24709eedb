# SPDX-License-Identifier: Apache-2.0
"""From styles, meshes and cameras to a stream of pictures: what stays from frame to frame is computed once.

The pipeline of videos and reenactment: frames are read ahead in a thread, drawn in batches, and copied to the host
while the next ones are drawn.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.interpolate import CubicSpline

from geometry.cameras import camera_rays, split_label
from training.generator import EG3DGenerator, Next3DGenerator, Planes
from training.head_raster import ViewCoverage
from training.inference import CapturedCall, Synthesizer, repeatable, to_host
from training.mesh_render import MeshRenderer
from training.pictures import overlay, to_bytes

IMAGE_MODES = ('image', 'image_raw', 'image_depth')
MAPPING_BATCH = 64
FRAMES_AHEAD = 8
PORTRAIT_MODES = (*IMAGE_MODES, 'normals', 'mesh')
FLAT_DENSITY = 0.1  # Difference of densities over two texels below which there is no surface to speak of.

T = TypeVar('T')


class Frame(NamedTuple):
    """What changes with time: label c [1, 25], styles ws [N, num_ws, w_dim], mesh v [1, V + 68, 3]; None: as before."""

    c: torch.Tensor
    ws: torch.Tensor | None = None
    v: torch.Tensor | None = None


class Film:
    """N people under one mesh and one camera, drawn frame by frame.

    ws [N, num_ws, w_dim], v [1, V + 68, 3]: what all frames share; None: each frame brings its own. Shared ws: texture
    and static planes are painted once. A shared mesh is rasterised once. With both, frames only render planes.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        ws: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        resolution: int | None = None,
        image_mode: str = 'image',
    ):
        if image_mode not in IMAGE_MODES:
            raise ValueError(f'image_mode: expected one of {", ".join(IMAGE_MODES)}, got {image_mode!r}')
        self._synthesizer, self._image_mode, self._calls = synthesizer, image_mode, {}
        self._resolution = synthesizer._resolution(resolution)
        self._identity = self._planes = self._coverage = self._v = None
        self._moving = tuple(name for name, shared in (('ws', ws), ('v', v)) if shared is None)
        with torch.no_grad(), repeatable():
            if v is not None:
                self._v = v.to(synthesizer.device)
                self._coverage = synthesizer.generator.cover(self._v)
            if ws is not None:
                generator = synthesizer.generator
                generator._check_ws(ws, None)
                styles = synthesizer._bank.styles(ws.to(synthesizer.device))
                self._identity = synthesizer._identity(generator.fold(styles))
            if not self._moving:
                self._planes = self._blend(self._identity, self._v)
                self._coverage = self._v = None

    @torch.no_grad()
    def draw(self, frame: Frame, count: int) -> torch.Tensor:
        """Return pictures [count, R, R, 3] uint8 on the device; on a GPU the next call overwrites them.

        The frame has to bring what frames do not share, ValueError otherwise. count: N.
        """
        inputs = [frame.c.expand(count, -1), *(getattr(frame, name) for name in self._moving)]
        if any(x is None for x in inputs):
            raise ValueError(f'frame: expected {" and ".join(self._moving)}, which frames do not share, got None')
        device = self._synthesizer.device
        call = self._calls.get(count) or CapturedCall(self._draw, *(x.to(device) for x in inputs))
        out = call(*inputs)['picture']
        self._calls[count] = call  # Now that it has worked once.
        return out

    def _draw(self, c, *moving):
        given = dict(zip(self._moving, moving, strict=True))
        synthesizer = self._synthesizer
        identity = self._identity
        if 'ws' in given:
            identity = synthesizer._identity(synthesizer._bank.styles(given['ws']))
        planes = self._planes or self._blend(identity, given.get('v', self._v))
        out = synthesizer._render(planes, identity, c, self._resolution)
        return {'picture': as_picture(out[self._image_mode], self._image_mode)}

    def _blend(self, identity, v):
        """Blend all people's planes with one mesh, which is rasterised once for all of them."""
        coverage = self._synthesizer.generator.cover(v) if self._coverage is None else self._coverage
        count = len(identity.texture)
        shared = ViewCoverage(*(x.expand(count, *x.shape[1:]).contiguous() for x in coverage))
        return self._synthesizer._blend(identity, v.expand(count, -1, -1), shared)


class Portrait:
    """One person in a live view: what a picture has in common with the one before is not computed again.

    Portraits may share a synthesizer as long as one draws at a time: what each keeps is its own.
    """

    def __init__(self, synthesizer: Synthesizer):
        self._synthesizer = synthesizer
        self._ws = self._v = self._identity = self._planes = self._renderer = None

    def forget(self) -> None:
        """Compute everything anew for the next picture."""
        self._ws = self._v = self._identity = self._planes = None

    @torch.no_grad()
    def planes(self, ws: torch.Tensor, v: torch.Tensor) -> Planes:
        """Return the blended planes of styles ws [1, num_ws, w_dim] and a mesh v [1, V + 68, 3]."""
        synthesizer = self._synthesizer
        ws, v = ws.to(synthesizer.device), v.to(synthesizer.device)
        is_same = self._ws is not None and torch.equal(ws, self._ws)
        if is_same and torch.equal(v, self._v):
            return self._planes
        with repeatable():
            if not is_same:
                styles = synthesizer._bank.styles(ws)
                self._identity = synthesizer._identity(synthesizer.generator.fold(styles))
            self._planes = synthesizer._blend(self._identity, v)
        self._ws, self._v = ws.clone(), v.clone()
        return self._planes

    @torch.no_grad()
    def draw(self, ws, v, c: torch.Tensor, resolution: int | None = None, mode: str = 'image') -> torch.Tensor:
        """Return a picture [1, R, R, 3] uint8, on the device, from the camera of a label c [1, 25].

        resolution: side of the rendered picture r; None: the checkpoint's. mode: one of PORTRAIT_MODES: 'normals' are
        those of the density, of r x r pixels like 'image_raw' and 'image_depth'; 'mesh' lays the mesh over 'image'.
        """
        if mode not in PORTRAIT_MODES:
            raise ValueError(f'mode: expected one of {", ".join(PORTRAIT_MODES)}, got {mode!r}')
        synthesizer, planes = self._synthesizer, self.planes(ws, v)
        c, resolution = c.to(synthesizer.device), synthesizer._resolution(resolution)
        if mode in ('image', 'mesh'):
            image = synthesizer._render(planes, self._identity, c, resolution)['image']
            if mode == 'mesh':
                image = overlay(image.clamp(-1, 1), self._mesh_renderer()(self._v, c))
            return to_bytes(image)
        generator = synthesizer.generator
        features, depth = generator.volume(planes, c, resolution, 'center')
        if mode == 'normals':
            return to_bytes(surface_normals(generator, planes, c, depth))
        return as_picture(features[:, :3] if mode == 'image_raw' else depth, mode)

    def _mesh_renderer(self):
        if self._renderer is None:
            generator = self._synthesizer.generator
            topology = generator.faces[0], generator.face_uvcoords[0]
            self._renderer = MeshRenderer(*topology, 'normal', generator.img_resolution)
        return self._renderer


class Wall:
    """A grid's people, drawn in batches of one row; arguments as those of `Film`, ws of all people or None."""

    def __init__(self, synthesizer: Synthesizer, count: int, columns: int, ws=None, v=None, **options):
        starts = range(0, count, columns)
        self._rows = [slice(start, min(start + columns, count)) for start in starts]
        if ws is None:  # Films of moving people differ in nothing: one serves all rows.
            self._films = [Film(synthesizer, None, v, **options)] * len(self._rows)
        else:
            self._films = [Film(synthesizer, ws[row], v, **options) for row in self._rows]

    def draw(self, frame: Frame) -> torch.Tensor:
        """Return pictures [N, R, R, 3] uint8 on the device."""
        drawn = []
        for film, row in zip(self._films, self._rows, strict=True):
            part = frame if frame.ws is None else frame._replace(ws=frame.ws[row])
            pictures = film.draw(part, row.stop - row.start)
            drawn.append(pictures.clone() if len(self._rows) > 1 else pictures)  # The next row may overwrite it.
        return torch.cat(drawn)


def stream(
    wall: Wall, frames: Iterable[Frame], first: Callable[[Frame], torch.Tensor] | None = None
) -> Iterator[np.ndarray]:
    """Yield pictures [N, R, R, 3] uint8 of frames in order; reading, drawing and what the caller does overlap.

    first: draws a picture [1, R, R, 3] of a frame on the device, which comes before the others.
    """

    def draw(frame):
        pictures = wall.draw(frame)
        return pictures if first is None else torch.cat([first(frame), pictures])

    yield from to_host(draw(frame) for frame in read_ahead(frames))


def as_picture(image: torch.Tensor, image_mode: str) -> torch.Tensor:
    """Return an output [N, C, R, R] of the network as bytes [N, R, R, 3]; of depths, near is white, per picture."""
    if image_mode == 'image_depth':
        low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
        image = ((high - image) / (high - low).clamp(min=1e-6) * 2 - 1).expand(-1, 3, -1, -1)
    return to_bytes(image)


def surface_normals(generator: EG3DGenerator, planes: Planes, c: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    """Return outward unit normals [N, 3, r, r] in the world's frame where rays of labels c [N, 25] see the surface.

    depth: image_depth [N, 1, r, r] of the same cameras. Normals are those of the density (central differences over two
    texels of the planes); shorter than 1, down to 0, where the density hardly changes, as in empty space.
    """
    count, resolution, config = len(depth), depth.shape[-1], generator.config
    origins, directions = camera_rays(*split_label(c.float()), resolution)
    points = origins + directions * depth.flatten(2).transpose(1, 2)
    step = config.sampling.box_warp / config.plane_resolution
    offsets = step * torch.eye(3, device=points.device)
    around = points[:, None] + torch.cat([offsets, -offsets])[:, None]
    sigma = generator.query(planes, around.flatten(1, 2), with_rgb=False)['sigma']
    density = torch.nn.functional.softplus(sigma - 1).view(count, 2, 3, resolution, resolution)
    outwards = density[:, 1] - density[:, 0]
    return outwards / outwards.norm(dim=1, keepdim=True).clamp(min=FLAT_DENSITY)


def tile(pictures: list[np.ndarray] | np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Lay pictures [h, w, 3] out row by row as one [rows·h, columns·w, 3]; cells without one are black."""
    height, width = pictures[0].shape[:2]
    sheet = np.zeros([rows * height, columns * width, 3], dtype=np.uint8)
    for number, picture in enumerate(pictures):
        y, x = number // columns * height, number % columns * width
        sheet[y : y + height, x : x + width] = picture
    return sheet


def read_ahead(items: Iterable[T], count: int = FRAMES_AHEAD) -> Iterator[T]:
    """Yield items that a thread takes from their source beforehand, at most `count`; its errors arrive, too."""
    waiting, is_over = queue.Queue(count), threading.Event()

    def put(entry):
        while not is_over.is_set():
            try:
                waiting.put(entry, timeout=0.1)  # Looks up now and then whether anybody still wants it.
                return
            except queue.Full:
                continue

    def work():
        try:
            for item in items:
                put((item, None))
                if is_over.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # Raised again where the items are used.
            put((None, error))

    thread = threading.Thread(target=work, name='frames', daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        is_over.set()
        thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# Styles


@torch.no_grad()
def styles_of_seeds(generator: EG3DGenerator, seeds, label: torch.Tensor, psi: float, cutoff: int | None):
    """Return ws [N, num_ws, w_dim] of seeds under one label [1, 25]; cutoff None: all but the texture's."""
    device = label.device
    draws = np.concatenate([np.random.RandomState(seed).randn(1, generator.z_dim) for seed in seeds])
    cutoff = generator.num_style_ws if cutoff is None else cutoff
    parts = torch.from_numpy(draws).float().to(device).split(MAPPING_BATCH)
    return torch.cat([generator.mapping(z, label.expand(len(z), -1), psi, cutoff) for z in parts])


class Loop:
    """A closed smooth curve through keyframes [K, ...]: at time 0 and K the first, cubic between them.

    Deviation: the published curve is a cubic over five copies of the keyframes, nearly periodic; this one is periodic.
    """

    def __init__(self, keyframes: torch.Tensor):
        self._keys = keyframes.cpu().double().numpy()
        closed = np.concatenate([self._keys, self._keys[:1]])
        self.is_constant = bool((self._keys == self._keys[:1]).all())
        self._spline = None if self.is_constant else CubicSpline(np.arange(len(closed)), closed, bc_type='periodic')

    def at(self, time: float) -> torch.Tensor:
        """Return the point [...] at a time in keyframes, float32."""
        point = self._keys[0] if self.is_constant else self._spline(time)
        return torch.from_numpy(point.astype(np.float32))


def with_sampling(generator: Next3DGenerator, multiple: float) -> Next3DGenerator:
    """Multiply the numbers of depth samples along a ray, in place."""
    sampling = generator.config.sampling
    counts = {name: max(1, round(getattr(sampling, name) * multiple)) for name in ('num_depths', 'num_importance')}
    generator.config = dataclasses.replace(generator.config, sampling=dataclasses.replace(sampling, **counts))
    return generator
