# SPDX-License-Identifier: Apache-2.0
"""preprocess_in_the_wild.py run again after something changed, on sources of all kinds, and its steps one by one."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_fit_head import (  # noqa: F401  (fixtures)
    DrawnFaces, angles_between, content, fitter, people, photograph, photos, wild,
)

from dataset_preprocessing.ffhq import (
    deca_net, detect, files, find_gaze, fit_head, fitting, preprocess_in_the_wild, write_items,
)  # fmt: skip
from dataset_preprocessing.synthetic.anatomy import load_anatomy
from dataset_preprocessing.synthetic.paint import picture
from dataset_preprocessing.synthetic.people import random_person
from training import data_checks
from training.driving import open_clip
from training.video import video_file

pytestmark = pytest.mark.usefixtures('one_thread')


def same_as_fresh(wild, photos, tmp_path, *flags):  # noqa: F811
    """Tell whether what lies in photos/processed is what a run without a past writes."""
    assert wild(photos, f'--outdir={tmp_path}/fresh', *flags).exit_code == 0
    return all(content(photos / f'processed{end}') == content(tmp_path / f'fresh{end}') for end in ('', '_work'))


# --- again, after something changed ----------------------------------------------------------------------------------


@pytest.mark.parametrize('flag, told', [
    ('--same-person', '--same-person true, found those of false'),
    ('--all-faces', '--all-faces true, found those of false'),
    ('--confidence=0.3', '--confidence 0.3, found those of 0.5'),
    ('--model={}/other.task', '--model "'),
])  # fmt: skip
def test_results_of_other_choices_are_refused(wild, photos, tmp_path, flag, told):  # noqa: F811
    (tmp_path / 'other.task').write_bytes(b'text')
    assert wild(photos).exit_code == 0
    before = content(photos)
    result = wild(photos, flag.format(tmp_path))
    assert result.exit_code == 1 and f'processed_work: expected results of {told}' in result.output, result.output
    assert len(result.output.splitlines()) == 1 and content(photos) == before


def test_choices_that_cannot_be_read_are_told(wild, photos):  # noqa: F811
    assert wild(photos).exit_code == 0
    for text in ('{', '[]', '1'):
        (photos / 'processed_work' / 'choices.json').write_text(text)
        result = wild(photos)
        assert result.exit_code == 1 and 'choices.json: expected the choices of an earlier run' in result.output


def test_mended_pictures_are_read_again(wild, photos, tmp_path):  # noqa: F811
    assert 'broken' in wild(photos).output
    photograph(1).save(photos / 'broken.jpg', format='PNG')
    result = wild(photos)
    assert result.exit_code == 0 and '4 faces of 5 pictures, 0 faults' in result.output, result.output
    assert 'broken' not in (photos / 'processed_work' / 'rejected.txt').read_text()
    assert same_as_fresh(wild, photos, tmp_path)


@pytest.mark.parametrize('flags', [[], ['--same-person', '--overlays']])
def test_exchanged_and_new_pictures_are_worked_on(wild, photos, tmp_path, flags):  # noqa: F811
    assert wild(photos, *flags).exit_code == 0
    photograph(3).save(photos / 'one.png')
    photograph(1).save(photos / 'zoe.png')
    result = wild(photos, *flags)
    assert result.exit_code == 0 and '4 faces of 6 pictures, 0 faults' in result.output, result.output
    assert same_as_fresh(wild, photos, tmp_path, *flags)


def test_fits_that_are_there_are_not_written_again(wild, photos):  # noqa: F811
    assert wild(photos).exit_code == 0
    fit = photos / 'processed_work' / 'fits' / 'one.npz'
    before = fit.stat().st_mtime_ns
    photograph(1).save(photos / 'zoe.png')
    assert wild(photos).exit_code == 0 and fit.with_name('zoe.npz').exists() and fit.stat().st_mtime_ns == before


def test_faces_that_are_gone_leave_nothing(wild, photos, tmp_path):  # noqa: F811
    flags = '--all-faces', '--overlays'
    assert wild(photos, *flags).exit_code == 0 and (photos / 'processed' / 'pair-1.obj').exists()
    photograph(2).save(photos / 'pair.png')
    photograph().save(photos / 'one.png')
    result = wild(photos, *flags)
    assert result.exit_code == 0 and '2 faces of 5 pictures, 0 faults' in result.output, result.output
    assert same_as_fresh(wild, photos, tmp_path, *flags)


@pytest.mark.parametrize('flags', [[], ['--same-person', '--overlays'], ['--all-faces']])
def test_results_of_pictures_that_are_gone_go(wild, photos, tmp_path, flags):  # noqa: F811
    assert wild(photos, *flags).exit_code == 0
    (photos / 'one.png').rename(photos / 'uno.png')
    (photos / 'pair.png').unlink()
    result = wild(photos, *flags)
    assert result.exit_code == 0 and '2 pictures are gone, their results with them: one, pair' in result.output
    assert same_as_fresh(wild, photos, tmp_path, *flags)


def test_nothing_stays_when_the_last_face_is_gone(wild, photos, tmp_path):  # noqa: F811
    assert wild(photos, '--overlays').exit_code == 0
    for name in ('one.png', 'pair.png', 'sub/two.png'):
        photograph().save(photos / name)
    result = wild(photos)  # Overlays of before go, too.
    assert result.exit_code == 0 and '0 of 5 pictures used: no face found' in result.output, result.output
    assert same_as_fresh(wild, photos, tmp_path)


def test_fewer_pictures_of_one_person_are_another_identity(wild, photos, tmp_path):  # noqa: F811
    assert wild(photos, '--same-person').exit_code == 0
    photograph().save(photos / 'pair.png')
    assert wild(photos, '--same-person').exit_code == 0
    assert same_as_fresh(wild, photos, tmp_path, '--same-person')


def test_faces_of_one_name_are_told_until_one_is_renamed(wild, photos, tmp_path):  # noqa: F811
    photograph(3).save(photos / 'pair-1.png')
    result = wild(photos, '--all-faces')
    assert result.exit_code == 1 and 'found it for pair-1 and pair: rename one' in result.output, result.output
    (photos / 'pair-1.png').rename(photos / 'zoe.png')
    assert wild(photos, '--all-faces').exit_code == 0
    assert same_as_fresh(wild, photos, tmp_path, '--all-faces')


def test_work_without_choices_is_refused(wild, photos):  # noqa: F811
    assert wild(photos).exit_code == 0
    (photos / 'processed_work' / 'choices.json').unlink()
    result = wild(photos)
    assert result.exit_code == 1 and 'found faces without: choose another --outdir' in result.output, result.output


def test_pictures_that_go_while_they_are_read_are_told(wild, photos, monkeypatch):  # noqa: F811
    real = files.read_picture

    def read(path):
        if path.name == 'one.png':
            path.unlink()
        return real(path)

    monkeypatch.setattr(files, 'read_picture', read)
    result = wild(photos)
    assert result.exit_code == 0 and 'one: ' in result.output and '2 faces of 5 pictures' in result.output


@pytest.mark.parametrize('stage', ['faces', 'fits', 'items'])
def test_work_on_exchanged_pictures_survives_interrupts(wild, photos, tmp_path, monkeypatch, stage):  # noqa: F811
    assert wild(photos).exit_code == 0
    photograph(3).save(photos / 'one.png')
    photograph(1).save(photos / 'pair.png')
    module, name = {
        'faces': (preprocess_in_the_wild, 'faces_text'), 'fits': (fitting, 'write_fit'), 'items': (files, 'save_png'),
    }[stage]  # fmt: skip
    real, calls = getattr(module, name), []

    def fails(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        assert wild(photos).exit_code
    assert len(calls) == 2 and wild(photos).exit_code == 0
    assert same_as_fresh(wild, photos, tmp_path)


# --- sources of all kinds --------------------------------------------------------------------------------------------


@pytest.fixture
def one_face(wild, fitter, people, monkeypatch):  # noqa: F811
    """Find the same face in each frame of a video, larger in those whose middle is darker; return `wild`."""
    faces = DrawnFaces(fitter, people)

    def find(_, image):
        return [faces.face(int(np.asarray(image)[280, 320, 0] < 100), 0)]

    faces.__class__ = type('Same', (DrawnFaces,), {'__call__': find})
    monkeypatch.setattr(preprocess_in_the_wild, 'Landmarker', lambda *_, **__: faces)
    return wild


def film(path, count, grey=200):
    with video_file(path, 12.5) as add:
        for _ in range(count):
            add(np.full([560, 640, 3], grey, np.uint8))


def test_an_exchanged_video_leaves_nothing_of_the_other(one_face, tmp_path):
    film(tmp_path / 'a.mp4', 6)
    assert one_face(tmp_path / 'a.mp4').exit_code == 0
    assert (tmp_path / 'a_processed' / '00005.png').exists()
    film(tmp_path / 'a.mp4', 3, 50)
    result = one_face(tmp_path / 'a.mp4')
    assert result.exit_code == 0 and '3 faces of 3 pictures, 0 faults' in result.output, result.output
    assert one_face(tmp_path / 'a.mp4', f'--outdir={tmp_path}/fresh').exit_code == 0
    assert content(tmp_path / 'a_processed') == content(tmp_path / 'fresh')
    assert content(tmp_path / 'a_processed_work') == content(tmp_path / 'fresh_work')


def test_a_video_that_cannot_be_read_does_not_end_the_others(one_face, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    (folder / 'a.mp4').write_bytes(b'text')
    film(folder / 'b.mp4', 3)
    result = one_face(folder)
    assert result.exit_code == 1 and 'b: 3 faces of 3 pictures, 0 faults' in result.output, result.output
    assert f'a: failed: {folder}/a.mp4: expected a video, found none' in result.output
    assert result.output.splitlines()[-1] == 'Error: 1 of 2 videos failed'
    assert not (folder / 'processed' / 'a').exists()


def test_faults_of_what_was_written_give_an_exit_status(wild, photos, monkeypatch):  # noqa: F811
    fault = data_checks.Fault('one.obj', 'expected a mesh, found another')
    monkeypatch.setattr(data_checks, 'check_driving', lambda *_: [fault])
    result = wild(photos)
    assert result.exit_code == 1 and 'one.obj: expected a mesh, found another\n' in result.output
    assert '3 faces of 5 pictures, 1 faults' in result.output and result.output.splitlines()[-1].startswith('Error: ')


def test_a_photograph_is_no_video(wild, photos):  # noqa: F811
    result = wild(photos / 'one.png')
    assert result.exit_code == 0 and '1 faces of 1 pictures, 0 faults' in result.output, result.output
    written = content(photos / 'one_processed')
    assert {'one.png', 'one.obj', 'dataset.json'} <= set(written)
    with np.load(photos / 'one_processed' / 'coefficients.npz') as arrays:
        assert arrays['identity'].shape == (1, 100) and 'fps' not in arrays


def test_formats_that_are_not_read_are_told(wild, photos, tmp_path):  # noqa: F811
    (photos / 'sub' / 'phone.HEIC').write_bytes(b'text')
    photograph(1).save(photos / 'a.avif', quality=95)
    photograph(1).quantize().save(photos / 'b.gif', save_all=True, append_images=[photograph().quantize()])
    result = wild(photos)
    assert result.exit_code == 0 and '5 faces of 8 pictures, 0 faults' in result.output, result.output
    assert 'sub/phone.HEIC: expected .png, .jpg,' in result.output and 'found .HEIC: convert it' in result.output
    assert 'sub/phone.HEIC: expected' in (photos / 'processed_work' / 'rejected.txt').read_text()
    (tmp_path / 'only').mkdir()
    shutil.copy(photos / 'sub' / 'phone.HEIC', tmp_path / 'only')
    result = wild(tmp_path / 'only')
    assert result.exit_code == 1 and 'found none; phone.HEIC: expected' in result.output, result.output
    assert len(result.output.splitlines()) == 1
    result = wild(tmp_path / 'only' / 'phone.HEIC')
    assert result.exit_code == 1 and 'phone.HEIC: expected .png, .jpg,' in result.output, result.output


# --- one step after the other ----------------------------------------------------------------------------------------


def test_the_steps_are_those_of_the_command(wild, fitter, people, photos, tmp_path, monkeypatch):  # noqa: F811
    """Detected, fitted and written by three commands: the same bytes."""
    assert wild(photos, '--overlays', '--same-person').exit_code == 0
    monkeypatch.setattr(detect, 'Landmarker', lambda *_, **__: DrawnFaces(fitter, people))
    (photos / 'broken.jpg').unlink()
    shutil.move(photos / 'sub' / 'two.png', photos / 'sub-two.png')
    (photos / 'phone.heic').touch()

    def run(script, *words):
        result = CliRunner().invoke(script.main, [word.format(tmp_path) for word in words])
        assert result.exit_code == 0, result.output
        return result.output

    told = run(detect, f'--images={photos}', '--out={}/points')
    assert 'phone.heic: expected .png' in told and 'faces: 3 done' in told
    run(fit_head, '--faces={}/points/faces', '--out={}/fits', '--same-person', '--device=cpu')
    words = [f'--images={photos}', '--faces={}/points/faces', '--fits={}/fits', '--out={}/out', '--same-person',
             '--overlays={}/overlays']  # fmt: skip
    assert 'items: 3 done, 0 already there' in run(write_items, *words)
    before = content(tmp_path / 'out')
    assert 'items: 0 done, 3 already there' in run(write_items, *words) and content(tmp_path / 'out') == before
    expected = content(photos / 'processed')
    assert before == expected
    assert content(tmp_path / 'overlays') == content(photos / 'processed_work' / 'overlays')
    # A picture more is another identity: all is fitted and written again.
    photograph(3).save(photos / 'zoe.png')
    run(detect, f'--images={photos}', '--out={}/points')
    run(fit_head, '--faces={}/points/faces', '--out={}/fits', '--same-person', '--device=cpu')
    assert 'items: 4 done, 0 already there' in run(write_items, *words)
    assert wild(photos, '--same-person', f'--outdir={tmp_path}/fresh').exit_code == 0
    assert content(tmp_path / 'out') == content(tmp_path / 'fresh')

    def refused(*words):
        result = CliRunner().invoke(write_items.main, [word.format(tmp_path) for word in words])
        assert result.exit_code == 1 and len(result.output.splitlines()) == 1
        return result.output

    assert 'expected a fit of these faces and options' in refused(*words, '--fps=25')
    (tmp_path / 'fits' / 'other.npz').write_bytes((tmp_path / 'fits' / 'one.npz').read_bytes())
    assert 'other.npz: expected the fit of a picture of' in refused(*words)
    (tmp_path / 'fits' / 'other.npz').unlink()
    run(fit_head, '--faces={}/points/faces', '--out={}/fits', '--device=cpu')
    assert 'expected a fit of these faces and options' in refused(*words)
    run(write_items, *words[:4])
    with np.load(tmp_path / 'out' / 'coefficients.npz') as arrays:
        assert arrays['identity'].shape == (4, 100)


def test_faces_outside_of_their_pictures_are_told(fitter, people, photos, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(detect, 'Landmarker', lambda *_, **__: DrawnFaces(fitter, people))
    CliRunner().invoke(detect.main, [f'--images={photos}', f'--out={tmp_path}/points'])
    found = json.loads((tmp_path / 'points' / 'faces' / 'one.json').read_text())
    for key in ('points5', 'points478'):
        found['faces'][0][key] = [[place[0] + 5000, *place[1:]] for place in found['faces'][0][key]]
    (tmp_path / 'points' / 'faces' / 'away.json').write_text(json.dumps(found))
    result = CliRunner().invoke(fit_head.main, [f'--faces={tmp_path}/points/faces', f'--out={tmp_path}/fits'])
    assert result.exit_code == 0 and 'away: expected a face within the picture' in result.output
    assert (tmp_path / 'fits' / 'one.npz').exists() and not (tmp_path / 'fits' / 'away.npz').exists()


def test_gaze_files_tell_where_eyes_look(fitter, tmp_path):  # noqa: F811
    """A person's left eye that looks out, to the picture's right, and up: so does FLAME's, z turned to +x and +y."""
    names = fitter.head.expression_names
    local = np.zeros([1, 52])
    local[0, [names.index('eyeLookOutLeft'), names.index('eyeLookUpLeft')]] = 1, 0.5
    gaze = fitter.model.gaze(fitter.model.mean.new_tensor(local))[0].numpy().astype(np.float32)
    zeros = np.zeros([1], np.float32)
    fit = fitting.HeadFit(zeros, local[0], zeros, zeros, zeros, zeros, gaze, zeros)
    fitting.write_fit(fit, tmp_path / 'fits' / 'a' / 'b.npz')
    words = [f'--fits={tmp_path}/fits', f'--out={tmp_path}/gaze']
    assert 'gaze: 1 done' in CliRunner().invoke(find_gaze.main, words).output
    assert 'gaze: 0 done, 1 already there' in CliRunner().invoke(find_gaze.main, words).output
    fitting.write_fit(fit, tmp_path / 'fits' / 'a' / 'b.npz')
    assert 'gaze: 1 done, 0 already there' in CliRunner().invoke(find_gaze.main, words).output
    told = np.loadtxt(tmp_path / 'gaze' / 'a' / 'b.txt')
    assert np.allclose(np.degrees(told), [-9, -25, 0, 0], atol=1e-3)
    left = deca_net.flame_eye_pose(told)[:3]  # Small axis-angle turns: about x down, about y to +x.
    assert left[0] < 0 < left[1] and np.allclose(deca_net.flame_eye_pose(told)[3:], 0)
    (tmp_path / 'fits' / 'c.npz').write_bytes(b'text')
    result = CliRunner().invoke(find_gaze.main, words)
    assert result.exit_code == 1 and 'c.npz: expected a fit' in result.output


