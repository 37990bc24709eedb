# SPDX-License-Identifier: Apache-2.0
"""Find the faces in photographs: 478 points, 68 landmarks, five points, irises and expression scores, offline."""

import contextlib
import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files  # noqa: E402
from dataset_preprocessing.ffhq.faces_file import faces_text  # noqa: E402
from dataset_preprocessing.ffhq.landmarker import CONFIDENCE, Landmarker  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('images', metavar='DIR', type=cli.PathText(), required=True, help='Photographs, in folders at any depth.')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Folder for points.')
@cli.option('faces', type=click.Choice(['largest', 'all']), default='largest', show_default=True,
            help='Which faces <out>/faces tells; the points are those of the largest.')
@cli.option('confidence', metavar='FLOAT', type=cli.FiniteFloat(0, 1), default=CONFIDENCE, show_default=True,
            help='Of the detector, from which on it is a face.')
@cli.option('model', metavar='TASK', type=cli.PathText(),
            help='face_landmarker.task. Default: that of requirements-preprocess.txt.')
def main(images, out, faces, confidence, model):
    """Write points5/<name>.txt, points68/<name>.txt and faces/<name>.json for each photograph with a face.

    One without a face gets faces/<name>.json alone, and is told. Photographs that have theirs already are skipped.
    """
    out = pathlib.Path(out)
    try:
        items = files.list_pictures(pathlib.Path(images))
        landmarker = Landmarker(model, confidence, with_turns=True)
        find = click.get_current_context().with_resource(contextlib.closing(landmarker))

        def work(name, path):
            image = files.read_picture(path)
            found = find(image)
            for folder, points in (('points5', 'five'), ('points68', 'landmarks')) if found else ():
                files.write_points(getattr(found[0], points), out / folder / f'{name}.txt')
            # Last: where it is, the others are.
            told = found if faces == 'all' else found[:1]
            files.write_text(faces_text(told, image.size), out / 'faces' / f'{name}.json')
            if not found:
                raise files.NoFaceError(f'{path}: no face found')

        for name, reason in files.list_unread(pathlib.Path(images)).items():
            click.echo(f'{name}: {reason}')
        files.run_step('faces', items, lambda name: [out / 'faces' / f'{name}.json'], work)
    except files.PreprocessError as error:
        raise click.ClickException(str(error)) from error


if __name__ == '__main__':
    main()
