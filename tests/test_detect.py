# SPDX-License-Identifier: Apache-2.0
"""Faces found in photographs; those tests that need MediaPipe and its model skip where they are not installed."""

import json
import os
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dataset_preprocessing.ffhq import detect, files, landmarker
from dataset_preprocessing.ffhq.files import PreprocessError
from geometry.head_model import ARKIT_NAMES
from geometry.mirror import LANDMARK_MIRROR

# Of skimage's photograph of an astronaut, read off a magnified view: pupils, nose tip, mouth corners.
EYES, NOSE, MOUTH = [[203, 101], [246, 103]], [223, 128], [[202, 139], [244, 141]]


@pytest.fixture(scope='module')
def find():
    """Return the landmarker; skip without it."""
    pytest.importorskip('mediapipe', reason='mediapipe is not installed (requirements-preprocess.txt)')
    try:
        return landmarker.Landmarker()
    except PreprocessError as error:
        pytest.skip(f'no landmarker: {error}')


@pytest.fixture(scope='module')
def astronaut():
    return Image.fromarray(pytest.importorskip('skimage.data').astronaut())


def test_a_face_is_found(find, astronaut):
    (face,) = find(astronaut)
    assert face.points.shape == (478, 3) and face.landmarks.shape == (68, 2)
    assert np.allclose(face.irises[:, 0], EYES, atol=2)
    expected = [*EYES, NOSE, *MOUTH]
    assert np.allclose(face.five, expected, atol=3)
    left, top, right, bottom = face.box
    assert 170 < left < 190 and 60 < top < 85 and 260 < right < 280 and 165 < bottom < 185
    assert set(face.expressions) == set(ARKIT_NAMES) - {'tongueOut'}
    smile, blink = face.expressions['mouthSmileLeft'], face.expressions['eyeBlinkLeft']
    assert smile > 0.7 and blink < 0.2
    assert face.pose.shape == (4, 4) and abs(np.linalg.det(face.pose[:3, :3]) - 1) < 0.1


def test_it_starts_in_silence_and_leaves_the_error_stream(find, capfd):
    landmarker.Landmarker().close()
    os.write(2, b'heard')
    assert capfd.readouterr().err == 'heard'


def test_landmarks_lie_as_ibug_has_them(find, astronaut):
    (face,) = find(astronaut)
    x, y = face.landmarks.T
    assert (np.diff(x[4:13]) > 0).all() and (np.diff(y[:8]) > 0).all() and (np.diff(y[9:17]) < 0).all()
    assert (np.diff(x[17:27]) > 0).all() and (np.diff(y[27:31]) > 0).all() and (np.diff(x[31:36]) > 0).all()
    for start, count in ((36, 6), (42, 6), (48, 12), (60, 8)):  # Closed lines, clockwise as seen.
        part = face.landmarks[start : start + count]
        following = np.roll(part, -1, axis=0)
        assert (part[:, 0] * following[:, 1] - part[:, 1] * following[:, 0]).sum() > 0


