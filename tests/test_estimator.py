# SPDX-License-Identifier: Apache-2.0
"""The estimator: its training on drawn people, what mirroring does, resuming, its file, and spoiled pictures."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dataset_preprocessing.synthetic import make_dataset, train_estimator
from dataset_preprocessing.synthetic.jitter import _blur, _quantise, jitter
from dataset_preprocessing.synthetic.people import camera_label
from dataset_preprocessing.synthetic.train_estimator import batch_of, identity_signs, load_data, measure_scales
from geometry.head_model import load_embedded_head
from geometry.mirror import mirror_label, mirror_mesh
from metrics import estimator
from metrics.subject import MetricError
from training.dataset import open_source

COUNT = 20
CLIP = estimator.DEFAULT_ESTIMATOR.parents[1] / 'demo' / 'clip'
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    """A packed data set of drawn people, larger than what the estimator sees."""
    out = tmp_path_factory.mktemp('data') / 'people'
    words = [f'--out={out}', f'--count={COUNT}', '--resolution=160', '--packed', '--workers=1']
    assert CliRunner().invoke(make_dataset.main, words).exit_code == 0
    return out


def train(people, out, *more):
    """Run the script; return its exit status and text."""
    words = [f'--data={people}', f'--out={out}', '--batch=6', '--device=cpu', '--workers=2', *more]
    result = CliRunner().invoke(train_estimator.main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope='module')
def trained(people, tmp_path_factory):
    """The file of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp('trained') / 'estimator.npz'
    status, text = train(people, out, '--epochs=2')
    assert status == 0, text
    return out, text


def test_poses_are_those_that_cameras_were_made_with():
    wanted = [(0.4, -0.2, 0.1), (-0.9, 0.45, -0.2), (0, 0, 0)]
    labels = torch.from_numpy(np.stack([camera_label(*angles) for angles in wanted]))
    assert torch.allclose(estimator.pose_of_labels(labels), torch.tensor(wanted, dtype=torch.float32), atol=1e-5)


def test_mirrored_targets_are_those_of_the_mirrored_head(people):
    head = load_embedded_head()
    data, mirror, names = load_data(people, torch.device('cpu'), 2)
    scales = train_estimator.Scales(*((0.0, 1.0) for _ in range(3)))
    numbers = torch.arange(4)
    straight, plain = batch_of(data, mirror, scales, numbers, torch.zeros(4, dtype=torch.bool))
    mirrored, targets = batch_of(data, mirror, scales, numbers, torch.ones(4, dtype=torch.bool))
    assert torch.equal(mirrored, straight.flip(3)) and set(np.abs(identity_signs())) == {1.0}
    meshes = [head(person[:, :100], expression).stacked() for expression, _, person in (plain, targets)]
    for mesh, reflection in zip(*meshes):
        expected = mirror_mesh(mesh.numpy(), head.mirror.numpy())
        assert np.abs(reflection.numpy() - expected).max() < 2e-5
    labels = torch.from_numpy(np.stack([mirror_label(label) for label in data.labels[:4].numpy()]))
    assert torch.allclose(targets[1], estimator.pose_of_labels(labels), atol=1e-6)
    assert torch.allclose(targets[1], plain[1] * torch.tensor([-1.0, 1, -1]), atol=1e-6)
    assert names == head.expression_names


def test_pictures_are_made_smaller_with_smoothing(people):
    data, _, _ = load_data(people, torch.device('cpu'), 2)
    source = open_source(people, None)
    for index in (0, COUNT - 1):
        whole = torch.from_numpy(source.image(index).astype(np.float32))
        assert data.images[index].float().mean().item() == pytest.approx(whole.mean().item(), abs=0.6)
    assert torch.equal(data.expression[3], torch.from_numpy(np.load(people / 'coefficients.npz')['expression'][3]))


