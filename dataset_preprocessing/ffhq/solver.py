# SPDX-License-Identifier: Apache-2.0
"""Fit head and camera to points of pictures in one: damped Gauss-Newton, batched, identity shared within groups.

Unknowns of an item: how the face moves, and its camera; of a group of items: identity, by a Schur complement. Bounds
are kept by an active set, outliers by iterated weights, neighbours in time by a block tridiagonal system.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from geometry.cameras import FOCAL
from geometry.flame import rotation_matrices

RADIUS = 2.7
# Unknowns of a pose: turns [3] of the head about the world's origin, along the camera's axes, and where that is [3].
# Turns of the camera itself would move the head across the picture, and be nearly the same as its moves.
POSE = 6
POSE_ITERATIONS, ITERATIONS = 4, 10
DAMPING = 1e-4  # Of the diagonal.
MAX_TURN, MAX_SHIFT, MAX_COEFFICIENT = 0.3, 0.5, 1.5  # The longest step.
ROBUST = 2.0  # Standard deviations at which a point counts half.
TURN_ROBUST = 4.0  # The same of what else tells a camera, which has three numbers.
RADIUS_DEVIATION = 0.2  # World units: heads and crops are of different sizes, which meshes take over afterwards.
TURN_DEVIATION, MOVE_DEVIATION = 0.03, 0.03  # Between frames: radians, world units.
ALIKE = 0.3  # Correlation of the detector's errors in pictures of one person: many tell little more than a few.
FACING_LOW, FACING_HIGH, HIDDEN_WEIGHT = -0.25, 0.35, 0.03  # Points on the far side are the detector's guess.
CHUNK = 64  # Items whose Jacobians are in memory at once.


class PointModel(Protocol):
    """Points of a head that depend on coefficients. I: identity, L: what changes from item to item.

    deviation [P]: expected error of each point, world units. normals [P, 3]: of the neutral head. lower, upper,
    local_deviation [L]: bounds and prior of the second kind. step_deviation [L]: expected change between frames.
    modes [K, P, 2]: errors of points that go together, world units across the picture; each has a standard normal size.
    """

    num_identity: int
    deviation: torch.Tensor
    normals: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    local_deviation: torch.Tensor
    step_deviation: torch.Tensor
    modes: torch.Tensor

    def points(self, identity: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Return points [N, P, 3] in world units of identity [N, I] and local [N, L]."""

    def jacobians(self, identity: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return their derivatives [N or 1, P, 3, I] and [N or 1, P, 3, L]."""

    def restrict(self, local: torch.Tensor) -> torch.Tensor:
        """Return local [N, L] within the bounds and what else the model asks for."""


class Turned(NamedTuple):
    """What tells cameras beside the points. rotation [N, 3, 3]: from the world to the camera; precision [N, 3, 3]: of
    small turns about the camera's axes."""

    rotation: torch.Tensor
    precision: torch.Tensor


class Fit(NamedTuple):
    """identity [G, I] of groups; of N items: local [N, L], rotation [N, 3, 3] from the world to the camera (OpenCV) and
    place [N, 3] of the world's origin seen by it."""

    identity: torch.Tensor
    local: torch.Tensor
    rotation: torch.Tensor
    place: torch.Tensor

    @property
    def size(self) -> torch.Tensor:
        """Factor [N] by which heads grow about the world's origin where cameras are at 2.7: pictures stay the same."""
        return RADIUS / self.place.norm(dim=1)

    def cam2world(self) -> torch.Tensor:
        """Return poses [N, 4, 4] as labels hold them, 2.7 from the origin: of heads of `size`."""
        place = self.place * self.size[:, None]
        pose = torch.eye(4, dtype=place.dtype, device=place.device).repeat(len(place), 1, 1)
        pose[:, :3, :3], pose[:, :3, 3] = self.rotation.mT, -(self.rotation.mT @ place[..., None])[..., 0]
        return pose


def see(points: torch.Tensor, rotation: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return points [N, P, 3] of the world in coordinates of cameras."""
    return points @ rotation.mT + place[:, None]


def project(seen: torch.Tensor) -> torch.Tensor:
    """Return where points [N, P, 3] in camera coordinates are in the picture: [N, P, 2], 0 to 1 from its corner."""
    return FOCAL * seen[..., :2] / seen[..., 2:] + 0.5


def fit(
    model: PointModel,
    targets: torch.Tensor,
    prior: torch.Tensor,
    groups: torch.Tensor,
    identity: torch.Tensor | None = None,
    turned: Turned | None = None,
    is_sequence: bool = False,
    on_step: Callable[[], None] = lambda: None,
) -> Fit:
    """Return the fit to targets [N, P, 2], points of square pictures in sides from their corner.

    prior: [N, L], expected local coefficients, also the start. groups: [N] int64, 0 to G - 1: whose identity. identity:
    [G, I], known; None to find it. turned: what else tells cameras. is_sequence: items follow each other in time.
    on_step: called after each iteration.
    """
    state = _start(model, targets, prior, int(groups.max()) + 1, identity)
    with torch.no_grad():
        for iteration in range(POSE_ITERATIONS + ITERATIONS):
            is_pose_only = iteration < POSE_ITERATIONS
            free_identity = identity is None and not is_pose_only
            state = _step(model, targets, prior, turned, groups, state, is_pose_only, free_identity, is_sequence)
            on_step()
        return state


def _start(model, targets, prior, num_groups, identity):
    """Return the neutral head with cameras by scaled orthography."""
    local = model.restrict(prior)
    if identity is None:
        identity = prior.new_zeros([num_groups, model.num_identity])
    points = model.points(identity[:1], local[:1] * 0)[0]
    weights = 1 / model.deviation
    weights = (weights / weights.sum())[:, None]
    middle = (points * weights).sum(dim=0)
    target_middle = (targets * weights).sum(dim=1, keepdim=True)
    offsets = (points - middle) * weights.sqrt()
    affine = torch.linalg.lstsq(offsets.expand(len(targets), -1, -1), (targets - target_middle) * weights.sqrt())
    right, down = affine.solution.unbind(dim=2)
    # The nearest two orthonormal rows.
    u, _, v = torch.linalg.svd(torch.stack([right, down], dim=1), full_matrices=False)
    rows = u @ v
    rotation = torch.cat([rows, torch.linalg.cross(rows[:, 0], rows[:, 1])[:, None]], dim=1)
    place = (target_middle[:, 0] - 0.5) / FOCAL
    seen = RADIUS * torch.cat([place, torch.ones_like(place[:, :1])], dim=1)
    place = seen - (rotation @ middle[:, None])[..., 0]
    return Fit(identity, local, rotation, RADIUS * torch.nn.functional.normalize(place, dim=1))


def _step(model, targets, prior, turned, groups, state, is_pose_only, free_identity, is_sequence):
    """Return the state after one damped step of Gauss-Newton."""
    systems = [
        _system(model, targets[part], prior[part], turned and Turned(*(x[part] for x in turned)),
                state.identity[groups[part]], state, part, is_pose_only, free_identity)
        for part in torch.arange(len(targets), device=targets.device).split(CHUNK)
    ]  # fmt: skip
    local_matrix, local_vector, shared_matrix, shared_vector, mixed = (torch.cat(part) for part in zip(*systems))
    if is_sequence and len(targets) > 1:
        coupling = _couple(model, state, local_matrix, local_vector, is_pose_only)
        step = _solve_chain(local_matrix, local_vector, coupling)
        return _moved(model, state, step, None)
    if not free_identity:
        return _moved(model, state, _solve(local_matrix, local_vector), None)
    # Schur complement: what items leave for the identity of their group.
    eliminated = _solve(local_matrix, torch.cat([mixed.mT, local_vector[..., None]], dim=2))
    reduced_matrix = shared_matrix - mixed @ eliminated[..., :-1]
    reduced_vector = shared_vector - (mixed @ eliminated[..., -1:])[..., 0]
    size = model.num_identity
    total = torch.eye(size, dtype=targets.dtype, device=targets.device).repeat(len(state.identity), 1, 1)
    share = 1 / (1 + ALIKE * (torch.bincount(groups, minlength=len(total)) - 1)).to(targets)[groups, None]
    total = total.index_add(0, groups, reduced_matrix * share[..., None])
    vector = (-state.identity).index_add(0, groups, reduced_vector * share)
    change = _solve(total, vector)
    step = eliminated[..., -1] - (eliminated[..., :-1] @ change[groups][..., None])[..., 0]
    return _moved(model, state, step, change)


def _system(model, targets, prior, turned, identity, state, part, is_pose_only, free_identity):
    """Return the normal equations of items: local matrix and vector, shared matrix and vector, mixed matrix."""
    local, rotation, place = state.local[part], state.rotation[part], state.place[part]
    seen = see(model.points(identity, local), rotation, place)
    residual = project(seen) - targets
    weight = _weights(model, residual, rotation)
    # d(picture) / d(camera coordinates) [N, P, 2, 3], and on to the world.
    depth = seen[..., 2]
    slope = torch.zeros(*depth.shape, 2, 3, dtype=seen.dtype, device=seen.device)
    slope[..., 0, 0] = slope[..., 1, 1] = FOCAL / depth
    slope[..., :, 2] = -FOCAL * seen[..., :2] / depth[..., None] ** 2
    root = weight.sqrt()[..., None, None]
    slope = slope * root
    world_slope = slope @ rotation[:, None]
    around = (seen - place[:, None])[..., None, :].expand_as(slope)
    pose = torch.cat([torch.linalg.cross(around, slope), slope], dim=3).flatten(1, 2)
    right = -(residual * weight.sqrt()[..., None]).flatten(1)
    size = len(model.lower)
    if is_pose_only:
        by_local, shared = pose.new_zeros([*pose.shape[:2], size]), pose.new_zeros([*pose.shape[:2], 0])
    else:
        by_identity, by_local = (_chained(world_slope, basis) for basis in model.jacobians(identity, local))
        shared = by_identity if free_identity else by_identity[..., :0]
    products = _products(torch.cat([by_local, pose, right[..., None], shared], dim=2), model.modes, weight)
    width = size + POSE
    matrix, vector = products[:, :width, :width], products[:, :width, width]
    _add_priors(model, matrix, vector, local - prior, place, is_pose_only)
    if turned is not None:
        _add_turned(matrix, vector, turned, rotation)
    torch.diagonal(matrix, dim1=1, dim2=2).mul_(1 + DAMPING)
    _freeze(model, matrix, vector, local, is_pose_only, held := _held(model, vector, local))
    mixed = products[:, width + 1 :, :width]
    mixed[:, :, :size] *= ~held[:, None]
    return matrix, vector, products[:, width + 1 :, width + 1 :], products[:, width + 1 :, width], mixed


def _products(columns, modes, weight):
    """Return the products [N, C, C] of weighted columns [N, P·2, C], less what the detector's usual errors explain.

    Errors of points go together: their covariance is diag(1/weight) plus that of modes [K, P, 2] of unit size.
    """
    products = columns.mT @ columns
    if not len(modes):
        return products
    errors = (modes.flatten(1).mT * (FOCAL / RADIUS)) * weight.sqrt().repeat_interleave(2, dim=1)[..., None]
    mixed = errors.mT @ columns
    inner = errors.mT @ errors + torch.eye(len(modes), dtype=errors.dtype, device=errors.device)
    halved = torch.linalg.solve_triangular(torch.linalg.cholesky(inner), mixed, upper=False)
    return products - halved.mT @ halved


def _chained(slope, basis):
    """Return slope [N, P, 2, 3] times basis [N or 1, P, 3, C] as rows [N, P·2, C]; small matrix products are slow."""
    rows = slope[..., 0, None] * basis[:, :, None, 0]
    rows.addcmul_(slope[..., 1, None], basis[:, :, None, 1]).addcmul_(slope[..., 2, None], basis[:, :, None, 2])
    return rows.flatten(1, 2)


def _weights(model, residual, rotation):
    """Return the weight [N, P] of each point: its accuracy, whether it faces the camera, whether it fits."""
    # A world unit at the distance of the head measures FOCAL / RADIUS sides of the picture.
    scaled = residual.norm(dim=2) * (RADIUS / FOCAL) / model.deviation
    facing = -(model.normals @ rotation[:, 2, :, None])[..., 0]
    shown = ((facing - FACING_LOW) / (FACING_HIGH - FACING_LOW)).clamp(HIDDEN_WEIGHT, 1)
    return shown / (1 + (scaled / ROBUST) ** 2) / (model.deviation * FOCAL / RADIUS) ** 2


def _add_priors(model, matrix, vector, away, place, is_pose_only):
    size = len(model.lower)
    diagonal = torch.diagonal(matrix, dim1=1, dim2=2)
    if not is_pose_only:
        diagonal[:, :size] += model.local_deviation**-2
        vector[:, :size] -= away * model.local_deviation**-2
    radius = place.norm(dim=1, keepdim=True)
    outwards, strength = place / radius, RADIUS_DEVIATION**-2
    matrix[:, -3:, -3:] += strength * outwards[:, :, None] * outwards[:, None]
    vector[:, -3:] -= strength * (radius - RADIUS) * outwards


def _add_turned(matrix, vector, turned, rotation):
    """Pull cameras to what else tells them; one that is far from what the points tell is believed less."""
    pull = _turns(turned.rotation @ rotation.mT)[..., None]
    distance = (pull * (turned.precision @ pull)).sum(dim=1, keepdim=True)
    precision = turned.precision / (1 + distance / TURN_ROBUST**2)
    turn = slice(-POSE, -POSE + 3)
    matrix[:, turn, turn] += precision
    vector[:, turn] += (precision @ pull)[..., 0]


def _held(model, vector, local):
    """Return which coefficients [N, L] are at a bound and would leave it."""
    push = vector[:, : local.shape[1]]
    return ((local <= model.lower) & (push < 0)) | ((local >= model.upper) & (push > 0))


def _freeze(model, matrix, vector, local, is_pose_only, held):
    """Take coefficients out of the equations: those at a bound, or all."""
    held = held | is_pose_only
    free = torch.cat([~held, held.new_ones([len(held), POSE])], dim=1).to(matrix)
    matrix *= free[:, :, None] * free[:, None]
    torch.diagonal(matrix, dim1=1, dim2=2).add_(1 - free)
    vector *= free


def _couple(model, state, matrix, vector, is_pose_only):
    """Add to systems [T, ...] that frames differ little from their neighbours; return how strongly [T - 1, L + 6]."""
    size = len(model.lower)
    between = torch.cat([
        torch.diff(state.local, dim=0), _turns(state.rotation[1:] @ state.rotation[:-1].mT),
        torch.diff(state.place, dim=0),
    ], dim=1)  # fmt: skip
    deviation = torch.cat([
        model.step_deviation, matrix.new_full([3], TURN_DEVIATION), matrix.new_full([3], MOVE_DEVIATION)
    ])  # fmt: skip
    strength = deviation**-2
    if is_pose_only:
        strength = torch.cat([torch.zeros_like(strength[:size]), strength[size:]])
    ends = torch.zeros_like(vector)
    ends[:-1] += strength
    ends[1:] += strength
    frozen = torch.cat([_held(model, vector, state.local), ends.new_zeros([len(ends), POSE], dtype=torch.bool)], dim=1)
    torch.diagonal(matrix, dim1=1, dim2=2).add_(ends * ~frozen)
    pull = torch.zeros_like(vector)
    pull[:-1] += strength * between
    pull[1:] -= strength * between
    vector += pull * ~frozen
    return strength * ~(frozen[1:] | frozen[:-1])


def _turns(rotation):
    """Return axis-angle vectors [N, 3] of small rotations [N, 3, 3]."""
    skew = (rotation - rotation.mT) / 2
    return torch.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], dim=1)


def _solve(matrix, vector):
    """Return solutions of symmetric positive definite systems [N, n, n], of vectors [N, n] or columns [N, n, k]."""
    factor = torch.linalg.cholesky(matrix.double())
    columns = vector if vector.ndim == 3 else vector[..., None]
    solution = torch.cholesky_solve(columns.double(), factor).to(vector)
    return solution if vector.ndim == 3 else solution[..., 0]


def _solve_chain(matrix, vector, strength):
    """Return solutions [T, n] of systems, each coupled to the next one by -strength [T - 1, n]: block elimination."""
    matrix, vector, strength = matrix.double().cpu(), vector.double().cpu(), strength.double().cpu()
    strength = torch.cat([strength, torch.zeros_like(strength[:1])])
    carried, rights = [], []
    for frame in range(len(matrix)):
        system, right = matrix[frame], vector[frame]
        if frame:
            system = system - strength[frame - 1, :, None] * carried[-1]
            right = right + strength[frame - 1] * rights[-1]
        columns = torch.cat([torch.diag(strength[frame]), right[:, None]], dim=1)
        solved = torch.cholesky_solve(columns, torch.linalg.cholesky(system))
        carried.append(solved[:, :-1])
        rights.append(solved[:, -1])
    solution = [rights[-1]]
    for frame in range(len(matrix) - 2, -1, -1):
        solution.append(rights[frame] + carried[frame] @ solution[-1])
    return torch.stack(solution[::-1])


def _moved(model, state, step, change):
    """Return the state after steps [N, L + 6] of items and, unless None, [G, I] of identities."""
    step = step.to(state.local)
    size = len(model.lower)
    local, turn, shift = step[:, :size], step[:, size : size + 3], step[:, size + 3 :]
    turn = turn.clamp(-MAX_TURN, MAX_TURN)
    identity = state.identity if change is None else state.identity + change.clamp(-MAX_COEFFICIENT, MAX_COEFFICIENT)
    return Fit(
        identity,
        model.restrict(state.local + local),
        rotation_matrices(turn) @ state.rotation,
        state.place + shift.clamp(-MAX_SHIFT, MAX_SHIFT),
    )
