# SPDX-License-Identifier: Apache-2.0
"""Train Next3D from scratch, or on top of trained EG3D or Next3D weights, on one or many GPUs."""

import json
import os
import re
import signal

import click
import torch

import cli
import legacy
import measure
from geometry.meshes import MeshFileError
from torch_utils.distributed import (
    SIGNAL_OFFSET,
    RanksFailedError,
    is_launched,
    joined,
    launch,
)
from training import evaluation, loop
from training.config import BLEND_PLANES
from training.dataset import has_expressions, open_source
from training.generator import Next3DGenerator
from training.head_raster import PLANE_LAYOUTS
from training.layers import NOISE_MODES
from training.loss import DENSITY_REGIONS, REG_TYPES
from training.mesh_render import RENDER_COLOURS
from training.precision import COMPUTE_DTYPES
from training.run_dir import RunError
from training.superresolution import VARIANTS
from training.topology import load_topology
from training.train_config import AUGMENT_MODES, CAMERA_SETUPS, DEFAULTS, PRESETS, TrainConfig, make_config, preset_of

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
measure.register()


class Number(cli.FiniteFloat):
    """A number within limits, which the message tells in words; NaN, which click's ranges take, is refused."""

    def __init__(self, is_within, expected):
        super().__init__()
        self.is_within, self.expected = is_within, expected

    def convert(self, value, param, ctx):
        """Return the float or fail with what was expected."""
        try:
            number = super().convert(value, param, ctx)
        except click.BadParameter:
            number = None
        if number is None or not self.is_within(number):
            self.fail(f'expected a number {self.expected}, got {value!r}.', param, ctx)
        return number


COUNT = click.IntRange(0, 64)
POSITIVE = Number(lambda x: 0 < x <= 1e9, 'above 0, up to 1e9')
NOT_NEGATIVE = Number(lambda x: 0 <= x <= 1e9, 'from 0 to 1e9')
PROBABILITY = Number(lambda x: 0 <= x <= 1, 'from 0 to 1')


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
    """Choice that also takes a bool: True stands for the first word."""

    def convert(self, value, param, ctx):
        """Return the word or False."""
        try:
            return click.BOOL.convert(value, param, ctx) and self.words[0]
        except click.BadParameter:
            return super().convert(value, param, ctx)


def setting(name, text, kind, metavar=None):
    """Return an option that overrides a setting of the preset; its help tells the default."""
    values = {preset: PRESETS[preset].get(name, DEFAULTS[name]) for preset in PRESETS}
    common = DEFAULTS[name]
    if len(set(map(str, values.values()))) == 1:
        default = next(iter(values.values()))
        told = 'none' if default in (None, '') else default
    else:
        usual = [] if common is None else [f'{common}']
        told = ', '.join(usual + [f'{preset}: {value}' for preset, value in values.items() if value != common])
    ending = '' if told == 'none' and 'by default' in text else f'  [default: {told}]'
    return cli.option(name, type=kind, metavar=metavar, default=None, help=f'{text}{ending}')


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
    names = [] if (value or 'none').lower() == 'none' else [name.strip() for name in value.split(',')]
    bases = [evaluation.split_name(name)[0] for name in names]
    unknown = [name for name in bases if name not in evaluation.names()]
    if unknown:
        known = ', '.join(evaluation.names())
        raise click.UsageError(f'--metrics: {", ".join(unknown)}: expected registered metrics ({known}).')
    return tuple(names)


