# SPDX-License-Identifier: Apache-2.0
"""Write what fitted faces become: pictures of 512 pixels, meshes, landmarks, labels and coefficients in one folder."""

import pathlib
import sys

import click
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files  # noqa: E402
from dataset_preprocessing.ffhq.faces_file import read_faces  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402
from dataset_preprocessing.ffhq.fitting import crops_inside, points_of  # noqa: E402
from dataset_preprocessing.ffhq.head_choice import head_model_options, load_fitter  # noqa: E402
from dataset_preprocessing.ffhq.points import reference_points  # noqa: E402
from dataset_preprocessing.ffhq.wild_output import ItemWriter, write_tables  # noqa: E402

SAME_PLACE_PX = 0.01  # Between points of a fit and those of its face, where both were cropped alike.


@click.command(cls=cli.Command)
@cli.option('images', metavar='DIR', type=cli.PathText(), required=True, help='The photographs.')
@cli.option('faces', metavar='DIR', type=cli.PathText(), required=True, help='Folder faces of detect.py.')
@cli.option('fits', metavar='DIR', type=cli.PathText(), required=True, help='Fits of fit_head.py.')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Where to write all.')
@cli.option('overlays', metavar='DIR', type=cli.PathText(), help='Write <name>.jpg here: the mesh over the picture.')
@cli.flag('same_person', help='As for fit_head.py.')
@cli.option('fps', metavar='FLOAT', type=cli.FiniteFloat(0, 1000), help='As for fit_head.py.')
@cli.option('reference', metavar='MAT', type=cli.PathText(), help='As for fit_head.py.')
@head_model_options
def main(images, faces, fits, out, overlays, same_person, fps, reference, head_model, flame_path):
    """Write <name>.png, <name>.obj, <name>_kpt2d.txt, dataset.json and coefficients.npz for all pictures with a fit.

    Items that are there already, and are newer than their fits, are kept; the last two files are written anew.
    check_data.py --driving=OUT checks all.
    """
    out = pathlib.Path(out)
    try:
        fitter = load_fitter('cpu', head_model, flame_path)
        photographs, names = files.list_pictures(pathlib.Path(images)), files.list_files(pathlib.Path(fits), ('.npz',))
        read = {name: fitter.read(path) for name, path in names.items()}
        told = files.list_files(pathlib.Path(faces), ('.json',))
        found = {name: entries[0] for name, path in told.items() if (entries := read_faces(path).faces)}
        crops, _ = crops_inside(found, reference_points(reference), fps)
        is_one_person = same_person or fps is not None
        for name, fit in read.items():
            if name not in photographs or name not in crops:
                raise PreprocessError(f'{names[name]}: expected the fit of a picture of {images}, found none of it')
            away = np.abs(fitter.model.targets(points_of(found[name], crops[name])[None])[0] - fit.points).max()
            other = is_one_person and not np.array_equal(fit.identity, read[next(iter(read))].identity)
            if away > SAME_PLACE_PX or other:
                raise PreprocessError(f'{names[name]}: expected a fit of these faces and options, found another')
        writer = ItemWriter(fitter, out, None if overlays is None else pathlib.Path(overlays))
        files.mark_written(out)
        for name in read:
            if files.is_older(writer.last_files(name), names[name]):
                writer.forget(name)
        files.run_step(
            'items', {name: photographs[name] for name in read}, writer.last_files,
            lambda name, path: writer(name, files.read_picture(path), crops[name], read[name]),
        )  # fmt: skip
        write_tables(out, read, fitter, fps, is_one_person)
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error


if __name__ == '__main__':
    main()
