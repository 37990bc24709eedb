# SPDX-License-Identifier: Apache-2.0
"""The options that say which head model is fitted."""

from collections.abc import Callable

import click
import torch

import cli
from dataset_preprocessing.ffhq.fitting import HEAD_MODELS, HeadFitter


def head_model_options(command: Callable) -> Callable:
    """Add --head-model and --flame-path, for `load_fitter`, to a command."""
    for add in (
        cli.option('flame_path', metavar='PATH', type=cli.PathText(),
                   help='generic_model.pkl with landmark_embedding.npy and head_template.obj beside it, or the folder '
                        'of all. Default: dataset_preprocessing/ffhq/deca/data.'),
        cli.option('head_model', type=click.Choice(HEAD_MODELS), default=HEAD_MODELS[0], show_default=True,
                   help='What is fitted: the embedded head, or FLAME from your own files.'),
    ):  # fmt: skip
        command = add(command)
    return command


def load_fitter(device: torch.device, head_model: str, flame_path: str | None) -> HeadFitter:
    """Return the fitter of the options; click.UsageError where they contradict each other."""
    if flame_path is not None and head_model != 'flame':
        raise click.UsageError('--flame-path: expected --head-model=flame with it, got none.')
    return HeadFitter(device, head_model, flame_path)
