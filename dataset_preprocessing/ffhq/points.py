# SPDX-License-Identifier: Apache-2.0
"""Points of faces: where each picture's five come from, the reference that they are fitted to, tables of landmarks."""

import json
import pathlib

import numpy as np

from dataset_preprocessing.ffhq import alignment, assets, files
from dataset_preprocessing.ffhq.files import PreprocessError
from geometry.head_model import load_embedded_head

# Points of MediaPipe's face mesh that stand for iBUG's 68 landmarks. Between points that both name (corners, tips,
# middles), chosen by the share of the way along the mesh's edges at which the embedded head has the landmark; left
# and right are mirror images in the mesh.
IBUG_OF_MESH = np.array([
    127, 234, 132, 58, 172, 150, 149, 148, 152, 377, 378, 379, 397, 288, 361, 454, 356,  # Contour.
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,  # Brows.
    168, 197, 195, 4, 98, 97, 2, 326, 327,  # Nose.
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,  # Eyes.
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,  # Outer lips.
    78, 82, 13, 312, 308, 317, 14, 87,  # Inner lips.
])  # fmt: skip
NUM_MESH_POINTS = 478
IRISES = ((468, 469, 470, 471, 472), (473, 474, 475, 476, 477))  # Centre and rim; image-left eye first.


def reference_points(path: str | None) -> np.ndarray:
    """Return the reference points [5, 3] of a file, of BFM's at its published place, else of the embedded head."""
    place = assets.ASSETS['bfm_landmarks'].path
    if path is not None or place.is_file():
        return alignment.read_reference(place if path is None else pathlib.Path(path))
    head = load_embedded_head()
    zero = head.mean.new_zeros
    return alignment.reference_from_head(head(zero([1, head.num_identity]), zero([1, 52])).landmarks[0].numpy())


class FivePoints:
    """Five points [5, 2] of each picture: a folder of files <name>.txt, or a JSON such as cropping_params.json."""

    def __init__(self, path: str):
        self.path, self.table = pathlib.Path(path), None
        if self.path.is_dir():
            return
        try:
            entries = json.loads(self.path.read_text(encoding='utf-8'))
            self.table = {
                name.rsplit('.', 1)[0]: np.array(e['lm'], dtype=np.float64).reshape(5, -1)[:, :2]
                for name, e in entries.items()
            }
        except FileNotFoundError:
            raise PreprocessError(f'{path}: expected a folder of points or a JSON file, found nothing') from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise PreprocessError(f'{path}: expected {{"name.png": {{"lm": five points}}}}, found another') from error

    def __call__(self, name: str) -> np.ndarray:
        """Return the points of a picture; NoFaceError where it has none."""
        if self.table is None:
            path = self.path / f'{name}.txt'
            if not path.exists():
                raise files.NoFaceError(f'{name}: no points')
            return files.read_points(path, 5)
        points = self.table.get(name)
        if points is None:
            raise files.NoFaceError(f'{name}: no points')
        if points.shape != (5, 2) or not np.isfinite(points).all():
            raise PreprocessError(f'{name}: expected five points x y in {self.path}, found others')
        return points
