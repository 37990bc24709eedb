# SPDX-License-Identifier: Apache-2.0
"""data/demo: what the commands of data/README.md write, with its hashes; a head and a clip that one network draws."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from parity import ROOT
from PIL import Image

import cli
from dataset_preprocessing import check_data
from dataset_preprocessing.synthetic import make_clip, store
from dataset_preprocessing.synthetic.anatomy import load_anatomy
from dataset_preprocessing.synthetic.paint import picture
from geometry import demo_head
from geometry.cameras import FRONTAL
from geometry.head_model import load_embedded_head
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT, read_landmarks, read_obj
from geometry.paths import path_labels
from metrics.estimator import load_estimator
from training.driving import open_clip
from training.mesh_render import project

DEMO = ROOT / 'data' / 'demo'
README = (ROOT / 'data' / 'README.md').read_text()
FILES = {'head_template.obj', 'demo.obj', 'demo_kpt2d.txt', 'uv_face_mask.png'}
CLIP_FILES = {f'{i:05d}{ending}' for i in range(20) for ending in ('.png', '.obj', '_kpt2d.txt')}

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def options():
    """Options of the clip's command in data/README.md."""
    command = re.search(r'make_clip\.py --out=data/demo/clip (.*)', README)[1]
    return {name: int(value) for name, value in re.findall(r'--(\w+)=(\d+)', command)}


