# SPDX-License-Identifier: Apache-2.0
"""What all command lines share: option types, one-line errors, networks, meshes, outputs."""

import dataclasses
import pickle
import re
import urllib.error

import click
import demo_network
import numpy as np
import parity
import pytest
import torch
from click.testing import CliRunner

import cli
import legacy
from dnnlib.util import DownloadError
from geometry.meshes import MeshFileError
from training.checkpoint import save_snapshot
from training.config import EG3D_PLANE_AXES, DiscriminatorConfig, EG3DConfig
from training.discriminator import Discriminator
from training.generator import EG3DGenerator, Next3DGenerator
from training.pictures import to_uint8
from training.volume.render import SamplingConfig

CPU = torch.device('cpu')


def converted(param_type, value):
    """Return what an option of a type makes of a value; click.BadParameter where it refuses."""
    return param_type.convert(value, None, None)


def command_of(*options, body=lambda **values: None):
    """Return a command with options, which echoes the values it gets."""

    def main(**values):
        body(**values)
        click.echo(repr(values))

    for decorate in options:
        main = decorate(main)
    return click.command(cls=cli.Command)(main)


def outcome(command, *arguments):
    return CliRunner().invoke(command, arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Option types


def test_options_take_kebab_and_snake_case():
    command = command_of(cli.option('shape_res', type=int))
    for words in (('--shape-res=3',), ('--shape_res=3',), ('--shape-res', '3'), ('--shape_res', '3')):
        assert outcome(command, *words).stdout == "{'shape_res': 3}\n"
    assert outcome(command, '--shape-Res=3').exit_code == 2


@pytest.mark.parametrize(
    'words, expected',
    [
        ([], False),
        (['--lms_cond=True'], True),
        (['--lms-cond=true'], True),
        (['--lms_cond', 'True'], True),
        (['--lms_cond=1'], True),
        (['--lms_cond'], True),
        (['--lms_cond', '--other=x'], True),
        (['--other=x', '--lms_cond'], True),
        (['--lms_cond=False'], False),
        (['--lms_cond', 'false'], False),
        (['--lms_cond=0'], False),
    ],
)
def test_flags_take_a_value_or_stand_alone(words, expected):
    command = command_of(cli.flag('lms_cond'), cli.option('other'))
    assert f"'lms_cond': {expected}" in outcome(command, *words).stdout
    assert outcome(command, '--lms_cond=perhaps').exit_code == 2


@pytest.mark.parametrize(
    'text, seeds',
    [
        ('0', [0]),
        ('0,3,7-9', [0, 3, 7, 8, 9]),
        ('5-5', [5]),
        (' 1 , 2-3 ', [1, 2, 3]),
        ('3,1,1', [3, 1, 1]),
        ('007', [7]),
        (str(2**32 - 1), [2**32 - 1]),
        (f'{2**32 - 2}-{2**32 - 1}', [2**32 - 2, 2**32 - 1]),
    ],
)
def test_seeds(text, seeds):
    assert converted(cli.SeedList(), text) == seeds


@pytest.mark.parametrize(
    'text', ['', ',', '0,', '-1', '1-', '1-2-3', '9-7', '1.5', '1e3', 'x', '0 1', '0;1', str(2**32), '9' * 5000]
)
def test_malformed_seeds(text):
    with pytest.raises(click.BadParameter, match='expected'):
        converted(cli.SeedList(), text)


def test_number_of_seeds_is_limited():
    assert len(converted(cli.SeedList(), '0-999999')) == 10**6
    for text in ('0-1000000', '0-999999,5', f'0-{2**32 - 1}'):
        with pytest.raises(click.BadParameter, match='at most 1000000 seeds'):
            converted(cli.SeedList(), text)


def test_finite_floats():
    anything, angle = cli.FiniteFloat(), cli.FiniteFloat(0, 180)
    assert [converted(anything, text) for text in ('0', '-1.5', '1e30', ' 2 ', 3)] == [0, -1.5, 1e30, 2, 3]
    assert converted(angle, '179.9') == 179.9
    for text in ('nan', 'inf', '-inf', '1e39', '1e999', '', 'x', '1,5'):
        with pytest.raises(click.BadParameter, match='expected a finite number, got'):
            converted(anything, text)
    for text in ('0', '180', '-1', '200', 'nan'):
        with pytest.raises(click.BadParameter, match='expected a finite number between 0 and 180, got'):
            converted(angle, text)


def test_paths_are_not_empty():
    assert converted(cli.PathText(), 'a/b') == 'a/b'
    with pytest.raises(click.BadParameter, match="expected a path, got ''"):
        converted(cli.PathText(), '')


@pytest.mark.parametrize('count', [0, 1, 2])
def test_devices(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    device = cli.Device()
    assert converted(device, 'auto') == torch.device('cuda' if count else 'cpu')
    assert converted(device, 'cpu') == CPU and converted(device, CPU) is CPU
    for text, needed in (('cuda', 1), ('cuda:0', 1), ('cuda:1', 2), ('cuda:2', 3)):
        if count >= needed:
            assert converted(device, text) == torch.device(text)
        else:
            with pytest.raises(click.BadParameter, match=f'{text}.* {count or "no"} CUDA devices'):
                converted(device, text)
    for text in ('', 'CPU', 'gpu', 'mps', 'cuda:', 'cuda:-1', 'cuda:x', 'cuda:' + '9' * 30):
        with pytest.raises(click.BadParameter, match="expected 'cpu', 'cuda' or 'cuda:N'"):
            converted(device, text)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def raising(error):
    def body(**_):
        raise error

    return command_of(cli.option('size', type=int), body=body)


@pytest.mark.parametrize(
    'error, line, exit_code',
    [
        (MeshFileError('a.obj: expected\n  this'), 'Error: a.obj: expected this', 1),
        (legacy.NetworkFileError('a.pkl: damaged'), 'Error: a.pkl: damaged', 1),
        (DownloadError('http://a: expected a file'), 'Error: http://a: expected a file', 1),
        (FileNotFoundError(2, 'No such file or directory', 'a.obj'), 'Error: a.obj: No such file or directory', 1),
        (PermissionError(13, 'Permission denied', 'out/x'), 'Error: out/x: Permission denied', 1),
        (OSError('odd'), 'Error: odd', 1),
        (
            torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB.\nSee the manual.'),
            f'Error: CUDA out of memory. Tried to allocate 2.00 GiB; {cli.LESS_MEMORY}', 1,
        ),
        (urllib.error.URLError('no route'), 'Error: <urlopen error no route>', 1),
        (click.UsageError('--x: expected\ty'), 'Error: --x: expected y', 2),
        (click.BadParameter('expected z'), 'Error: Invalid value: expected z', 2),
        (click.ClickException('short'), 'Error: short', 1),
    ],
)
def test_what_users_cause_is_one_line(error, line, exit_code):
    result = outcome(raising(error))
    assert (result.stderr, result.stdout, result.exit_code) == (f'{line}\n', '', exit_code)


@pytest.mark.parametrize('words', [['--size=x'], ['--size'], ['--syze=1'], ['stray'], ['--size=1', '--', '-x']])
def test_bad_command_lines_are_one_line_without_usage(words):
    result = outcome(command_of(cli.option('size', type=int)), *words)
    assert result.exit_code == 2 and result.stdout == ''
    assert result.stderr.startswith('Error: ') and result.stderr.count('\n') == 1
    assert 'Usage' not in result.stderr


@pytest.mark.parametrize('error', [ValueError('v'), RuntimeError('r'), KeyError('k'), AssertionError('a')])
def test_errors_of_the_program_are_not_hidden(error):
    assert outcome(raising(error)).exception is error


def test_help_is_help():
    result = outcome(command_of(cli.option('size', type=int)), '--help')
    assert result.exit_code == 0 and 'Usage' in result.stdout and '--size' in result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Networks and meshes


@pytest.fixture(scope='module')
def networks():
    """An EG3D generator and another, a Next3D generator of two triangles, and a discriminator, all tiny."""
    small = dict(z_dim=8, w_dim=8, channel_base=64, channel_max=4, sr_num_fp16_res=0, sr_channels=(4, 4))
    config = EG3DConfig(
        **small,
        superresolution='SuperresolutionHybrid2X',
        plane_resolution=16,
        plane_channels=4,
        sampling=SamplingConfig(num_depths=4, num_importance=0, plane_axes=EG3D_PLANE_AXES),
    )
    torch.manual_seed(0)
    sides = dict(plane_resolution=16, texture_resolution=16, mouth_resolution=8, blending_lowest=8)
    head = dataclasses.replace(demo_network.CONFIG, **small, **sides, plane_channels=4)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return {
        'first': EG3DGenerator(config),
        'second': EG3DGenerator(config),
        'head': Next3DGenerator(head, faces, np.random.rand(4, 2), faces, torch.ones(1, 1, 16, 16)),
        'discriminator': Discriminator(DiscriminatorConfig(img_resolution=8, channel_base=64, channel_max=4)),
    }


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_averaged_generator_is_preferred(networks, tmp_path):
    first, second = networks['first'], networks['second']
    assert not same_weights(first, second)
    save_snapshot(tmp_path / 'both.pkl', {'G': first, 'G_ema': second})
    save_snapshot(tmp_path / 'one.pkl', {'G': first, 'D': networks['discriminator']})
    both, one = (cli.load_generator(str(tmp_path / name), CPU) for name in ('both.pkl', 'one.pkl'))
    assert same_weights(both, second) and same_weights(one, first)
    assert not both.training and not any(p.requires_grad for p in both.parameters())


def test_files_without_a_generator_are_refused(networks, tmp_path):
    for name, key in (('d.pkl', 'D'), ('g.pkl', 'G'), ('ema.pkl', 'G_ema')):
        save_snapshot(tmp_path / name, {key: networks['discriminator']})
        with pytest.raises(legacy.NetworkFileError, match=f'{name}: expected a generator as G_ema or G, found none'):
            cli.load_generator(str(tmp_path / name), CPU)


def test_damage_of_g_ema_is_told_although_g_is_there(networks, tmp_path):
    save_snapshot(tmp_path / 'net.pkl', {'G': networks['first'], 'G_ema': networks['second']})
    content = pickle.loads((tmp_path / 'net.pkl').read_bytes())
    del content['G_ema']['tensors']['decoder.net.0.weight']
    (tmp_path / 'net.pkl').write_bytes(pickle.dumps(content))
    with pytest.raises(legacy.NetworkFileError, match='G_ema.*decoder.net.0.weight'):
        cli.load_generator(str(tmp_path / 'net.pkl'), CPU)


def test_urls_that_cannot_be_are_refused():
    for url in ('ftp://example.org/a.pkl', 'http:///a.pkl'):
        with pytest.raises(click.UsageError, match='--network: '):
            cli.load_generator(url, CPU)


def head_files(tmp_path, obj='v 0 0 0\nv .1 0 0\nv 0 .2 0\nv 0 0 .3\nvt 0 0\nf 1/1 2/1 3/1\n', count=68):
    (tmp_path / 'head.obj').write_text(obj)
    (tmp_path / 'head.txt').write_text('0.1 0.2 -0.1\n' * count)
    return str(tmp_path / 'head.obj'), str(tmp_path / 'head.txt')


def test_mesh_input(networks, tmp_path):
    v = cli.load_mesh(networks['head'], *head_files(tmp_path), CPU)
    assert v.shape == (1, 4 + 68, 3) and v.dtype == torch.float32
    torch.testing.assert_close(v[0, 1], torch.tensor([0.1, 0, 0]))
    torch.testing.assert_close(v[0, 4:], torch.tensor([0.1, 0.2, -0.1]).expand(68, 3))
    assert cli.load_mesh(networks['first'], None, None, CPU) is None


def test_meshes_that_do_not_fit(networks, tmp_path):
    obj, lms = head_files(tmp_path)
    for arguments, flag in (((None, lms), '--obj_path'), ((obj, None), '--lms_path'), ((None, None), '--obj_path')):
        with pytest.raises(click.UsageError, match=f'{flag}: expected a file, got none'):
            cli.load_mesh(networks['head'], *arguments, CPU)
    vertices = 'v 0 0 0\nv 1 0 0\nv 0 1 0\n'
    cases = {
        vertices + 'vt 0 0\nf 1/1 2/1 3/1\n': 'expected the 4 vertices.*found 3',
        vertices + 'v 0 0 1\nf 1 2 3\n': 'expected a UV-mapped mesh.*no UVs',
    }
    for content, message in cases.items():
        with pytest.raises(click.UsageError, match=f'--obj_path: .*head.obj: {message}'):
            cli.load_mesh(networks['head'], *head_files(tmp_path, content), CPU)
    with pytest.raises(MeshFileError, match='head.txt: expected 68 lines'):
        cli.load_mesh(networks['head'], *head_files(tmp_path, count=67), CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def test_outdir_is_made_with_its_parents(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert cli.make_outdir(str(tmp_path / 'a' / 'b')).is_dir()
    assert cli.make_outdir(str(tmp_path / 'a' / 'b')) == tmp_path / 'a' / 'b'
    assert cli.make_outdir('~/c') == tmp_path / 'c' and (tmp_path / 'c').is_dir()
    (tmp_path / 'file').touch()
    with pytest.raises(click.UsageError, match='--outdir: .*file: expected a folder, found a file'):
        cli.make_outdir(str(tmp_path / 'file'))


def test_latents_are_those_of_the_published_scripts():
    z = cli.latent(166, 512)
    assert z.shape == (1, 512) and z.dtype == torch.float32
    assert np.array_equal(z.numpy(), np.random.RandomState(166).randn(1, 512).astype(np.float32))
    # The generator of numpy never changes: the first numbers of seed 0.
    assert cli.latent(0, 3)[0].tolist() == pytest.approx([1.7640524, 0.4001572, 0.9787380], rel=1e-6)


def test_bytes_of_pictures_are_rounded_down():
    values = torch.tensor([-2, -1, -0.99999, 0, 0.003, 0.99, 1, 7])
    image = torch.stack([values, values.flip(0), torch.zeros(8)])[:, None]
    picture = to_uint8(image)
    expected = [0, 0, 0, 128, 128, 254, 255, 255]
    assert picture.shape == (1, 8, 3) and picture.dtype == np.uint8
    assert picture[0, :, 0].tolist() == expected and picture[0, :, 1].tolist() == expected[::-1]
    assert picture[0, :, 2].tolist() == [128] * 8


def test_errors_of_writing_name_the_file(tmp_path):
    def write(path, error=None):
        with cli.naming(path):
            if error:
                raise error
            path.write_text('x')

    write(tmp_path / 'new')
    write(tmp_path / 'new')
    start = f'^{re.escape(str(tmp_path / "new"))}: cannot be written: '
    for error, reason in ((OSError(28, 'No space left', 'tmp123'), 'No space left'), (OSError('short'), 'short')):
        with pytest.raises(click.ClickException, match=f'{start}{reason}$'):
            write(tmp_path / 'new', error)
    with pytest.raises(click.ClickException, match='expected a regular file or a new name'):
        write(tmp_path)
    with pytest.raises(KeyError):
        write(tmp_path / 'new', KeyError('bug'))
