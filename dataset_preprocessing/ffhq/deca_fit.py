# SPDX-License-Identifier: Apache-2.0
"""DECA's encoder and FLAME, from the user's files, on one picture: mesh, landmarks and codes as files."""

import collections
import functools
import io
import pathlib
import zipfile
from collections.abc import Callable, Iterable

import numpy as np
import torch

from dataset_preprocessing.ffhq import assets, deca_net, files
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.flame_points import read_flame_head
from dnnlib import atomic_write
from geometry.flame import FlameHead
from geometry.meshes import obj_surface, obj_vertices
from training.driving import COEFFICIENTS_FILE

EXACT = '%r'  # How numbers of meshes are printed: float32 is kept.
GATHERED = ('shape', 'exp', 'pose', 'eye_pose')  # What of the codes makes the mesh.
DECA_FILES = ('deca', 'flame', 'flame_landmarks', 'flame_template')


def load_files(folder: str | None, device: torch.device) -> tuple[deca_net.DecaEncoder, FlameHead]:
    """Return DECA's encoder and the FLAME head of a folder laid out as deca/data; None for the published place."""
    given = {key: folder and str(pathlib.Path(folder) / assets.ASSETS[key].path.name) for key in DECA_FILES}
    paths = assets.locate(**given)
    head = read_flame_head(paths)
    return deca_net.load_encoder(paths['deca'], device), head.to(device)


def read_gaze(folder: pathlib.Path, name: str) -> np.ndarray:
    """Return left pitch, left yaw, right pitch, right yaw [4]: the last four numbers of <name>.txt or .npy."""
    for path in (folder / f'{name}.txt', folder / f'{name}.npy'):
        if not path.exists():
            continue
        try:
            load = np.loadtxt if path.suffix == '.txt' else np.load
            numbers = np.asarray(load(path), dtype=np.float32).ravel()[-4:]
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise PreprocessError(f'{path}: expected gaze angles, found a file that cannot be read') from error
        if numbers.shape != (4,) or not np.isfinite(numbers).all():
            raise PreprocessError(f'{path}: expected four finite numbers at the end, found others')
        return numbers
    raise PreprocessError(f'{folder / name}.txt: expected gaze angles, found no file')


@functools.lru_cache(maxsize=1)
def _surface(head):
    return obj_surface(head.uvs.cpu().numpy(), head.faces.cpu().numpy(), head.uv_faces.cpu().numpy(), EXACT)


def mesh_text(head: FlameHead, vertices: np.ndarray) -> str:
    """Return an .obj of vertices [V, 3] on the head's surface; float32 is kept exactly."""
    return (obj_vertices(vertices, EXACT) + _surface(head)).decode('ascii')


def landmarks_text(landmarks: np.ndarray) -> str:
    """Return a landmark file of [68, 3]; float32 is kept exactly."""
    stream = io.StringIO()
    np.savetxt(stream, landmarks)
    return stream.getvalue()


@torch.no_grad()
def write_fit(
    encoder: deca_net.DecaEncoder, head: FlameHead, seen: torch.Tensor,
    eyes: np.ndarray | Callable[[torch.Tensor], np.ndarray] | None, outputs: list[pathlib.Path],
) -> None:
    """Write mesh, landmarks and, where a third path is given, codes of an `encoder_input` and an eye pose [6].

    eyes: None for straight ahead; a function is given the codes [1, 236].
    """
    values = encoder(seen[None])
    eyes = eyes(values) if callable(eyes) else eyes
    eye_pose = None if eyes is None else torch.from_numpy(eyes).to(seen)[None]
    mesh = deca_net.decode(head, values, eye_pose)
    if not mesh.vertices.isfinite().all():
        raise PreprocessError(f'{outputs[0]}: expected finite coordinates, found others')
    for path in outputs[2:]:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {key: part[0].cpu().numpy() for key, part in deca_net.split_codes(values).items()}
        with atomic_write(path) as file:
            np.savez(file, **parts, eye_pose=np.zeros(6, np.float32) if eyes is None else eyes)
    files.write_text(landmarks_text(mesh.landmarks[0].cpu().numpy()), outputs[1])
    files.write_text(mesh_text(head, mesh.vertices[0].cpu().numpy()), outputs[0])


def gather_codes(names: Iterable[str], codes: pathlib.Path, out: pathlib.Path) -> None:
    """Write coefficients.npz to each folder of `out`, of the pictures in it that have codes; format: docs/videos.md."""
    folders = collections.defaultdict(list)
    for name in names:
        if (codes / f'{name}.npz').exists():
            folders[pathlib.PurePath(name).parent].append(pathlib.PurePath(name).name)
    for folder, stems in folders.items():
        rows = []
        for stem in stems:
            path = codes / folder / f'{stem}.npz'
            try:
                with np.load(path, allow_pickle=False) as file:
                    rows.append([file[key] for key in GATHERED])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise PreprocessError(f'{path}: expected codes, found a file without: delete it, run again') from error
        arrays = dict(zip(GATHERED, map(np.stack, zip(*rows, strict=True)), strict=True))
        with atomic_write(out / folder / COEFFICIENTS_FILE) as file:
            np.savez(file, names=np.array(stems), **arrays)
