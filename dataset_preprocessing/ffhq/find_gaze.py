# SPDX-License-Identifier: Apache-2.0
"""Where the eyes of fitted heads look, as files that fit_meshes.py takes."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files  # noqa: E402
from dataset_preprocessing.ffhq.fitting import read_fit  # noqa: E402
from dataset_preprocessing.ffhq.gaze import angles_of_gaze_file  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('fits', metavar='DIR', type=cli.PathText(), required=True, help='Fits of fit_head.py.')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Where to write <name>.txt.')
def main(fits, out):
    """Write left pitch, left yaw, right pitch, right yaw in radians for each fit, as FaceVerse's gaze files have them.

    Name the folder to fit_meshes.py by --gaze: DECA does not tell where eyes look. Files that are there already,
    and are newer than their fits, are kept.
    """
    folder = pathlib.Path(out)

    def work(name, path):
        angles = angles_of_gaze_file(read_fit(path).gaze)
        files.write_text(' '.join(f'{angle:.6f}' for angle in angles) + '\n', folder / f'{name}.txt')

    try:
        items = files.list_files(pathlib.Path(fits), ('.npz',))
        for name, path in items.items():
            if files.is_older([folder / f'{name}.txt'], path):
                (folder / f'{name}.txt').unlink()
        files.run_step('gaze', items, lambda name: [folder / f'{name}.txt'], work)
    except files.PreprocessError as error:
        raise click.ClickException(str(error)) from error


if __name__ == '__main__':
    main()
