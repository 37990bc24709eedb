# SPDX-License-Identifier: Apache-2.0
"""Files that users get themselves under licences of their own: what they are, where they come from, where they lie.

The places are those of the published pipeline, so that folders made for it work as they are.
"""

import pathlib
from typing import NamedTuple

from dataset_preprocessing.ffhq.files import PreprocessError
from geometry.flame import LANDMARK_FILE, MODEL_FILE, PUBLISHED_FOLDER as DECA_FOLDER

ROOT = pathlib.Path(__file__).resolve().parent
DEEP3D_FOLDER = ROOT / 'Deep3DFaceRecon_pytorch'


class Asset(NamedTuple):
    """A file: its published place, what it is for, where to get it."""

    path: pathlib.Path
    purpose: str
    source: str


ASSETS = {
    'deep3d': Asset(
        DEEP3D_FOLDER / 'checkpoints' / 'pretrained' / 'epoch_20.pth', 'cameras',
        'the pretrained model linked from https://github.com/sicxu/Deep3DFaceRecon_pytorch',
    ),
    'bfm_landmarks': Asset(
        DEEP3D_FOLDER / 'BFM' / 'similarity_Lm3D_all.mat', "crops by BFM's own points (optional)",
        'the folder BFM of https://github.com/sicxu/Deep3DFaceRecon_pytorch',
    ),
    'deca': Asset(
        DECA_FOLDER / 'deca_model.tar', 'meshes',
        'the trained model linked from https://github.com/yfeng95/DECA',
    ),
    'flame': Asset(
        DECA_FOLDER / MODEL_FILE, 'meshes',
        'FLAME 2020 from https://flame.is.tue.mpg.de (registration)',
    ),
    'flame_landmarks': Asset(
        DECA_FOLDER / LANDMARK_FILE, 'meshes', 'the folder data of https://github.com/yfeng95/DECA',
    ),
    'flame_template': Asset(
        DECA_FOLDER / 'head_template.obj', 'meshes', 'the folder data of https://github.com/yfeng95/DECA',
    ),
}  # fmt: skip


def locate(**overrides: str | None) -> dict[str, pathlib.Path]:
    """Return the paths of assets by name: the given ones, None for the published place.

    Raises PreprocessError, one message for all that are missing.
    """
    paths = {name: ASSETS[name].path if given is None else pathlib.Path(given) for name, given in overrides.items()}
    missing = [f'{path} ({ASSETS[name].source})' for name, path in paths.items() if not path.is_file()]
    if missing:
        raise PreprocessError(f'expected files that you download yourself, at these places: {"; ".join(missing)}')
    return paths
