# SPDX-License-Identifier: Apache-2.0
"""Train Next3D from scratch, or on top of trained EG3D or Next3D weights, on one or many GPUs."""

import json
import os
import sys

import click

import cli
from torch_utils.distributed import (
    RankLostError,
    RanksFailedError,
    ToldElsewhereError,
    is_launched,
    joined,
    launch,
)
from training import evaluation, loop
from training.config import BLEND_PLANES
from training.dataset import has_expressions, open_source
from training.head_raster import PLANE_LAYOUTS
from training.layers import NOISE_MODES
from training.loss import DENSITY_REGIONS, REG_TYPES
from training.mesh_render import RENDER_COLOURS
from training.superresolution import VARIANTS
from training.train_config import AUGMENT_MODES, CAMERA_SETUPS, DEFAULTS, PRESETS, TrainConfig, make_config, preset_of

USER_STATUS = 3  # Exit status of a process that has told the user what to mend.
SIGNAL_STATUS = {'SIGINT': 130, 'SIGTERM': 143}  # As shells report them.
COUNT = click.IntRange(0, 2**31 - 1)
POSITIVE = cli.FiniteFloat(minimum=0, maximum=1e9)
NOT_NEGATIVE = cli.FiniteFloat(minimum=-1e-12, maximum=1e9)
PROBABILITY = click.FloatRange(0, 1)


class Choice(click.ParamType):
    """One of some words; for other words of the published script the reason why they are refused."""

    name = 'choice'

    def __init__(self, words, refused=None):
        self.words, self.refused = tuple(words), refused or {}

    def get_metavar(self, param, ctx=None):
        """Return the words for the help text."""
        return '|'.join(self.words)

    def convert(self, value, param, ctx):
        """Return the word, without a module's name before it."""
        word = value.rsplit('.', 1)[-1]
        if word in self.refused:
            self.fail(f'{word!r} {self.refused[word]}.', param, ctx)
        if word not in self.words:
            self.fail(f'expected one of {", ".join(self.words)}, got {value!r}.', param, ctx)
        return word


class Switch(Choice):
    """Choice that also takes a bool: True stands for the first word, False for None."""

    def convert(self, value, param, ctx):
        """Return the word or None."""
        try:
            return self.words[0] if click.BOOL.convert(value, param, ctx) else None
        except click.BadParameter:
            return super().convert(value, param, ctx)


def setting(name, text, kind, metavar=None):
    """Return an option that overrides a setting of the preset; its help tells the default."""
    values = {preset: PRESETS[preset].get(name, DEFAULTS[name]) for preset in PRESETS}
    common = DEFAULTS[name]
    if len(set(map(str, values.values()))) == 1:
        default = next(iter(values.values()))
        told = 'none' if default is None else default
    else:
        usual = [] if common is None else [f'{common}']
        told = ', '.join(usual + [f'{preset}: {value}' for preset, value in values.items() if value != common])
    return cli.option(name, type=kind, metavar=metavar, default=None, help=f'{text}  [default: {told}]')


def switch(name, text):
    """Return a setting that takes a bool, or stands alone for True."""
    text = f'{text}  [default: {DEFAULTS[name]}]'
    return cli.option(name, type=bool, is_flag=False, flag_value=True, default=None, metavar='BOOL', help=text)


def refused(name, reason):
    """Return a hidden option of the published script that is refused with the reason."""

    def refuse(ctx, param, value):
        if value is not None:
            raise click.UsageError(f'--{name}: {reason}; leave it out.')

    return cli.option(name, default=None, hidden=True, expose_value=False, callback=refuse)


def check_metrics(_ctx, _param, value):
    """Split the list of metrics and refuse names that nothing registered."""
    names = [] if value in (None, '', 'none') else value.split(',')
    unknown = [name for name in names if name not in evaluation.names()]
    if unknown:
        known = ', '.join(evaluation.names()) or 'none so far'
        raise click.UsageError(f'--metrics: {", ".join(unknown)}: expected registered metrics ({known}).')
    return tuple(names)