# --- with the detector -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_drawn_people_are_found_as_they_are(fitter, tmp_path):  # noqa: F811
    """Drawn, found, cropped and fitted as photographs; docs/preprocessing.md has the numbers of 144 people."""
    pytest.importorskip('mediapipe', reason='mediapipe is not installed (requirements-preprocess.txt)')
    anatomy = load_anatomy()
    drawn = [random_person(anatomy, 31, number) for number in range(48)]
    for number, person in enumerate(drawn):
        files.save_png(Image.fromarray(picture(anatomy, person, 512).image), tmp_path / 'in' / f'{number:02d}.png')
    result = CliRunner().invoke(preprocess_in_the_wild.main, [f'--indir={tmp_path}/in', '--device=cpu'])
    assert result.exit_code == 0 and '48 faces of 48 pictures, 0 faults' in result.output, result.output
    with np.load(tmp_path / 'in' / 'processed' / 'coefficients.npz') as arrays:
        errors, found = arrays['error'], arrays['expression']
    assert np.median(errors) < 0.02 and errors.max() < 0.04
    truth = np.stack([anatomy.coefficients(person.expression) for person in drawn])
    for name in ('jawOpen', 'mouthSmileLeft', 'mouthSmileRight', 'eyeBlinkLeft', 'eyeBlinkRight'):
        column = fitter.head.expression_names.index(name)
        assert np.corrcoef(found[:, column], truth[:, column])[0, 1] > 0.9, name
    clip = open_clip(tmp_path / 'in' / 'processed')
    angles = angles_between(clip.labels, np.stack([person.label for person in drawn]))
    assert np.median(angles) < 1.7 and np.quantile(angles, 0.9) < 4
