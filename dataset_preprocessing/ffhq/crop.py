# SPDX-License-Identifier: Apache-2.0
"""Cut the pictures of 512 pixels that networks are trained with and driven by, out of photographs."""

import pathlib
import sys

import click
from PIL import ImageOps

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files  # noqa: E402
from dataset_preprocessing.ffhq.cropping import Cutter, realigner  # noqa: E402
from dataset_preprocessing.ffhq.files import MIRROR, PreprocessError  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('images', metavar='DIR', type=cli.PathText(), required=True, help='Photographs.')
@cli.option('points', metavar='DIR|JSON', type=cli.PathText(), help='Five points: points5 of detect.py, MTCNN, ...')
@cli.option('points68', metavar='DIR', type=cli.PathText(), help='68 landmarks: points68 of detect.py.')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Where to write the pictures.')
@cli.option('reference', metavar='MAT', type=cli.PathText(),
            help="BFM's similarity_Lm3D_all.mat. Default: the published place, else the embedded head.")
@cli.flag('ffhq', help='Re-align as FFHQ, to 1500 pixels, by --points68 instead; those are cut in a second turn.')
@cli.flag('mirror', help='Write the mirror image of each, too: <name>_mirror.png.')
@cli.option('out_points68', metavar='DIR', type=cli.PathText(),
            help='Write where --points68 lie in the new pictures, for fit_meshes.py and check_data.py.')
def main(images, points, points68, out, reference, ffhq, mirror, out_points68):
    """Write <out>/<name>.png for each photograph that has points; pictures that are there already are kept."""
    if (points68 if ffhq else points) is None:
        raise click.UsageError(f'--{"points68" if ffhq else "points"}: expected where the faces are, got none.')
    if out_points68 is not None and (points68 is None or ffhq):
        raise click.UsageError('--out-points68: expected with --points68 and without --ffhq only.')
    if ffhq and mirror:
        raise click.UsageError('--mirror: expected without --ffhq, in the second turn.')
    out = pathlib.Path(out)
    try:
        items = files.list_pictures(pathlib.Path(images))
        cut = realigner(pathlib.Path(points68)) if ffhq else Cutter(points, reference, points68, out_points68)

        def outputs(name):
            written = [out / f'{name}.png'] + ([out / f'{name}{MIRROR}.png'] if mirror else [])
            return written + ([pathlib.Path(out_points68) / f'{name}.txt'] if out_points68 else [])

        def work(name, path):
            picture = cut(name, path)
            if mirror:
                files.save_png(ImageOps.mirror(picture), out / f'{name}{MIRROR}.png')
            files.save_png(picture, out / f'{name}.png')

        files.run_step('crops', items, outputs, work)
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error


if __name__ == '__main__':
    main()
