# SPDX-License-Identifier: Apache-2.0
"""From photographs to data: pictures of any kind, crops, checkpoints, cameras and labels, meshes; without downloads."""

import json
import pathlib
import pickle

import numpy as np
import pytest
import scipy.io
import torch
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage
from torch import nn

from dataset_preprocessing.ffhq import (
    alignment, assets, cameras_file, crop, deca_net, deep3d_net, files, fit_cameras, fit_meshes, labels, points, resnet,
)  # fmt: skip
from dataset_preprocessing.ffhq.files import NoFaceError, PreprocessError
from geometry.cameras import look_at_pose
from geometry.head_model import HeadMesh
from geometry.meshes import read_landmarks, read_obj
from geometry.mirror import LANDMARK_MIRROR, mirror_label

pytestmark = pytest.mark.usefixtures('one_thread')
REFERENCE = np.array([[-0.31, 0.29, 0.5], [0.32, 0.3, 0.51], [0.0, -0.02, 1], [-0.25, -0.4, 0.6], [0.26, -0.41, 0.58]])
FACE = np.array([[200.0, 180], [300, 182], [250, 235], [208, 290], [295, 291]])


def noise_picture(width, height, seed=0):
    """Return a picture that is smooth enough to be resampled twice, and nowhere the same."""
    small = np.random.default_rng(seed).integers(0, 256, [height // 16 + 1, width // 16 + 1, 3]).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def run(script, **options):
    arguments = [f'--{name.replace("_", "-")}={value}' for name, value in options.items()]
    return CliRunner().invoke(script.main, arguments)


def refused(script, message, **options):
    result = run(script, **options)
    assert result.exit_code and message in result.output and 'Traceback' not in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1
    return result.output


# --- pictures and steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['L', '1', 'P', 'LA', 'RGBA', 'CMYK', 'I;16', 'I', 'RGB'])
def test_pictures_of_all_kinds_are_read(tmp_path, mode):
    grey = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    path = tmp_path / ('a.tif' if mode in ('CMYK', 'I', 'I;16') else 'a.png')
    if mode in ('I;16', 'I'):
        image = Image.fromarray(grey.astype(np.uint16 if mode == 'I;16' else np.int32) * 257)
        assert image.mode == mode
    else:
        image = Image.fromarray(grey)
        image = image.convert('RGB').convert(mode) if mode == 'CMYK' else image.convert(mode)
    image.save(path)
    read = files.read_picture(path)
    assert read.mode == 'RGB' and read.size == (64, 48)
    close = 255 if mode == '1' else 2  # One bit is dithered.
    assert np.abs(np.asarray(read).astype(int) - grey[..., None]).max() <= close


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_rotation_is_undone(tmp_path, orientation):
    image = noise_picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 'FLIP_LEFT_RIGHT', 3: 'ROTATE_180', 4: 'FLIP_TOP_BOTTOM', 5: 'TRANSPOSE', 6: 'ROTATE_90',
            7: 'TRANSVERSE', 8: 'ROTATE_270'}  # fmt: skip
    stored = image.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else image
    stored.save(tmp_path / 'a.png', exif=exif)
    assert np.array_equal(np.asarray(files.read_picture(tmp_path / 'a.png')), np.asarray(image))


@pytest.mark.parametrize('content', [b'', b'no picture', 'cut', 'float'])
def test_bad_pictures_are_refused(tmp_path, content):
    path = tmp_path / 'a.png'
    noise_picture(64, 64).save(path)
    if content == 'float':
        path = tmp_path / 'a.tif'
        Image.fromarray(np.zeros([4, 4], np.float32)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if content == 'cut' else content)
    with pytest.raises(PreprocessError, match=f'{path.name}: expected a picture, found'):
        files.read_picture(path)


def test_huge_pictures_are_refused(tmp_path, monkeypatch):
    noise_picture(64, 64).save(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
    with pytest.raises(PreprocessError, match='expected a picture'):
        files.read_picture(tmp_path / 'a.png')


def test_listing(tmp_path):
    for name in ('b.PNG', 'a/c.jpg', '.hidden.png', 'a/.d/e.png', 'notes.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list(files.list_pictures(tmp_path)) == ['a/c', 'b']
    (tmp_path / 'b.jpg').touch()
    with pytest.raises(PreprocessError, match='expected one file of a name'):
        files.list_pictures(tmp_path)
    for folder, message in ((tmp_path / 'a/.d/e.png', 'found a file'), (tmp_path / 'none', 'found nothing')):
        with pytest.raises(PreprocessError, match=message):
            files.list_pictures(folder)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(PreprocessError, match='found none'):
        files.list_pictures(tmp_path / 'empty')


@pytest.mark.parametrize('text', ['', '1 2\n' * 4, '1 2 3\n' * 5, 'a b\n' * 5, '1 nan\n' * 5, '1\n1 2\n' * 3])
def test_bad_points_are_refused(tmp_path, text):
    (tmp_path / 'a.txt').write_text(text)
    with pytest.raises(PreprocessError, match='a.txt: expected 5 lines of x y'):
        files.read_points(tmp_path / 'a.txt', 5)


def test_steps_resume_and_go_on_after_failures(tmp_path, capsys):
    items = {name: pathlib.Path(name) for name in 'abcd'}
    done = []

    def work(name, path):
        if name == 'b':
            raise PreprocessError('b: expected\nbetter')
        if name == 'c':
            raise NoFaceError('c: no face')
        files.write_text(name, tmp_path / name)
        done.append(name)

    for _ in range(2):
        with pytest.raises(Exception, match='1 of 4 failed'):
            files.run_step('step', items, lambda name: [tmp_path / name], work)
    assert done == ['a', 'd']
    printed = capsys.readouterr().out
    assert 'b: expected better\n' in printed and 'step: 0 done, 2 already there, 1 without a face' in printed


# --- crops -----------------------------------------------------------------------------------------------------------


def test_placement_recovers_a_projection():
    projected = 150 * REFERENCE[:, :2] + np.array([320.0, 200.0])
    points = np.stack([projected[:, 0], 479 - projected[:, 1]], axis=1)
    assert np.allclose(alignment.place_face(points, 480, REFERENCE), (150, 320, 200))


def test_crop_of_a_crop_is_that_crop():
    image = noise_picture(640, 480)
    first = alignment.crop_of(alignment.place_face(FACE, image.height, REFERENCE), image.size)
    once = alignment.training_picture(image, first)
    moved = alignment.points_in_training_picture(FACE, image.size, first)
    second = alignment.crop_of(alignment.place_face(moved, once.height, REFERENCE), once.size)
    assert np.allclose(alignment.points_in_training_picture(moved, once.size, second), moved, atol=1.5)
    twice = alignment.training_picture(once, second)
    inner = slice(40, -40)
    assert np.abs(np.asarray(twice).astype(int) - np.asarray(once))[inner, inner].mean() < 6


def test_points_lie_on_what_they_lay_on():
    pixels = np.zeros([480, 640, 3], np.uint8)
    pixels[230:233, 260:263] = 255
    image = Image.fromarray(pixels)
    cut = alignment.crop_of(alignment.place_face(FACE, image.height, REFERENCE), image.size)
    result = np.asarray(alignment.training_picture(image, cut))[..., 0].astype(float)
    rows, columns = np.indices(result.shape)
    centre = np.array([(columns * result).sum(), (rows * result).sum()]) / result.sum()
    moved = alignment.points_in_training_picture(np.array([[261.0, 231.0]]), image.size, cut)[0]
    assert np.allclose(centre, moved, atol=0.1)


@pytest.mark.parametrize('shift', [(0, 0), (-150, 60), (300, -120)])
def test_large_photographs_are_cut_the_same(monkeypatch, shift):
    image = noise_picture(640, 480)
    cut = alignment.crop_of(alignment.place_face(FACE + shift, image.height, REFERENCE), image.size)
    whole = np.asarray(alignment.take_crop(image, cut)).astype(int)
    monkeypatch.setattr(alignment, 'MAX_ENLARGED_PIXELS', 0)
    part = np.asarray(alignment.take_crop(image, cut)).astype(int)
    assert np.abs(whole - part).max() <= 2 and (whole != part).mean() < 0.02


def test_faces_without_extent_or_outside_are_refused():
    with pytest.raises(PreprocessError, match='found no extent'):
        alignment.place_face(np.full([5, 2], 7.0), 480, REFERENCE)
    for shift in ((5000, 0), (-5000, 0), (0, 5000), (0, -5000)):
        with pytest.raises(PreprocessError, match='found one outside'):
            alignment.crop_of(alignment.place_face(FACE + shift, 480, REFERENCE), (640, 480))


def upright_landmarks():
    """Return landmarks whose crop is known: eyes 100 apart at y 200, mouth at y 300."""
    landmarks = np.zeros([68, 2])
    landmarks[36:42], landmarks[42:48] = (150, 200), (250, 200)
    landmarks[48], landmarks[54] = (170, 300), (230, 300)
    return landmarks


def test_ffhq_square_of_an_upright_face():
    # right = (100, 0) - turned (0, 100) = (200, 0); half side = max(2·100, 1.8·100); centre (200, 200 + 10).
    quad = alignment.ffhq_quad(upright_landmarks(), zoom=1)
    assert np.allclose(quad, [[0, 10], [0, 410], [400, 410], [400, 10]])
    wide = alignment.ffhq_quad(upright_landmarks())
    assert np.allclose(wide - wide.mean(axis=0), 1.8 * (quad - quad.mean(axis=0)))


def test_ffhq_square_turns_with_the_face():
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = alignment.ffhq_quad(upright_landmarks() @ turn.T)
    assert np.allclose(turned, alignment.ffhq_quad(upright_landmarks()) @ turn.T)
    with pytest.raises(PreprocessError, match='found no extent'):
        alignment.ffhq_quad(np.zeros([68, 2]))


def test_ffhq_sampling_inside_a_picture():
    image = noise_picture(600, 500)
    quad = np.array([[100.0, 100], [100, 356], [356, 356], [356, 100]]) - 0.5
    sampled = np.asarray(alignment.sample_quad(image, quad, 256, 1024)).astype(int)
    assert np.abs(sampled - np.asarray(image)[100:356, 100:356]).mean() < 1.5


def test_ffhq_sampling_of_much_larger_and_of_leaving_squares():
    image = noise_picture(90, 70).resize((900, 700), Image.Resampling.BICUBIC)
    quad = np.array([[50.0, 50], [50, 650], [650, 650], [650, 50]]) - 0.5
    small = np.asarray(alignment.sample_quad(image, quad, 60, 240)).astype(int)
    expected = np.asarray(image.crop((50, 50, 650, 650)).resize((60, 60), Image.Resampling.BOX)).astype(int)
    assert np.abs(small - expected).mean() < 4
    out = np.asarray(alignment.sample_quad(image, quad - 400, 150, 300)).astype(int)
    assert out.shape == (150, 150, 3) and out.std() > 5
    assert out[:40, :40].std(axis=(0, 1)).max() < out[110:, 110:].std(axis=(0, 1)).min()
    with pytest.raises(PreprocessError, match='found one outside'):
        alignment.sample_quad(image, quad + 5000, 150, 300)


@pytest.mark.parametrize('sigma, largest', [(5.2, 0), (13, 0.5), (40, 0.5)])
def test_a_wide_blur_is_that_of_a_gaussian(sigma, largest):
    """Smooth colours with noise, of a size that is no multiple of blocks; the last sigmas fade to one colour anyway."""
    y, x = np.mgrid[:317, :411]
    noise = np.random.default_rng(0).normal(0, 20, [317, 411, 3])
    pixels = (128 + 80 * np.sin(x / 90)[..., None] * np.cos(y / 70)[..., None] + noise).astype(np.float32)
    expected = ndimage.gaussian_filter(pixels, [sigma, sigma, 0])
    difference = np.abs(alignment._blurred(pixels, sigma) - expected)
    inner = slice(int(2 * sigma), -int(2 * sigma))
    assert difference.shape == pixels.shape and difference[inner, inner].max() <= largest


# --- points and reference --------------------------------------------------------------------------------------------


def test_reference_of_the_embedded_head_is_a_face():
    reference = points.reference_points(None)
    assert reference.shape == (5, 3)
    assert np.allclose(reference[[1, 0, 2, 4, 3]] * [-1, 1, 1], reference, atol=1e-4)
    assert (np.abs(reference) < 1).all() and reference[0, 1] > reference[2, 1] > reference[3, 1]
    assert reference[2, 2] == reference[:, 2].max()


def test_reference_files(tmp_path):
    landmarks = np.random.default_rng(0).normal(size=[68, 3]).astype(np.float32)
    scipy.io.savemat(tmp_path / 'a.mat', {'lm': landmarks})
    read = points.reference_points(str(tmp_path / 'a.mat'))
    assert np.allclose(read, alignment.five_of_68(landmarks))
    scipy.io.savemat(tmp_path / 'b.mat', {'lm': landmarks[:5]})
    (tmp_path / 'c.mat').write_bytes(b'text')
    scipy.io.savemat(tmp_path / 'd.mat', {'other': landmarks})
    for name in 'bcde':
        with pytest.raises(PreprocessError, match=f'{name}.mat: expected'):
            points.reference_points(str(tmp_path / f'{name}.mat'))


def test_tables_of_mesh_points():
    assert points.IBUG_OF_MESH.shape == (68,) and len(set(points.IBUG_OF_MESH.tolist())) == 68
    pairs = dict(zip(points.IBUG_OF_MESH.tolist(), points.IBUG_OF_MESH[LANDMARK_MIRROR].tolist(), strict=True))
    assert all(pairs[pairs[point]] == point for point in pairs)
    assert (points.IBUG_OF_MESH < 468).all()


def test_points_of_a_json(tmp_path):
    path = tmp_path / 'cropping_params.json'
    path.write_text(json.dumps({'00000/img0.png': {'lm': FACE.tolist()}, 'b.png': {'lm': [[0, 'nan']] * 5}}))
    five = points.FivePoints(str(path))
    assert np.array_equal(five('00000/img0'), FACE)
    with pytest.raises(NoFaceError):
        five('other')
    with pytest.raises(PreprocessError, match='expected five points'):
        five('b')
    for bad in ('[]', '{"a": 1}', '{"a": {"lm": [1, 2]}}', '{'):
        path.write_text(bad)
        with pytest.raises(PreprocessError, match='found another'):
            points.FivePoints(str(path))


# --- checkpoints and networks ----------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path('touched-by-a-checkpoint'),)


def test_parts_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    weights = {name: tensor.clone() + 1 for name, tensor in own.state_dict().items() if 'num_batches' not in name}

    def load(content, legacy=False):
        torch.save(content, 'net.pth', _use_new_zipfile_serialization=not legacy)
        return resnet.load_part(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 'net.pth', 'part', 'a file')

    for legacy in (False, True):
        loaded = load({'part': {**weights, 'extra': torch.zeros(2)}, 'opt_00': {'lr': 1}}, legacy)
        assert not loaded.training and all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    bad = [
        ({'other': weights}, 'with the entry part, found none'), (weights, 'with the entry part'),
        ([weights], 'with the entry part'), ({'part': 3}, 'with the entry part'),
        ({'part': {**weights, '0.bias': torch.zeros(5)}}, r'with part.0.bias \[4\], found \[5\]'),
        ({'part': {**weights, '0.bias': torch.zeros(4).long()}}, 'with part.0.bias'),
        ({'part': {n: w for n, w in weights.items() if n != '1.running_var'}}, r'running_var \[4\], found none'),
        ({'part': {**weights, '0.bias': torch.full([4], torch.nan)}}, 'expected finite numbers'),
        ({'part': weights, 'extra': Hostile()}, 'that cannot be read'),
    ]  # fmt: skip
    for content, message in bad:
        with pytest.raises(PreprocessError, match=message) as error:
            load(content)
        assert '\n' not in str(error.value)
    for content in (b'', b'text', pickle.dumps(Hostile(), 2), pathlib.Path('net.pth').read_bytes()[:900]):
        pathlib.Path('net.pth').write_bytes(content)
        with pytest.raises(PreprocessError, match='that cannot be read'):
            resnet.load_part(nn.Linear(1, 1), 'net.pth', 'part', 'a file')
    with pytest.raises(PreprocessError, match='found no file'):
        resnet.load_part(nn.Linear(1, 1), 'none.pth', 'part', 'a file')
    assert not pathlib.Path('touched-by-a-checkpoint').exists()


def test_names_and_sizes_of_the_published_networks():
    with torch.device('meta'):
        deep3d, deca = deep3d_net.Deep3DNet(), deca_net.DecaEncoder()
    state = deca.state_dict()
    assert sum(name.startswith('encoder.') for name in state) == 318
    assert state['encoder.layer4.0.downsample.0.weight'].shape == (2048, 1024, 1, 1)
    assert state['encoder.layer3.5.conv2.weight'].shape == (256, 256, 3, 3)
    assert state['layers.2.weight'].shape == (236, 1024)
    assert [len(deep3d.state_dict()[f'final_layers.{i}.bias']) for i in range(7)] == [80, 64, 80, 3, 27, 2, 1]
    assert sum(deep3d_net.COEFFICIENTS.values()) == 257 and sum(deca_net.CODES.values()) == 236


def test_a_fabricated_checkpoint_gives_its_coefficients(tmp_path):
    torch.manual_seed(0)
    made = deep3d_net.Deep3DNet().eval()
    torch.save({'net_recon': made.state_dict(), 'opt_00': {}}, tmp_path / 'epoch_20.pth')
    loaded = deep3d_net.load_network(tmp_path / 'epoch_20.pth')
    seen = deep3d_net.network_input(noise_picture(640, 480), FACE, REFERENCE)
    assert seen.size == (224, 224)
    values = deep3d_net.coefficients(loaded, seen)
    with torch.no_grad():
        expected = made(torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None] / 255)[0].numpy()
    assert np.array_equal(values, expected) and values.shape == (257,)


def test_bottlenecks_stride_in_the_middle():
    block = resnet.Bottleneck(8, 4, 2).eval()
    assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((1, 1), (2, 2), (2, 2))
    assert block(torch.randn(2, 8, 9, 9)).shape == (2, 16, 5, 5)
    assert resnet.Bottleneck(16, 4, 1).downsample is None


# --- cameras and labels ----------------------------------------------------------------------------------------------


def test_camera_of_a_frontal_face():
    pose = deep3d_net.raw_pose(np.zeros(3), np.zeros(3))
    assert np.allclose(pose[:3, 3], (0, 0.006, 2.861)) and np.allclose(pose[:3, :3], np.diag([1, -1, -1]))
    assert np.allclose(deep3d_net.normalised_pose(pose)[:3, 3], (0, 0.005662, 2.699994), atol=1e-6)


def test_camera_of_a_turned_face():
    pose = deep3d_net.raw_pose(np.array([0.1, 0.2, -0.05]), np.array([0.05, -0.02, 0.3]))
    assert np.allclose(pose[:3, 3], (-0.533794, 0.266674, 2.711781), atol=1e-6)
    expected = [[0.978842, 0.048983, 0.198669, -0.519058], [0.069539, -0.992769, -0.097843, 0.259312],
                [0.192440, 0.109588, -0.975170, 2.636918], [0, 0, 0, 1]]  # fmt: skip
    label = deep3d_net.label(deep3d_net.normalised_pose(pose))
    assert np.allclose(label[:16].reshape(4, 4), expected, atol=1e-6)
    assert np.allclose(label[16:], [4.2647, 0, 0.5, 0, 4.2647, 0.5, 0, 0, 1])


@pytest.mark.parametrize('mode', deep3d_net.MODES)
def test_modes(mode):
    rng = np.random.default_rng(0)
    for _ in range(20):
        raw = deep3d_net.raw_pose(rng.uniform(-0.5, 0.5, 3), rng.uniform(-0.5, 0.5, 3))
        pose = deep3d_net.normalised_pose(raw, mode)
        pivot = np.zeros(3) if mode == 'orig' else np.array([0, 0, 0.175])
        assert np.isclose(np.linalg.norm(pose[:3, 3] - pivot), 2.7)
        assert np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-6) and np.linalg.det(pose[:3, :3]) > 0
        if mode == 'simplify':
            forward = (pivot - pose[:3, 3]) / 2.7
            assert np.allclose(pose[:3, 2], forward, atol=1e-6) and abs(pose[1, 0]) < 1e-6
        else:
            assert np.array_equal(pose[:3, :3], raw[:3, :3])
        label = deep3d_net.label(pose)
        assert np.array_equal(mirror_label(mirror_label(label)), label)
    on_sphere = look_at_pose(1.3, 1.6)[0].numpy()
    assert np.allclose(deep3d_net.normalised_pose(on_sphere), on_sphere, atol=1e-6)


def test_mirrored_labels_are_those_of_mirrored_faces():
    angle, move = np.array([0.1, 0.2, -0.05]), np.array([0.05, -0.02, 0.3])
    mirrored = deep3d_net.raw_pose(angle * [1, -1, -1], move * [-1, 1, 1])  # Yaw and roll turn round.
    label = deep3d_net.label(deep3d_net.normalised_pose(deep3d_net.raw_pose(angle, move)))
    assert np.allclose(mirror_label(label), deep3d_net.label(deep3d_net.normalised_pose(mirrored)))


def test_poses_in_the_middle_and_unknown_modes_are_refused():
    with pytest.raises(ValueError, match='in its middle'):
        deep3d_net.normalised_pose(np.eye(4))
    with pytest.raises(ValueError, match='mode: expected orig'):
        deep3d_net.normalised_pose(np.eye(4), 'other')


def write_coefficients(folder):
    values = np.zeros(257, np.float32)
    cameras_file.write_coefficients(values, folder / 'b' / 'one.npz')
    values[224:227], values[254:] = (0.1, 0.2, -0.05), (0.05, -0.02, 0.3)
    parts = deep3d_net.split_coefficients(values[None])
    scipy.io.savemat(folder / 'a.mat', parts)


def test_labels_of_coefficients_and_of_cameras(tmp_path):
    (tmp_path / 'c').mkdir()
    write_coefficients(tmp_path / 'c')
    result = run(labels, coeffs=tmp_path / 'c', outdir=tmp_path / 'out', mirror=True)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / 'out' / 'dataset.json').read_text())['labels']
    assert [name for name, _ in written] == ['a.png', 'a_mirror.png', 'b/one.png', 'b/one_mirror.png']
    assert np.allclose(mirror_label(np.array(written[0][1])), written[1][1])
    assert np.allclose(written[0][1][3], -0.519058, atol=1e-6)
    cameras = json.loads((tmp_path / 'out' / 'cameras.json').read_text())
    assert np.allclose(np.array(cameras['b/one.png']['pose'])[:3, 3], (0, 0.006, 2.861))
    assert cameras['a.png']['intrinsics'][0] == [2985.29, 0, 512]
    result = run(labels, cameras=tmp_path / 'out' / 'cameras.json', outdir=tmp_path / 'again')
    assert result.exit_code == 0 and not (tmp_path / 'again' / 'cameras.json').exists()
    assert json.loads((tmp_path / 'again' / 'dataset.json').read_text())['labels'] == written[::2]


