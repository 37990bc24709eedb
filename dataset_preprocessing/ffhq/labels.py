# SPDX-License-Identifier: Apache-2.0
"""Turn camera coefficients, or a cameras.json, into the labels that training and driving read: dataset.json."""

import json
import pathlib
import sys
import zipfile

import click
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import deep3d_net, files  # noqa: E402
from dataset_preprocessing.ffhq.files import MIRROR, PreprocessError  # noqa: E402
from geometry.mirror import mirror_label  # noqa: E402


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


@click.command(cls=cli.Command)
@cli.option('coeffs', metavar='DIR', type=cli.PathText(), help='Coefficients: .npz of fit_cameras.py, or .mat.')
@cli.option('cameras', metavar='JSON', type=cli.PathText(), help='Instead of --coeffs: a cameras.json.')
@cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Folder for dataset.json.')
@cli.option('mode', type=click.Choice(deep3d_net.MODES), default='orig', show_default=True,
            help='How cameras move to their sphere: as published networks need it; about a point within the head; '
                 'that, upright and looking at it.')
@cli.flag('mirror', help='Labels of mirror images, too (crop.py --mirror). Not for driving frames.')
def main(coeffs, cameras, outdir, mode, mirror):
    """Write <outdir>/dataset.json and, of coefficients, cameras.json: the cameras before they move to their sphere."""
    if (coeffs is None) == (cameras is None):
        raise click.UsageError('expected either --coeffs or --cameras.')
    try:
        if cameras is not None:
            poses = read_cameras(pathlib.Path(cameras))
        else:
            found = files.list_files(pathlib.Path(coeffs), ('.npz', '.mat'))
            poses = {f'{name}.png': read_pose(path) for name, path in found.items()}
        _check_names(poses)
        text = labels_text(poses, mode, mirror)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    outdir = cli.make_outdir(outdir)
    if cameras is None:
        files.write_text(cameras_text(poses), outdir / 'cameras.json')
    files.write_text(text, outdir / 'dataset.json')
    click.echo(f'{len(poses)} cameras{" and their mirror images" if mirror else ""}: {outdir / "dataset.json"}')


def _check_names(poses):
    for name in poses:
        if '.' not in name:
            raise PreprocessError(f'{name}: expected the name of a picture, found no ending')


if __name__ == '__main__':
    main()
