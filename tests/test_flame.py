# SPDX-License-Identifier: Apache-2.0
"""The FLAME head: published numbers, an independent skinning of fabricated files, refusals, hostile and damaged files.

The fabricated model has FLAME's sizes and random content; nothing in it comes from FLAME.
"""

import io
import pickle
import random
import struct

import numpy as np
import pytest
import torch
from parity import agrees, load, parity_file, recipe
from scipy.spatial.transform import Rotation
from test_restricted_pickle import Call, Name, Touch, Writer, numpy_array, numpy_dtype, write

from geometry.flame import FlameFileError, contour_rows, load_flame, rotation_matrices
from geometry.meshes import MeshFileError

V, F = 5023, 9976
POSE_NAMES = ('global_pose', 'neck_pose', 'jaw_pose', 'eye_pose')
pytestmark = pytest.mark.usefixtures('one_thread')

# --- published numbers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def published(builders, tmp_path_factory):
    """Return a function that loads the head of the published numbers, and their arrays by name."""
    folder, template = tmp_path_factory.mktemp('flame'), parity_file('head_template.obj')
    builders.build_landmark_npy(folder / 'landmark_embedding.npy')

    def head(wrapped=('shapedirs',), **options):
        builders.build_flame_pkl(folder / 'generic_model.pkl', template, wrapped)
        return load_flame(folder / 'generic_model.pkl', folder / 'landmark_embedding.npy', template, **options)

    return head, {key: torch.from_numpy(array) for key, array in load('fits/prep_flame')[1].items()}


@pytest.fixture(scope='module')
def published_head(published):
    return published[0]()


def pose_of(pose, **more):
    """Return keyword arguments of poses that the published code holds as global and jaw rotation."""
    return {'global_pose': pose[:, :3], 'jaw_pose': pose[:, 3:], **more}


def relative_transforms(joints):
    """Return [N, 5, 4, 4]: each joint's motion, with the joint at rest taken away."""
    shift = joints.positions - torch.einsum('njab,njb->nja', joints.rotations, joints.rest)
    top = torch.cat([joints.rotations, shift[..., None]], dim=3)
    return torch.cat([top, torch.tensor([0.0, 0, 0, 1]).expand(*top.shape[:2], 1, 4)], dim=2)


def agrees_as_mesh(part, mesh, vertices, landmarks):
    agrees(f'flame_{part}/vertices', mesh.vertices[:, ::23], vertices, 'op')
    agrees(f'flame_{part}/landmarks', mesh.landmarks, landmarks, 'op')


def test_published_poses(published, published_head):
    x = published[1]
    codes, poses = (x['shape'], x['exp']), pose_of(x['pose'], eye_pose=x['eye_pose'])
    mesh, joints = published_head(*codes, **poses), published_head.joints(*codes, **poses)
    agrees_as_mesh('poses', mesh, x['verts_s'], x['lmk2d'])
    agrees('flame_poses/all_vertices', mesh.vertices[6], x['verts_full_6'], 'op')
    agrees('flame_poses/sums', mesh.vertices.double().sum(dim=1), x['verts_sum'], 'op')
    agrees('flame_joints/rest', joints.rest, x['J_rest'], 'op')
    agrees('flame_joints/posed', joints.positions, x['J_posed'], 'op')
    agrees('flame_joints/transforms', relative_transforms(joints), x['A'], 'op')
    agrees_as_mesh('no_pose', published_head(codes[0][6:7], codes[1][6:7]), x['none_verts_s'], x['none_lmk2d'])


def test_published_neck_poses(published, published_head):
    x, rows = published[1], [6, 4, 0]
    codes = x['shape'][rows], x['exp'][rows]
    poses = pose_of(x['pose'][rows], neck_pose=x['neck'], eye_pose=x['eye_pose'][rows])
    agrees_as_mesh('neck', published_head(*codes, **poses), x['neck_verts_s'], x['neck_lmk2d'])
    joints = published_head.joints(*codes, **poses)
    agrees('flame_neck/posed', joints.positions, x['neck_J_posed'], 'op')
    agrees('flame_neck/transforms', relative_transforms(joints), x['neck_A'], 'op')


@pytest.mark.parametrize('sweep', ['yaw', 'mixed'])
def test_published_contour(published, published_head, sweep):
    x = published[1]
    pose = x[f'{sweep}_pose']
    assert contour_rows(rotation_matrices(pose[:, :3])).tolist() == x[f'{sweep}_dyn_row'].tolist()
    codes = torch.zeros([len(pose), 100]), torch.zeros([len(pose), 50])
    mesh = published_head(*codes, **pose_of(pose))
    agrees(f'flame_contour/{sweep}', mesh.landmarks[:, :17], x[f'{sweep}_contour'], 'op')


def test_published_full_basis_with_all_arrays_wrapped(published):
    head, x = published
    wrapped = ('shapedirs', 'v_template', 'posedirs', 'weights', 'f', 'kintree_table', 'J')
    head = head(wrapped, num_identity=300, num_expression=100)
    codes = [torch.from_numpy(recipe.weight(f'flame/in/{name}{n}', (1, n), 0, 0.5, 701))
             for name, n in (('shape', 300), ('exp', 100))]  # fmt: skip
    mesh = head(*codes, **pose_of(x['pose'][4:5], eye_pose=x['eye_pose'][6:7]))
    agrees_as_mesh('full_basis', mesh, x['full_basis_verts_s'], x['full_basis_lmk2d'])


