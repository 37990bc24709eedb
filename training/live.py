# SPDX-License-Identifier: Apache-2.0
"""What is behind a live view: who is shown how, what is drawn when, and a clip's clock. docs/viewer.md."""

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable

import numpy as np
import torch

from geometry import orbit, paths
from geometry.head_model import EmbeddedHead, load_embedded_head
from training import avatar
from training.driving import Clip, Retargeted
from training.generator import Next3DGenerator
from training.inference import Synthesizer

SETTLED_SECONDS = 0.3  # After so long without a change a picture is drawn in full.
PATIENCE_SECONDS = 1.0
MIXED_PARTS = ('all', 'planes', 'texture')


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What one viewer wants to see.

    second: the seed whose styles take over from style `crossover` on, in `parts` (one of MIXED_PARTS); None: none.
    weights: expression weights by name, the rest 0. frame: of the clip; None: the avatar's own mesh. keeps_shape: move
    the own mesh by the clip's coefficients instead. camera: position, point looked at and up of the page.
    """

    seed: int = 0
    psi: float = 0.7
    second: int | None = None
    crossover: int = 0
    parts: str = 'all'
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    frame: int | None = None
    keeps_shape: bool = False
    mode: str = 'image'
    camera: tuple = ()


class Studio:
    """A network and what its viewers share; nothing of it changes but under `lock`.

    mesh: the avatar's own mesh [V + 68, 3]; None: the mean of the embedded head. resolution, coarse: sides of the
    rendered picture in full and while something moves; None: the checkpoint's. cutoff: of truncation, None: all but
    the texture's.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        mesh: np.ndarray | None = None,
        clip: Clip | None = None,
        cutoff: int | None = None,
        resolution: int | None = None,
        coarse: int | None = None,
    ):
        self.synthesizer, self.clip, self.lock = synthesizer, clip, threading.Lock()
        generator, config = synthesizer.generator, synthesizer.generator.config
        self.pivot, self.radius = config.avg_camera_pivot, config.avg_camera_radius
        self.head = embedded_head_of(generator)
        self.mesh = self._mean_mesh() if mesh is None else np.asarray(mesh, dtype=np.float32)
        has_coefficients = getattr(clip, 'coefficients', None) is not None
        self.retargeted = Retargeted(clip, self.mesh) if has_coefficients else None
        self.resolution = synthesizer._resolution(resolution)
        self.coarse = min(self.resolution, self.resolution if coarse is None else coarse)
        self._cutoff = cutoff
        self._frontal = paths.path_labels(paths.fixed_path(1), self.pivot, self.radius).to(synthesizer.device)

    @property
    def expression_names(self) -> tuple[str, ...]:
        """Names of the expressions that can be set: those of the embedded head, or none."""
        return () if self.head is None else self.head.expression_names

    @property
    def num_layers(self) -> int:
        """How many styles there are to mix: of the planes or of the texture, whichever has more."""
        generator = self.synthesizer.generator
        return max(generator.num_style_ws, generator.num_ws - generator.num_style_ws)

    def styles(self, view: View) -> torch.Tensor:
        """Return ws [1, num_ws, w_dim] of a view's seeds."""
        seeds = [view.seed] if view.second is None else [view.seed, view.second]
        ws = avatar.styles_of_seeds(self.synthesizer.generator, seeds, self._frontal, view.psi, self._cutoff)
        if view.second is None:
            return ws
        return mix_styles(ws[:1], ws[1:], view.crossover, view.parts, self.synthesizer.generator.num_style_ws)

    @torch.no_grad()
    def mesh_of(self, view: View) -> torch.Tensor:
        """Return the mesh [1, V + 68, 3] of a view: of its frame or the avatar's own, moved by its expression."""
        clip = self.retargeted if view.keeps_shape and self.retargeted is not None else self.clip
        mesh = self.mesh if view.frame is None or clip is None else clip.mesh(view.frame)
        mesh = torch.from_numpy(np.asarray(mesh, dtype=np.float32))[None]
        weights = {name: value for name, value in view.weights.items() if value}
        if not weights or self.head is None:
            return mesh
        neutral = torch.zeros(1, self.head.num_identity)
        moved, still = (self.head(neutral, self.head.expression(w)).stacked() for w in (weights, {}))
        return mesh + (moved - still)

    def label(self, view: View) -> torch.Tensor:
        """Return the label [1, 25] of a view's camera; the frontal one where it has none."""
        camera = view.camera or orbit.start_camera(self.pivot, self.radius)
        return orbit.orbit_label(*camera, self.pivot, self.radius)

    def _mean_mesh(self):
        if self.head is None:
            raise ValueError("mesh: expected one, as the network's head is not the embedded one, got None")
        zero = torch.zeros(1, self.head.num_identity)
        with torch.no_grad():
            return self.head(zero, self.head.expression()).stacked()[0].numpy()