def check_cond(_ctx, _param, value):
    """Refuse training without labels."""
    if value is False:
        raise click.UsageError('--cond=False: pictures cannot be rendered without camera labels; leave it out.')


NEVER_READ = 'the published script never read it'
NEVER_RAN = 'fails in the published code'
OPTIONS = [
    # What and where.
    cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Where run directories are made.'),
    cli.option(
        'cfg', type=Choice([*CAMERA_SETUPS, *PRESETS]), required=True,
        help='Preset; ffhq, afhq, shapenet: cameras of that data set, and the preset of the size of the pictures.',
    ),
    cli.option('data', metavar='DIR|ZIP', type=cli.PathText(), required=True,
               help='Pictures with dataset.json, or a folder written by pack.py.'),
    cli.option('rdata', metavar='DIR|ZIP', type=cli.PathText(), default=None,
               help='Meshes; landmarks beside them. Not for a packed folder.'),
    setting('topology_path', 'UV-mapped template mesh; uv_face_mask.png beside it is used.', cli.PathText(), 'OBJ'),
    setting('gpus', 'Processes, one per GPU; under torchrun all of them.', click.IntRange(1, 4096), 'N'),
    setting('batch', 'Images per iteration over all GPUs.', click.IntRange(1, 65536), 'N'),
    setting('batch_gpu', 'Images at a time on one GPU; gradients add up.', click.IntRange(1, 65536), 'N'),
    setting('gamma', 'Weight of the R1 penalty.', NOT_NEGATIVE, 'FLOAT'),
    # Start and end.
    cli.option('resume', metavar='auto|PKL|URL', default='auto', show_default=True,
               help='Weights to start a run from, of EG3D or Next3D. A run that holds a state goes on from that.'),
    cli.flag('fresh', help='Begin anew, in a new directory, whatever there is.'),
    setting('kimg', 'Thousands of images to train for.', POSITIVE, 'FLOAT'),
    setting('tick', 'Thousands of images between two reports.', POSITIVE, 'FLOAT'),
    setting('snap', 'Ticks between two snapshots.', click.IntRange(1, 10**6), 'N'),
    setting('save_minutes', 'A state at least every so many minutes; 0: at snapshots alone.', NOT_NEGATIVE, 'FLOAT'),
    setting('desc', 'Words in the name of the run directory.', click.STRING, 'TEXT'),
    cli.option('metrics', metavar='LIST', default=None, callback=check_metrics,
               help='Registered metrics to evaluate at snapshots.  [default: none]'),
    cli.option('dry_run', '-n', is_flag=True, help='Print the resolved options and stop.'),
    # Data and conditioning.
    cli.option('cond', type=bool, default=True, expose_value=False, callback=check_cond, metavar='BOOL',
               help='Train with labels; there is no other way.'),
    switch('mirror', 'Add mirror images, cameras and meshes.'),
    switch('gen_pose_cond', 'Condition the generator on the camera.'),
    switch('gen_exp_cond', 'Append the expressions of dataset_exp.json to labels.'),
    cli.option('load_lms', type=bool, default=True, expose_value=False, metavar='BOOL',
               help='Accepted; landmarks are always read.'),
    setting('c_scale', "Factor on the generator's label.", NOT_NEGATIVE, 'FLOAT'),
    setting('gpc_reg_prob', 'How often the conditioning camera is swapped.', PROBABILITY, 'FLOAT'),
    setting('gpc_reg_fade_kimg', 'Length of its fade from 1.', NOT_NEGATIVE, 'FLOAT'),
    setting('disc_c_noise', "Noise on the discriminator's label, in its deviations.", NOT_NEGATIVE, 'FLOAT'),
    setting('disc_render', 'Show the discriminator the mesh, coloured by normals (True) or UV.',
            Switch(RENDER_COLOURS), 'BOOL|normal|uv'),
    # Augmentation.
    setting('aug', 'Augmentation.', Choice(AUGMENT_MODES)),
    setting('p', 'Its probability (--aug=fixed).', PROBABILITY, 'FLOAT'),
    setting('target', 'Its target (--aug=ada).', PROBABILITY, 'FLOAT'),
    setting('freezed', 'First layers of the discriminator that stay as they are.', click.IntRange(0, 64), 'N'),
    # Networks and optimisation.
    setting('cbase', 'Channels of a block at resolution r: at most cbase/r ...', click.IntRange(64, 2**20), 'N'),
    setting('cmax', '... and cmax.', click.IntRange(1, 4096), 'N'),
    setting('map_depth', 'Layers of the mapping network.', click.IntRange(1, 32), 'N'),
    setting('mbstd_group', 'Images whose deviation the discriminator sees.', click.IntRange(1, 4096), 'N'),
    setting('glr', 'Learning rate of the generator.', POSITIVE, 'FLOAT'),
    setting('dlr', 'Learning rate of the discriminator.', POSITIVE, 'FLOAT'),
    setting('decoder_lr_mul', "Factor on the decoder's learning rate.", POSITIVE, 'FLOAT'),
    setting('style_mixing_prob', 'How often two latents are mixed.', PROBABILITY, 'FLOAT'),
    setting('sr_module', 'Super-resolution; by default that of the size of the pictures.', Choice(VARIANTS), 'NAME'),
    setting('sr_noise_mode', 'Noise of super-resolution.', Choice(sorted(NOISE_MODES))),
    setting('g_num_fp16_res', "Resolutions in half precision: the backbones' ...", COUNT, 'N'),
    setting('sr_num_fp16_res', "... super-resolution's (any or none) ...", COUNT, 'N'),
    setting('d_num_fp16_res', "... the discriminator's.", COUNT, 'N'),
    setting('plane_layout', 'How views become planes.', Choice(PLANE_LAYOUTS)),
    setting('blend_planes', 'Planes that the mesh paints.', Choice(BLEND_PLANES)),
    cli.option('model_version', type=Choice(['next3d']), default='next3d', expose_value=False, show_default=True,
               help='Accepted.'),
    setting('discriminator_version', 'Sees the picture, the raw one too, or splits the label.',
            Choice(['single', 'dual', 'dual_label'])),
    # Schedules and regularisation.
    setting('neural_rendering_resolution_initial', 'Side of raw pictures.', click.IntRange(4, 512), 'N'),
    setting('neural_rendering_resolution_final', 'The same at the end of a fade.', click.IntRange(4, 512), 'N'),
    setting('neural_rendering_resolution_fade_kimg', 'Length of the fade.', NOT_NEGATIVE, 'FLOAT'),
    setting('blur_fade_kimg', "Length of the fade of the discriminator's blur.", NOT_NEGATIVE, 'FLOAT'),
    switch('resume_blur', 'Blur although weights are given to start from.'),
    setting('density_reg', 'Weight of the density regularisation.', NOT_NEGATIVE, 'FLOAT'),
    setting('density_reg_every', 'Iterations between two of them; 0: none.', click.IntRange(0, 10**6), 'N'),
    setting('density_reg_p_dist', 'Distance of the points compared.', POSITIVE, 'FLOAT'),
    setting('density_region', 'Where they lie: the volume, or [-1, 1]³ as published.', Choice(DENSITY_REGIONS)),
    setting('reg_type', 'Kind of density regularisation.',
            Choice(REG_TYPES, dict.fromkeys(('l1-alt', 'total-variation', 'monotonic-detach'), NEVER_RAN))),
    # Machine.
    setting('seed', 'Of everything random.', click.IntRange(0, 2**31 - 1), 'N'),
    cli.option('device', type=Choice(['auto', 'cuda', 'cpu']), default='auto', show_default=True,
               help='auto: CUDA where there is one.'),
    setting('workers', 'Processes that load data, for each GPU.', click.IntRange(0, 256), 'N'),
    switch('nobench', "Leave cuDNN's convolutions untuned."),
    setting('dist_timeout', 'Seconds after which a silent process counts as lost.', POSITIVE, 'FLOAT'),
    cli.option('dataset_type', type=Choice(['image'], {'video': NEVER_RAN}), default=None, hidden=True,
               expose_value=False),
    refused('c_noise', NEVER_READ),
    refused('sr_first_cutoff', NEVER_READ),
    refused('sr_first_stopband', NEVER_READ),
]


