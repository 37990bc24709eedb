# SPDX-License-Identifier: Apache-2.0
"""train_next3d.py: the published command, every option, what is refused and why, presets, and toy runs from A to Z."""

import dataclasses
import json
import pathlib
import shlex
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import TINY
from parity import ROOT
from PIL import Image
from simple_head import TEMPLATE
from toy_data import make_toy_data

import legacy
import train_next3d
from dataset_preprocessing import pack
from torch_utils import custom_ops
from training import pictures
from training.checkpoint import save_snapshot
from training.config import EG3DConfig
from training.data_checks import check_before_training
from training.dataset import open_source
from training.discriminator import Discriminator
from training.generator import EG3DGenerator
from training.run_dir import load_config
from training.train_config import DEFAULTS, PRESETS, TrainConfig, make_config, preset_of
from training.trainer import layers_to_freeze, new_networks

PUBLISHED = (
    '--outdir=~/training-runs --cfg=ffhq --data=data/ffhq/images512x512 --rdata data/ffhq/meshes512x512 --gpus=8 '
    '--batch=32 --gamma=4 --topology_path=data/demo/head_template.obj --gen_pose_cond=True --gen_exp_cond=True '
    '--disc_c_noise=1 --load_lms=True --model_version=next3d --resume pretrained_models/ffhqrebalanced512-64.pkl'
)
NUM_VERTICES = sum(line.startswith('v ') for line in TEMPLATE.read_text().splitlines())
BUILD_DIR = str(custom_ops._build_root())  # Of compiled operations, before tests move the cache.
ITEMS = 2
# Two iterations of two small pictures.
SHORT = (
    '--device=cpu', '--workers=0', '--batch=2', '--kimg=0.004', '--tick=0.002', '--snap=2',
    '--neural_rendering_resolution_initial=8', f'--topology_path={TEMPLATE}',
)

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folder of pictures at four sizes with meshes and landmarks, of pictures with expressions, and of packed ones."""
    root = tmp_path_factory.mktemp('data')
    make_toy_data(root, ITEMS)
    for side in (64, 256, 512):
        for kind in ('images', 'meshes', 'lms'):
            shutil.copytree(root / f'{kind}128x128', root / f'{kind}{side}x{side}')
        for path in (root / f'images{side}x{side}').rglob('*.png'):
            Image.open(path).resize((side, side)).save(path)
    with_expressions(root)
    words = (f'--data={root}/images128x128', f'--rdata={root}/meshes128x128', f'--out={root}/packed', '--workers=1')
    assert CliRunner().invoke(pack.main, words).exit_code == 0
    return root


def with_expressions(root):
    """Copy the pictures to a folder with dataset_exp.json beside dataset.json."""
    folder = root / 'expressive128x128'
    shutil.copytree(root / 'images128x128', folder)
    names = [name for name, _ in json.loads((folder / 'dataset.json').read_text())['labels']]
    numbers = np.random.default_rng(0).standard_normal([len(names), 50]).tolist()
    (folder / 'dataset_exp.json').write_text(json.dumps({'labels': list(zip(names, numbers))}))


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Work in the repository, outside any launcher, with caches and home in a folder of the test."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)


def places(data, side=128, images='images'):
    return f'--data={data}/{images}{side}x{side}', f'--rdata={data}/meshes{side}x{side}'


def invoke(*words):
    result = CliRunner().invoke(train_next3d.main, words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def dry_run(*words):
    """Return the config that --dry-run prints."""
    result = invoke('--outdir=never', *words, '--dry-run')
    assert result.exit_code == 0, result.output
    assert not pathlib.Path('never').exists()
    return TrainConfig.from_dict(json.loads(result.stdout))


def refusal(tmp_path, *words):
    """Return the one line that a bad command gives, which creates nothing."""
    result = invoke(f'--outdir={tmp_path}/runs', *words)
    assert result.exit_code != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith('Warning:')]
    assert len(lines) == 1 and lines[0].startswith('Error: '), result.output
    assert not (tmp_path / 'runs').exists()
    return lines[0]


def entry(config, path):
    """Return an entry of a config by its dotted path."""
    for name in path.split('.'):
        config = getattr(config, name)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# The published command


def test_the_published_command_word_for_word(data, tmp_path, monkeypatch):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'ffhq').symlink_to(data)
    (tmp_path / 'data' / 'demo').symlink_to(TEMPLATE.parent)
    monkeypatch.chdir(tmp_path)
    result = invoke(*shlex.split(PUBLISHED), '--dry-run')
    assert result.exit_code == 0, result.output
    assert 'Warning' in result.stderr and 'dataset_exp.json' in result.stderr and '25 long' in result.stderr
    config = TrainConfig.from_dict(json.loads(result.stdout))
    expected = {
        'preset': 'ffhq512', 'outdir': '~/training-runs', 'data': 'data/ffhq/images512x512',
        'rdata': 'data/ffhq/meshes512x512', 'topology_path': 'data/demo/head_template.obj', 'gpus': 8, 'batch': 32,
        'batch_gpu': 4, 'resume': 'pretrained_models/ffhqrebalanced512-64.pkl', 'with_expressions': False,
        'label_length': 25, 'resolution': 512, 'loss.r1_gamma': 4.0, 'loss.gpc_reg_prob': 0.5,
        'loss.gpc_reg_fade_kimg': 0.0, 'loss.blur_init_sigma': 0.0, 'ema_rampup': None, 'ada_kimg': 100.0,
        'discriminator.disc_c_noise': 1.0, 'discriminator.kind': 'dual', 'generator.c_gen_conditioning_zero': False,
        'generator.superresolution': 'SuperresolutionHybrid8XDC', 'generator.plane_layout': 'aligned',
    }
    assert {path: entry(config, path) for path in expected} == expected
    assert not (tmp_path / 'home').exists()


def test_published_defaults(data):
    config = dry_run('--cfg=ffhq', *places(data, 512))
    expected = {
        'batch': 32, 'gpus': 1, 'glr': 0.0025, 'dlr': 0.002, 'density_reg_every': 4, 'r1_every': 16, 'freezed': 0,
        'mirror': False, 'augment': 'noaug', 'augment_p': 0.2, 'ada_target': 0.6, 'ada_kimg': 500.0,
        'ema_rampup': 0.05, 'kimg': 25000.0, 'tick_kimg': 4.0, 'snap': 20, 'seed': 0, 'workers': 3, 'benchmark': True,
        'resume': None, 'generator.channel_base': 32768, 'generator.channel_max': 512, 'generator.num_fp16_res': 0,
        'generator.sr_num_fp16_res': 4, 'generator.mapping.num_layers': 2, 'generator.c_scale': 1.0,
        'generator.c_gen_conditioning_zero': True, 'generator.superresolution_noise_mode': 'none',
        'generator.decoder_lr_mul': 1.0, 'generator.neural_rendering_resolution': 64, 'generator.blend_planes': 'all',
        'discriminator.channel_base': 32768, 'discriminator.channel_max': 512, 'discriminator.num_fp16_res': 4,
        'discriminator.mbstd_group_size': 4, 'discriminator.kind': 'dual', 'discriminator.disc_c_noise': 0.0,
        'loss.density_reg': 0.25, 'loss.density_reg_p_dist': 0.004, 'loss.reg_type': 'l1', 'loss.gpc_reg_prob': None,
        'loss.gpc_reg_fade_kimg': 1000.0, 'loss.blur_init_sigma': 10.0, 'loss.blur_fade_kimg': 200.0,
        'loss.rendering_resolution_initial': 64, 'loss.rendering_resolution_final': None,
        'loss.rendering_resolution_fade_kimg': 1000.0, 'loss.style_mixing_prob': 0.0, 'loss.r1_gamma': 4.0,
    }
    assert {path: entry(config, path) for path in expected} == expected


# Option, value, where it goes, what arrives there.
ACCEPTED = [
    ('gpus', '4', 'gpus', 4), ('batch', '16', 'batch', 16), ('batch_gpu', '8', 'batch_gpu', 8),
    ('gamma', '2.5', 'loss.r1_gamma', 2.5), ('resume', '~/x.pkl', 'resume', '{home}/x.pkl'),
    ('kimg', '7', 'kimg', 7.0), ('tick', '2', 'tick_kimg', 2.0), ('snap', '3', 'snap', 3),
    ('save_minutes', '0', 'save_minutes', 0.0), ('desc', 'words', 'desc', 'words'), ('metrics', 'None', 'metrics', ()),
    ('mirror', 'True', 'mirror', True), ('gen_pose_cond', 'true', 'generator.c_gen_conditioning_zero', False),
    ('gen_pose_cond', '1', 'loss.gpc_reg_prob', 0.5), ('c_scale', '0.5', 'generator.c_scale', 0.5),
    ('gpc_reg_fade_kimg', '9', 'loss.gpc_reg_fade_kimg', 9.0), ('disc_c_noise', '1', 'discriminator.disc_c_noise', 1.0),
    ('disc_render', 'True', 'disc_render', 'normal'), ('disc_render', 'uv', 'discriminator.render_channels', 3),
    ('disc_gaze', '0', 'loss.gaze_mismatch', 0.0),  # Others need --disc_render: see below.
    ('disc_render', 'False', 'disc_render', None), ('aug', 'fixed', 'augment', 'fixed'), ('p', '1', 'augment_p', 1.0),
    ('target', '0.7', 'ada_target', 0.7), ('freezed', '3', 'freezed', 3),
    ('cbase', '16384', 'generator.channel_base', 16384), ('cbase', '16384', 'discriminator.channel_base', 16384),
    ('cmax', '256', 'generator.channel_max', 256), ('cmax', '256', 'discriminator.channel_max', 256),
    ('map_depth', '8', 'generator.mapping.num_layers', 8), ('mbstd_group', '2', 'discriminator.mbstd_group_size', 2),
    ('glr', '0.001', 'glr', 0.001), ('dlr', '0.003', 'dlr', 0.003),
    ('decoder_lr_mul', '2', 'generator.decoder_lr_mul', 2),
    ('style_mixing_prob', '0.9', 'loss.style_mixing_prob', 0.9),
    ('sr_module', 'training.superresolution.SuperresolutionHybrid8X', 'generator.superresolution',
     'SuperresolutionHybrid8X'),
    ('sr_noise_mode', 'random', 'generator.superresolution_noise_mode', 'random'),
    ('g_num_fp16_res', '2', 'generator.num_fp16_res', 2), ('sr_num_fp16_res', '0', 'generator.sr_num_fp16_res', 0),
    ('d_num_fp16_res', '1', 'discriminator.num_fp16_res', 1),
    ('plane_layout', 'next3d', 'generator.plane_layout', 'next3d'),
    ('blend_planes', 'front', 'generator.blend_planes', 'front'),
    ('discriminator_version', 'single', 'discriminator.kind', 'single'),
    ('neural_rendering_resolution_initial', '48', 'loss.rendering_resolution_initial', 48),
    ('neural_rendering_resolution_final', '128', 'generator.neural_rendering_resolution', 128),
    ('neural_rendering_resolution_fade_kimg', '5', 'loss.rendering_resolution_fade_kimg', 5.0),
    ('blur_fade_kimg', '6', 'loss.blur_fade_kimg', 6.0), ('density_reg', '0', 'loss.density_reg', 0.0),
    ('density_reg_every', '0', 'density_reg_every', 0), ('density_reg_p_dist', '0.01', 'loss.density_reg_p_dist', 0.01),
    ('density_region', 'published', 'loss.density_region', 'published'), ('precision', 'bf16', 'precision', 'bf16'),
    ('reg_type', 'monotonic-fixed', 'loss.reg_type', 'monotonic-fixed'), ('seed', '5', 'seed', 5),
    ('device', 'cuda', 'device', 'cuda'), ('workers', '0', 'workers', 0), ('nobench', 'True', 'benchmark', False),
    ('nographs', 'True', 'graphs', False),
    ('dist_timeout', '60', 'timeout_s', 60.0), ('topology_path', 'x.obj', 'topology_path', 'x.obj'),
    # Accepted for the published command lines; nothing depends on them.
    ('cond', 'True', 'label_length', 25), ('load_lms', 'False', 'label_length', 25),
    ('model_version', 'next3d', 'preset', 'ffhq512'), ('dataset_type', 'image', 'preset', 'ffhq512'),
]


@pytest.mark.parametrize('name, value, path, expected', ACCEPTED, ids=[f'{x[0]}-{x[2]}' for x in ACCEPTED])
def test_options_reach_the_config_in_both_spellings(data, tmp_path, name, value, path, expected):
    if isinstance(expected, str):
        expected = expected.format(home=tmp_path / 'home')
    common = ('--cfg=ffhq', *places(data, 512))
    kebab = dry_run(*common, f'--{name.replace("_", "-")}', value)
    assert entry(kebab, path) == expected
    assert dry_run(*common, f'--{name}={value}') == kebab


def test_the_table_above_knows_every_option():
    """Those missing from it are given in all tests, or have one of their own."""
    others = {
        'outdir', 'cfg', 'data', 'rdata', 'fresh', 'dry_run', 'gen_exp_cond', 'resume_blur', 'gpc_reg_prob',
        'c_noise', 'sr_first_cutoff', 'sr_first_stopband',
    }
    assert {parameter.name for parameter in train_next3d.main.params} == {x[0] for x in ACCEPTED} | others


def test_options_that_depend_on_others(data):
    common = ('--cfg=ffhq', *places(data, 512), '--gen_pose_cond=True')
    assert dry_run(*common, '--gpc_reg_prob=0.8').loss.gpc_reg_prob == 0.8
    resumed = dry_run(*common, '--resume=x.pkl', '--resume_blur=True')
    assert (resumed.loss.blur_init_sigma, resumed.ema_rampup) == (10.0, None)
    assert dry_run(*common, '--resume=auto') == dry_run(*common)
    expressive = dry_run('--cfg=toy', *places(data), f'--data={data}/expressive128x128', '--gen-exp-cond')
    assert (expressive.label_length, expressive.discriminator.c_dim, expressive.generator.c_dim) == (75, 75, 25)


@pytest.mark.parametrize('batch, expected', [(32, 8), (12, 4), (20, 4), (6, 6), (2, 2), (1, 1)])
def test_micro_batches_hold_whole_groups_where_they_can(batch, expected):
    settings = dict(batch=batch) | (dict(mbstd_group=3) if batch == 6 else {})
    assert make_config('toy', 'runs', 'data', **settings).batch_gpu == expected


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    'word, reason',
    [
        ('--c_noise=1', 'never read'),
        ('--c-noise=0', 'never read'),
        ('--sr_first_cutoff=2', 'never read'),
        ('--sr-first-stopband=2', 'never read'),
        ('--cond=False', 'camera labels'),
        ('--dataset_type=video', 'fails in the published code'),
        ('--reg_type=l1-alt', 'fails in the published code'),
        ('--reg_type=total-variation', 'fails in the published code'),
        ('--reg_type=monotonic-detach', 'fails in the published code'),
        ('--reg_type=foo', 'l1, monotonic-fixed'),
        ('--metrics=fid50k_full', 'registered'),
        ('--model_version=eg3d', 'next3d'),
        ('--cfg=foo', 'ffhq512'),
        ('--batch=0', '0'),
        ('--batch=-4', '-4'),
        ('--batch=nan', 'nan'),
        ('--gpus=3', 'batch: expected a multiple of the 3'),
        ('--batch_gpu=3', 'divisor of the 4'),
        ('--batch_gpu=4 --mbstd_group=3', 'got 4'),
        ('--mbstd_group=0', '0'),
        ('--gamma=-1', 'from 0'),
        ('--gamma=nan', 'from 0'),
        ('--glr=0', 'above 0'),
        ('--dlr=inf', 'above 0'),
        ('--tick=0', 'above 0'),
        ('--kimg=nan', 'above 0'),
        ('--kimg=-1', 'above 0'),
        ('--snap=0', '0'),
        ('--p=1.5', '0 to 1'),
        ('--p=nan', '0 to 1'),
        ('--target=nan', '0 to 1'),
        ('--gpc_reg_prob=nan', '0 to 1'),
        ('--style_mixing_prob=-0.1', '0 to 1'),
        ('--seed=-1', '-1'),
        ('--freezed=17', '16 layers'),
        ('--cbase=64', 'at least 128'),
        ('--map_depth=0', '0'),
        ('--aug=foo', 'noaug, ada, fixed'),
        ('--disc_render=foo', 'normal, uv, waves'),
        ('--disc_gaze=-1', 'from 0'),
        ('--disc_gaze=0.5', 'a rendering whose eyes can turn'),
        ('--disc_render=True --disc_gaze=0.5', 'a rendering whose eyes can turn'),
        ('--sr_module=SuperresolutionHybrid8XDC', 'SuperresolutionHybrid2X for 128'),
        ('--neural_rendering_resolution_initial=256', 'at most 128'),
        ('--neural_rendering_resolution_final=129', 'at most 128'),
        ('--discriminator_version=dual_label', 'expression'),
        ('--desc=../elsewhere', 'folder name'),
        ('--resume=', 'path'),
        ('--outdir=', 'path'),
        ('--mirror=perhaps', 'boolean'),
        ('--unheard_of=1', 'No such option'),
        ('--topology_path=absent.obj', 'No such file'),
        ('--data=absent', 'nothing there'),
        ('--rdata=absent', 'nothing there'),
    ],
)
def test_bad_values_give_one_line_that_names_the_flag(data, tmp_path, word, reason):
    line = refusal(tmp_path, '--cfg=toy', *places(data), '--device=cpu', *word.split(' '))
    assert word.split('=')[0][2:].replace('-', '_') in line.replace('-', '_') and reason in line


def test_gaze_needs_a_head_with_eyeballs(data, tmp_path):
    words = ('--cfg=toy', *places(data), '--device=cpu', '--disc-render=waves', '--disc-gaze=0.5',
             f'--topology_path={TEMPLATE}')
    assert dry_run(*words).loss.gaze_mismatch == 0.5
    line = refusal(tmp_path, *words)
    assert '--disc_gaze: expected eyeballs as separate parts of' in line and str(TEMPLATE) in line


def test_presets_that_do_not_fit_the_pictures_are_refused(data, tmp_path):
    line = refusal(tmp_path, '--cfg=ffhq256', *places(data), '--device=cpu')
    assert '--cfg=ffhq256' in line and '256' in line and '128' in line
    line = refusal(tmp_path, '--cfg=ffhq', *places(data, 64), '--device=cpu')
    assert '--cfg=ffhq' in line and '128, 256, 512' in line and '64' in line
    words = (*places(data, 256), '--device=cpu', '--neural_rendering_resolution_final=256')
    line = refusal(tmp_path, '--cfg=ffhq', *words)
    assert 'at most 128 for 256 pixels' in line


def test_missing_options_are_named(data, tmp_path):
    assert '--cfg' in refusal(tmp_path, *places(data))
    assert '--data' in refusal(tmp_path, '--cfg=toy')
    assert '--rdata' in refusal(tmp_path, '--cfg=toy', places(data)[0])
    result = invoke('--cfg=toy', *places(data))
    assert result.exit_code and '--outdir' in result.stderr


def test_bad_data_is_refused(data, tmp_path):
    empty = tmp_path / 'empty'
    empty.mkdir()
    assert 'expected pictures, found none' in refusal(tmp_path, '--cfg=toy', *places(data), f'--data={empty}')
    Image.new('RGB', [128, 128]).save(empty / 'a.png')
    assert 'dataset.json' in refusal(tmp_path, '--cfg=toy', *places(data), f'--data={empty}')
    assert f'{TEMPLATE}: expected a folder' in refusal(tmp_path, '--cfg=toy', *places(data), f'--data={TEMPLATE}')
    assert "'meshes'" in refusal(tmp_path, '--cfg=toy', *places(data), f'--rdata={empty}')


def test_mirror_images_have_no_expressions(data, tmp_path):
    words = ('--cfg=toy', *places(data), f'--data={data}/expressive128x128', '--gen_exp_cond=True', '--mirror=True')
    assert '--mirror' in refusal(tmp_path, *words)


def test_a_template_without_uvs_is_refused(data, tmp_path):
    path = tmp_path / 'bare.obj'
    path.write_text('v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n')
    line = refusal(tmp_path, '--cfg=toy', *places(data), '--device=cpu', f'--topology_path={path}')
    assert '--topology_path' in line and 'found no UVs' in line


def test_more_gpus_than_there_are_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    words = ('--cfg=toy', *places(data), '--device=cuda', '--gpus=2')
    assert '--gpus=2: expected 2 GPUs' in refusal(tmp_path, *words)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert 'found 0 (--device=cpu' in refusal(tmp_path, *words)


def test_torchrun_decides_on_the_number_of_processes(data, tmp_path, monkeypatch):
    for name, value in {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1'}.items():
        monkeypatch.setenv(name, value)
    words = ('--cfg=toy', *places(data))
    assert dry_run(*words).gpus == 2
    assert dry_run(*words, '--gpus=2').batch_gpu == 2
    assert '--gpus=4' in refusal(tmp_path, *words, '--gpus=4')
    result = invoke(f'--outdir={tmp_path}', *words, '--gen_exp_cond=True', '--dry-run')
    assert 'Warning' not in result.stderr  # The first process says it.


# ---------------------------------------------------------------------------------------------------------------------
# Presets and configs


@pytest.mark.parametrize('preset, gamma', [('ffhq512', 4), ('ffhq256', 1), ('ffhq128', 0.5)])
def test_published_networks_at_three_sizes(data, preset, gamma):
    side = int(preset[4:])
    config = dry_run('--cfg=ffhq', *places(data, side))
    assert config == dry_run(f'--cfg={preset}', *places(data, side))
    assert (config.preset, config.resolution, config.loss.r1_gamma) == (preset, side, gamma)
    generator, discriminator = config.generator, config.discriminator
    assert (generator.z_dim, generator.w_dim) == (512, 512)
    assert (generator.plane_resolution, generator.plane_channels) == (256, 32)
    assert (generator.channel_base, generator.texture_resolution, generator.sr_channels) == (32768, 256, None)
    assert (generator.sampling.num_depths, generator.sampling.num_importance) == (48, 48)
    assert (discriminator.img_resolution, discriminator.channel_base, discriminator.c_dim) == (side, 32768, 25)


def test_cameras_of_other_data_sets(data):
    shapenet = dry_run('--cfg=shapenet', *places(data)).generator
    assert (shapenet.avg_camera_radius, shapenet.avg_camera_pivot) == (1.7, (0.0, 0.0, 0.0))
    sampling = shapenet.sampling
    assert (sampling.near, sampling.far, sampling.box_warp, sampling.white_back) == (0.1, 2.6, 1.6, True)
    assert (sampling.num_depths, sampling.num_importance) == (64, 64)
    cats = dry_run('--cfg=afhq', *places(data))
    assert (cats.preset, cats.generator.avg_camera_pivot) == ('ffhq128-afhq', (0.0, 0.0, -0.06))
    with pytest.raises(ValueError, match='--cfg=demo'):
        preset_of('demo', 512)


# 7 million in float16 are 16 MB with the mesh.
@pytest.mark.parametrize('preset, most', [('demo', 7e6), ('demo128', 6e6), ('toy', 1e6)])
def test_small_presets_can_be_built(preset, most):
    config = make_config(preset, 'runs', 'data', topology_path=str(TEMPLATE))
    networks = new_networks(config)
    assert networks.G.z_dim == config.generator.z_dim
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert sizes[0] < most and sizes[1] < 30e6


@pytest.mark.parametrize('preset', PRESETS)
def test_json_loads_back_to_the_same_config(preset):
    config = make_config(preset, 'runs', 'data')
    text = json.dumps(config.to_dict())
    assert TrainConfig.from_dict(json.loads(text)) == config
    assert TrainConfig.from_dict(json.loads(text)).digest() == config.digest()
    assert config.num_iterations * config.batch >= config.kimg * 1000
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.batch = 1


def test_unknown_entries_are_refused():
    plain = make_config('toy', 'runs', 'data').to_dict()
    with pytest.raises(ValueError, match='novel'):
        TrainConfig.from_dict(plain | {'novel': 1})
    with pytest.raises(ValueError, match='novel'):
        TrainConfig.from_dict(plain | {'generator': plain['generator'] | {'novel': 1}})
    with pytest.raises(ValueError, match='novel'):
        make_config('toy', 'runs', 'data', novel=1)
    assert all(set(preset) <= set(DEFAULTS) for preset in PRESETS.values())


def test_as_many_layers_can_be_frozen_as_there_are():
    config = make_config('toy', 'runs', 'data', freezed=16)
    assert len(layers_to_freeze(Discriminator(config.discriminator), 16)) == 16
    with pytest.raises(ValueError, match='--freezed'):
        make_config('toy', 'runs', 'data', freezed=17)


def test_help_names_options_and_defaults_and_is_that_of_docs():
    result = CliRunner(env={'COLUMNS': '120'}).invoke(
        train_next3d.main, ['--help'], prog_name='train_next3d.py', terminal_width=120
    )
    assert result.stdout == (ROOT / 'docs' / 'help' / 'train_next3d.txt').read_text(encoding='utf-8')
    assert 'c_noise' not in result.stdout.replace('disc_c_noise', '') and '[default: ]' not in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Toy runs


@pytest.fixture(scope='module')
def checked(data, tmp_path_factory):
    """Cache folder in which the data sets are noted as checked, which would start processes in every run."""
    patch = pytest.MonkeyPatch()
    patch.setenv(custom_ops.BUILD_DIR_VARIABLE, BUILD_DIR)  # Compiled already, or kept for the next time.
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    patch.setattr(pictures, 'LARGEST_SHEET', (2, 1))
    for images, has_expressions in (('images128x128', False), ('expressive128x128', True), ('packed', False)):
        source = open_source(f'{data}/{images}', f'{data}/meshes128x128', has_expressions)
        check_before_training(source, NUM_VERTICES, 128)
    yield
    patch.undo()


def train(outdir, data, *words):
    """Run a short toy training; return what it says."""
    result = invoke(f'--outdir={outdir}', '--cfg=toy', *places(data), *SHORT, *words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope='module')
def first_run(data, checked, tmp_path_factory):
    """Folder of a finished toy run, and what it said."""
    outdir = tmp_path_factory.mktemp('first')
    return outdir / '00000-toy-8-batch2-gamma1', train(outdir, data)


def test_a_run_writes_what_it_promises(first_run, data):
    folder, said = first_run
    names = {path.name for path in folder.iterdir()}
    sheets = {f'{name}{end}.png' for name in ('fakes_init', 'fakes000000') for end in ('', '_raw', '_depth', '_mesh')}
    assert sheets | {'reals.png', 'stats.jsonl', 'log.txt', 'training_options.json'} <= names
    assert len([name for name in names if name.startswith('events')]) == 1
    assert len([name for name in names if name.startswith('training-state-') and name.endswith('.pt')]) in (1, 2)
    assert 'Finished at kimg 0.004' in said and 'Finished at kimg 0.004' in (folder / 'log.txt').read_text()
    networks = legacy.load_network_pkl(str(folder / 'network-snapshot-000000.pkl'))
    assert set(networks) >= {'G_ema', 'G', 'D'} and networks['G_ema'].z_dim == 16
    config = load_config(folder)
    words = (*places(data), *SHORT)
    assert dataclasses.replace(dry_run('--cfg=toy', *words), outdir=config.outdir) == config
    lines = [json.loads(line) for line in (folder / 'stats.jsonl').read_text().splitlines()]
    assert len(lines) == 2 and 'Loss/D/loss' in lines[-1]


def weights(folder):
    network = legacy.load_network_pkl(str(sorted(folder.glob('network-snapshot-*.pkl'))[-1]))['G']
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_the_same_command_finishes_goes_on_or_begins_anew(first_run, data, tmp_path):
    shutil.copytree(first_run[0], tmp_path / first_run[0].name)
    folder, before = tmp_path / first_run[0].name, weights(first_run[0])
    state = sorted(path.name for path in folder.glob('training-state-*'))
    again = train(tmp_path, data)
    assert 'Finished' in again and 'tick' not in again
    assert sorted(path.name for path in folder.glob('training-state-*')) == state
    assert all(torch.equal(value, before[name]) for name, value in weights(folder).items())
    longer = train(tmp_path, data, '--kimg=0.006')
    assert 'Going on from training-state-' in longer and 'Finished at kimg 0.006' in longer
    assert [path.name for path in tmp_path.glob('0*')] == [folder.name]
    assert not all(torch.equal(value, before[name]) for name, value in weights(folder).items())
    fresh = train(tmp_path, data, '--fresh')
    assert 'Starting from random weights' in fresh and '00001-toy-8-batch2-gamma1' in fresh


def test_other_options_under_the_same_desc_are_refused(data, checked, tmp_path):
    train(tmp_path, data, '--desc=mine', '--kimg=0.002')
    words = (f'--outdir={tmp_path}', '--cfg=toy', *places(data), *SHORT, '--desc=mine', '--glr=0.001')
    result = invoke(*words)
    assert result.exit_code != 0 and len(result.stderr.strip().splitlines()) == 1
    assert 'glr 0.0025 there, 0.001 now' in result.stderr and '--desc=mine' in result.stderr
    assert len(list(tmp_path.iterdir())) == 1


def discriminator_of(folder):
    return legacy.load_network_pkl(str(folder / 'network-snapshot-000000.pkl'))['D']


@pytest.mark.parametrize(
    'words',
    [
        ['--disc-render=True', '--aug=fixed', '--p=1'],
        ['--disc-render=uv', '--mirror=True'],
        ['--aug=ada', '--gen_pose_cond=True', '--disc_c_noise=1'],
        ['--reg_type=monotonic-fixed', '--style_mixing_prob=0.5', '--discriminator_version=single'],
        ['--gen_exp_cond=True', '--data={data}/expressive128x128'],
        ['--gen_exp_cond=True', '--data={data}/expressive128x128', '--discriminator_version=dual_label'],
        ['--data={data}/packed'],
    ],
    ids=lambda words: '-'.join(word.strip('-').split('=')[0] for word in words),
)
def test_toy_runs_with_other_options(data, checked, tmp_path, words):
    said = train(tmp_path, data, *(word.format(data=data) for word in words))
    (folder,) = tmp_path.glob('0*')
    config, discriminator = load_config(folder), discriminator_of(folder)
    colours = 3 * ((config.discriminator.kind != 'single') + 1) + config.discriminator.render_channels
    assert discriminator.b128.fromrgb.weight.shape[1] == colours
    assert hasattr(discriminator, 'mapping2') == (config.discriminator.kind == 'dual_label')
    assert ('augment' in said) == (config.augment != 'noaug')
    assert f'{ITEMS * (1 + config.mirror)} pictures' in said
    statistics = json.loads((folder / 'stats.jsonl').read_text().splitlines()[-1])
    assert all(np.isfinite(value['mean'] if isinstance(value, dict) else value) for value in statistics.values())


def test_a_run_starts_from_the_weights_of_another(first_run, data, tmp_path):
    """Frozen layers keep them; blur starts again where asked for."""
    snapshot = first_run[0] / 'network-snapshot-000000.pkl'
    said = train(tmp_path, data, f'--resume={snapshot}', '--freezed=2', '--resume_blur=True')
    assert f'Starting from {snapshot}' in said
    (folder,) = tmp_path.glob('0*')
    assert load_config(folder).loss.blur_init_sigma == 10.0
    assert load_config(folder).generator.plane_layout == load_config(first_run[0]).generator.plane_layout == 'aligned'
    before, after = (layers_to_freeze(discriminator_of(x), 3) for x in (first_run[0], folder))
    same = [torch.equal(a.weight, b.weight) for a, b in zip(before, after)]
    assert same == [True, True, False]


def test_planes_are_those_of_the_weights_to_start_from(data, tmp_path):
    """Published Next3D weights were trained with other planes than new runs are; EG3D's have none of a mesh."""
    config = make_config('toy', '', '', plane_layout='next3d', blend_planes='front').generator
    network = new_networks(make_config('toy', '', '', topology_path=str(TEMPLATE))).G
    for name, content in {'G': {'G': network}, 'G_ema': {'G_ema': network}}.items():
        network.config = config
        save_snapshot(tmp_path / f'{name}.pkl', content)
    toy = ('--cfg=toy', *places(data))

    def planes(*words):
        generator = dry_run(*toy, *words).generator
        return generator.plane_layout, generator.blend_planes

    assert planes() == planes(f'--resume={tmp_path}/gone.pkl') == ('aligned', 'all')
    assert planes(f'--resume={tmp_path}/G.pkl') == planes(f'--resume={tmp_path}/G_ema.pkl') == ('next3d', 'front')
    assert planes(f'--resume={tmp_path}/G.pkl', '--plane_layout=aligned') == ('aligned', 'front')
    save_snapshot(tmp_path / 'eg3d.pkl', {'G_ema': EG3DGenerator(EG3DConfig(**TINY))})
    assert planes(f'--resume={tmp_path}/eg3d.pkl') == ('aligned', 'all')
    (tmp_path / 'damaged.pkl').write_bytes((tmp_path / 'G.pkl').read_bytes()[:-100])
    assert planes(f'--resume={tmp_path}/damaged.pkl') == ('aligned', 'all')


def test_a_rendering_of_the_preset_can_be_left_out():
    assert make_config('demo', '', '').disc_render == make_config('demo128', '', '').disc_render == 'waves'
    for off in (None, False):
        config = make_config('demo', '', '', disc_render=off)
        assert (config.disc_render, config.discriminator.render_channels) == (None, 0)


def test_weights_that_cannot_be_read_are_told_in_one_line(data, checked, tmp_path):
    path = tmp_path / 'bad.pkl'
    path.write_bytes(b'no pickle')
    result = invoke(f'--outdir={tmp_path}/runs', '--cfg=toy', *places(data), *SHORT, f'--resume={path}')
    assert result.exit_code != 0 and len(result.stderr.strip().splitlines()) == 1
    assert str(path) in result.stderr and not list((tmp_path / 'runs').iterdir())