def test_the_command_writes_the_committed_files_again(tmp_path):
    demo_head.main(['--out', str(tmp_path / 'new')])
    assert {path.name for path in (tmp_path / 'new').iterdir()} == FILES
    assert {path.name for path in DEMO.iterdir()} == FILES | {'clip', 'next3d_demo.pkl'}
    for name in FILES:
        assert (tmp_path / 'new' / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_hashes_are_those_of_the_readme():
    table = dict(re.findall(r'\| `([^`]+)` \| `([0-9a-f]{64})` \|', README))
    assert FILES | {'next3d_demo.pkl'} == set(table)
    for name, digest in table.items():
        assert hashlib.sha256((DEMO / name).read_bytes()).hexdigest() == digest, name


def test_the_demo_mesh_is_the_mean_head_with_a_light_expression():
    model = load_embedded_head()
    template, demo = (read_obj(DEMO / name) for name in ('head_template.obj', 'demo.obj'))
    assert np.array_equal(template.faces, model.faces.numpy()) and np.array_equal(demo.uv_faces, model.uv_faces.numpy())
    assert np.abs(template.vertices - model.mean.numpy()).max() < 1e-6
    distance = np.linalg.norm(demo.vertices - template.vertices, axis=1)
    is_face = model.regions['face'].numpy()
    assert 0.003 < distance[is_face].max() < 0.02 and distance[template.vertices[:, 2] < -0.05].max() < 1e-4
    assert np.abs(demo.vertices[model.mirror] * [-1, 1, 1] - demo.vertices).max() < 3e-6
    landmarks = read_landmarks(DEMO / 'demo_kpt2d.txt')
    assert np.abs(landmarks - model.landmarks(torch.from_numpy(demo.vertices)[None])[0].numpy()).max() < 1e-6
    moved = landmarks - model.landmarks(model.mean[None])[0].numpy()
    assert moved[66, 1] < moved[62, 1] and (moved[[48, 54], 1] > 0.001).all()  # Lips part, the corners rise.


def test_the_clip_is_what_its_command_draws(options):
    table = json.loads((DEMO / 'clip' / store.OPTIONS_FILE).read_text())
    assert table == {'format': 'next3d-synthetic', 'version': store.VERSION, 'resolution': 256, **options}
    anatomy = load_anatomy()
    people = make_clip.clip_people(anatomy, options['seed'], options['frames'], options['fps'])
    labels = dict(json.loads((DEMO / 'clip' / 'dataset.json').read_text())['labels'])
    with np.load(DEMO / 'clip' / store.COEFFICIENTS_FILE) as arrays:
        assert arrays['names'].tolist() == sorted(labels) and arrays['fps'] == options['fps']
        assert np.abs(arrays['identity'] - people[0].identity).max() < 1e-5
        for number in (0, 13):  # The beginning, and eyes that are closed.
            person, stem = people[number], f'{number:05d}'
            assert np.abs(arrays['expression'][number] - anatomy.coefficients(person.expression)).max() < 1e-5
            assert np.abs(np.array(labels[f'{stem}.png']) - person.label).max() < 1e-5
            drawn = picture(anatomy, person, 256)
            assert np.abs(read_obj(DEMO / 'clip' / f'{stem}.obj').vertices - drawn.vertices).max() < 2e-6
            assert np.abs(read_landmarks(DEMO / 'clip' / f'{stem}_kpt2d.txt') - drawn.landmarks).max() < 2e-6
            kept = np.asarray(Image.open(DEMO / 'clip' / f'{stem}.png'))
            assert kept.shape == drawn.image.shape
            assert np.abs(kept.astype(int) - drawn.image).mean() < 0.5  # Edges may fall to another pixel elsewhere.


def test_the_clip_is_whole_and_somebody_talks_blinks_and_turns():
    names = {path.name for path in (DEMO / 'clip').iterdir()}
    assert names == CLIP_FILES | {'dataset.json', store.OPTIONS_FILE, store.COEFFICIENTS_FILE}
    result = CliRunner().invoke(check_data.main, [f'--driving={DEMO}/clip', '--workers=1'])
    assert result.output.endswith('20 items, no fault\n'), result.output
    assert sum(path.stat().st_size for path in (DEMO / 'clip').iterdir()) < 14e6
    clip = open_clip(DEMO / 'clip', with_coefficients=True)
    with np.load(DEMO / 'clip' / store.COEFFICIENTS_FILE) as arrays:
        moved = dict(zip(arrays['expression_names'].tolist(), np.ptp(arrays['expression'], axis=0), strict=True))
    assert moved['eyeBlinkLeft'] > 0.9 and moved['jawOpen'] > 0.4
    yaw_deg = np.degrees(np.arctan2(clip.labels[:, 3], clip.labels[:, 11]))
    assert yaw_deg.min() < -15 and yaw_deg.max() > 15


def test_one_network_takes_the_demo_head_and_the_clip():
    cpu = torch.device('cpu')
    loaded = cli.load_generator(str(DEMO / 'next3d_demo.pkl'), cpu)
    v = cli.load_mesh(loaded, str(DEMO / 'demo.obj'), str(DEMO / 'demo_kpt2d.txt'), cpu)
    assert v.shape == (1, 5144 + 68, 3)
    clip = open_clip(DEMO / 'clip')
    assert clip.num_vertices == 5144 and len(clip.names) == 20 and clip.fps == 10


@pytest.mark.parametrize('weights, region', [
    ({'eyeBlinkLeft': 1.0, 'eyeBlinkRight': 1.0}, 'eyelids'), ({'jawOpen': 0.7}, 'lips'),
    ({'eyeLookOutLeft': 0.7, 'eyeLookInRight': 0.7}, 'eyes'),
])
def test_the_demo_network_follows_the_mesh(weights, region):
    generator, model = cli.load_next3d(DEMO / 'next3d_demo.pkl', torch.device('cpu')), load_embedded_head()
    c = path_labels(np.full([1, 2], FRONTAL), (0, 0, 0.2), 2.7)
    ws = generator.mapping(cli.latent(5, generator.z_dim), c, 0.7, generator.num_style_ws)
    neutral, moved = (model(torch.zeros(1, model.num_identity), model.expression(w)).stacked() for w in ({}, weights))
    with torch.no_grad():
        change = [generator.synthesis(ws, c, v)['image'][0] for v in (neutral, moved)]
    change = (change[1] - change[0]).abs().mean(dim=0)
    points = model.regions[region].nonzero()[:, 0]
    screen = project(WORLD_SCALE * neutral[:, points] + torch.tensor(WORLD_SHIFT), c)[0, :, :2]
    x, y = ((screen + 1) * 128).long().clamp(0, 255).T
    outside = torch.ones(256, 256, dtype=torch.bool)
    outside[y.min() - 20 : y.max() + 40, x.min() - 20 : x.max() + 20] = False
    assert change[y, x].mean() > 0.05 and change[y, x].mean() > 10 * change[outside].mean()


def test_the_demo_network_looks_where_the_mesh_looks():
    """By the estimator, whose gaze correlates with the truth of exact pictures by 0.90; both eyes' turns, -1 to 1."""
    generator, model = cli.load_next3d(DEMO / 'next3d_demo.pkl', torch.device('cpu')), load_embedded_head()
    c = path_labels(np.full([1, 2], FRONTAL), (0, 0, 0.2), 2.7)
    sides = [dict(eyeLookInLeft=0.7, eyeLookOutRight=0.7), {}, dict(eyeLookOutLeft=0.7, eyeLookInRight=0.7)]
    meshes = torch.cat([model(torch.zeros(1, model.num_identity), model.expression(w)).stacked() for w in sides])
    estimate = load_estimator(None, torch.device('cpu'))
    for seed in (8, 10, 21):
        ws = generator.mapping(cli.latent(seed, generator.z_dim), c, 0.7, generator.num_style_ws).expand(3, -1, -1)
        with torch.no_grad():
            pictures = generator.synthesis(ws, c.expand(3, -1), meshes)['image']
            pictures = (pictures * 127.5 + 128).clamp(0, 255).to(torch.uint8)
            weights = dict(zip(estimate.expression_names, estimate(pictures, c.expand(3, -1), meshes).expression.T))
        turn = weights['eyeLookOutLeft'] + weights['eyeLookInRight']
        turn = (turn - weights['eyeLookInLeft'] - weights['eyeLookOutRight']) / 2
        assert turn[1] - turn[0] > 0.25 and turn[2] - turn[1] > 0.25, (seed, turn)
