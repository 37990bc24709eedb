# SPDX-License-Identifier: Apache-2.0
"""Pictures of rare poses count several times: the bins, the file, what training makes of it."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from test_dataset import COUNT, folder_source, published, run_pack  # noqa: F401  (published is a fixture)

from dataset_preprocessing import balancing, rebalance
from geometry.cameras import FRONTAL, intrinsics, look_at_pose, make_label
from training.dataset import REPEATS_FILE, DatasetError, HeadDataset, PackedSource


def labels_of(yaws_deg):
    pose = [make_label(look_at_pose(FRONTAL + np.radians(yaw), FRONTAL), intrinsics())[0].numpy() for yaw in yaws_deg]
    return np.array(pose)


def test_yaw_is_that_of_the_camera():
    assert np.allclose(balancing.yaw_deg(labels_of([0, 20, -35, 120])), [0, 20, -35, 120], atol=1e-4)


def test_rare_bins_count_several_times():
    yaws = [0] * 36 + [15] * 9 + [-15] * 4 + [60] + [130]
    result = balancing.balance(labels_of(yaws), bins=9, strength=0.5, most=5)
    assert result.counts.tolist() == [0, 0, 0, 4, 36, 9, 0, 1, 1]
    assert result.factors.tolist() == [1, 1, 1, 3, 1, 2, 1, 5, 5]  # Roots of 9, 1, 4 and 36; at most 5.
    assert result.repeats.tolist() == [1] * 36 + [2] * 9 + [3] * 4 + [5] * 2
    table = result.table().splitlines()
    assert len(table) == 11 and table[4].split()[-3:] == ['4', '3', '12'] and table[-1].split() == ['all', '51', '76']
    assert (balancing.balance(labels_of(yaws), strength=0).repeats == 1).all()
    equal = balancing.balance(labels_of(yaws), strength=1, most=36)
    assert set((equal.counts * equal.factors)[equal.counts > 0].tolist()) == {36}
    with pytest.raises(ValueError, match='most'):
        balancing.balance(labels_of(yaws), most=0)


@pytest.fixture
def copy(published, tmp_path):  # noqa: F811
    return shutil.copytree(published, tmp_path / 'data')


def invoke(*words):
    return CliRunner().invoke(rebalance.main, [str(word) for word in words])


def items_seen(dataset):
    return [dataset[i].label.tolist() for i in range(len(dataset))]


def test_training_sees_repeated_items_with_their_camera_and_mesh(copy, tmp_path):
    source = folder_source(copy)
    result = invoke(f'--data={copy}/images512x512', '--bins=9', '--strength=1')
    assert result.exit_code == 0 and 'yaw of the camera' in result.output
    repeats = folder_source(copy).repeats
    assert repeats.tolist() == balancing.balance(source.labels, 9, 1).repeats.tolist() and repeats.max() > 1
    plain, more = HeadDataset(source), HeadDataset(folder_source(copy), repeats=repeats)
    expected = [plain[i] for i in range(COUNT) for _ in range(repeats[i])]
    assert len(more) == repeats.sum() == len(expected)
    for i, item in enumerate(expected):
        assert all(np.array_equal(a, b) for a, b in zip(more[i], item, strict=True))
    mirrored = HeadDataset(folder_source(copy), partner=np.arange(plain.num_vertices), repeats=repeats)
    assert len(mirrored) == 2 * len(more)
    assert np.array_equal(mirrored[len(more) + 1].image, more[1].image[:, :, ::-1])
    run_pack(copy, tmp_path / 'packed')
    assert PackedSource(tmp_path / 'packed').repeats.tolist() == repeats.tolist()


def test_a_packed_set_is_rebalanced_and_back(copy, tmp_path):
    packed = tmp_path / 'packed'
    run_pack(copy, packed)
    before = (packed / 'manifest.json').read_text()
    words = [f'--data={packed}', '--bins=9', '--strength=1']
    assert 'yaw' in invoke(*words, '--dry-run').output and (packed / 'manifest.json').read_text() == before
    assert invoke(*words).exit_code == 0
    assert PackedSource(packed).repeats.max() > 1
    assert 'each picture counts once' in invoke(*words, '--undo').output
    assert json.loads((packed / 'manifest.json').read_text()) == json.loads(before)


def test_a_folder_is_set_back(copy):
    images = copy / 'images512x512'
    assert invoke(f'--data={images}', '--bins=9', '--strength=1').exit_code == 0
    assert (images / REPEATS_FILE).exists()
    assert invoke(f'--data={images}', '--undo').exit_code == 0
    assert not (images / REPEATS_FILE).exists() and (folder_source(copy).repeats == 1).all()


@pytest.mark.parametrize('number', [0, -1, 1.5, '2', True, 1001])
def test_bad_numbers_are_told(copy, number):
    path = copy / 'images512x512' / REPEATS_FILE
    path.write_text(json.dumps({'repeats': {'00000/img00000001.png': number, 'unknown.png': 3}}))
    with pytest.raises(DatasetError, match='img00000001.png: expected a whole number from 1 to 1000'):
        folder_source(copy)


def test_bad_files_are_told(copy, tmp_path):
    path = copy / 'images512x512' / REPEATS_FILE
    for text in ('{', '[]', '{"repeats": []}', '{"other": {}}'):
        path.write_text(text)
        with pytest.raises(DatasetError, match=f"{REPEATS_FILE}: expected"):
            folder_source(copy)
    path.unlink()
    run_pack(copy, tmp_path / 'packed')
    manifest = json.loads((tmp_path / 'packed' / 'manifest.json').read_text())
    (tmp_path / 'packed' / 'manifest.json').write_text(json.dumps({**manifest, 'repeats': [1]}))
    with pytest.raises(DatasetError, match='expected repeats of 5 items'):
        PackedSource(tmp_path / 'packed')


def test_bad_input_is_one_line(copy, tmp_path):
    shutil.make_archive(tmp_path / 'images', 'zip', copy / 'images512x512')
    (tmp_path / 'empty').mkdir()
    for data, message in ((tmp_path / 'images.zip', 'found an archive'), (tmp_path / 'empty', 'found no such file'),
                          (tmp_path / 'none', 'No such file')):  # fmt: skip
        result = invoke(f'--data={data}')
        assert result.exit_code and message in result.output and len(result.output.strip().splitlines()) == 1