def check_desc(_ctx, _param, value):
    """Refuse words that cannot be part of the name of a folder."""
    if value and not re.fullmatch(r'[^/\\\x00-\x1f]{1,120}', value):
        raise click.UsageError(f'--desc: expected up to 120 characters of a folder name, got {value!r}.')
    return value


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
        help='Preset. ffhq, afhq, shapenet: cameras of that data set, networks for the size of the pictures.',
    ),
    cli.option('data', metavar='DIR|ZIP', type=cli.PathText(), required=True,
               help='Pictures with dataset.json, or a folder written by pack.py.'),
    cli.option('rdata', metavar='DIR|ZIP', type=cli.PathText(), default=None,
               help='Meshes; landmarks beside them. Not for a packed folder.'),
    setting('topology_path', 'UV-mapped template mesh; uv_face_mask.png beside it is used.', cli.PathText(), 'OBJ'),
    setting('gpus', 'Number of GPUs; on the CPU, of processes. Under torchrun: all processes, and may be left out.',
            click.IntRange(1, 4096), 'N'),
    setting('batch', 'Images per iteration over all GPUs.', click.IntRange(1, 65536), 'N'),
    setting(
        'batch_gpu',
        'Images at a time on one GPU, whose gradients add up; by default up to 8 that divide its share.',
        click.IntRange(1, 65536), 'N',
    ),
    setting('gamma', 'Weight of the R1 gradient penalty.', NOT_NEGATIVE, 'FLOAT'),
    # Start and end.
    cli.option('resume', metavar='auto|PKL|URL', type=cli.PathText(), default='auto', show_default=True,
               help='EG3D or Next3D weights to start from; auto: random ones. Either way an interrupted run goes on.'),
    cli.flag('fresh', help='Begin anew in a new directory even where an interrupted run could go on.'),
    setting('kimg', 'Thousands of images to train for.', POSITIVE, 'FLOAT'),
    setting('tick', 'Thousands of images between two reports.', POSITIVE, 'FLOAT'),
    setting('snap', 'Ticks between two snapshots.', click.IntRange(1, 10**6), 'N'),
    setting('save_minutes', 'Save the complete state at least every so many minutes; 0: at snapshots alone.',
            NOT_NEGATIVE, 'FLOAT'),
    cli.option('desc', metavar='TEXT', default=None, callback=check_desc,
               help='Ending of the name of the run directory.  [default: none]'),
    cli.option('metrics', metavar='LIST', default=None, callback=check_metrics,
               help='Metrics to evaluate at snapshots (docs/metrics.md); NAME-N: with N pictures.  [default: none]'),
    cli.option('dry_run', '-n', is_flag=True, help='Print the resolved configuration as JSON and stop.'),
    # Data and conditioning.
    cli.option('cond', type=bool, default=True, expose_value=False, callback=check_cond, metavar='BOOL',
               help='Train with labels; there is no other way.'),
    switch('mirror', 'Also train on mirror images, with cameras and meshes mirrored.'),
    switch('gen_pose_cond', 'Condition the generator on the camera.'),
    switch('gen_exp_cond', 'Append the expressions of dataset_exp.json to labels.'),
    cli.option('load_lms', type=bool, default=True, expose_value=False, metavar='BOOL',
               help='Accepted; landmarks are always read.'),
    setting('c_scale', "Factor on the generator's label.", NOT_NEGATIVE, 'FLOAT'),
    setting('gpc_reg_prob', 'How often the camera it is conditioned on is another than is rendered (--gen-pose-cond).',
            PROBABILITY, 'FLOAT'),
    setting('gpc_reg_fade_kimg', 'Thousands of images over which that falls from 1; at once with --resume.',
            NOT_NEGATIVE, 'FLOAT'),
    setting('disc_c_noise', "Noise on the discriminator's label, in standard deviations of the label.",
            NOT_NEGATIVE, 'FLOAT'),
    setting('disc_render', 'Show the discriminator a rendering of the mesh: normals (True), UVs, or waves of UVs.',
            Switch(RENDER_COLOURS), 'BOOL|normal|uv|waves'),
    setting('disc_gaze', 'Weight of real pictures with a rendering that looks elsewhere, as ones that are not real.',
            NOT_NEGATIVE, 'FLOAT'),
    # Augmentation.
    setting('aug', 'Augmentation of what the discriminator sees; ada: adaptive.', Choice(AUGMENT_MODES)),
    setting('p', 'Probability of augmentation (--aug=fixed).', PROBABILITY, 'FLOAT'),
    setting('target', "Target of the adaptation: mean sign of the discriminator's scores of real images (--aug=ada).",
            PROBABILITY, 'FLOAT'),
    setting('freezed', 'How many of the first layers of the discriminator are not trained.',
            click.IntRange(0, 64), 'N'),
    # Networks and optimisation.
    setting('cbase', 'Channels of a block at resolution r: cbase/r ...', click.IntRange(64, 2**20), 'N'),
    setting('cmax', '... and at most cmax. In demo, demo128 and toy these do not change the discriminator.',
            click.IntRange(1, 4096), 'N'),
    setting('map_depth', 'Layers of the mapping network.', click.IntRange(1, 32), 'N'),
    setting('mbstd_group', 'Images in a group whose standard deviation the discriminator sees.',
            click.IntRange(1, 4096), 'N'),
    setting('glr', 'Learning rate of the generator.', POSITIVE, 'FLOAT'),
    setting('dlr', 'Learning rate of the discriminator.', POSITIVE, 'FLOAT'),
    setting('decoder_lr_mul', "Factor on the decoder's learning rate.", POSITIVE, 'FLOAT'),
    setting('style_mixing_prob', 'How often the styles of two latents are mixed.', PROBABILITY, 'FLOAT'),
    setting('sr_module', 'Super-resolution; by default that of the size of the pictures.', Choice(VARIANTS), 'NAME'),
    setting('sr_noise_mode', 'Noise of super-resolution.', Choice(sorted(NOISE_MODES))),
    setting('g_num_fp16_res', "Resolutions in half precision: the backbones' ...", COUNT, 'N'),
    setting('sr_num_fp16_res', "... super-resolution's (any or none) ...", COUNT, 'N'),
    setting('d_num_fp16_res', "... the discriminator's.", COUNT, 'N'),
    setting('precision', "Arithmetic on a GPU: as published; TF32; all the generator's convolutions in bf16 or fp16.",
            Choice(COMPUTE_DTYPES)),
    setting('plane_layout', 'How views of the mesh become planes: as published, or aligned with the volume; with '
            '--resume of a Next3D network as there.', Choice(PLANE_LAYOUTS)),
    setting('blend_planes', 'Planes that the mesh paints; with --resume of a Next3D network as there.',
            Choice(BLEND_PLANES)),
    cli.option('model_version', type=Choice(['next3d']), default='next3d', expose_value=False, show_default=True,
               help='Accepted.'),
    setting('discriminator_version',
            'single: sees the picture; dual: the raw one too; dual_label: and splits the label.',
            Choice(['single', 'dual', 'dual_label'])),
    # Schedules and regularisation.
    setting('neural_rendering_resolution_initial', 'Side in pixels of the raw pictures that are rendered.',
            click.IntRange(4, 512), 'N'),
    setting('neural_rendering_resolution_final', 'The same at the end of a fade; by default it stays.',
            click.IntRange(4, 512), 'N'),
    setting('neural_rendering_resolution_fade_kimg', 'Thousands of images that this fade takes.',
            NOT_NEGATIVE, 'FLOAT'),
    setting(
        'blur_fade_kimg',
        'Thousands of images, at a batch of 32, over which the blur of what the discriminator sees fades.',
        NOT_NEGATIVE, 'FLOAT',
    ),
    switch('resume_blur', 'Blur also with --resume, which otherwise leaves it off.'),
    setting('density_reg', 'Weight of the density regularisation.', NOT_NEGATIVE, 'FLOAT'),
    setting('density_reg_every', 'Every so many iterations; 0: never.', click.IntRange(0, 10**6), 'N'),
    setting('density_reg_p_dist', 'Distance of the points whose densities are compared.', POSITIVE, 'FLOAT'),
    setting('density_region', 'Where they lie: in the volume, or in [-1, 1]³ as published.', Choice(DENSITY_REGIONS)),
    setting('reg_type', 'Kind of density regularisation.',
            Choice(REG_TYPES, dict.fromkeys(('l1-alt', 'total-variation', 'monotonic-detach'), NEVER_RAN))),
    # Machine.
    setting('seed', 'Seed of everything random.', click.IntRange(0, 2**31 - 1), 'N'),
    cli.option('device', type=Choice(['auto', 'cuda', 'cpu']), default='auto', show_default=True,
               help='auto: CUDA where there is one.'),
    setting('workers', 'Processes that load data, for each GPU.', click.IntRange(0, 256), 'N'),
    switch('nobench', "Leave cuDNN's convolutions untuned."),
    switch('nographs', 'Launch every kernel by itself instead of whole phases as CUDA graphs.'),
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
    check_machine(config)
    requests = [evaluation.split_name(name) for name in config.metrics]
    measure.expect_files([name for name, _ in requests])
    if requests:
        measure.expect_data(requests, open_source(config.data, config.rdata))
    if is_launched():
        run_rank(config.to_dict(), fresh)
    elif config.gpus == 1:
        with joined(config.device, config.timeout_s) as ranks:
            ctx.exit(exit_status(loop.train(config, ranks, fresh)))
    else:
        start(ctx, config, fresh)


