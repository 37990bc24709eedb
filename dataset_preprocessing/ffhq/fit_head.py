# SPDX-License-Identifier: Apache-2.0
"""Fit a head and its camera to faces that detect.py found: one joint fit, so that mesh and camera agree."""

import pathlib
import sys

import click
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files  # noqa: E402
from dataset_preprocessing.ffhq.faces_file import read_faces  # noqa: E402
from dataset_preprocessing.ffhq.fitting import crops_inside, fit_all  # noqa: E402
from dataset_preprocessing.ffhq.head_choice import head_model_options, load_fitter  # noqa: E402
from dataset_preprocessing.ffhq.points import reference_points  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('faces', metavar='DIR', type=cli.PathText(), required=True, help='Faces: folder faces of detect.py.')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Where to write fits.')
@cli.flag('same_person', help='All pictures show one person: one identity for all.')
@cli.option('fps', metavar='FLOAT', type=cli.FiniteFloat(0, 1000),
            help='Pictures are frames of a video, so many a second: one person, smooth motion and crops.')
@cli.option('reference', metavar='MAT', type=cli.PathText(),
            help="BFM's similarity_Lm3D_all.mat. Default: the published place, else the embedded head.")
@head_model_options
@cli.option('device', metavar='DEVICE', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N.')
def main(faces, out, same_person, fps, reference, head_model, flame_path, device):
    """Write <out>/<name>.npz for the largest face of each picture: identity, expression, label, gaze and error.

    Of FLAME, the expression is followed by the jaw's rotation and pitch and yaw of both eyes.

    The crop is that of crop.py. Files that are there already are kept, but all are made
    anew where pictures of one person became others; the error is the median distance between found
    and fitted points, over the distance of the eyes.
    """
    out = pathlib.Path(out)
    try:
        fitter = load_fitter(device, head_model, flame_path)
        found = files.list_files(pathlib.Path(faces), ('.json',))
        read = {name: read_faces(path).faces for name, path in found.items()}
        faces = {name: entries[0] for name, entries in read.items() if entries}
        crops, outside = crops_inside(faces, reference_points(reference), fps) if faces else ({}, {})
        with tqdm(total=len(crops), desc='fits', delay=2) as bar:
            kept = {name: faces[name] for name in crops}
            fits = fit_all(fitter, kept, crops, out, fps, same_person, bar.update) if kept else {}
        errors = [float(fit.error) for fit in fits.values()]
    except files.PreprocessError as error:
        raise click.ClickException(str(error)) from error
    for name, reason in outside.items():
        click.echo(f'{name}: {reason}')
    click.echo(f'fits: {len(fits)} faces, {len(read) - len(faces)} pictures without a face')
    if fits:
        click.echo(f'error: median {100 * np.median(errors):.2f} %, largest {100 * max(errors):.2f} % of the eyes\' '
                   'distance')  # fmt: skip


if __name__ == '__main__':
    main()
