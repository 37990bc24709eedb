# SPDX-License-Identifier: Apache-2.0
"""What a rerun of preprocess_in_the_wild.py may keep: results of the same choices, of pictures that did not change."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch

from dataset_preprocessing.ffhq import files
from dataset_preprocessing.ffhq.faces_file import Stamp, read_faces
from dataset_preprocessing.ffhq.files import PreprocessError

CHOICES_FILE = 'choices.json'
DIGEST = 16  # Hexadecimal digits: enough to tell files apart.


def digest(data: bytes | torch.Tensor) -> str:
    """Return a short hash of a file's content or of numbers."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:DIGEST]


def keep_choices(choices: dict[str, Any], work: pathlib.Path) -> None:
    """Write what a run was asked for to a folder; PreprocessError where results of other choices are there."""
    path, advice = work / CHOICES_FILE, 'choose another --outdir, or delete this folder and the results'
    if not path.exists():
        if (work / 'faces').exists():
            raise PreprocessError(f'{work}: expected {CHOICES_FILE} of an earlier run, found faces without: {advice}')
        files.write_text(json.dumps(choices, indent=1) + '\n', path)
        return
    try:
        before = json.loads(path.read_text(encoding='utf-8'))
        differing = [name for name in choices if before.get(name) != choices[name]]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PreprocessError(f'{path}: expected the choices of an earlier run, found another file') from error
    if differing:
        asked, found = (json.dumps(told.get(differing[0])) for told in (choices, before))
        raise PreprocessError(f'{work}: expected results of {differing[0]} {asked}, found those of {found}: {advice}')


def is_current(path: pathlib.Path, stamp: Stamp | None) -> bool:
    """Tell whether a file of faces is there, of the picture of this stamp, and no failure, which may be mended."""
    if not path.exists():
        return False
    found = read_faces(path)
    return found.reason is None and found.stamp == stamp


def item_names(name: str, count: int) -> list[str]:
    """Return the names of a picture's items, one for each of its faces, largest first."""
    return [f'{name}-{number}' if number else name for number in range(count)]


def drop_gone(folder: pathlib.Path, seen: set[str], forget: Callable[[pathlib.Path], None]) -> list[str]:
    """Remove files of faces of pictures that are no longer there; return their names.

    forget: called with each file before it goes, to remove what came of it.
    """
    gone = {name: path for name, path in files.list_written(folder, '.json').items() if name not in seen}
    for path in gone.values():
        forget(path)
        path.unlink()
    return list(gone)