class Sitting:
    """One viewer's pictures: draws under the studio's lock and keeps what does not change for itself."""

    def __init__(self, studio: Studio):
        self._studio, self._portrait = studio, avatar.Portrait(studio.synthesizer)

    def draw(self, view: View, is_full: bool) -> np.ndarray:
        """Return the picture [R, R, 3] uint8 of a view."""
        studio = self._studio
        with studio.lock, device_of(studio.synthesizer):
            resolution = studio.resolution if is_full else studio.coarse
            inputs = studio.styles(view), studio.mesh_of(view), studio.label(view)
            return self._portrait.draw(*inputs, resolution, view.mode)[0].cpu().numpy()

    def planes(self, view: View):
        """Return the planes of a view, which stay good while others are drawn."""
        studio = self._studio
        with studio.lock, device_of(studio.synthesizer):
            return self._portrait.planes(studio.styles(view), studio.mesh_of(view))

    def query(self, planes, points, **options) -> dict:
        """Return `Next3DGenerator.query`, taking turns with other viewers."""
        studio = self._studio
        with studio.lock, device_of(studio.synthesizer), torch.no_grad():
            return studio.synthesizer.generator.query(planes, points, **options)


def device_of(synthesizer: Synthesizer):
    """Return a context in which a thread's work goes to the synthesizer's device."""
    return torch.cuda.device(synthesizer.device if synthesizer.device.type == 'cuda' else -1)


def embedded_head_of(generator: Next3DGenerator) -> EmbeddedHead | None:
    """Return the embedded head where a network has its topology, else None."""
    head = load_embedded_head()
    is_same = generator.num_vertices == len(head.mean) and torch.equal(generator.faces[0].cpu(), head.faces)
    return head if is_same else None


def mix_styles(first: torch.Tensor, second: torch.Tensor, crossover: int, parts: str, num_style_ws: int):
    """Return ws of the first [N, num_ws, w_dim], of the second from number `crossover` on.

    Numbers count through the planes' styles (the first num_style_ws) and anew through the texture's. parts: one of
    MIXED_PARTS, 'planes' or 'texture' leave the other part to the first.
    """
    if parts not in MIXED_PARTS:
        raise ValueError(f'parts: expected one of {", ".join(MIXED_PARTS)}, got {parts!r}')
    mixed, num_ws = first.clone(), first.shape[1]
    for part, start, stop in (('planes', 0, num_style_ws), ('texture', num_style_ws, num_ws)):
        if parts in ('all', part):
            begin = min(start + max(crossover, 0), stop)
            mixed[:, begin:stop] = second[:, begin:stop]
    return mixed


# ---------------------------------------------------------------------------------------------------------------------
# When


class Player:
    """The clock of a clip of `count` frames; times in seconds, given by the caller."""

    def __init__(self, count: int, fps: float):
        self.count, self.fps, self.loops = count, fps, True
        self._frame, self._since = 0, None

    @property
    def is_playing(self) -> bool:
        """Whether it has been started and neither paused nor, without a loop, played to its end."""
        return self._since is not None

    def play(self, now: float) -> None:
        """Go on from the frame shown; at the last one, from the first."""
        if not self.is_playing:
            self._frame = 0 if self._frame >= self.count - 1 else self._frame
            self._since = now

    def pause(self, now: float) -> None:
        """Stop at the frame of now."""
        self._frame, self._since = self.at(now), None

    def seek(self, frame: int, now: float) -> None:
        """Go to a frame, and go on playing where it plays."""
        self._frame = min(max(frame, 0), self.count - 1)
        self._since = now if self.is_playing else None

    def set_fps(self, fps: float, now: float) -> None:
        """Change the speed from now on."""
        self.seek(self.at(now), now)
        self.fps = fps

    def at(self, now: float) -> int:
        """Return the frame of now; at the end of a clip that does not loop, the clock stops."""
        if not self.is_playing:
            return self._frame
        frame = self._frame + int((now - self._since) * self.fps + 1e-6)
        if frame < self.count:
            return frame
        if self.loops:
            return frame % self.count
        self._frame, self._since = self.count - 1, None
        return self._frame

    def next_change(self, now: float) -> float | None:
        """Return the time of the next frame, None where it stands still."""
        if not self.is_playing:
            return None
        passed = int((now - self._since) * self.fps + 1e-6)
        return self._since + (passed + 1) / self.fps


