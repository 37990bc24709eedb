# SPDX-License-Identifier: Apache-2.0
"""The topology that new networks are built with: faces and UVs of a mesh, and the mask of its texture."""

import shutil

import numpy as np
import parity
import pytest
import torch
from PIL import Image

from geometry.meshes import MeshFileError, read_obj
from training.topology import load_topology

DEMO = parity.ROOT / 'tests' / 'data' / 'simple_head'
TEMPLATE = DEMO / 'head_template.obj'


@pytest.fixture
def template(tmp_path):
    """The demo's template in a folder without a mask."""
    return shutil.copy(TEMPLATE, tmp_path / 'head.obj')


def grey_ramp(size=64):
    return np.tile(np.linspace(0, 255, size).astype(np.uint8), (size, 1))


def test_demo_topology():
    mesh, topology = read_obj(TEMPLATE), load_topology(TEMPLATE, 256)
    assert np.array_equal(topology.faces, mesh.faces) and np.array_equal(topology.uv_faces, mesh.uv_faces)
    assert np.array_equal(topology.uvs, mesh.uvs)
    mask = np.asarray(Image.open(DEMO / 'uv_face_mask.png'))
    assert topology.uv_face_mask.shape == (1, 1, 256, 256) and topology.uv_face_mask.dtype == torch.float32
    assert np.array_equal(topology.uv_face_mask[0, 0], np.float32(mask) / 255)


@pytest.mark.parametrize('size', [32, 512])
def test_mask_is_resized_to_the_texture(size):
    mask, full = load_topology(TEMPLATE, size).uv_face_mask, load_topology(TEMPLATE, 256).uv_face_mask
    assert mask.shape == (1, 1, size, size)
    assert mask.min() >= 0 and mask.max() <= 1
    assert mask.mean().item() == pytest.approx(full.mean().item(), abs=0.01)
    # Upright and not mirrored: coarse blocks have the same brightness.
    blocks = [torch.nn.functional.adaptive_avg_pool2d(x, 8) for x in (mask, full)]
    torch.testing.assert_close(*blocks, atol=0.05, rtol=0)


def test_no_mask_beside_the_mesh_means_ones(template):
    assert torch.equal(load_topology(template, 64).uv_face_mask, torch.ones(1, 1, 64, 64))


def test_mask_of_another_path_wins(template, tmp_path):
    Image.fromarray(grey_ramp()).save(tmp_path / 'uv_face_mask.png')
    Image.fromarray(grey_ramp().T.copy()).save(tmp_path / 'other.png')
    beside = load_topology(template, 64).uv_face_mask[0, 0]
    other = load_topology(template, 64, tmp_path / 'other.png').uv_face_mask[0, 0]
    assert np.array_equal(beside, np.float32(grey_ramp()) / 255) and torch.equal(other, beside.T)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'P', '1'])
def test_mask_is_the_first_channel_of_any_picture(template, tmp_path, mode):
    red = np.where(grey_ramp() > 127, 255, 0).astype(np.uint8)
    other = np.full_like(red, 99)
    pictures = {
        'RGB': Image.fromarray(np.stack([red, other, other], axis=2)),
        'RGBA': Image.fromarray(np.stack([red, other, other, other], axis=2)),
        'LA': Image.fromarray(np.stack([red, other], axis=2)),
        'P': Image.fromarray(np.stack([red, red, red], axis=2)).quantize(2),
        '1': Image.fromarray(red).convert('1'),
    }
    assert pictures[mode].mode == mode
    pictures[mode].save(tmp_path / 'mask.png')
    mask = load_topology(template, 64, tmp_path / 'mask.png').uv_face_mask[0, 0]
    assert np.array_equal(mask, np.float32(red) / 255)


def test_bad_masks_are_named(template, tmp_path):
    Image.fromarray(grey_ramp()).save(tmp_path / 'whole.png')
    whole = (tmp_path / 'whole.png').read_bytes()
    for name, content in {'text.png': b'no picture', 'empty.png': b'', 'cut.png': whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MeshFileError, match=rf'{name}: expected a picture'):
            load_topology(template, 64, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_topology(template, 64, tmp_path / 'none.png')


def test_bad_meshes(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_topology(tmp_path / 'none.obj', 64)
    (tmp_path / 'plain.obj').write_text('v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n')
    with pytest.raises(MeshFileError, match=r'plain.obj: expected a UV-mapped mesh \(vt lines, f v/vt\), found no UVs'):
        load_topology(tmp_path / 'plain.obj', 64)
