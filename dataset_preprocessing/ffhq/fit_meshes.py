# SPDX-License-Identifier: Apache-2.0
"""Run DECA's encoder and FLAME, from the user's files, on cropped pictures: a mesh and a landmark file each."""

import collections
import functools
import io
import pathlib
import sys
import zipfile
from collections.abc import Iterable

import click
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import assets, deca_net, files  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402
from dnnlib import atomic_write  # noqa: E402
from geometry.flame import FlameFileError, FlameHead, load_flame  # noqa: E402
from geometry.meshes import MeshFileError, obj_surface, obj_vertices  # noqa: E402
from training.driving import COEFFICIENTS_FILE  # noqa: E402

EXACT = '%r'  # How numbers of meshes are printed: float32 is kept.

GATHERED = ('shape', 'exp', 'pose', 'eye_pose')  # What of the codes makes the mesh.
DECA_FILES = ('deca', 'flame', 'flame_landmarks', 'flame_template')


def load_files(folder: str | None, device: torch.device) -> tuple[deca_net.DecaEncoder, FlameHead]:
    """Return DECA's encoder and the FLAME head of a folder laid out as deca/data; None for the published place."""
    given = {key: folder and str(pathlib.Path(folder) / assets.ASSETS[key].path.name) for key in DECA_FILES}
    paths = assets.locate(**given)
    try:
        head = load_flame(paths['flame'], paths['flame_landmarks'], paths['flame_template'])
    except (FlameFileError, MeshFileError) as error:
        raise PreprocessError(str(error)) from error
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


def landmarks_text(landmarks: np.ndarray) -> str:
    """Return a landmark file of [68, 3]; float32 is kept exactly."""
    stream = io.StringIO()
    np.savetxt(stream, landmarks)
    return stream.getvalue()


@click.command(cls=cli.Command)
@cli.option('images', metavar='DIR', type=cli.PathText(), required=True, help='Pictures of crop.py.')
@cli.option('points68', metavar='DIR', type=cli.PathText(), required=True, help='Their landmarks (--out-points68).')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Where to write <name>.obj.')
@cli.option('lms', metavar='DIR', type=cli.PathText(),
            help='Where to write landmarks as <name>.txt, for training. Default: <name>_kpt2d.txt beside the mesh.')
@cli.option('codes', metavar='DIR', type=cli.PathText(), help="Where to write DECA's codes as <name>.npz, too.")
@cli.flag('coefficients', help='With --codes: gather them in coefficients.npz beside the meshes, for driving clips '
          'and their --retarget.')
@cli.option('gaze', metavar='DIR', type=cli.PathText(),
            help='<name>.txt or .npy ending in left pitch, left yaw, right pitch, right yaw; radians. Default: ahead.')
@cli.option('deca', metavar='DIR', type=cli.PathText(), help='Folder of the files of DECA and FLAME. Default: the '
            'published place, deca/data.')
@cli.option('device', metavar='DEVICE', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N.')
def main(images, points68, out, lms, codes, coefficients, gaze, deca, device):
    """Write mesh and landmarks, metres and head upright, for each picture; those that are there already are kept."""
    out = pathlib.Path(out)
    if coefficients and codes is None:
        raise click.UsageError('--coefficients: expected --codes with it, got none.')
    codes, gaze = (None if path is None else pathlib.Path(path) for path in (codes, gaze))
    try:
        items = files.list_pictures(pathlib.Path(images))
        encoder, head = load_files(deca, device)

        def outputs(name):
            beside = out / f'{name}_kpt2d.txt' if lms is None else pathlib.Path(lms) / f'{name}.txt'
            return [out / f'{name}.obj', beside] + ([] if codes is None else [codes / f'{name}.npz'])

        def work(name, path):
            eyes = None if gaze is None else deca_net.flame_eye_pose(read_gaze(gaze, name))
            if not (pathlib.Path(points68) / f'{name}.txt').exists():
                raise files.NoFaceError(f'{name}: no landmarks')
            points = files.read_points(pathlib.Path(points68) / f'{name}.txt', 68)
            with files.naming(path):
                seen = deca_net.encoder_input(files.read_picture(path), deca_net.square_around(points))
            write_fit(encoder, head, seen.to(device), eyes, outputs(name))

        files.run_step('meshes', items, outputs, work)
        if coefficients:
            gather_codes(items, codes, out)
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error


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


@torch.no_grad()
def write_fit(
    encoder: deca_net.DecaEncoder, head: FlameHead, seen: torch.Tensor, eyes: np.ndarray | None,
    outputs: list[pathlib.Path],
) -> None:
    """Write mesh, landmarks and, where a third path is given, codes of an `encoder_input` and an eye pose [6]."""
    values = encoder(seen[None])
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
    mesh_lines = obj_vertices(mesh.vertices[0].cpu().numpy(), EXACT) + _surface(head)
    files.write_text(mesh_lines.decode('ascii'), outputs[0])


if __name__ == '__main__':
    main()