def test_bad_cameras_are_refused(tmp_path):
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c' / 'a.npz').write_bytes(b'PK text')
    refused(labels, 'a.npz: expected coefficients', coeffs=tmp_path / 'c', outdir=tmp_path / 'out')
    np.savez(tmp_path / 'c' / 'a.npz', angle=np.full(3, np.nan), trans=np.zeros(3))
    refused(labels, 'a.npz: expected finite', coeffs=tmp_path / 'c', outdir=tmp_path / 'out')
    path = tmp_path / 'cameras.json'
    for text in ('{', '[]', '{"a.png": {}}', '{"a.png": {"pose": [1]}}'):
        path.write_text(text)
        refused(labels, 'expected a cameras.json', cameras=path, outdir=tmp_path / 'out')
    for pose in (2 * np.eye(4), np.full([4, 4], np.nan)):
        path.write_text(json.dumps({'a.png': {'pose': pose.tolist()}}))
        refused(labels, 'expected the pose of a camera', cameras=path, outdir=tmp_path / 'out')
    path.write_text(json.dumps({'a': {'pose': deep3d_net.raw_pose(np.zeros(3), np.zeros(3)).tolist()}}))
    refused(labels, 'expected the name of a picture', cameras=path, outdir=tmp_path / 'out')
    refused(labels, 'expected either', outdir=tmp_path / 'out')
    refused(labels, 'found no file', cameras=tmp_path / 'none', outdir=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


# --- meshes ----------------------------------------------------------------------------------------------------------


def test_gaze():
    # Pitch is kept, yaw turned round, no roll.
    assert deca_net.flame_eye_pose(np.array([0.1, 0.2, 0.3, 0.4])).tolist() == [0.1, -0.2, 0, 0.3, -0.4, 0]
    assert deca_net.flame_eye_pose(np.zeros([5, 4])).shape == (5, 6)


def test_square_of_deca():
    landmarks = np.array([[100.0, 200], [300, 300], [200, 250]])
    square = deca_net.square_around(landmarks)
    assert square.side == int((200 + 100) / 2 * 1.1 * 1.25) == 206
    assert (square.left + 103, square.top + 103) == (200, 250)
    corners = deca_net.square_matrix(square) @ [[square.left, square.left + 206], [square.top, square.top], [1, 1]]
    assert np.allclose(corners[:2].T, [[0, 0], [223, 0]])
    with pytest.raises(PreprocessError, match='no extent'):
        deca_net.square_around(np.zeros([68, 2]))


def test_input_of_deca_is_the_picture_at_its_scale():
    image = noise_picture(400, 300)
    seen = deca_net.encoder_input(image, deca_net.Square(50, 40, 223))
    expected = np.asarray(image)[40:264, 50:274].transpose(2, 0, 1) / 255
    assert seen.dtype == torch.float32 and np.allclose(seen, expected, atol=1e-6)
    beyond = deca_net.encoder_input(image, deca_net.Square(-100, 40, 223))
    assert (beyond[:, :, :99] == 0).all() and (beyond[:, :, 101:] > 0).any()


class ToyHead:
    """Takes FLAME's place: a triangle that follows shape, jaw and eyes."""

    faces, uv_faces = torch.tensor([[0, 1, 2]]), torch.tensor([[2, 1, 0]])
    uvs = torch.tensor([[0.0, 0.1], [0.5, 1 / 3], [1.0, 1.0]])

    def __call__(self, shape, expression, jaw_pose, eye_pose=None):
        eyes = torch.zeros(1, 6) if eye_pose is None else eye_pose
        vertices = torch.stack([shape[:, :3], jaw_pose, eyes[:, :3]], dim=1) / 30
        return HeadMesh(vertices, vertices[:, :1].expand(-1, 68, -1))


@pytest.fixture
def toy_deca(monkeypatch):
    codes = torch.linspace(0, 1, 236)[None]
    monkeypatch.setattr(fit_meshes, 'load_files', lambda *_: (lambda image: codes, ToyHead()))
    return codes


def picture_and_landmarks(folder, name='a/b'):
    (folder / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
    noise_picture(200, 200).save(folder / 'images' / f'{name}.png')
    files.write_points(np.random.default_rng(0).uniform(50, 150, [68, 2]), folder / 'points' / f'{name}.txt')


def test_meshes_are_written(tmp_path, toy_deca):
    picture_and_landmarks(tmp_path)
    files.write_text('9 9 0.1 0.2 0.3 0.4\n', tmp_path / 'gaze' / 'a' / 'b.txt')
    options = dict(images=tmp_path / 'images', points68=tmp_path / 'points', out=tmp_path / 'out')
    result = run(fit_meshes, **options, gaze=tmp_path / 'gaze', codes=tmp_path / 'codes')
    assert result.exit_code == 0, result.output
    mesh, codes = read_obj(tmp_path / 'out' / 'a' / 'b.obj'), toy_deca[0].numpy()
    eyes = np.array([0.1, -0.2, 0], np.float32)
    assert np.array_equal(mesh.vertices, np.stack([codes[:3], codes[203:206], eyes]) / np.float32(30))
    assert np.array_equal(mesh.uvs, ToyHead.uvs) and np.array_equal(mesh.uv_faces, ToyHead.uv_faces)
    landmarks = read_landmarks(tmp_path / 'out' / 'a' / 'b_kpt2d.txt')
    assert np.array_equal(landmarks, np.tile(mesh.vertices[:1], [68, 1]))
    with np.load(tmp_path / 'codes' / 'a' / 'b.npz') as written:
        assert np.array_equal(written['exp'], codes[150:200]) and written['eye_pose'].shape == (6,)
    before = (tmp_path / 'out' / 'a' / 'b.obj').stat().st_mtime_ns
    assert '0 done, 1 already there' in run(fit_meshes, **options).output
    assert (tmp_path / 'out' / 'a' / 'b.obj').stat().st_mtime_ns == before
    assert '1 done' in run(fit_meshes, **options, lms=tmp_path / 'lms').output
    assert (tmp_path / 'lms' / 'a' / 'b.txt').exists()


def test_codes_are_gathered_for_driving(tmp_path, toy_deca):
    for name in ('b', 'a', 'c/d'):
        picture_and_landmarks(tmp_path, name)
    options = dict(images=tmp_path / 'images', points68=tmp_path / 'points', out=tmp_path / 'out', coefficients=True)
    refused(fit_meshes, '--coefficients: expected --codes with it, got none', **options)
    (tmp_path / 'points' / 'b.txt').unlink()  # No face: no row.
    options['codes'] = tmp_path / 'codes'
    assert '1 without a face' in run(fit_meshes, **options).output
    codes = toy_deca[0].numpy()
    for path, names in (('out/coefficients.npz', ['a']), ('out/c/coefficients.npz', ['d'])):
        with np.load(tmp_path / path, allow_pickle=False) as written:
            assert sorted(written) == ['exp', 'eye_pose', 'names', 'pose', 'shape']
            assert written['names'].tolist() == names and np.array_equal(written['pose'], codes[None, 200:206])
            assert np.array_equal(written['shape'], codes[None, :100]) and written['eye_pose'].shape == (1, 6)
    (tmp_path / 'codes' / 'a.npz').write_bytes(b'PK cut')
    result = run(fit_meshes, **options)
    assert result.exit_code == 1
    assert result.output.endswith('a.npz: expected codes, found a file without: delete it, run again\n')


def test_meshes_of_bad_input_are_told(tmp_path, toy_deca):
    picture_and_landmarks(tmp_path)
    options = dict(images=tmp_path / 'images', points68=tmp_path / 'points', out=tmp_path / 'out')
    result = run(fit_meshes, **options, gaze=tmp_path / 'gaze')
    assert result.exit_code and 'expected gaze angles, found no file' in result.output
    for text in ('1 2', 'a b c d', '1 2 3 inf'):
        files.write_text(text, tmp_path / 'gaze' / 'a' / 'b.txt')
        assert 'b.txt: expected' in run(fit_meshes, **options, gaze=tmp_path / 'gaze').output
    (tmp_path / 'points' / 'a' / 'b.txt').write_text('1 2\n' * 68)
    assert 'a/b.png: expected landmarks of a face' in run(fit_meshes, **options).output
    (tmp_path / 'points' / 'a' / 'b.txt').unlink()
    result = run(fit_meshes, **options)
    assert result.exit_code == 0 and '1 without a face' in result.output
    assert not (tmp_path / 'out').exists()


# --- files that users download ---------------------------------------------------------------------------------------


def test_all_missing_files_are_told_at_once(tmp_path):
    picture_and_landmarks(tmp_path)
    options = dict(images=tmp_path / 'images', points68=tmp_path / 'points', out=tmp_path / 'out')
    (tmp_path / 'deca').mkdir()
    (tmp_path / 'deca' / 'generic_model.pkl').touch()
    told = refused(fit_meshes, 'expected files that you download yourself', **options, deca=tmp_path / 'deca')
    names = ['deca_model.tar', 'landmark_embedding.npy', 'head_template.obj']
    assert all(f'{tmp_path}/deca/{name} (' in told for name in names) and 'generic_model.pkl' not in told
    for name in names:
        (tmp_path / 'deca' / name).touch()
    refused(fit_meshes, 'generic_model.pkl: expected', **options, deca=tmp_path / 'deca')
    files.write_points(FACE, tmp_path / 'five' / 'a' / 'b.txt')
    options = dict(images=tmp_path / 'images', points=tmp_path / 'five', out=tmp_path / 'out')
    refused(fit_cameras, 'epoch_20.pth (the pretrained model', **options, network=tmp_path / 'epoch_20.pth')
    assert not (tmp_path / 'out').exists()


def test_published_places():
    root = pathlib.Path(assets.__file__).parent
    places = {name: asset.path.relative_to(root).as_posix() for name, asset in assets.ASSETS.items()}
    assert places['deca'] == 'deca/data/deca_model.tar'
    assert places['deep3d'] == 'Deep3DFaceRecon_pytorch/checkpoints/pretrained/epoch_20.pth'
    assert all('https://' in asset.source for asset in assets.ASSETS.values())


# --- the crops' command ----------------------------------------------------------------------------------------------


def test_crops_are_written(tmp_path):
    (tmp_path / 'in').mkdir()
    noise_picture(640, 480).save(tmp_path / 'in' / 'a.jpg')
    noise_picture(640, 480, 1).save(tmp_path / 'in' / 'faceless.png')
    files.write_points(FACE, tmp_path / 'five' / 'a.txt')
    files.write_points(np.tile(FACE[2], [68, 1]), tmp_path / 'points68' / 'a.txt')
    options = dict(images=tmp_path / 'in', points=tmp_path / 'five', out=tmp_path / 'out', mirror=True)
    options |= dict(points68=tmp_path / 'points68', out_points68=tmp_path / 'moved')
    result = run(crop, **options)
    assert result.exit_code == 0 and '1 done, 0 already there, 1 without a face' in result.output
    picture, mirrored = (np.asarray(Image.open(tmp_path / 'out' / name)) for name in ('a.png', 'a_mirror.png'))
    assert picture.shape == (512, 512, 3) and np.array_equal(mirrored, picture[:, ::-1])
    assert files.read_points(tmp_path / 'moved' / 'a.txt', 68).shape == (68, 2)
    assert '0 done, 1 already there' in run(crop, **options).output
    (tmp_path / 'out' / 'a_mirror.png').unlink()
    assert '1 done, 0 already there' in run(crop, **options).output
    assert not list(tmp_path.rglob('.tmp*'))


def test_ffhq_crops_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(alignment.sample_quad, '__defaults__', (150, 300))
    (tmp_path / 'in').mkdir()
    noise_picture(640, 480).save(tmp_path / 'in' / 'a.jpg')
    files.write_points(upright_landmarks(), tmp_path / 'points68' / 'a.txt')
    result = run(crop, images=tmp_path / 'in', points68=tmp_path / 'points68', out=tmp_path / 'out', ffhq=True)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / 'out' / 'a.png').size == (150, 150)


def test_crops_of_bad_input_are_told(tmp_path):
    (tmp_path / 'in').mkdir()
    noise_picture(640, 480).save(tmp_path / 'in' / 'a.png')
    options = dict(images=tmp_path / 'in', out=tmp_path / 'out')
    refused(crop, '--points: expected where the faces are', **options)
    refused(crop, '--points68: expected where the faces are', **options, ffhq=True)
    refused(crop, '--out-points68: expected with', **options, points=tmp_path, out_points68=tmp_path)
    refused(crop, '--mirror: expected without', **options, points68=tmp_path, ffhq=True, mirror=True)
    refused(crop, 'expected a folder of points or a JSON file', **options, points=tmp_path / 'none')
    files.write_points(np.full([5, 2], 3.0), tmp_path / 'five' / 'a.txt')
    result = run(crop, **options, points=tmp_path / 'five')
    assert result.exit_code and 'a.png: expected five different points' in result.output
    assert not (tmp_path / 'out').exists()