def test_published_rotations(published):
    x = published[1]
    agrees('flame_rotations', rotation_matrices(x['rodrigues_in']), x['rodrigues_out'], 'op')


def test_published_landmark_files(published_head):
    x = {key: torch.from_numpy(array) for key, array in load('fits/prep_deca')[1].items()}
    codes, jaw = (x['code_shape'], x['code_exp']), x['code_pose'][:, 3:]
    mesh = published_head(*codes, jaw_pose=jaw, eye_pose=x['eye_pose'])
    agrees_as_mesh('deca', mesh, x['verts_s'], x['kpt2d'])
    agrees('flame_deca/sums', mesh.vertices.double().sum(dim=1), x['verts_sum'], 'op')
    agrees_as_mesh('deca_no_eyes', published_head(*codes, jaw_pose=jaw), x['verts_noeye_s'], x['kpt2d_noeye'])
    for run in 'ac':
        code = x[f'run_{run}_code'][None]
        poses = dict(jaw_pose=code[:, 203:206], eye_pose=x[f'run_{run}_eye_pose'][None])
        mesh = published_head(code[:, :100], code[:, 150:200], **poses)
        agrees_as_mesh(f'run_{run}', mesh, x[f'run_{run}_obj_v_s'][None], x[f'run_{run}_kpt2d'][None])


def test_published_template_is_symmetric(published_head):
    partner = published_head.mirror
    assert (partner[partner] == torch.arange(V)).all()
    assert published_head.uv_faces.shape == (F, 3) and published_head.uvs.shape == (5118, 2)


# --- fabricated files ------------------------------------------------------------------------------------------------


