# SPDX-License-Identifier: Apache-2.0
"""What photographs and videos become: <name>.png, .obj, _kpt2d.txt, dataset.json, coefficients.npz, overlays."""

import io
import json
import pathlib

import numpy as np
from PIL import Image

from dataset_preprocessing.ffhq import alignment, files
from dataset_preprocessing.ffhq.alignment import Crop
from dataset_preprocessing.ffhq.fitting import HeadFit, HeadFitter
from dataset_preprocessing.overlay import draw_overlay
from dnnlib import atomic_path, atomic_write
from geometry.meshes import landmark_lines, obj_surface, obj_vertices
from training.dataset import LABEL_FILE
from training.driving import COEFFICIENTS_FILE

OVERLAY_QUALITY = 90


class ItemWriter:
    """Writes items to a folder; a picture is written last: where it is, the rest of the item is."""

    def __init__(self, fitter: HeadFitter, out: pathlib.Path, overlays: pathlib.Path | None):
        head, self.fitter, self.out, self.overlays = fitter.head, fitter, out, overlays
        self.surface = obj_surface(head.uvs.cpu().numpy(), head.faces.cpu().numpy(), head.uv_faces.cpu().numpy())
        self.drawn = fitter.model.drawn_faces().cpu().numpy()

    def has(self, name: str) -> bool:
        """Tell whether an item is complete."""
        return all(path.exists() for path in self.last_files(name))

    def last_files(self, name: str) -> list[pathlib.Path]:
        """Return the files of an item that are there when all are."""
        overlay = [] if self.overlays is None else [self.overlays / f'{name}.jpg']
        return [self.out / f'{name}.png', *overlay]

    def forget(self, name: str) -> None:
        """Remove what there is of an item, its picture first, and the tables, which list it."""
        for file in (f'{name}.png', f'{name}.obj', f'{name}_kpt2d.txt', LABEL_FILE, COEFFICIENTS_FILE):
            (self.out / file).unlink(missing_ok=True)
        if self.overlays is not None:
            (self.overlays / f'{name}.jpg').unlink(missing_ok=True)

    def __call__(self, name: str, photograph: Image.Image, crop: Crop, fit: HeadFit) -> None:
        """Write an item of an upright RGB photograph."""
        vertices, landmarks = self.fitter.mesh(fit)
        picture = alignment.training_picture(photograph, crop)
        if self.overlays is not None:
            path = self.overlays / f'{name}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                drawn = draw_overlay(picture, vertices, self.drawn, fit.label, fit.points)
                drawn.save(temporary, format='JPEG', quality=OVERLAY_QUALITY)
        files.write_text((obj_vertices(vertices) + self.surface).decode('ascii'), self.out / f'{name}.obj')
        files.write_text(landmark_lines(landmarks).decode('ascii'), self.out / f'{name}_kpt2d.txt')
        files.save_png(picture, self.out / f'{name}.png')


def write_tables(
    out: pathlib.Path, fits: dict[str, HeadFit], fitter: HeadFitter, fps: float | None, is_one_person: bool
) -> None:
    """Write dataset.json and coefficients.npz of a folder: names, the head model's `coefficients` (its identity once if
    all are of one person), size [N], gaze [N, 4], error [N] and, of a video, fps."""
    labels = [[f'{name}.png', fit.label.astype(float).tolist()] for name, fit in fits.items()]
    files.write_text(json.dumps({'labels': labels}), out / LABEL_FILE)
    rows = list(fits.values())
    identity = rows[0].identity if is_one_person else np.stack([fit.identity for fit in rows])
    arrays = {
        'names': np.array([f'{name}.png' for name in fits]),
        **fitter.model.coefficients(identity, np.stack([fit.expression for fit in rows])),
        'size': np.stack([fit.size for fit in rows]),
        'gaze': np.stack([fit.gaze for fit in rows]),
        'error': np.stack([fit.error for fit in rows]),
        **({} if fps is None else {'fps': np.array(fps)}),
    }
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    with atomic_write(out / COEFFICIENTS_FILE) as file:
        file.write(stream.getvalue())