def test_jitter_changes_each_picture_by_itself_and_within_limits():
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, again = (jitter(x, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again) and first.min() >= 0 and first.max() <= 1
    assert not torch.equal(first, jitter(x, torch.Generator().manual_seed(8)))
    assert torch.allclose(_blur(x, torch.zeros(5)), x) and torch.equal(_quantise(x, torch.zeros(5)), x)
    blurred = _blur(x, torch.tensor([0, 0.5, 1.0, 1.5, 0]))
    roughness = [float(each.diff(dim=-1).abs().mean()) for each in blurred]
    assert roughness[0] > roughness[1] > roughness[2] > roughness[3] and torch.allclose(blurred[4], x[4])
    assert torch.allclose(_quantise(x, torch.full([5], 1e-4)), x, atol=2e-3)
    flat = torch.full([1, 3, 16, 16], 0.5)
    assert torch.allclose(_blur(flat, torch.ones(1)), flat, atol=1e-6)
    errors = [float((_quantise(x, torch.full([5], step)) - x).abs().mean()) for step in (0.01, 0.05, 0.2)]
    assert errors == sorted(errors) and errors[2] > 5 * errors[0]


def test_a_file_holds_weights_errors_and_scales(trained, people):
    out, text = trained
    loaded = estimator.load_estimator(out)
    assert out.stat().st_size < 8e6 and sum(p.numel() for p in loaded.regressor.parameters()) < 3.2e6
    assert loaded.errors['num_pictures'] == 2 and f'aed   {loaded.errors["aed"]:.4f}' in text
    assert set(loaded.errors['expression_rmse']) == set(loaded.expression_names) and len(loaded.sha256) == 64
    # The errors in the file are those of the file, to float16: measured anew as metrics do.
    source = open_source(people, None)
    truth = np.load(people / 'coefficients.npz')['expression'][-2:]
    pictures = torch.from_numpy(np.stack([source.image(i) for i in (COUNT - 2, COUNT - 1)]))
    found = loaded(pictures)
    aed = (found.expression - torch.from_numpy(truth)).square().mean(dim=1).sqrt().mean()
    pose = estimator.pose_of_labels(torch.from_numpy(np.array(source.labels[-2:])))
    apd = (found.pose - pose).square().mean(dim=1).sqrt().mean()
    assert float(aed) == pytest.approx(loaded.errors['aed'], rel=0.03)
    assert float(apd) == pytest.approx(loaded.errors['apd'], rel=0.03)
    assert torch.allclose(found.identity.norm(dim=1), torch.ones(2), atol=1e-5)


def test_the_estimator_of_the_repository_knows_people_it_was_not_trained_on(people):
    """Its errors on them are those in its file, and one person's pictures resemble each other more than others do."""
    loaded = estimator.load_estimator(estimator.DEFAULT_ESTIMATOR)
    assert estimator.DEFAULT_ESTIMATOR.stat().st_size < 8e6
    assert loaded.expression_names == load_embedded_head().expression_names
    source = open_source(people, None)
    truth = torch.from_numpy(np.load(people / 'coefficients.npz')['expression'])
    found = loaded(torch.from_numpy(np.stack([source.image(i) for i in range(COUNT)])))
    aed = float((found.expression - truth).square().mean(dim=1).sqrt().mean())
    assert aed == pytest.approx(loaded.errors['aed'], rel=0.3) and aed < 0.65 * loaded.errors['aed_of_the_mean']
    pose = estimator.pose_of_labels(torch.from_numpy(np.array(source.labels)))
    assert float((found.pose - pose).square().mean(dim=1).sqrt().mean()) < 1.6 * loaded.errors['apd']
    for name, least in (('jawOpen', 0.9), ('mouthSmileLeft', 0.9), ('eyeBlinkRight', 0.8)):
        column = loaded.expression_names.index(name)
        assert torch.corrcoef(torch.stack([found.expression[:, column], truth[:, column]]))[0, 1] > least, name
    frames = sorted(CLIP.glob('*.png'))  # One person who talks, blinks and turns.
    one = loaded(torch.from_numpy(np.stack([np.asarray(Image.open(x)).transpose(2, 0, 1) for x in frames]))).identity
    same, others = one @ one.T, found.identity @ found.identity.T
    assert same.mean() > 0.8 and same.min() > others[~torch.eye(COUNT, dtype=torch.bool)].quantile(0.98)


def test_training_learns_to_tell_pictures_apart(people):
    data, mirror, _ = load_data(people, torch.device('cpu'), 2)
    torch.manual_seed(0)
    model = train_estimator.Model(52, data.person.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    numbers, flips = torch.arange(6), torch.zeros(6, dtype=torch.bool)
    images, targets = batch_of(data, mirror, measure_scales(data), numbers, flips)
    losses = []
    for _ in range(12):
        loss = train_estimator.loss_of(model, images, targets, mirror.person.abs())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    rates = [train_estimator.rate(done) for done in (0, 0.05, 0.5, 1)]
    assert rates == pytest.approx([0, 0.994, 0.5, 0], abs=1e-3)


def test_a_run_that_was_cut_off_ends_as_an_uninterrupted_one(trained, people, tmp_path, monkeypatch):
    out = tmp_path / 'estimator.npz'
    step, count = train_estimator.Run._one_step, []

    def cut_off(run):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(train_estimator, 'STATE_EVERY_S', 0.0)
        patch.setattr(train_estimator.Run, '_one_step', cut_off)
        status, _ = train(people, out, '--epochs=2')
        assert status != 0 and not out.exists()
    status, text = train(people, out, '--epochs=2')
    assert status == 0 and 'Going on from step 3 of 6' in text
    ours, theirs = (np.load(path) for path in (out, trained[0]))
    for name in ours.files:
        if name != 'about':
            assert np.array_equal(ours[name], theirs[name]), name
    status, text = train(people, out, '--epochs=3')
    assert status != 0 and 'expected a state of the same settings' in text and text.count('\n') == 1


def test_bad_input_is_told_in_one_line(trained, people, tmp_path):
    def refused(*words):
        status, text = train(*words)
        assert status != 0 and text.count('\n') == 1, text
        return text

    assert 'ends in .npz' in refused(people, tmp_path / 'weights.pt')
    assert 'at most the 18 pictures' in refused(people, tmp_path / 'x.npz', '--batch=19')
    assert 'manifest' in refused(tmp_path, tmp_path / 'x.npz')
    copy = tmp_path / 'copy'
    shutil.copytree(people, copy)
    whole = (copy / 'coefficients.npz').read_bytes()
    with np.load(copy / 'coefficients.npz') as file:
        names = file['names']
    np.savez(tmp_path / 'bare.npz', names=names)
    np.savez(tmp_path / 'renamed.npz', names=names[::-1])
    for content in (whole[:1000], b'', *((tmp_path / f'{x}.npz').read_bytes() for x in ('bare', 'renamed'))):
        (copy / 'coefficients.npz').write_bytes(content)
        assert 'expected what make_dataset.py writes' in refused(copy, tmp_path / 'x.npz')
    (copy / 'coefficients.npz').unlink()
    assert 'expected the coefficients of make_dataset.py' in refused(copy, tmp_path / 'x.npz')
    assert not (tmp_path / 'x.npz').exists()
    with pytest.raises(MetricError, match='found nothing at'):
        estimator.load_estimator(tmp_path / 'none.npz')
    arrays = dict(np.load(trained[0]))
    about = json.loads(str(arrays['about']))
    for change in ({'format': 'other'}, {'expression_names': ['a']}):
        np.savez(tmp_path / 'other.npz', **{**arrays, 'about': np.array(json.dumps({**about, **change}))})
        with pytest.raises(MetricError, match='none that can be read'):
            estimator.load_estimator(tmp_path / 'other.npz')
    assert math.isfinite(about['errors']['aed']) and re.search('regressor trained on 18 ', about['name'])