def test_mirrored_faces_are_mirrored(find, astronaut):
    face, mirrored = find(astronaut)[0], find(astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[0]
    expected = face.landmarks[LANDMARK_MIRROR] * [-1, 1] + [astronaut.width - 1, 0]
    assert np.abs(mirrored.landmarks - expected).mean() < 1.5
    assert abs(face.expressions['mouthPressRight'] - mirrored.expressions['mouthPressLeft']) < 0.15


def test_sides_of_expressions_are_those_of_the_person(find, astronaut):
    winking = np.array(astronaut)
    rows, columns = np.indices(winking.shape[:2])
    winking[((columns - 203) / 10) ** 2 + ((rows - 102) / 6) ** 2 < 1] = (200, 150, 130)  # Image-left eye.
    winking[103, 196:212] = (90, 50, 40)
    before, after = (find(image)[0].expressions for image in (astronaut, Image.fromarray(winking)))
    assert after['eyeBlinkRight'] > before['eyeBlinkRight'] + 0.2 > before['eyeBlinkLeft'] + 0.1


def test_no_face(find):
    assert find(Image.new('RGB', (300, 200), (90, 120, 80))) == []


def test_small_and_several_faces_are_found(find, astronaut):
    canvas = Image.new('RGB', (3000, 2000), (90, 120, 80))
    canvas.paste(astronaut, (2400, 1400))
    (face,) = find(canvas)
    assert np.allclose(face.irises[:, 0], np.array(EYES) + [2400, 1400], atol=3)
    pair = Image.new('RGB', (900, 512))
    pair.paste(astronaut.resize((400, 400)), (0, 0))
    pair.paste(astronaut.crop((0, 0, 500, 512)), (400, 0))
    first, second = find(pair)
    assert first.box[0] > 400 > second.box[2]


def test_the_command(find, astronaut, tmp_path):
    (tmp_path / 'in' / 'sub').mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    astronaut.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'in' / 'turned.png', exif=exif)
    astronaut.convert('L').save(tmp_path / 'in' / 'sub' / 'grey.jpg')
    Image.new('RGB', (200, 200)).save(tmp_path / 'in' / 'none.png')
    arguments = [f'--images={tmp_path}/in', f'--out={tmp_path}/out', '--faces=all']
    result = CliRunner().invoke(detect.main, arguments)
    assert result.exit_code == 0 and 'none.png: no face found' in result.output, result.output
    assert 'faces: 2 done, 0 already there, 1 without a face' in result.output
    for name in ('turned', 'sub/grey'):
        five = files.read_points(tmp_path / 'out' / 'points5' / f'{name}.txt', 5)
        assert np.allclose(five, [*EYES, NOSE, *MOUTH], atol=3)
        told = json.loads((tmp_path / 'out' / 'faces' / f'{name}.json').read_text())
        assert np.allclose(told['faces'][0]['points5'], five)
        assert np.array(told['faces'][0]['points478']).shape == (478, 3)
        landmarks = files.read_points(tmp_path / 'out' / 'points68' / f'{name}.txt', 68)
        assert np.allclose(told['faces'][0]['points68'], landmarks)
    assert json.loads((tmp_path / 'out' / 'faces' / 'none.json').read_text())['faces'] == []
    assert '0 done, 3 already there' in CliRunner().invoke(detect.main, arguments).output
    (tmp_path / 'in' / 'bad.png').write_bytes(b'text')
    result = CliRunner().invoke(detect.main, arguments)
    assert result.exit_code and 'bad.png: expected a picture' in result.output


def test_other_model_files_are_refused(find, tmp_path):
    (tmp_path / 'a.task').write_bytes(b'text')
    with pytest.raises(PreprocessError, match='a.task: expected face_landmarker.task, found another file'):
        landmarker.Landmarker(str(tmp_path / 'a.task'))


def test_missing_packages_and_models_are_told(tmp_path, monkeypatch):
    (tmp_path / 'in').mkdir()
    Image.new('RGB', (20, 20)).save(tmp_path / 'in' / 'a.png')
    arguments = [f'--images={tmp_path}/in', f'--out={tmp_path}/out']
    (tmp_path / 'a.task').write_bytes(b'text')
    monkeypatch.setitem(sys.modules, 'mediapipe', None)
    result = CliRunner().invoke(detect.main, [*arguments, f'--model={tmp_path}/a.task'])
    assert result.exit_code and 'pip install -r requirements-preprocess.txt' in result.output
    result = CliRunner().invoke(detect.main, [*arguments, f'--model={tmp_path}/b.task'])
    assert result.exit_code and 'b.task: expected face_landmarker.task' in result.output
    monkeypatch.setattr(landmarker.importlib.util, 'find_spec', lambda name: None)
    result = CliRunner().invoke(detect.main, arguments)
    assert result.exit_code and 'requirements-preprocess.txt, or get it from https://' in result.output
    assert not (tmp_path / 'out').exists() and len(result.output.splitlines()) == 1


def test_tiles_cover_the_picture():
    for size, side in (((100, 60), 100), ((100, 60), 50), ((4000, 3000), 1000), ((130, 700), 350)):
        covered = np.zeros(size[::-1], int)
        for left, top, right, bottom in landmarker.tiles(size, side):
            assert 0 < right - left <= side and 0 < bottom - top <= side
            covered[top:bottom, left:right] += 1
        assert covered.min() >= 1
    assert landmarker.tiles((100, 60), 100) == [(0, 0, 100, 60)]
    assert len(landmarker.tiles((200, 200), 100)) == 9


def test_repeated_faces_are_one():
    def face(left, top, side):
        points = np.zeros([478, 3])
        points[1:, :2] = side
        return landmarker.Face(points + [left, top, 0], {}, np.eye(4))

    small, large, other = face(10, 10, 90), face(5, 5, 100), face(300, 0, 50)
    assert landmarker.distinct([other, small, large]) == [large, other]
