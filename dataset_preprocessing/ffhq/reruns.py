# SPDX-License-Identifier: Apache-2.0
"""What a rerun of preprocess_in_the_wild.py may keep: results of the same choices, of pictures that did not change."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from dataset_preprocessing.ffhq import files
from dataset_preprocessing.ffhq.faces_file import read_faces
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.sources import Photos, Video

CHOICES_FILE = 'choices.json'
DIGEST = 16  # Hexadecimal digits: enough to tell files apart.


def digest(data: bytes | torch.Tensor) -> str:
    """Return a short hash of a file's content or of numbers."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:DIGEST]


def keep_choices(choices: dict[str, Any], work: pathlib.Path) -> None:
    """Write what a run was asked for to a folder; PreprocessError where results of other choices are there."""
    path = work / CHOICES_FILE
    if not path.exists():
        files.write_text(json.dumps(choices, indent=1) + '\n', path)
        return
    try:
        before = json.loads(path.read_text(encoding='utf-8'))
        differing = sorted(name for name in choices if before[name] != choices[name])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise PreprocessError(f'{path}: expected the choices of an earlier run, found another file') from error
    for name in differing:
        raise PreprocessError(
            f'{work}: expected results of {name} {json.dumps(choices[name])}, found those of '
            f'{json.dumps(before[name])}: choose another --outdir, or delete this folder and the results'
        )


def is_current(path: pathlib.Path, source: Photos | Video, forget: Callable[[str], None]) -> bool:
    """Tell whether a file of faces is there, of this very picture, and no failure, which may have been mended.

    forget: called with the name of each item that the file has led to where it is not.
    """
    if not path.exists():
        return False
    found = read_faces(path)
    if found.reason is None and found.stamp in (None, source.stamp(path.stem)):
        return True
    for item in item_names(path.stem, len(found.faces)):
        forget(item)
    return False


def item_names(name: str, count: int) -> list[str]:
    """Return the names of a picture's items, one for each of its faces, largest first."""
    return [f'{name}-{number}' if number else name for number in range(count)]


def drop_frames(folder: pathlib.Path, source: Video, seen: set[str], forget: Callable[[str], None]) -> None:
    """Remove faces and items of frames that a video no longer has: those of a longer one of the same name."""
    for path in sorted(folder.glob('*.json')):
        if path.stem not in seen and not is_current(path, source, forget):
            path.unlink()
