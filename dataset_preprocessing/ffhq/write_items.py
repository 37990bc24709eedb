# SPDX-License-Identifier: Apache-2.0
"""Write what fitted faces become: pictures of 512 pixels, meshes, landmarks, labels and coefficients in one folder."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files  # noqa: E402
from dataset_preprocessing.ffhq.faces_file import read_faces  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402
from dataset_preprocessing.ffhq.fitting import crops_inside  # noqa: E402
from dataset_preprocessing.ffhq.head_choice import head_model_options, load_fitter  # noqa: E402
from dataset_preprocessing.ffhq.points import reference_points  # noqa: E402
from dataset_preprocessing.ffhq.wild_output import ItemWriter, write_tables  # noqa: E402


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

    Items that are there already are kept; the last two files are written anew. check_data.py --driving=OUT checks all.
    """
    out = pathlib.Path(out)
    try:
        fitter = load_fitter('cpu', head_model, flame_path)
        photographs, names = files.list_pictures(pathlib.Path(images)), files.list_files(pathlib.Path(fits), ('.npz',))
        read = {name: fitter.read(path) for name, path in names.items()}
        found = {name: _largest(pathlib.Path(faces) / f'{name}.json') for name in read}
        crops, _ = crops_inside(found, reference_points(reference), fps)
        missing = [name for name in read if name not in photographs or name not in crops]
        if missing:
            raise PreprocessError(f'{names[missing[0]]}: expected the fit of a picture of {images}, found none of it')
        writer = ItemWriter(fitter, out, None if overlays is None else pathlib.Path(overlays))
        files.run_step(
            'items', {name: photographs[name] for name in read}, writer.last_files,
            lambda name, path: writer(name, files.read_picture(path), crops[name], read[name]),
        )  # fmt: skip
        write_tables(out, read, fitter, fps, same_person or fps is not None)
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error


def _largest(path):
    """Return the largest face of a file of detect.py."""
    faces = read_faces(path).faces
    if not faces:
        raise PreprocessError(f'{path}: expected the face of a fit, found none')
    return faces[0]


if __name__ == '__main__':
    main()
