# SPDX-License-Identifier: Apache-2.0
"""The file that detection leaves for each picture: its faces, or why it could not be used."""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.head_turn import Turn
from dataset_preprocessing.ffhq.landmarker import Face
from dataset_preprocessing.ffhq.points import NUM_MESH_POINTS

FORMAT = 'next3d-faces-1'
Stamp = tuple[int, int]  # Bytes of the picture's file and when it changed, in nanoseconds: another picture has others.


class FoundFace(NamedTuple):
    """A face in a picture of size (width, height). points [478, 2] and five [5, 2]: pixels, centres whole. turn: how
    the head is turned, None where it was not looked at."""

    size: tuple[int, int]
    points: np.ndarray
    five: np.ndarray
    expressions: dict[str, float]
    turn: Turn | None = None


class FacesFile(NamedTuple):
    """Faces, largest first; reason: why there are none where the picture could not be read; stamp: of its file."""

    faces: list[FoundFace]
    reason: str | None
    stamp: Stamp | None


def faces_text(faces: list[Face], size: tuple[int, int], stamp: Stamp | None = None) -> str:
    """Return the JSON of a picture's faces, largest first; coordinates in thousandths of a pixel."""
    entries = [
        {
            'box': [round(edge, 3) for edge in face.box],
            'points5': face.five.round(3).tolist(),
            'points68': face.landmarks.round(3).tolist(),
            'irises': face.irises.round(3).tolist(),
            'points478': face.points.round(3).tolist(),
            'expressions': {name: round(score, 5) for name, score in face.expressions.items()},
            'pose': face.pose.round(6).tolist(),
            'turn': face.turn and {name: array.round(5).tolist() for name, array in face.turn._asdict().items()},
        }
        for face in faces
    ]
    return json.dumps({'format': FORMAT, 'width': size[0], 'height': size[1], 'stamp': stamp, 'faces': entries})


def reason_text(reason: str, stamp: Stamp | None = None) -> str:
    """Return the JSON of a picture that could not be read."""
    return json.dumps({'format': FORMAT, 'reason': reason, 'stamp': stamp, 'faces': []})


def read_faces(path: pathlib.Path) -> FacesFile:
    """Return what a file tells; PreprocessError for another file. Files without stamps are read, too."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if content['format'] != FORMAT:
            raise ValueError(f'format {content["format"]!r}')
        faces = []
        for entry in content['faces']:
            points, five = np.array(entry['points478'], float)[:, :2], np.array(entry['points5'], float)
            if points.shape != (NUM_MESH_POINTS, 2) or five.shape != (5, 2) or not np.isfinite(points).all():
                raise ValueError(f'points {points.shape}')
            size = int(content['width']), int(content['height'])
            turn = entry.get('turn') and Turn(*(np.array(entry['turn'][name], float) for name in Turn._fields))
            if turn and (np.shape(turn) != (2, 3) or not np.isfinite(turn).all() or not (turn.deviation > 0).all()):
                raise ValueError('turn')
            faces.append(FoundFace(size, points, five, {k: float(v) for k, v in entry['expressions'].items()}, turn))
        stamp = content.get('stamp')
        return FacesFile(faces, content.get('reason'), None if stamp is None else (int(stamp[0]), int(stamp[1])))
    except FileNotFoundError:
        raise PreprocessError(f'{path}: expected faces, found no file') from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise PreprocessError(f'{path}: expected faces of detect.py, found another file ({error})') from error