def resolve(options) -> TrainConfig:
    """Return the run that the options ask for; reads the data set's list and one picture."""
    given = {name: value for name, value in options.items() if value is not None}
    cfg, outdir, data = (given.pop(name) for name in ('cfg', 'outdir', 'data'))
    given['topology_path'] = os.path.expanduser(given.get('topology_path', DEFAULTS['topology_path']))
    given['resume'] = None if given['resume'] == 'auto' else os.path.expanduser(given['resume'])
    if given['device'] == 'auto':
        given['device'] = cli.Device().convert('auto', None, None).type
    for name, path in {'data': data, 'rdata': given.get('rdata')}.items():
        if path is not None and not os.path.exists(os.path.expanduser(path)):
            raise click.UsageError(f'--{name}: {path}: expected a folder or a zip archive, found nothing there.')
    if given.get('gen_exp_cond') and not has_expressions(data):
        if os.environ.get('RANK', '0') == '0':
            text = '--gen_exp_cond: no expression labels (dataset_exp.json) in'
            click.echo(f'Warning: {text} {data}: labels stay 25 long', err=True)
        given['gen_exp_cond'] = False
    size = int(os.environ['WORLD_SIZE']) if is_launched() else given.get('gpus', 1)
    if given.setdefault('gpus', size) != size:
        raise click.UsageError(f'--gpus={given["gpus"]}: torchrun has started {size} processes; leave it out.')
    resolution = open_source(data, given.get('rdata')).image(0).shape[-1]
    try:
        preset, given['camera_setup'] = preset_of(cfg, resolution)
        if not {'plane_layout', 'blend_planes'} <= given.keys():
            given = {**planes_of(given['resume']), **given}
        return make_config(preset, outdir, data, **given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def planes_of(path) -> dict[str, str]:
    """Return the settings of planes that weights to start from were trained with; none where there are no such."""
    try:
        networks = {} if path is None else legacy.load_network_pkl(path, only=('G', 'G_ema'))
    except (legacy.NetworkFileError, OSError):
        return {}  # Told when training wants the weights; a run that has a state of its own goes on without them.
    network = networks.get('G', networks.get('G_ema'))
    if not isinstance(network, Next3DGenerator):
        return {}
    return {name: getattr(network.config, name) for name in ('plane_layout', 'blend_planes')}


def check_machine(config):
    """Refuse a template or a number of GPUs that training would fail with once a run directory is there."""
    try:
        load_topology(config.topology_path, config.generator.texture_resolution)
    except (OSError, MeshFileError) as error:
        raise click.UsageError(f'--topology_path: {cli.describe(error)}') from error
    if config.device == 'cuda':
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        wanted = int(os.environ['LOCAL_RANK']) + 1 if is_launched() else config.gpus
        if found < wanted:
            hint = '' if found else ' (--device=cpu trains without)'
            raise click.UsageError(f'--gpus={config.gpus}: expected {wanted} GPUs here, found {found}{hint}.')


def start(ctx, config, fresh):
    """Start the processes, wait, and pass on how they ended."""
    loop.compile_plugins()  # Not in the processes, where the others would wait for it.
    try:
        launch(run_rank, (config.to_dict(), fresh), config.gpus)
    except RanksFailedError as error:
        if error.status not in (cli.USER_STATUS, *map(exit_status, STOP_SIGNALS)):
            raise click.ClickException(f'{error}; the same command goes on from the newest state') from error
        ctx.exit(1 if error.status == cli.USER_STATUS else error.status)


def exit_status(number):
    """Return the exit status, as shells tell it, of a run that a signal stopped; 0 for none."""
    return SIGNAL_OFFSET + number if number else 0


def run_rank(config, fresh):
    """Train in one of several processes; where that fails, end it with a status that `start` knows."""
    config = TrainConfig.from_dict(config)

    def work():
        with joined(config.device, config.timeout_s) as ranks:
            return exit_status(loop.train(config, ranks, fresh))

    cli.run_rank(work, RunError)  # All processes agree on these errors.


if __name__ == '__main__':
    main()
