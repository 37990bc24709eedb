# SPDX-License-Identifier: Apache-2.0
"""Files of cameras: coefficients of single pictures, cameras.json of raw poses, dataset.json of labels."""

import json
import pathlib
import zipfile

import numpy as np

from dataset_preprocessing.ffhq import deep3d_net, files
from dataset_preprocessing.ffhq.files import MIRROR, PreprocessError
from dnnlib import atomic_write
from geometry.mirror import mirror_label


def write_coefficients(values: np.ndarray, path: pathlib.Path) -> None:
    """Write coefficients [257] by name; the file appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        np.savez(file, **deep3d_net.split_coefficients(values))


def read_pose(path: pathlib.Path) -> np.ndarray:
    """Return the raw pose [4, 4] of a file of coefficients: .npz of fit_cameras.py, .mat of Deep3DFaceRecon."""
    if path.suffix == '.mat':
        parts = files.read_mat(path, ('angle', 'trans'))
    else:
        try:
            with np.load(path, allow_pickle=False) as content:
                parts = [np.asarray(content[key], dtype=np.float64) for key in ('angle', 'trans')]
        except (ValueError, TypeError, LookupError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise PreprocessError(f'{path}: expected coefficients with angle and trans, found others') from error
    if any(part.size != 3 or not np.isfinite(part).all() for part in parts):
        raise PreprocessError(f'{path}: expected finite numbers, three for angle and for trans, found others')
    parts = [part.reshape(3) for part in parts]
    return deep3d_net.raw_pose(*parts)


def read_cameras(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the raw poses [4, 4] of a cameras.json by picture, in its order."""
    try:
        entries = json.loads(path.read_text(encoding='utf-8'))
        poses = {name: np.array(entry['pose'], dtype=np.float64).reshape(4, 4) for name, entry in entries.items()}
    except FileNotFoundError:
        raise PreprocessError(f'{path}: expected a cameras.json, found no file') from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PreprocessError(f'{path}: expected a cameras.json (name: pose, intrinsics), found another') from error
    for name, pose in poses.items():
        # The limit is that of check_data.py; comparisons with NaN are false.
        if not np.abs(pose[:3, :3] @ pose[:3, :3].T - np.eye(3)).max() < 1e-3 or not np.isfinite(pose).all():
            raise PreprocessError(f'{path}: {name}: expected the pose of a camera, found another matrix')
    return poses


def cameras_text(poses: dict[str, np.ndarray]) -> str:
    """Return a cameras.json of raw poses: distance as found, intrinsics in pixels of the crop of 1024."""
    intrinsics = deep3d_net.pixel_intrinsics().tolist()
    cameras = {name: {'pose': pose.tolist(), 'intrinsics': intrinsics} for name, pose in poses.items()}
    return json.dumps(cameras, indent=1)


def labels_text(poses: dict[str, np.ndarray], mode: str, with_mirrors: bool) -> str:
    """Return a dataset.json of raw poses; each mirror image follows its picture, as published data have them."""
    labels = []
    for name, pose in poses.items():
        label = deep3d_net.label(deep3d_net.normalised_pose(pose, mode))
        labels.append([name, label.tolist()])
        if with_mirrors:
            stem, ending = name.rsplit('.', 1)
            labels.append([f'{stem}{MIRROR}.{ending}', mirror_label(label).tolist()])
    return json.dumps({'labels': labels})