class Python2Writer(Writer):
    """Writes str as Python 2 did, whose bytes were strings too."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        data = text.encode('latin1')
        head = b'U' + bytes([len(data)]) if len(data) < 256 else b'T' + struct.pack('<i', len(data))
        self.write(head + data)
        self.memoize(text)

    dispatch[str] = save_string


def python2(content, protocol=2) -> bytes:
    """Return the pickle of a content as Python 2 wrote it."""
    stream = io.BytesIO()
    Python2Writer(stream, protocol).dump(content)
    return stream.getvalue()


def pickled(array, package='numpy.core') -> Call:
    """Return an array as Python 2 and NumPy 1 pickle it."""
    is_fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    data = array.tobytes('F' if is_fortran else 'C').decode('latin1')
    empty = (Name('numpy', 'ndarray'), (0,), 'b')
    dtype = Call(Name('numpy', 'dtype'), (array.dtype.str[1:], 0, 1), state=(3, '<', None, None, None, -1, -1, 0))
    state = (1, array.shape, dtype, bool(is_fortran), data)
    return Call(Name(f'{package}.multiarray', '_reconstruct'), empty, state=state)


def chumpy(value) -> Call:
    """Return what chumpy pickles for Ch(value)."""
    dirty = Call(Name('__builtin__', 'set'), (['x'],))
    state = {'_dirty_vars': dirty, '_itr': None, '_depends_on_deps': {}, 'x': value, '_make_dense': False}
    return Call(Name('chumpy.ch', 'Ch'), state=state, opcode=pickle.NEWOBJ)


def sparse(dense, module='scipy.sparse.csc', **changes) -> Call:
    """Return a scipy matrix in compressed columns as it is pickled; changes replace entries of its state."""
    columns, rows = np.nonzero(dense.T)
    starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=dense.shape[1]))]).astype(np.int32)
    arrays = {'data': dense[rows, columns], 'indices': rows.astype(np.int32), 'indptr': starts}
    state = {'_shape': dense.shape, 'maxprint': 50, **{key: pickled(array) for key, array in arrays.items()}, **changes}
    return Call(Name(module, 'csc_matrix'), state=state, opcode=pickle.NEWOBJ)


def fabricated_model(seed=0):
    """Return random arrays in FLAME's sizes; the template is symmetric."""
    rng = np.random.default_rng(seed)
    half = rng.uniform([0.005, -0.1, -0.1], [0.1, 0.1, 0.1], [V // 2, 3])
    regressor = np.where(rng.random([5, V]) < 0.01, rng.random([5, V]), 0)
    weights = rng.random([V, 5])
    return {
        'f': rng.permuted(np.arange(3 * F) % V).reshape(F, 3).astype(np.uint32),
        'v_template': np.concatenate([half, [[0, 0.05, 0.08]], half * [-1, 1, 1]]),
        'shapedirs': rng.normal(0, 0.001, [V, 3, 400]),
        'posedirs': rng.normal(0, 0.001, [V, 3, 36]),
        'weights': weights / weights.sum(axis=1, keepdims=True),
        'J_regressor': regressor / regressor.sum(axis=1, keepdims=True),
        'kintree_table': np.array([[2**32 - 1, 0, 1, 1, 1], range(5)], np.uint32),
    }


def fabricated_landmarks(seed=1):
    """Return random arrays in the sizes of DECA's landmark embedding."""
    rng = np.random.default_rng(seed)
    bary = {'static': rng.dirichlet([1, 1, 1], 51), 'dynamic': rng.dirichlet([1, 1, 1], [79, 17])}
    arrays = {}
    for name, weights in bary.items():
        arrays[f'{name}_lmk_faces_idx'] = rng.integers(0, F, weights.shape[:-1])
        arrays[f'{name}_lmk_bary_coords'] = weights.astype(np.float32)
    return arrays


MODEL, LANDMARKS = fabricated_model(), fabricated_landmarks()


def model_entries(**changes):
    """Return the entries of a model file; changes replace some, or drop those that are None."""
    entries = {key: pickled(array) for key, array in MODEL.items()}
    entries.update(shapedirs=chumpy(entries['shapedirs']), J_regressor=sparse(MODEL['J_regressor']))
    entries.update(bs_style='lbs', bs_type='lrotmin', J=pickled(np.zeros([5, 3])), **changes)
    return {key: value for key, value in entries.items() if value is not None}


def npy(content: bytes, descr="'|O'", version=b'\1\0') -> bytes:
    """Return a .npy file around a pickle."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (), }}".encode().ljust(117) + b'\n'
    length = struct.pack('<H' if version[0] == 1 else '<I', len(header))
    return b'\x93NUMPY' + version + length + header + content


def object_array(content, package='numpy.core', dtype='O8') -> Call:
    """Return a numpy array of one object as numpy pickles it."""
    return numpy_array(package, (), numpy_dtype(dtype, '|'), [content])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with both files."""
    folder = tmp_path_factory.mktemp('fabricated')
    (folder / 'generic_model.pkl').write_bytes(python2(model_entries()))
    (folder / 'landmark_embedding.npy').write_bytes(landmark_file())
    return folder


def landmark_file(**changes):
    entries = {key: numpy_array('numpy.core', a.shape, numpy_dtype(a.dtype.str[1:]), a.tobytes())
               for key, a in LANDMARKS.items()}  # fmt: skip
    return npy(write(object_array({**entries, **changes}), 3))


@pytest.fixture(scope='module')
def head(folder):
    return load_flame(folder / 'generic_model.pkl', folder / 'landmark_embedding.npy', num_identity=7, num_expression=3)


def load_changed(folder, tmp_path, model: bytes | None = None, landmarks: bytes | None = None):
    """Load a head with the content of one of the files replaced."""
    paths = [folder / 'generic_model.pkl', folder / 'landmark_embedding.npy']
    for i, content in enumerate([model, landmarks]):
        if content is not None:
            paths[i] = tmp_path / paths[i].name
            paths[i].write_bytes(content)
    return load_flame(*paths, num_identity=7, num_expression=3)


def codes_and_poses(batch=3, seed=2, dtype=torch.float32):
    """Return random coefficients, and poses by name."""
    rng = torch.Generator().manual_seed(seed)
    identity, expression = (torch.randn([batch, n], generator=rng, dtype=dtype) for n in (7, 3))
    lengths = zip(POSE_NAMES, (3, 3, 3, 6))
    return identity, expression, {n: 0.4 * torch.randn([batch, k], generator=rng, dtype=dtype) for n, k in lengths}


def reference_mesh(identity, expression, global_pose, neck_pose, jaw_pose, eye_pose):
    """Return vertices and landmarks of one head, by 4 x 4 matrices in float64, joint after joint."""
    m = MODEL
    shaped = m['v_template'] + m['shapedirs'][:, :, :7] @ identity + m['shapedirs'][:, :, 300:303] @ expression
    turns = Rotation.from_rotvec(np.concatenate([global_pose, neck_pose, jaw_pose, eye_pose]).reshape(5, 3)).as_matrix()
    posed = shaped + m['posedirs'] @ np.concatenate([(turn - np.eye(3)).ravel() for turn in turns[1:]])
    joints = m['J_regressor'] @ shaped
    motions = []
    for joint, parent in enumerate([None, 0, 1, 1, 1]):
        # Turn about the joint's place at rest, then follow the parent.
        motion = np.eye(4)
        motion[:3, :3], motion[:3, 3] = turns[joint], joints[joint] - turns[joint] @ joints[joint]
        motions.append(motion if parent is None else motions[parent] @ motion)
    moved = sum(w[:, None] * (posed @ t[:3, :3].T + t[:3, 3]) for w, t in zip(m['weights'].T, motions))
    yaw = np.rad2deg(np.arcsin(np.clip(-(turns[0] @ turns[1])[2, 0], -1, 1)))
    row = min(round(yaw), 39) if round(yaw) >= 0 else min(39 - round(yaw), 78)
    parts = [(LANDMARKS[f'{n}_lmk_faces_idx'], LANDMARKS[f'{n}_lmk_bary_coords']) for n in ('dynamic', 'static')]
    faces, bary = (np.concatenate([contour[row], fixed]) for contour, fixed in zip(*parts))
    return moved, np.einsum('lc,lck->lk', bary, moved[m['f'].astype(np.int64)[faces]]), row


def assert_is_reference(mesh, identity, expression, poses):
    rows = []
    for i in range(len(identity)):
        arguments = [x[i].double().numpy() for x in (identity, expression, *poses.values())]
        vertices, landmarks, row = reference_mesh(*arguments)
        np.testing.assert_allclose(mesh.vertices[i], vertices, atol=3e-7)
        np.testing.assert_allclose(mesh.landmarks[i], landmarks, atol=3e-7)
        rows.append(row)
    return rows


def test_head_is_the_reference(head):
    identity, expression, poses = codes_and_poses(batch=6)
    mesh = head(identity, expression, **poses)
    assert mesh.vertices.dtype == mesh.landmarks.dtype == torch.float32
    assert mesh.vertices.shape == (6, V, 3) and mesh.landmarks.shape == (6, 68, 3)
    assert len(set(assert_is_reference(mesh, identity, expression, poses))) > 3
    assert mesh.stacked().shape == (6, V + 68, 3)


@pytest.mark.parametrize('name', POSE_NAMES)
def test_poses_left_out_are_none(head, name):
    identity, expression, poses = codes_and_poses(batch=1)
    poses = {key: pose if key == name else torch.zeros_like(pose) for key, pose in poses.items()}
    assert_is_reference(head(identity, expression, **{name: poses[name]}), identity, expression, poses)


def test_description(head):
    assert head.num_identity == 7 and len(head.expression_names) == len(set(head.expression_names)) == 3
    assert head.faces.dtype == torch.int64 and np.array_equal(head.faces, MODEL['f'])
    assert head.uvs.shape == (0, 2) and head.uv_faces.shape == (0, 3) and head.mirror.dtype == torch.int64
    assert head.mirror.tolist() == [*range(V // 2 + 1, V), V // 2, *range(V // 2)]  # Halves change places.


def test_models_without_symmetry_have_no_mirror(folder, tmp_path):
    uneven = np.random.default_rng(0).normal(size=[V, 3])
    assert load_changed(folder, tmp_path, model=python2(model_entries(v_template=pickled(uneven)))).mirror is None


def test_licensed_arrays_stay_out_of_state_dicts(head):
    assert head.state_dict() == {} and not list(head.parameters())


def test_batches_are_rows(head):
    identity, expression, poses = codes_and_poses()
    mesh = head(identity, expression, **poses)
    for i in range(3):
        one = head(identity[i : i + 1], expression[i : i + 1], **{key: pose[i : i + 1] for key, pose in poses.items()})
        torch.testing.assert_close(one.stacked()[0], mesh.stacked()[i], atol=1e-6, rtol=0)
    spread = head(identity[:1], expression, jaw_pose=poses['jaw_pose'][:1])
    full = head(identity[:1].expand(3, -1), expression, jaw_pose=poses['jaw_pose'][:1].expand(3, -1))
    assert torch.equal(spread.stacked(), full.stacked())
    assert head(identity[:0], expression[:0]).stacked().shape == (0, V + 68, 3)


def test_all_devices(head, folder):
    """Nothing in the forward stays on the CPU or looks at values: it runs where tensors have none."""
    moved = load_flame(folder / 'generic_model.pkl', folder / 'landmark_embedding.npy', None, 7, 3).to('meta')
    identity, expression, poses = codes_and_poses()
    mesh = moved(identity.to('meta'), expression.to('meta'), **{key: pose.to('meta') for key, pose in poses.items()})
    assert mesh.stacked().device.type == 'meta'
    assert moved(identity.to('meta'), expression.to('meta')).stacked().device.type == 'meta'


@pytest.mark.parametrize('scale', [1.0, 0.0], ids=['posed', 'at rest'])
def test_gradients(folder, scale):
    head = load_flame(folder / 'generic_model.pkl', folder / 'landmark_embedding.npy', None, 7, 3).double()
    identity, expression, poses = codes_and_poses(batch=1, dtype=torch.float64)
    inputs = [(scale * x).requires_grad_() for x in (identity, expression, *poses.values())]
    probe = torch.randn([V + 68, 3], generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value(*args):
        return (head(*args[:2], **dict(zip(POSE_NAMES, args[2:]))).stacked() * probe).sum()

    assert torch.autograd.gradcheck(value, inputs, eps=1e-5, atol=1e-5)


def test_frontal_contour(head):
    identity, expression, poses = codes_and_poses()
    turned, frontal = (head(identity, expression, **poses, use_frontal_contour=frontal) for frontal in (False, True))
    assert torch.equal(turned.vertices, frontal.vertices)
    assert torch.equal(turned.landmarks[:, 17:], frontal.landmarks[:, 17:])
    assert not torch.isclose(turned.landmarks[:, :17], frontal.landmarks[:, :17], atol=1e-3).all(dim=2).any()
    corners = MODEL['f'].astype(np.int64)[LANDMARKS['dynamic_lmk_faces_idx'][0]]
    bary = torch.from_numpy(LANDMARKS['dynamic_lmk_bary_coords'][0])
    expected = (frontal.vertices[:, corners] * bary[..., None]).sum(dim=2)
    torch.testing.assert_close(frontal.landmarks[:, :17], expected, atol=1e-7, rtol=0)


def yaw_rotations(degrees):
    vectors = np.deg2rad(np.asarray(degrees, np.float64))[:, None] * [0, 1, 0]
    return torch.from_numpy(Rotation.from_rotvec(vectors).as_matrix())


def test_contour_rows():
    table = {0: 0, 0.4: 0, 0.6: 1, 17: 17, 38.6: 39, 39: 39, 60: 39, 120: 39, 170: 10}
    table |= {-0.4: 0, -1: 40, -17.2: 56, -38.4: 77, -38.6: 78, -39: 78, -70: 78, -170: 49}
    assert contour_rows(yaw_rotations(list(table))).tolist() == list(table.values())
    others = Rotation.from_euler('xz', [[50, 0], [0, 70]], degrees=True).as_matrix()
    assert contour_rows(torch.from_numpy(others)).tolist() == [0, 0]
    assert contour_rows(torch.full([1, 3, 3], torch.nan)).tolist() == [0]


def test_rotations():
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-9, 0.6, [200, 1])
    vectors = sizes * rng.normal(size=[200, 3])
    expected = Rotation.from_rotvec(vectors).as_matrix()
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        made = rotation_matrices(torch.from_numpy(vectors).to(dtype))
        np.testing.assert_allclose(made, expected, atol=tolerance)
    at_rest = torch.zeros([2, 3], requires_grad=True)
    rotation_matrices(at_rest)[:, 2, 1].sum().backward()
    assert at_rest.grad.tolist() == [[1, 0, 0], [1, 0, 0]]


# --- forms of files --------------------------------------------------------------------------------------------------


def same_heads(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


def bytes_of_python3(array):
    """Return an array as Python 3 pickles it for Python 2."""
    made = pickled(array)
    *state, data = made.state
    encode = Name('_codecs', 'encode')
    function, empty = made.args[0], Call(encode, ('b', 'latin1'))
    return Call(made.function, (function, (0,), empty), state=(*state, Call(encode, (data, 'latin1'))))


def old_object(call):
    """Return an object as protocols 0 and 1 write it."""
    arguments = (call.function, Name('__builtin__', 'object'), None)
    return Call(Name('copy_reg', '_reconstructor'), arguments, state=call.state)


def form(case) -> bytes:
    entries, signed = model_entries(), MODEL['kintree_table'].astype(np.int64)
    if case == 'all wrapped':
        return python2({key: value if isinstance(value, str) else chumpy(value) for key, value in entries.items()}
                       | {'shapedirs': entries['shapedirs'], 'J_regressor': entries['J_regressor']})  # fmt: skip
    if case == 'nothing wrapped':
        return python2({**entries, **{key: pickled(array) for key, array in MODEL.items()}})
    if case == 'signed and float32':
        signed[0, 0] = -1
        shorter = {key: pickled(MODEL[key].astype(np.float32)) for key in ('shapedirs', 'weights')}
        faces = pickled(MODEL['f'].astype(np.int64))
        return python2({**entries, **shorter, 'f': faces, 'kintree_table': pickled(signed)})
    if case == 'root in 64 bits':
        return python2({**entries, 'kintree_table': pickled(signed)})
    if case == 'column order':
        return python2({**entries, 'posedirs': pickled(np.asfortranarray(MODEL['posedirs']))})
    if case == 'protocol 1':
        old = {key: old_object(entries[key]) for key in ('shapedirs', 'J_regressor')}
        return python2({**entries, **old}, protocol=1)
    if case == 'Python 3 for Python 2':
        return write({key: bytes_of_python3(array) for key, array in MODEL.items()}, 2)
    arrays = {key: numpy_array('numpy._core', a.shape, numpy_dtype(a.dtype.str[1:]), a.tobytes())
              for key, a in MODEL.items()}  # fmt: skip
    regressor = sparse(MODEL['J_regressor'], 'scipy.sparse._csc')
    regressor.state = {key: value for key, value in regressor.state.items() if key not in ('data', 'indices', 'indptr')}
    regressor.state |= {key: numpy_array('numpy._core', a.shape, numpy_dtype(a.dtype.str[1:]), a.tobytes())
                        for key, a in sparse_parts(MODEL['J_regressor']).items()}  # fmt: skip
    return write({**arrays, 'J_regressor': regressor}, 4)


def sparse_parts(dense):
    from scipy.sparse import csc_matrix

    made = csc_matrix(dense)
    return {'data': made.data, 'indices': made.indices, 'indptr': made.indptr}


FORMS = ['all wrapped', 'nothing wrapped', 'signed and float32', 'root in 64 bits', 'column order', 'protocol 1',
         'Python 3 for Python 2', 'Python 3']  # fmt: skip


@pytest.mark.parametrize('case', FORMS)
def test_forms_of_model_files(head, folder, tmp_path, case):
    assert same_heads(load_changed(folder, tmp_path, model=form(case)), head)


@pytest.mark.parametrize('version', [b'\1\0', b'\2\0', b'\3\0'])
@pytest.mark.parametrize('kind', ['numpy', 'torch'])
def test_forms_of_landmark_files(head, folder, tmp_path, kind, version):
    """What numpy itself saves, with some entries as torch tensors, as in the file that users download."""
    entries = dict(LANDMARKS, full_lmk_faces_idx=np.zeros([1, 68], np.int64), unused='text')
    if kind == 'torch':
        entries |= {key: torch.from_numpy(a) for key, a in LANDMARKS.items() if key.startswith('dynamic')}
    stream, holder = io.BytesIO(), np.empty([], object)
    holder[()] = entries
    np.lib.format.write_array(stream, holder, version=tuple(version), allow_pickle=True)
    assert same_heads(load_changed(folder, tmp_path, landmarks=stream.getvalue()), head)


def write_template(path, faces, uv_faces=None, vertices=V):
    """Write an OBJ file with a UV for each vertex, in reverse."""
    lines = [f'v {x} {y} {z}' for x, y, z in np.zeros([vertices, 3])]
    lines += [f'vt {i / V:.6f} {1 - i / V:.6f}' for i in range(V)]
    uv_faces = V - 1 - faces if uv_faces is None else uv_faces
    for corners, uv_corners in zip(faces + 1, uv_faces + 1):
        lines.append('f ' + ' '.join(f'{i}/{j}' if j else f'{i}' for i, j in zip(corners, uv_corners)))
    path.write_text('\n'.join(lines))
    return path


def test_template(head, folder, tmp_path):
    """The template's order of triangles is kept with its UVs; landmarks still lie in the model's triangles."""
    order = np.random.default_rng(0).permutation(F)
    faces = np.roll(MODEL['f'].astype(np.int64), 1, axis=1)[order]
    template = write_template(tmp_path / 'template.obj', faces)
    files = folder / 'generic_model.pkl', folder / 'landmark_embedding.npy'
    made = load_flame(*files, template, num_identity=7, num_expression=3)
    assert np.array_equal(made.faces, faces) and np.array_equal(made.uv_faces, V - 1 - faces)
    assert made.uvs.shape == (V, 2) and made.uvs.dtype == torch.float32
    assert made.uvs[1].tolist() == np.float32([round(1 / V, 6), round(1 - 1 / V, 6)]).tolist()
    identity, expression, poses = codes_and_poses()
    assert torch.equal(made(identity, expression, **poses).stacked(), head(identity, expression, **poses).stacked())


@pytest.mark.parametrize('case', ['vertices', 'faces', 'triangles', 'uvs'])
def test_templates_of_other_meshes_are_refused(folder, tmp_path, case):
    faces = MODEL['f'].astype(np.int64)
    path = tmp_path / 'template.obj'
    if case == 'triangles':
        faces[5, 1] = (faces[5, 1] + 1) % V
    arguments = {
        'vertices': dict(faces=faces, vertices=V + 1),
        'faces': dict(faces=faces[1:]),
        'triangles': dict(faces=faces),
        'uvs': dict(faces=faces, uv_faces=np.full_like(faces, -1)),
    }
    write_template(path, **arguments[case])
    expected = {
        'vertices': "expected FLAME's 5023 vertices and 9976 faces, found 5024 and 9976",
        'faces': "expected FLAME's 5023 vertices and 9976 faces, found 5023 and 9975",
        'triangles': "expected FLAME's triangles, found 1 others",
        'uvs': 'expected UVs on all faces',
    }
    with pytest.raises(MeshFileError) as caught:
        load_flame(folder / 'generic_model.pkl', folder / 'landmark_embedding.npy', path)
    assert str(caught.value).startswith(f'{path}: {expected[case]}')


# --- refusals --------------------------------------------------------------------------------------------------------


WRONG_SHAPES = [('identity', [2, 8]), ('identity', [7]), ('identity', []), ('expression', [2, 50]),
                ('expression', [3, 3]), ('global_pose', [2, 4]), ('neck_pose', [3, 3]), ('jaw_pose', [3]),
                ('eye_pose', [2, 3])]  # fmt: skip


@pytest.mark.parametrize('name, shape', WRONG_SHAPES)
def test_wrong_lengths(head, name, shape):
    identity, expression, poses = codes_and_poses(batch=2)
    arguments = {'identity': identity, 'expression': expression, **poses, name: torch.zeros(shape)}
    lengths = {'identity': 7, 'expression': 3, 'eye_pose': 6}
    for call in (head, head.joints):
        with pytest.raises(ValueError) as caught:
            call(**arguments)
        batch = 'coefficients [N' if name in ('identity', 'expression') else '[2 or 1'
        expected = f'{name}: expected {batch}, {lengths.get(name, 3)}], got {shape}'
        if (name, shape) == ('expression', [3, 3]):
            expected = 'expression: expected a batch of 2 or 1, got 3'
        assert str(caught.value) == expected


@pytest.mark.parametrize('name, most', [('num_identity', 300), ('num_expression', 100)])
def test_numbers_of_coefficients(folder, name, most):
    files = folder / 'generic_model.pkl', folder / 'landmark_embedding.npy'
    for count in (0, most + 1):
        with pytest.raises(ValueError, match=f'^{name}: expected 1 to {most}, got {count}$'):
            load_flame(*files, **{name: count})


def test_missing_files_say_where_to_get_them(folder, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_flame(tmp_path / 'no.pkl', folder / 'landmark_embedding.npy')
    for part in (f'{tmp_path}/no.pkl: ', 'https://flame.is.tue.mpg.de', 'register', 'FLAME 2020', 'generic_model.pkl'):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:
        load_flame(folder / 'generic_model.pkl', tmp_path / 'no.npy')
    for part in (f'{tmp_path}/no.npy: ', 'landmark_embedding.npy', 'DECA'):
        assert part in str(caught.value)


def refused(folder, tmp_path, *parts, **contents):
    """Assert that a file is refused with one line that names it and holds all parts."""
    with pytest.raises(FlameFileError) as caught:
        load_changed(folder, tmp_path, **contents)
    message = str(caught.value)
    name = 'generic_model.pkl' if 'model' in contents else 'landmark_embedding.npy'
    assert message.startswith(f'{tmp_path}/{name}: ') and message.isprintable(), message
    for part in parts:
        assert part in message
    return message


def other_parents(parents):
    return pickled(np.array([parents, range(5)], np.int64))


REGRESSOR = MODEL['J_regressor']
LESS = chumpy(pickled(np.zeros([V, 3, 10])))
OTHER_MODELS = {
    'SMPL': ({'v_template': pickled(np.zeros([6890, 3]))},
             'v_template: real numbers [5023, 3], found float64 [6890, 3]'),
    'fewer shapes': ({'shapedirs': LESS}, 'shapedirs: real numbers [5023, 3, 400], found float64 [5023, 3, 10]'),
    'more joints': ({'weights': pickled(np.zeros([V, 24]))},
                    'weights: real numbers [5023, 5], found float64 [5023, 24]'),
    'other regressor': ({'J_regressor': sparse(np.ones([24, V]))},
                        'J_regressor: real numbers [5, 5023], found a sparse matrix (24, 5023)'),
    'whole weights': ({'weights': pickled(np.zeros([V, 5], np.int64))}, 'real numbers [5023, 5], found int64'),
    'real faces': ({'f': pickled(np.zeros([F, 3]))}, 'f: whole numbers [9976, 3], found float64'),
    'whole regressor': ({'J_regressor': sparse(np.ones([5, V], np.int64))}, 'found a sparse matrix of int64'),
    'other tree': ({'kintree_table': other_parents([-1, 0, 1, 2, 3])},
                   'with parents (-1, 0, 1, 1, 1) of its joints, found (-1, 0, 1, 2, 3)'),
    'without poses': ({'posedirs': None, 'weights': None}, 'found a file without posedirs, weights'),
    'faces beyond': ({'f': pickled(np.full([F, 3], V))}, 'f: expected numbers from 0 to 5022, found 5023 to 5023'),
    'faces before': ({'f': pickled(np.full([F, 3], -1))}, 'f: expected numbers from 0 to 5022, found -1 to -1'),
    'not finite': ({'weights': pickled(np.full([V, 5], np.nan))}, 'weights: expected finite numbers'),
    'text': ({'weights': 'text'}, 'weights: real numbers [5023, 5], found no array'),
    'empty object': ({'weights': Call(Name('chumpy.ch', 'Ch'), opcode=pickle.NEWOBJ)}, 'found no array'),
}  # fmt: skip


@pytest.mark.parametrize('case', OTHER_MODELS)
def test_models_of_other_versions_are_refused(folder, tmp_path, case):
    changes, message = OTHER_MODELS[case]
    kind = [] if 'expected' in message else ['expected the FLAME 2020 or 2023 model (generic_model.pkl)']
    refused(folder, tmp_path, message, *kind, model=python2(model_entries(**changes)))


STARTS = sparse_parts(REGRESSOR)['indptr'].astype(np.int64)
COUNT = np.count_nonzero(REGRESSOR)
BAD_MATRICES = {
    'no state': {'_shape': None},
    'rows beyond': {'indices': pickled(np.full([COUNT], 5))},
    'rows before': {'indices': pickled(np.full([COUNT], -1))},
    'real rows': {'indices': pickled(np.zeros([COUNT]))},
    'rows in two dimensions': {'indices': pickled(np.zeros([COUNT, 2], np.int64))},
    'huge counts': {'indptr': pickled(STARTS * 2**40)},
    'backwards': {'indptr': pickled(np.concatenate([[0], STARTS[:0:-1]]))},
    'start before': {'indptr': pickled(np.concatenate([[-(2**40)], STARTS[1:]]))},
    'start': {'indptr': pickled(np.concatenate([[1], STARTS[1:]]))},
    'columns missing': {'indptr': pickled(STARTS[1:])},
    'real columns': {'indptr': pickled(STARTS + 0.5)},
    'data missing': {'data': pickled(np.zeros([COUNT - 1]))},
    'no arrays': {'data': 'text'},
    'huge shape': {'_shape': (2**62, 2**62)},
    'long number': {'_shape': (2**70, 5)},
}


@pytest.mark.parametrize('case', BAD_MATRICES)
def test_damaged_sparse_matrices_are_refused(folder, tmp_path, case):
    content = python2(model_entries(J_regressor=sparse(REGRESSOR, **BAD_MATRICES[case])))
    refused(folder, tmp_path, 'J_regressor: real numbers [5, 5023], found ', model=content)


def changed_landmarks(key, array):
    made = numpy_array('numpy.core', array.shape, numpy_dtype(array.dtype.str[1:]), array.tobytes())
    return landmark_file(**{key: made})


OTHER_LANDMARKS = {
    'fewer static': (changed_landmarks('static_lmk_faces_idx', np.zeros([50], np.int64)),
                     'static_lmk_faces_idx: whole numbers [51], found int64 [50]'),
    'fewer rows': (changed_landmarks('dynamic_lmk_bary_coords', np.zeros([40, 17, 3])),
                   'dynamic_lmk_bary_coords: real numbers [79, 17, 3], found float64 [40, 17, 3]'),
    'triangles beyond': (changed_landmarks('dynamic_lmk_faces_idx', np.full([79, 17], F)),
                         'dynamic_lmk_faces_idx: expected numbers from 0 to 9975, found 9976 to 9976'),
    'not finite': (changed_landmarks('static_lmk_bary_coords', np.full([51, 3], np.inf)), 'expected finite numbers'),
    'numbers': (npy(b'', "'<f8'"), 'it holds numbers instead of a dict'),
    'no dict': (npy(write(object_array([1, 2]))), 'a dict of arrays, found something else'),
    'dict alone': (npy(write({})), 'it does not hold one object'),
    'several objects': (npy(write(numpy_array('numpy.core', (2,), numpy_dtype('O8', '|'), [{}, {}]))), 'one object'),
    'pickle': (write({}), 'not a .npy file'),
    'empty': (b'', 'not a .npy file'),
    'cut in the length': (npy(b'')[:9], 'it is cut off'),
    'cut in the pickle': (landmark_file()[:400], 'cannot be read'),
    'empty dict': (npy(write(object_array({}))), 'found a file without static_lmk_faces_idx, static_lmk_bary_coords'),
}  # fmt: skip


@pytest.mark.parametrize('case', OTHER_LANDMARKS)
def test_other_landmark_files_are_refused(folder, tmp_path, case):
    content, message = OTHER_LANDMARKS[case]
    refused(folder, tmp_path, message, landmarks=content)


HOSTILE = ['os system', 'posix system', 'builtins eval', '__builtin__ eval', 'builtins getattr', 'numpy load',
           'subprocess Popen', 'chumpy.ch MatVecMult', 'chumpy.ch Ch.__init__', 'scipy.sparse.csc csr_matrix',
           'codecs encode', 'copyreg _reconstructor', 'torch load', 'builtins object']  # fmt: skip


@pytest.mark.parametrize('name', HOSTILE)
def test_names_outside_the_allow_list_are_refused(folder, tmp_path, name):
    call = Call(Name(*name.split()), ('true',))
    message = f'it names {name.replace(" ", ".")}, which'
    for hostile in (call, chumpy(call), {'deep': [call]}):
        refused(folder, tmp_path, message, model=python2(model_entries(shapedirs=None, extra=hostile)))
    refused(folder, tmp_path, message, landmarks=npy(write(object_array({'extra': call}))))


def test_landmark_files_name_no_objects_of_models(folder, tmp_path):
    for module, name in (('chumpy.ch', 'Ch'), ('_codecs', 'encode'), ('copy_reg', '_reconstructor')):
        content = npy(write(object_array({'extra': Call(Name(module, name), ('x', 'y', None))})))
        refused(folder, tmp_path, f'it names {module}.{name}, which', landmarks=content)


@pytest.mark.parametrize('way', ['os.system', 'exec', 'mkdir', 'state', 'items'])
def test_nothing_runs(folder, tmp_path, way):
    marker = tmp_path / 'marker'
    for protocol in range(6):
        content = pickle.dumps({'v_template': Touch(marker, way)}, protocol)
        refused(folder, tmp_path, 'which no', model=content)
        refused(folder, tmp_path, 'which no', landmarks=npy(content))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touch(marker, way)))  # A careless reader would have run it.
    assert marker.exists()


FORGED = {
    'old object of a function': Call(Name('copy_reg', '_reconstructor'), (Name('numpy', 'dtype'), None, None)),
    'old object of a dict': Call(Name('copy_reg', '_reconstructor'), (Name('collections', 'OrderedDict'), None, None)),
    'old object of text': Call(Name('copy_reg', '_reconstructor'), ('os.system', None, None)),
    'other encoding': Call(Name('_codecs', 'encode'), ('text', 'rot13')),
    'bytes of a list': Call(Name('_codecs', 'encode'), ([], 'latin1')),
    'changed class': Call(Name('chumpy.ch', 'Ch'), state={'x': 1}, opcode=b'0' + pickle.GLOBAL + b'chumpy.ch\nCh\n'),
    'state that is no dict': Call(Name('chumpy.ch', 'Ch'), state=[1], opcode=pickle.NEWOBJ),
}


@pytest.mark.parametrize('case', FORGED)
def test_forged_objects_are_refused(folder, tmp_path, case):
    content = python2(model_entries(shapedirs=None, extra=FORGED[case]))
    assert 'cannot be read' in refused(folder, tmp_path, model=content)


def test_messages_stay_in_one_line(folder, tmp_path):
    content = write({'a': Call(Name('os\nINFO: all is well', 'system\x1b[2J'), ())}, 4)
    refused(folder, tmp_path, 'os\\nINFO', model=content)


def test_damaged_files_are_refused_or_read(folder, tmp_path):
    """Whatever bytes change, nothing but FlameFileError is raised."""
    rng, refusals = random.Random(0), 0
    small = python2(model_entries(**{key: pickled(np.zeros(3)) for key in MODEL if key != 'J_regressor'}))
    contents = [('landmarks', landmark_file()), ('model', small)]
    for turn in range(300):
        kind, content = contents[turn % 2]
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            # Most bytes are numbers: rather change those that say what they are.
            damaged[rng.randrange(600) if rng.random() < 0.8 else rng.randrange(len(damaged))] = rng.randrange(256)
        cut = rng.randrange(len(damaged)) if rng.random() < 0.2 else len(damaged)
        path = tmp_path / kind
        path.write_bytes(damaged[:cut])
        files = (path, folder / 'landmark_embedding.npy') if kind == 'model' else (light_model(folder), path)
        try:
            load_flame(*files)
        except FlameFileError as error:
            refusals += 1
            assert str(error).isprintable()
    assert refusals > 150


def light_model(folder):
    """Return a model file that is read fast: zeros of 32 bits."""
    path = folder / 'light_model.pkl'
    if not path.exists():
        light = {key: pickled(np.zeros(MODEL[key].shape, np.float32)) for key in ('shapedirs', 'posedirs')}
        path.write_bytes(python2(model_entries(**light)))
    return path