def with_options(command):
    """Decorate a function with OPTIONS, in their order."""
    for add in reversed(OPTIONS):
        command = add(command)
    return command


@click.command(cls=cli.Command)
@with_options
@click.pass_context
def main(ctx, dry_run, fresh, **options):
    """Train Next3D on pictures with cameras and meshes.

    Writes DIR/NNNNN-name with snapshots for the other scripts, pictures, statistics and complete states. Run the same
    command again after an interruption: it goes on from the newest state. --gpus=N starts N processes; on several
    machines start the command by torchrun.
    """
    config = resolve(options)
    if dry_run:
        click.echo(json.dumps(config.to_dict(), indent=1))
        return
    if is_launched():
        run_rank(config.to_dict(), fresh)
    elif config.gpus == 1:
        with joined(config.device, config.timeout_s) as ranks:
            ctx.exit(SIGNAL_STATUS.get(loop.train(config, ranks, fresh), 0))
    else:
        start(ctx, config, fresh)


def resolve(options) -> TrainConfig:
    """Return the run that the options ask for; reads the data set's list and one picture."""
    given = {name: value for name, value in options.items() if value is not None}
    cfg, outdir, data = (given.pop(name) for name in ('cfg', 'outdir', 'data'))
    if given['resume'] == 'auto':
        del given['resume']
    if given['device'] == 'auto':
        given['device'] = cli.Device().convert('auto', None, None).type
    if given.get('gen_exp_cond') and not has_expressions(data):
        click.echo(f'Warning: {data} has no expression labels (dataset_exp.json): labels stay 25 long', err=True)
        given['gen_exp_cond'] = False
    size = int(os.environ['WORLD_SIZE']) if is_launched() else given.get('gpus', 1)
    if given.setdefault('gpus', size) != size:
        raise click.UsageError(f'--gpus={given["gpus"]}: torchrun has started {size} processes; leave it out.')
    resolution = open_source(data, given.get('rdata')).image(0).shape[-1]
    try:
        preset, given['camera_setup'] = preset_of(cfg, resolution)
        return make_config(preset, outdir, data, **given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def start(ctx, config, fresh):
    """Start the processes, wait, and pass on how they ended."""
    loop.compile_plugins()  # Not in the processes, where the others would wait for it.
    try:
        launch(run_rank, (config.to_dict(), fresh), config.gpus)
    except RanksFailedError as error:
        if error.status not in (USER_STATUS, *SIGNAL_STATUS.values()):
            raise click.ClickException(f'{error}; the same command goes on from the newest state') from error
        ctx.exit(1 if error.status == USER_STATUS else error.status)


def run_rank(config, fresh):
    """Train in one of several processes; ends the process with a status that `start` knows."""
    config = TrainConfig.from_dict(config)
    status = 1
    try:
        with joined(config.device, config.timeout_s) as ranks:
            status = SIGNAL_STATUS.get(loop.train(config, ranks, fresh), 0)
    except ToldElsewhereError:
        status = USER_STATUS
    except (*cli.USER_ERRORS, OSError) as error:
        if int(os.environ['RANK']) == 0 or isinstance(error, loop.ReadError):
            click.echo(f'Error: {cli.describe(error)}', err=True)
        status = USER_STATUS
    except RankLostError as error:
        click.echo(f'Error: {error}', err=True)
    # Not sys.exit: an orderly end would wait for processes that may be gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == '__main__':
    main()
