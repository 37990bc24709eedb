# SPDX-License-Identifier: Apache-2.0
"""The two crops of a photograph, by points from files: FFHQ's alignment, then the crop by five points."""

import pathlib
from collections.abc import Callable

from PIL import Image

from dataset_preprocessing.ffhq import alignment, files
from dataset_preprocessing.ffhq.points import FivePoints, reference_points


class Cutter:
    """The crop by five points.

    points, reference: as `FivePoints` and `reference_points` take them. out_points68: where to write the landmarks of
    points68, moved to the new picture; None for nowhere.
    """

    def __init__(self, points: str, reference: str | None, points68: str | None, out_points68: str | None):
        self.points, self.reference = FivePoints(points), reference_points(reference)
        self.landmarks = pathlib.Path(points68) if out_points68 else None
        self.out_points68 = pathlib.Path(out_points68) if out_points68 else None

    def __call__(self, name: str, path: pathlib.Path) -> Image.Image:
        """Return the training picture of a photograph; errors name it."""
        five = self.points(name)
        image = files.read_picture(path)
        with files.naming(path):
            crop = alignment.crop_of(alignment.place_face(five, image.height, self.reference), image.size)
        if self.landmarks is not None:
            found = files.read_points(self.landmarks / f'{name}.txt', 68)
            moved = alignment.points_in_training_picture(found, image.size, crop)
            files.write_points(moved, self.out_points68 / f'{name}.txt')
        return alignment.training_picture(image, crop)


def realigner(folder: pathlib.Path) -> Callable[[str, pathlib.Path], Image.Image]:
    """Return a function (name, path) -> picture of 1500 pixels that re-aligns by the landmarks in a folder."""

    def cut(name, path):
        if not (folder / f'{name}.txt').exists():
            raise files.NoFaceError(f'{name}: no landmarks')
        landmarks = files.read_points(folder / f'{name}.txt', 68)
        with files.naming(path):
            return alignment.sample_quad(files.read_picture(path), alignment.ffhq_quad(landmarks))

    return cut