@dataclasses.dataclass
class _Due:
    coarse: float | None = None
    full: float | None = None
    served: float = float('-inf')


class Schedule:
    """Whose picture is drawn next, and how finely: coarse ones first, who has waited longest before others.

    A change makes a coarse picture due at once and a full one when nothing has changed for SETTLED_SECONDS. Full ones
    that have waited for PATIENCE_SECONDS take turns with coarse ones: one viewer's clip must not keep others from
    theirs. Times in seconds, given by the caller.
    """

    def __init__(self):
        self._due = {}

    def add(self, key: Hashable) -> None:
        """Take a viewer in."""
        self._due[key] = _Due()

    def remove(self, key: Hashable) -> None:
        """Forget a viewer; unknown ones are ignored."""
        self._due.pop(key, None)

    def touch(self, key: Hashable, at: float, settles: bool = True) -> None:
        """Note that a viewer's picture changes at a time; settles: a full one follows. Unknown viewers are ignored."""
        due = self._due.get(key)
        if due is not None:
            due.coarse = at if due.coarse is None else min(due.coarse, at)
            due.full = at + SETTLED_SECONDS if settles else None

    def take(self, now: float) -> tuple[Hashable, bool] | None:
        """Return (viewer, whether in full) of the picture to draw now, which is then no longer due; None: none."""
        ready = []
        for key, due in self._due.items():
            if due.coarse is not None and due.coarse <= now:
                ready.append((False, due.served, key))
            elif due.full is not None and due.full <= now:
                ready.append((due.full + PATIENCE_SECONDS > now, due.served, key))
        if not ready:
            return None
        key = min(ready, key=lambda entry: entry[:2])[2]
        due = self._due[key]
        is_full = due.coarse is None or due.coarse > now
        due.coarse, due.full = (due.coarse, None) if is_full else (None, due.full)
        due.served = now
        return key, is_full

    def wait(self, now: float) -> float | None:
        """Return the seconds until a picture is due, None where none will be without a change."""
        times = [time for due in self._due.values() for time in (due.coarse, due.full) if time is not None]
        return max(0.0, min(times) - now) if times else None


class Worker:
    """One thread that draws all viewers' pictures in turn.

    draw: (viewer, whether in full) -> time of the picture that follows by itself, None: none. on_error: told (viewer,
    error) when drawing fails; others' pictures go on.
    """

    def __init__(self, draw: Callable[[Hashable, bool], float | None], on_error: Callable[[Hashable, Exception], None]):
        self._draw, self._on_error, self._schedule = draw, on_error, Schedule()
        self._changed, self._is_over = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name='pictures', daemon=True)
        self._thread.start()

    def add(self, key: Hashable) -> None:
        """Take a viewer in and draw the first picture."""
        with self._changed:
            self._schedule.add(key)
        self.touch(key)

    def remove(self, key: Hashable) -> None:
        """Forget a viewer."""
        with self._changed:
            self._schedule.remove(key)

    def touch(self, key: Hashable) -> None:
        """Have a viewer's picture drawn anew."""
        with self._changed:
            self._schedule.touch(key, time.monotonic())
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the picture that it draws."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def _work(self):
        while True:
            with self._changed:
                task = None
                while not self._is_over and (task := self._schedule.take(time.monotonic())) is None:
                    self._changed.wait(self._schedule.wait(time.monotonic()))
                if self._is_over:
                    return
            self._serve(*task)

    def _serve(self, key, is_full):
        try:
            following = self._draw(key, is_full)
        except Exception as error:  # Whatever one viewer's picture fails of, the others' go on.
            self._on_error(key, error)
            return
        if following is not None:
            with self._changed:
                self._schedule.touch(key, following, settles=False)
