# SPDX-License-Identifier: Apache-2.0
"""OBJ and landmark files: read in file order, refused in one line that says what was expected and found."""

import numpy as np
import parity
import pytest
from simple_head import DEMO_HEAD, simple_head

from geometry import meshes
from geometry.meshes import MeshFileError, read_landmarks, read_obj

TRIANGLE = 'v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\n'
DEMO = parity.ROOT / 'tests' / 'data' / 'simple_head'


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file (text or bytes) and returns its path."""

    def write_file(content, name='file.obj'):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def test_the_demo_files_hold_the_generated_head():
    mesh, head = read_obj(DEMO / 'demo.obj'), simple_head(**DEMO_HEAD)
    assert np.array_equal(mesh.vertices, head.vertices)
    assert np.array_equal(mesh.uvs, head.uvs)
    assert np.array_equal(mesh.faces, head.faces) and np.array_equal(mesh.uv_faces, head.uv_faces)
    assert np.array_equal(read_landmarks(DEMO / 'demo_kpt2d.txt'), head.landmarks)


def test_the_published_head_reads_as_in_the_reference():
    path = parity.parity_file('demo.obj')
    vertices, uvs, faces, uv_faces = parity.recipe.load_obj(path)
    mesh = read_obj(path)
    assert mesh.vertices.shape == (5023, 3) and mesh.faces.shape == (9976, 3) and mesh.uvs.shape == (5118, 2)
    assert np.array_equal(mesh.vertices, np.float32(vertices)) and np.array_equal(mesh.uvs, np.float32(uvs))
    assert np.array_equal(mesh.faces, faces) and np.array_equal(mesh.uv_faces, uv_faces)
    landmarks = read_landmarks(parity.parity_file('demo_kpt2d.txt'))
    assert np.array_equal(landmarks, np.loadtxt(parity.parity_file('demo_kpt2d.txt'), dtype=np.float32))


def test_types_and_values_of_a_triangle(write):
    mesh = read_obj(write('v 0.1 -2e-3 3\n' + TRIANGLE + 'f 2/1 3/2 4/3\n'))
    assert mesh.vertices.dtype == mesh.uvs.dtype == np.float32
    assert mesh.faces.dtype == mesh.uv_faces.dtype == np.int64
    assert np.array_equal(mesh.vertices[0], np.float32([0.1, -0.002, 3]))
    assert mesh.faces.tolist() == [[1, 2, 3]] and mesh.uv_faces.tolist() == [[0, 1, 2]]
    assert mesh.uvs.tolist() == [[0, 0], [1, 0], [0, 1]]


@pytest.mark.parametrize('corners', ['1/2 2/3 3/1', '1/2/1 2/3/1 3/1/1'])
def test_corners_with_uvs(write, corners):
    mesh = read_obj(write(TRIANGLE + f'vn 0 0 1\nf {corners}\n'))
    assert mesh.faces.tolist() == [[0, 1, 2]] and mesh.uv_faces.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize('corners', ['1 2 3', '1//1 2//1 3//1', '1/1 2/2 3'])
def test_one_corner_without_uv_means_no_uv_faces(write, corners):
    mesh = read_obj(write(TRIANGLE + f'vn 0 0 1\nf 1/1 2/2 3/3\nf {corners}\n'))
    assert mesh.faces.tolist() == [[0, 1, 2], [0, 1, 2]] and mesh.uv_faces is None


def test_other_lines_spaces_and_line_ends_do_not_matter(write):
    plain = read_obj(write(TRIANGLE + 'f 1/1 2/2 3/3\n'))
    noisy = '# v 9 9 9\n\nmtllib a.mtl\no head\ng face\nusemtl skin\ns off\nvp 1 2\n'
    noisy += TRIANGLE.replace(' ', '\t  ').replace('\n', '  \n') + 'l 1 2\nf  1/1 2/2\t3/3 \n'
    for text in (noisy, noisy.replace('\n', '\r\n'), noisy.rstrip()):
        mesh = read_obj(write(text.encode() + b'\n# caf\xe9'))
        assert all(np.array_equal(a, b) for a, b in zip(mesh, plain, strict=True))


def test_colours_after_vertices_and_third_texture_coordinates_are_left_out(write):
    text = 'v 0 0 0 1 1 1\nv 1 0 0 .5 .5 .5\nv 0 1 0 0 0 0\nvt 0 0 0\nvt 1 0 0\nvt 0 1 0\nf 1/1 2/2 3/3\n'
    mesh, plain = read_obj(write(text)), read_obj(write(TRIANGLE + 'f 1/1 2/2 3/3\n'))
    assert all(np.array_equal(a, b) for a, b in zip(mesh, plain, strict=True))


def test_vertices_that_no_face_uses_stay_in_place(write):
    mesh = read_obj(write('v 7 7 7\n' + TRIANGLE + 'v 8 8 8\nf 2/1 3/2 4/3\n'))
    assert mesh.vertices[:, 0].tolist() == [7, 0, 1, 0, 8]


def test_faces_may_come_before_their_vertices(write):
    assert read_obj(write('f 1/1 2/2 3/3\n' + TRIANGLE)).faces.tolist() == [[0, 1, 2]]


BAD_OBJ = {
    'empty': ('', 'expected a triangle mesh, found 0 vertices and 0 faces'),
    'no faces': (TRIANGLE, 'found 3 vertices and 0 faces'),
    'words': (TRIANGLE + 'v a 1 2\nf 1 2 3', 'line 7: expected 3 numbers, found a 1 2'),
    'two numbers': (TRIANGLE + 'v 1 2\nf 1 2 3', 'line 7: expected 3 numbers, found 1 2'),
    'no number': (TRIANGLE + 'v\nf 1 2 3', 'line 7: expected 3 numbers'),
    'one uv': (TRIANGLE + 'vt 1\nf 1 2 3', 'line 7: expected 2 numbers, found 1'),
    'nan': (TRIANGLE + 'v 0 nan 0\nf 1 2 3', 'line 7: expected finite numbers, found 0 nan 0'),
    'nan uv': (TRIANGLE + 'vt 0 nan\nf 1 2 3', 'line 7: expected finite numbers, found 0 nan'),
    'infinity': (TRIANGLE + 'v 0 0 -inf\nf 1 2 3', 'line 7: expected finite numbers, found 0 0 -inf'),
    'beyond float32': (TRIANGLE + 'v 0 0 1e39\nf 1 2 3', 'line 7: expected finite numbers, found 0 0 1e39'),
    'beyond float64': (TRIANGLE + 'v 0 0 1e400\nf 1 2 3', 'line 7: expected finite numbers, found 0 0 1e400'),
    'quad': (TRIANGLE + 'f 1 2 3 1', 'line 7: expected a triangle, found 4 corners'),
    'edge': (TRIANGLE + 'f 1 2', 'line 7: expected a triangle, found 2 corners'),
    'corner of words': (TRIANGLE + 'f 1 2 c', 'line 7: expected corners v or v/vt, found 1 2 c'),
    'corner of a float': (TRIANGLE + 'f 1 2 3.0', 'line 7: expected corners v or v/vt, found 1 2 3.0'),
    'absent vertex': (TRIANGLE + 'f 1 2 3\nf 1 2 4', 'line 8: expected vertex numbers from 1 to 3, found 1 2 4'),
    'vertex 0': (TRIANGLE + 'f 0 1 2', 'line 7: expected vertex numbers from 1 to 3, found 0 1 2'),
    'relative vertex': (TRIANGLE + 'f -1 -2 -3', 'line 7: expected vertex numbers from 1 to 3'),
    'absent UV': (TRIANGLE + 'f 1/1 2/2 3/4', 'line 7: expected UV numbers from 1 to 3, found 1/1 2/2 3/4'),
    'relative UV': (TRIANGLE + 'f 1/-1 2/1 3/1', 'line 7: expected UV numbers from 1 to 3'),
    'beyond 64 bits': (TRIANGLE + f'f 1 2 {2**70}', 'expected vertex numbers up to 3, found one beyond 64 bits'),
}


@pytest.mark.parametrize('case', BAD_OBJ.values(), ids=BAD_OBJ)
def test_bad_obj(write, case):
    content, message = case
    path = write(content)
    with pytest.raises(MeshFileError) as info:
        read_obj(path)
    assert str(info.value).startswith(f'{path}') and message in str(info.value)


def test_messages_quote_only_the_start_of_long_lines(write):
    with pytest.raises(MeshFileError) as info:
        read_obj(write(TRIANGLE + 'f 1 2 ' + 'x' * 5000))
    assert len(str(info.value)) < 300 and 'xxx...' in str(info.value)


def test_garbage_never_raises_anything_else(write):
    demo = (DEMO / 'demo.obj').read_bytes()[:3000]
    for seed in range(60):
        random = np.random.RandomState(seed)
        content = bytearray(random.bytes(3000) if seed % 2 else demo)
        for _ in range(20):
            content[random.randint(len(content))] = random.choice(list(b'\n vf/-.9ne\0\xff'))
        for read in (read_obj, read_landmarks):
            with pytest.raises(MeshFileError):
                read(write(bytes(content)))


def test_missing_files_raise_file_not_found(tmp_path):
    for read in (read_obj, read_landmarks):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / 'none')


GOOD_LANDMARKS = [f'{i / 1000} {-i / 2000} 1e-2' for i in range(68)]


def test_landmarks_in_file_order_with_blank_lines(write):
    expected = np.float32([[i / 1000, -i / 2000, 0.01] for i in range(68)])
    for line_end in ('\n', '\r\n', '\n\n', ' \n \n'):
        landmarks = read_landmarks(write(line_end.join([*GOOD_LANDMARKS, '']), 'lms.txt'))
        assert landmarks.dtype == np.float32 and np.array_equal(landmarks, expected)


BAD_LANDMARKS = {
    'empty': ([], 'expected 68 lines of 3 numbers, found 0 lines'),
    '67': (GOOD_LANDMARKS[1:], 'found 67 lines of 3'),
    '69': (GOOD_LANDMARKS + ['0 0 0'], 'found 69 lines of 3'),
    'two columns': (['0 0'] * 68, 'found 68 lines of 2'),
    'four columns': (GOOD_LANDMARKS[1:] + ['0 0 0 0'], 'found 68 lines of 3 or 4'),
    'words': (GOOD_LANDMARKS[1:] + ['0 0 z'], 'line 68: expected 3 numbers, found 0 0 z'),
    'nan': (['nan 0 0'] + GOOD_LANDMARKS[1:], 'line 1: expected finite numbers, found nan 0 0'),
    'pixels': (['0 -256.5 0'] + GOOD_LANDMARKS[1:], 'in metres, all below 0.3, found 256.5 (pixels?)'),
    'limit': (['0 0 0.3'] + GOOD_LANDMARKS[1:], 'found 0.3'),
}


@pytest.mark.parametrize('case', BAD_LANDMARKS.values(), ids=BAD_LANDMARKS)
def test_bad_landmarks(write, case):
    lines, message = case
    path = write('\n'.join(lines), 'lms.txt')
    with pytest.raises(MeshFileError) as info:
        read_landmarks(path)
    assert str(info.value).startswith(f'{path}') and message in str(info.value)


def test_mesh_input_is_vertices_then_landmarks():
    vertices, landmarks = np.random.RandomState(0).randn(7, 3), np.random.RandomState(1).randn(68, 3)
    v = meshes.stack_mesh(vertices, landmarks)
    assert v.shape == (1, 75, 3) and v.dtype == np.float32
    assert np.array_equal(v[0, :7], np.float32(vertices)) and np.array_equal(v[0, 7:], np.float32(landmarks))
