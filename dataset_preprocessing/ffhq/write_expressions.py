# SPDX-License-Identifier: Apache-2.0
"""Write the expression labels that --gen_exp_cond of train_next3d.py reads, dataset_exp.json."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import expression_labels, files  # noqa: E402
from training.dataset import EXPRESSION_FILE  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('codes', metavar='DIR', type=cli.PathText(), help="DECA's codes: --codes of fit_meshes.py.")
@cli.option('coefficients', metavar='NPZ', type=cli.PathText(), help='Instead: coefficients.npz of the embedded head.')
@cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Folder with dataset.json.')
def main(codes, coefficients, outdir):
    """Write <outdir>/dataset_exp.json: 50 numbers for each picture.

    Of DECA: its expression code. Of the embedded head: its 52 expressions, where jaw and mouth to the left and to the
    right share a number each, left minus right.
    """
    if (codes is None) == (coefficients is None):
        raise click.UsageError('expected either --codes or --coefficients.')
    try:
        if coefficients is not None:
            found = expression_labels.read_coefficients(pathlib.Path(coefficients))
        else:
            paths = files.list_files(pathlib.Path(codes), ('.npz',))
            found = {f'{name}.png': expression_labels.read_code(path) for name, path in paths.items()}
    except files.PreprocessError as error:
        raise click.ClickException(str(error)) from error
    path = cli.make_outdir(outdir) / EXPRESSION_FILE
    files.write_text(expression_labels.labels_text(found), path)
    click.echo(f'{len(found)} expressions: {path}')


if __name__ == '__main__':
    main()
