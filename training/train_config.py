# SPDX-License-Identifier: Apache-2.0
"""Everything that a training run depends on, as one frozen dataclass, and the table of presets."""

import hashlib
import json
from dataclasses import dataclass, field

from training.config import (
    EXPRESSION_LENGTH,
    LABEL_LENGTH,
    NEXT3D_PLANE_AXES,
    DiscriminatorConfig,
    MappingConfig,
    Next3DConfig,
    Serialisable,
)
from training.loss import LossConfig
from training.mesh_render import RENDER_COLOURS
from training.precision import COMPUTE_DTYPES
from training.superresolution import VARIANTS
from training.volume.render import SamplingConfig

AUGMENT_MODES = ('noaug', 'ada', 'fixed')


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Serialisable):
    """A training run.

    What is learned: preset, topology_path, with_expressions, mirror, generator, discriminator, loss. disc_render:
    colours of the mesh rendering that the discriminator also sees ('normal', 'uv', 'waves'), or None.
    How: batch images per iteration, in micro-batches of batch_gpu on each of `gpus` processes; learning rates,
    intervals of the two regularisations (0: none); freezed: first layers of D that stay; ema_rampup of the average
    (None: none); augmentation mode, probability (fixed), target and speed (ada); precision, a key of
    `training.precision.COMPUTE_DTYPES`; seed.
    From and to where: data, rdata, resume (weights to start from), outdir, desc. How long: kimg; a tick each tick_kimg;
    snapshots each snap ticks; a state at least every save_minutes (0: at snapshots alone). Machine: device 'cuda' or
    'cpu', gpus, workers, benchmark, graphs (CUDA graphs of the phases), timeout_s of collectives. patience: iterations
    in a row with a loss that is not finite before the run stops.
    """

    preset: str
    outdir: str
    data: str
    rdata: str | None = None
    topology_path: str = 'data/demo/head_template.obj'
    desc: str = ''
    resume: str | None = None
    with_expressions: bool = False
    mirror: bool = False
    disc_render: str | None = None
    generator: Next3DConfig = field(default_factory=Next3DConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: int = 32
    batch_gpu: int = 4
    glr: float = 0.0025
    dlr: float = 0.002
    density_reg_every: int = 4
    r1_every: int = 16
    freezed: int = 0
    ema_rampup: float | None = 0.05
    augment: str = 'noaug'
    augment_p: float = 0.2
    ada_target: float = 0.6
    ada_kimg: float = 500.0
    precision: str = 'fp32'
    seed: int = 0
    kimg: float = 25000.0
    tick_kimg: float = 4.0
    snap: int = 20
    save_minutes: float = 30.0
    metrics: tuple[str, ...] = ()
    patience: int = 32
    device: str = 'cuda'
    gpus: int = 1
    workers: int = 3
    benchmark: bool = True
    graphs: bool = True
    timeout_s: float = 600.0

    def __post_init__(self):
        if self.precision not in COMPUTE_DTYPES:
            raise ValueError(f'precision: expected one of {", ".join(COMPUTE_DTYPES)}, got {self.precision!r}')
        if self.augment not in AUGMENT_MODES:
            raise ValueError(f'augment: expected one of {", ".join(AUGMENT_MODES)}, got {self.augment!r}')
        if self.disc_render not in (None, *RENDER_COLOURS):
            raise ValueError(f'disc_render: expected one of {", ".join(RENDER_COLOURS)}, got {self.disc_render!r}')
        if self.batch < 1 or self.batch % self.gpus:
            raise ValueError(f'batch: expected a multiple of the {self.gpus} processes (gpus), got {self.batch}')
        if self.batch_gpu < 1 or (self.batch // self.gpus) % self.batch_gpu:
            raise ValueError(
                f'batch_gpu: expected a divisor of the {self.batch // self.gpus} images of a process, '
                f'got {self.batch_gpu}'
            )
        group = min(self.discriminator.mbstd_group_size, self.batch_gpu)
        if self.batch_gpu % group:
            raise ValueError(
                f'batch_gpu: expected a multiple of mbstd_group {group}, or fewer images, got {self.batch_gpu}'
            )
        if self.generator.img_resolution != self.discriminator.img_resolution:
            raise ValueError(
                f'resolution: expected equal ones, got {self.generator.img_resolution} for the generator and '
                f'{self.discriminator.img_resolution} for the discriminator'
            )

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return self.generator.img_resolution

    @property
    def label_length(self) -> int:
        """25, or 75 with expressions."""
        return self.generator.c_dim + (EXPRESSION_LENGTH if self.with_expressions else 0)

    @property
    def num_iterations(self) -> int:
        """How many iterations show kimg thousand images."""
        return -(-round(self.kimg * 1000) // self.batch)

    @property
    def name(self) -> str:
        """Name of run directories without their number."""
        parts = [self.preset, f'{self.loss.rendering_resolution_initial}', f'batch{self.batch}']
        parts += [f'gamma{self.loss.r1_gamma:g}', *([self.desc] if self.desc else [])]
        return '-'.join(parts)

    def identity(self) -> dict:
        """Return what decides the numbers of a run: all but lengths, places, reports and the machine."""
        return {key: value for key, value in self.to_dict().items() if key not in NOT_IDENTITY}

    def digest(self) -> str:
        """Return a hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def _nested(cls):
        return {'generator': Next3DConfig, 'discriminator': DiscriminatorConfig, 'loss': LossConfig}


# A run may be continued with other values of these.
NOT_IDENTITY = frozenset({
    'outdir', 'data', 'rdata', 'topology_path', 'desc', 'kimg', 'tick_kimg', 'snap', 'save_minutes', 'metrics',
    'patience', 'device', 'gpus', 'workers', 'benchmark', 'graphs', 'timeout_s',
})

# Camera setups of EG3D's data sets (Chan et al. 2022, supplement 2): rays, volume, and the orbit of the cameras.
CAMERA_SETUPS = {
    'ffhq': dict(sampling=dict(), avg_camera_radius=2.7, avg_camera_pivot=(0.0, 0.0, 0.2)),
    'afhq': dict(sampling=dict(), avg_camera_radius=2.7, avg_camera_pivot=(0.0, 0.0, -0.06)),
    'shapenet': dict(
        sampling=dict(near=0.1, far=2.6, box_warp=1.6, white_back=True, num_depths=64, num_importance=64),
        avg_camera_radius=1.7,
        avg_camera_pivot=(0.0, 0.0, 0.0),
    ),
}
SUPERRESOLUTION = {
    512: 'SuperresolutionHybrid8XDC',
    256: 'SuperresolutionHybrid4X',
    128: 'SuperresolutionHybrid2X',
}

# Settings by the names of their options, as published but for plane_layout (docs/experiments.md). None: follows from
# others (see `make_config`).
DEFAULTS = dict(
    resolution=None, sr_module=None, gamma=None, batch=32, batch_gpu=None, gpus=1, cbase=32768, cmax=512, d_cbase=None,
    d_cmax=None, glr=0.0025, dlr=0.002, map_depth=2, mbstd_group=4, freezed=0, aug='noaug', p=0.2, target=0.6,
    mirror=False, kimg=25000.0, tick=4.0, snap=20, save_minutes=30.0, seed=0, workers=3, nobench=False,
    nographs=False, metrics=(),
    neural_rendering_resolution_initial=64, neural_rendering_resolution_final=None,
    neural_rendering_resolution_fade_kimg=1000.0, blur_fade_kimg=200.0, resume=None, resume_blur=False,
    gen_pose_cond=False, gen_exp_cond=False, c_scale=1.0, gpc_reg_prob=0.5, gpc_reg_fade_kimg=1000.0, disc_c_noise=0.0,
    sr_noise_mode='none', style_mixing_prob=0.0, sr_num_fp16_res=4, g_num_fp16_res=0, d_num_fp16_res=4,
    density_reg=0.25, density_reg_every=4, density_reg_p_dist=0.004, density_region='box', reg_type='l1',
    decoder_lr_mul=1.0, precision='fp32', plane_layout='aligned', blend_planes='all', discriminator_version='dual',
    disc_render=None, disc_gaze=0.0, num_depths=None, generator={}, camera_setup='ffhq', desc='', device='cuda',
    dist_timeout=600.0, topology_path='data/demo/head_template.obj', rdata=None,
)
PRESETS = {
    'ffhq512': dict(resolution=512, gamma=4.0),
    'ffhq256': dict(resolution=256, gamma=1.0),
    'ffhq128': dict(resolution=128, gamma=0.5),
    # The demo avatar: under 16 MB in float16, half a second a picture on a laptop.
    'demo': dict(
        resolution=256, gamma=1.0, kimg=2000.0, snap=10, cbase=8192, cmax=96, d_cbase=8192, d_cmax=256, num_depths=24,
        blur_fade_kimg=50.0, gpc_reg_fade_kimg=200.0, sr_num_fp16_res=0, disc_render='waves',
        generator=dict(
            z_dim=128, w_dim=128, sr_channels=(64, 32), plane_resolution=128, texture_resolution=128,
            mouth_resolution=64, blending_lowest=32, has_unused_mappings=False,
        ),
    ),
    # The same at half the size in every length, a quarter of the work: for experiments.
    'demo128': dict(
        resolution=128, gamma=0.5, kimg=2000.0, snap=10, cbase=4096, cmax=96, d_cbase=4096, d_cmax=256, num_depths=24,
        neural_rendering_resolution_initial=32, blur_fade_kimg=50.0, gpc_reg_fade_kimg=200.0, sr_num_fp16_res=0,
        disc_render='waves',
        generator=dict(
            z_dim=128, w_dim=128, sr_channels=(64, 32), plane_resolution=64, texture_resolution=64,
            mouth_resolution=32, blending_lowest=16, has_unused_mappings=False,
        ),
    ),
    # Two iterations in seconds on a CPU: for tests, and for a first try of a data set.
    'toy': dict(
        resolution=128, gamma=1.0, batch=4, kimg=0.008, tick=0.004, snap=1, cbase=256, cmax=8, d_cbase=512,
        num_depths=8, neural_rendering_resolution_initial=16, sr_num_fp16_res=0, d_num_fp16_res=0,
        generator=dict(
            z_dim=16, w_dim=16, sr_channels=(8, 4), plane_resolution=32, texture_resolution=32, plane_channels=8,
            decoder_hidden=16, mouth_resolution=16, blending_lowest=8, has_unused_mappings=False,
        ),
    ),
}
ADA_KIMG, ADA_KIMG_RESUMED = 500.0, 100.0
EMA_RAMPUP = 0.05
BLUR_SIGMA = 10.0
MAX_BATCH_GPU = 8  # Images at a time on one GPU where --batch-gpu is not given: 32 on 8 GPUs give 4.


def preset_of(cfg: str, resolution: int) -> tuple[str, str]:
    """Return (preset, camera setup) of a value of --cfg: a preset's name, or ffhq, afhq, shapenet as published.

    resolution: side of the pictures, which picks the preset of a published value. Raises ValueError where none fits.
    """
    if cfg in PRESETS:
        found = PRESETS[cfg]['resolution']
        if found != resolution:
            raise ValueError(f'--cfg={cfg}: expected pictures of {found} pixels, found {resolution}')
        return cfg, 'ffhq'
    if resolution not in SUPERRESOLUTION:
        sides = ', '.join(map(str, sorted(SUPERRESOLUTION)))
        raise ValueError(f'--cfg={cfg}: expected pictures of {sides} pixels, found {resolution}')
    return f'ffhq{resolution}', cfg


def make_config(preset: str, outdir: str, data: str, **given) -> TrainConfig:
    """Return the run of a preset with settings by the names of DEFAULTS; ValueError for values that do not fit.

    Settings that are not given come from the preset, then from DEFAULTS. As published, weights to start from (resume)
    switch off the fades of blur (unless resume_blur), pose swapping and averaging, and make ADA five times faster.
    """
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise ValueError(f'settings: expected some of DEFAULTS, got {", ".join(unknown)}')
    s = {**DEFAULTS, **PRESETS[preset], **given}
    s['disc_render'] = s['disc_render'] or None  # False: off where the preset has it on.
    _check(s)
    is_resumed = s['resume'] is not None
    per_process = s['batch'] // s['gpus']
    return TrainConfig(
        preset=preset if s['camera_setup'] == 'ffhq' else f'{preset}-{s["camera_setup"]}',
        outdir=outdir,
        data=data,
        generator=_generator(s),
        discriminator=_discriminator(s),
        loss=_loss(s, is_resumed),
        batch_gpu=s['batch_gpu'] or _usual_batch_gpu(per_process, s['mbstd_group']),
        ema_rampup=None if is_resumed else EMA_RAMPUP,
        ada_kimg=ADA_KIMG_RESUMED if is_resumed else ADA_KIMG,
        with_expressions=s['gen_exp_cond'],
        augment=s['aug'],
        augment_p=s['p'],
        ada_target=s['target'],
        tick_kimg=s['tick'],
        benchmark=not s['nobench'],
        graphs=not s['nographs'],
        timeout_s=s['dist_timeout'],
        metrics=tuple(s['metrics']),
        **{name: s[name] for name in _SAME_NAMES},
    )


_SAME_NAMES = (
    'rdata', 'topology_path', 'desc', 'resume', 'mirror', 'disc_render', 'batch', 'glr', 'dlr', 'density_reg_every',
    'freezed', 'precision', 'seed', 'kimg', 'snap', 'save_minutes', 'device', 'gpus', 'workers',
)


def _generator(s):
    camera = CAMERA_SETUPS[s['camera_setup']]
    depths = {} if s['num_depths'] is None else dict(num_depths=s['num_depths'], num_importance=s['num_depths'])
    fields = dict(
        superresolution=s['sr_module'] or SUPERRESOLUTION[s['resolution']],
        channel_base=s['cbase'],
        channel_max=s['cmax'],
        num_fp16_res=s['g_num_fp16_res'],
        sr_num_fp16_res=s['sr_num_fp16_res'],
        mapping=MappingConfig(num_layers=s['map_depth']),
        decoder_lr_mul=s['decoder_lr_mul'],
        superresolution_noise_mode=s['sr_noise_mode'],
        neural_rendering_resolution=s['neural_rendering_resolution_final'] or s['neural_rendering_resolution_initial'],
        sampling=SamplingConfig(plane_axes=NEXT3D_PLANE_AXES, **{**depths, **camera['sampling']}),
        c_scale=s['c_scale'],
        c_gen_conditioning_zero=not s['gen_pose_cond'],
        avg_camera_radius=camera['avg_camera_radius'],
        avg_camera_pivot=camera['avg_camera_pivot'],
        plane_layout=s['plane_layout'],
        blend_planes=s['blend_planes'],
    )
    return Next3DConfig(**{**fields, **s['generator']})


def _discriminator(s):
    kind = s['discriminator_version']
    extra = EXPRESSION_LENGTH if s['gen_exp_cond'] else 0
    if kind == 'dual_label' and not extra:
        raise ValueError('--discriminator_version=dual_label: expected expression labels (--gen_exp_cond), got none')
    is_split = kind == 'dual_label'
    return DiscriminatorConfig(
        kind=kind,
        c_dim=LABEL_LENGTH + (0 if is_split else extra),
        c2_dim=extra if is_split else 0,
        img_resolution=s['resolution'],
        channel_base=s['d_cbase'] or s['cbase'],
        channel_max=s['d_cmax'] or (s['cmax'] if s['d_cbase'] is None else 512),
        num_fp16_res=s['d_num_fp16_res'],
        mbstd_group_size=s['mbstd_group'],
        disc_c_noise=s['disc_c_noise'],
        render_channels=3 if s['disc_render'] else 0,
    )


def _loss(s, is_resumed):
    return LossConfig(
        r1_gamma=s['gamma'],
        density_reg=s['density_reg'],
        density_reg_p_dist=s['density_reg_p_dist'],
        density_region=s['density_region'],
        reg_type=s['reg_type'],
        gpc_reg_prob=s['gpc_reg_prob'] if s['gen_pose_cond'] else None,
        gpc_reg_fade_kimg=0.0 if is_resumed else s['gpc_reg_fade_kimg'],
        blur_init_sigma=0.0 if is_resumed and not s['resume_blur'] else BLUR_SIGMA,
        blur_fade_kimg=s['blur_fade_kimg'],
        rendering_resolution_initial=s['neural_rendering_resolution_initial'],
        rendering_resolution_final=s['neural_rendering_resolution_final'],
        rendering_resolution_fade_kimg=s['neural_rendering_resolution_fade_kimg'],
        style_mixing_prob=s['style_mixing_prob'],
        gaze_mismatch=s['disc_gaze'],
    )


def _check(s):
    """Raise ValueError for settings that the networks could not be built or trained with."""
    variant = VARIANTS[s['sr_module'] or SUPERRESOLUTION[s['resolution']]]
    if variant.resolution != s['resolution']:
        expected = ', '.join(name for name, v in VARIANTS.items() if v.resolution == s['resolution'])
        raise ValueError(f'--sr_module: expected {expected} for {s["resolution"]} pixels, got {s["sr_module"]}')
    limit = variant.input_resolution if variant.only_enlarges_input else s['resolution']
    for name in ('neural_rendering_resolution_initial', 'neural_rendering_resolution_final'):
        if (s[name] or 0) > limit:
            raise ValueError(f'--{name}: expected at most {limit} for {s["resolution"]} pixels, got {s[name]}')
    lowest = max(s['resolution'], s['generator'].get('plane_resolution', Next3DConfig.plane_resolution))
    if min(s['cbase'], s['d_cbase'] or s['cbase']) < lowest:
        raise ValueError(f'--cbase: expected at least {lowest}, a channel at the highest resolution, got {s["cbase"]}')
    layers = 1 + 3 * (s['resolution'].bit_length() - 3)  # From colours; two and the skip of a block, down to 8 pixels.
    if s['freezed'] > layers:
        raise ValueError(f'--freezed: expected at most the {layers} layers of the blocks, got {s["freezed"]}')
    if s['disc_gaze'] and s['disc_render'] != 'waves':  # Others hardly show it: real pictures would be fakes.
        found = s['disc_render'] or 'none'
        raise ValueError(f'--disc_gaze: expected a rendering whose eyes can turn (--disc_render=waves), got {found}')
    if s['mirror'] and s['gen_exp_cond']:
        raise ValueError('--mirror: expected no expressions (--gen_exp_cond): those of mirrored faces are not known')


def _usual_batch_gpu(number, group):
    """Return the most images at a time, up to MAX_BATCH_GPU, of which the discriminator makes whole groups."""
    fitting = [n for n in range(1, min(number, MAX_BATCH_GPU) + 1) if number % n == 0 and n % min(group, n) == 0]
    return max(fitting, default=1)
