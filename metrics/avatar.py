# SPDX-License-Identifier: Apache-2.0
"""Whether avatars do as they are told and stay who they are: expression, pose, identity, depth, views, animation."""

import numpy as np
import torch
from scipy.ndimage import binary_dilation
from scipy.spatial import Delaunay, QhullError
from torch.nn.functional import cosine_similarity, grid_sample, interpolate

from geometry.cameras import CAM2WORLD, camera_rays, local_rays, project_points, split_label
from geometry.expressions import CONTROLS, controlled
from geometry.meshes import NUM_LANDMARKS, to_world
from metrics.subject import MetricError, Request, Subject, summarise

PAIRS = 20  # Cameras and expressions of a latent.
TURN_DEG = 15.0  # Between the two views of `reprojection`.
DEPTH_TOLERANCE = 0.03  # World units between two surfaces that count as one.
MOVED = 0.1  # Share of the largest displacement above which a pixel is what the expression moves.
MARGIN = 1 / 32  # Of the picture's side: what is shaded anew beside it.
# What `animation` moves, one after another: each name and, where there is one, its partner on the other side.
MOVES = ({'jawOpen': 0.7}, {'eyeBlinkLeft': 1.0, 'eyeBlinkRight': 1.0}, {'mouthSmileLeft': 0.9, 'mouthSmileRight': 0.9},
         {'browInnerUp': 1.0, 'browOuterUpLeft': 1.0, 'browOuterUpRight': 1.0}, {'mouthPucker': 0.9})  # fmt: skip
# What `driven` follows: the mean of the first names less that of the second.
FOLLOWED = CONTROLS | {
    'smile': (('mouthSmileLeft', 'mouthSmileRight'), ()),
    'brows': (('browInnerUp', 'browOuterUpLeft', 'browOuterUpRight'), ('browDownLeft', 'browDownRight')),
}
DEGREES = 180 / np.pi


def driven(subject: Subject, count: int) -> tuple[dict[str, float], dict]:
    """AED and APD: root mean squared error of re-estimated against driving coefficients, by picture, then its mean;
    follow: correlation of driving and re-estimated jaw, blink, gaze (x: sideways, y: up), smile and brows.

    Each latent is drawn with several items' cameras and meshes. Values: the estimator's own errors on the data set's
    pictures of the same items, then those of the drawn pictures; apd in radians. Standard errors take latents and items
    as independent, pictures of one latent or one item not (those of follow: latents alone). Where no coefficients are
    known, the driving ones are the estimates of the items' pictures, and the estimator's own error is not known.
    """
    latents, pairs = split_count(subject.num or count)
    total = latents * pairs
    estimator = subject.estimator()
    has_truth = subject.truth is not None and tuple(subject.truth.expression_names) == tuple(estimator.expression_names)

    def work(numbers):
        items = subject.items(numbers)
        c, v = subject.cameras_and_meshes(items)
        z = subject.latents([i // pairs for i in numbers])
        drawn = subject.drawer(Request(z, subject.same_conditioning(len(items)), c, v, items)).picture
        own, found = estimator(subject.pictures(items), c, v), estimator(drawn, c, v)
        expression, pose = own.expression, own.pose
        if has_truth:
            expression, pose = subject.on_device(subject.truth.expression[items]).float(), estimator.pose_of(c)
        errors = [_rms(a - b) for x in (own, found) for a, b in ((x.expression, expression), (x.pose, pose))]
        followed = [x @ mixture.to(x) for x in (expression, own.expression, found.expression)]
        return torch.cat([torch.stack(errors, dim=1), *followed], dim=1)

    names = controlled(estimator.expression_names, FOLLOWED)
    mixture = _mixture(names, estimator.expression_names)
    rows = subject.rows(total, 4 + 3 * len(names), work, 'expressions and poses').view(latents, pairs, -1)
    items = torch.tensor(subject.items(range(total)))
    owners = torch.arange(latents).repeat_interleave(pairs)
    names_of_errors = ('aed_estimator', 'apd_estimator', 'aed', 'apd')
    values = summarise(rows[..., :4].flatten(0, 1), names_of_errors, owners, items)
    truth, own, found = rows[..., 4:].unflatten(-1, (3, len(names))).unbind(dim=2)
    for ending, estimate in {'_estimator': own, '': found}.items():
        for name, a, b in zip(names, truth.unbind(dim=-1), estimate.unbind(dim=-1), strict=True):
            value, error = _correlation(a, b)
            values |= {f'follow_{name}{ending}': value, f'follow_{name}{ending}_se': error}
    if not has_truth:
        values = {key: value for key, value in values.items() if '_estimator' not in key}
    driving = 'coefficients.npz' if has_truth else 'estimates of the pictures of the items'
    counts = {'num_latents': latents, 'num_pairs': pairs, 'num_items': len(items.unique())}
    return values, {**counts, **_about(estimator), 'driving': driving}


def split_count(num: int, pairs: int = PAIRS) -> tuple[int, int]:
    """Return latents and pictures of each: at most `pairs`, fewer so that there are two latents at least."""
    each = max(1, min(pairs, num // 2))
    return max(1, num // each), each


def _mixture(names, expression_names):
    """Return weights [E, len(names)] whose products with expressions are what FOLLOWED says."""
    weights = torch.zeros(len(expression_names), len(names))
    for column, name in enumerate(names):
        for sign, members in zip((1, -1), FOLLOWED[name]):
            for member in members:
                weights[expression_names.index(member), column] = sign / len(members)
    return weights


def _correlation(a, b):
    """Return the correlation of [L, P] numbers and its standard error, a jackknife over the L latents."""
    a, b = a.double(), b.double()
    sums = torch.stack([torch.ones_like(a), a, b, a * a, b * b, a * b]).sum(dim=2)
    total, without = sums.sum(dim=1), sums.sum(dim=1, keepdim=True) - sums
    (value,), left = _of_sums(total[:, None]), _of_sums(without)
    error = (left - left.mean()).square().sum().mul((len(left) - 1) / len(left)).sqrt()
    return float(value), float(error)


def _of_sums(sums):
    count, a, b, aa, bb, ab = sums
    return (count * ab - a * b) / ((count * aa - a * a) * (count * bb - b * b)).sqrt()


def _about(estimator):
    return {'estimator': estimator.name, 'estimator_sha256': estimator.sha256, 'estimator_errors': estimator.errors}


def _rms(difference):
    return difference.square().mean(dim=1).sqrt()


def identity(subject: Subject, count: int) -> tuple[dict[str, float], dict]:
    """Mean cosine of identity embeddings of pairs of pictures of one latent (EG3D's ID with another embedding).

    id_views: two cameras, one mesh. id_expressions: one camera, two expressions; on the head shape of the first where
    coefficients are known, otherwise two meshes as they are. Before them id_estimator_others: pictures of different
    people of the data set, and id_others, the same for different latents: what no resemblance looks like.
    """
    latents = max(2, (subject.num or count * 3) // 3)
    estimator = subject.estimator()

    def work(numbers):
        """Return the four cosines [N, 4] of latents by their numbers."""
        first, second = (subject.items(2 * i + k for i in numbers) for k in (0, 1))
        (c, v), (c_other, v_other) = subject.cameras_and_meshes(first), subject.cameras_and_meshes(second)
        v_moved = v_other if subject.head is None else with_expression(subject, first, second)
        z, same = subject.latents(numbers), subject.same_conditioning(len(first))

        def embed(items, z, c, v):
            return estimator(subject.drawer(Request(z, same, c, v, items)).picture, c, v).identity

        base, z_next = embed(first, z, c, v), subject.latents([(i + 1) % latents for i in numbers])
        pairs = [
            (estimator(subject.pictures(first), c, v).identity,
             estimator(subject.pictures(second), c_other, v_other).identity),
            (embed(second, z_next, c_other, v_other), base),
            (embed(second, z, c_other, v), base),
            (embed(first, z, c, v_moved), base),
        ]  # fmt: skip
        return torch.stack([cosine_similarity(a, b) for a, b in pairs], dim=1)

    rows = subject.rows(latents, 4, work, 'identities')
    values = summarise(rows, ('id_estimator_others', 'id_others', 'id_views', 'id_expressions'))
    counts = {'num_latents': latents, 'num_items': min(2 * latents, len(subject.dataset))}
    return values, {**counts, **_about(estimator), 'same_shape': subject.head is not None}


def with_expression(subject, items, others):
    """Return meshes [N, V + 68, 3] of the items' heads with the others' expressions."""
    truth = subject.truth
    identity, expression = (subject.on_device(x).float() for x in (truth.identity[items], truth.expression[others]))
    return subject.head(identity, expression).stacked()


def depth(subject: Subject, count: int) -> tuple[dict[str, float], dict]:
    """Distance of the drawn surface from the driving mesh in the face, along the camera's axis, in world units.

    The face: pixels of the mesh within the outline of the 68 projected landmarks. depth_mae: mean absolute difference;
    depth_bias: mean difference, positive where the drawn surface is behind; depth_mse_normalised: mean squared error
    of both depths at mean 0 and deviation 1 (EG3D's definition, with the driving mesh in place of a reconstruction).
    """
    total = subject.num or count

    def work(numbers):
        items = subject.items(numbers)
        c, v = subject.cameras_and_meshes(items)
        drawn = subject.drawer(Request(subject.latents(numbers), c, c, v, items)).depth
        view = subject.renderer(drawn.shape[-1]).look(v, c)
        face = (view.face >= 0) & _outlines(v[:, -NUM_LANDMARKS:], c, drawn.shape[-1])
        difference = axis_depth(drawn, c) - view.depth
        return torch.stack([
            _mean(difference.abs(), face), _mean(difference, face),
            _mean((_standard(axis_depth(drawn, c), face) - _standard(view.depth, face)).square(), face),
        ], dim=1)  # fmt: skip

    rows = subject.rows(total, 3, work, 'depths')
    names = ('depth_mae', 'depth_bias', 'depth_mse_normalised')
    values, counts = _by_item(subject, rows, names, 'num_pictures')
    return values, {**counts, 'estimator': 'none: the mesh is rasterised exactly'}


def axis_depth(distance: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return depths along the camera's axis of distances along rays [N, r, r]."""
    return distance / local_rays(split_label(c)[1], distance.shape[-1]).norm(dim=-1).view_as(distance)


def _outlines(landmarks, c, resolution):
    """Return which pixels [N, r, r] lie within the convex outline of projected landmarks [N, 68, 3]."""
    points = project_points(to_world(landmarks), c)[0].cpu().numpy()
    centre = 2 * (np.arange(resolution) + 0.5) / resolution - 1
    pixels = np.stack(np.meshgrid(centre, centre), axis=-1)
    return torch.from_numpy(np.stack([_within(each, pixels) for each in points])).to(c.device)


def _within(points, pixels):
    try:
        return Delaunay(points).find_simplex(pixels) >= 0
    except QhullError:  # Landmarks on one line have no inside.
        return np.zeros(pixels.shape[:2], dtype=bool)


def _mean(values, mask):
    """Return the mean [N] of values over a mask [N, r, r], NaN where it is empty."""
    return torch.where(mask, values, 0).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))


def _standard(values, mask):
    centred = values - _mean(values, mask)[:, None, None]
    return centred / _mean(centred.square(), mask).sqrt().clamp(min=1e-8)[:, None, None]


def reprojection(subject: Subject, count: int) -> tuple[dict[str, float], dict]:
    """One view warped into another, 15° of yaw away, by its depth: how far the two pictures differ where both see.

    Pixels of the driving mesh, at the resolution of the depth; seen by both where the other view's depth agrees to
    0.03 world units. reprojection_error: mean absolute difference of colours from 0 to 1; reprojection_depth: median
    difference of the two surfaces in world units, hidden pixels included; reprojection_seen: share seen by both.
    """
    total = subject.num or count

    def work(numbers):
        items = subject.items(numbers)
        c, v = subject.cameras_and_meshes(items)
        z, same = subject.latents(numbers), subject.same_conditioning(len(items))
        c_other = turned(c, TURN_DEG)
        here, there = (subject.drawer(Request(z, same, each, v, items)) for each in (c, c_other))
        mesh = subject.renderer(here.depth.shape[-1]).look(v, c).face >= 0
        return compare_views(here, there, c, c_other, mesh)

    rows = subject.rows(total, 3, work, 'views')
    names = ('reprojection_error', 'reprojection_depth', 'reprojection_seen')
    values, counts = _by_item(subject, rows, names, 'num_pairs')
    return values, {**counts, 'turn_deg': TURN_DEG, 'estimator': 'none: depths are those of the pictures'}


def turned(c: torch.Tensor, angle_deg: float) -> torch.Tensor:
    """Return labels [N, 25] of cameras turned about the world's vertical axis."""
    angle = torch.tensor(angle_deg / DEGREES, device=c.device)
    rotation = torch.eye(4, device=c.device)
    rotation[0, 0] = rotation[2, 2] = angle.cos()
    rotation[0, 2], rotation[2, 0] = angle.sin(), -angle.sin()
    pose = (rotation[:, :, None] * split_label(c)[0][:, None]).sum(dim=2)
    return torch.cat([pose.flatten(1), c[:, CAM2WORLD.stop :]], dim=1)


def compare_views(here, there, c: torch.Tensor, c_other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return colour difference, median depth difference and share seen [N, 3] of two drawn views; mask: [N, r, r]."""
    resolution = here.depth.shape[-1]
    colours = [interpolate(x.picture.float() / 255, size=resolution, mode='area') for x in (here, there)]
    origins, rays = camera_rays(*split_label(c), resolution)
    world = origins + rays * here.depth.flatten(1)[..., None]
    place = project_points(world, c_other)[0].view(*mask.shape, 2)
    world = world.view(*mask.shape, 3)
    distance = (world - split_label(c_other)[0][:, None, None, :3, 3]).norm(dim=-1)
    sample = {'mode': 'bilinear', 'align_corners': False, 'padding_mode': 'border'}
    surface = grid_sample(there.depth[:, None], place, **sample)[:, 0]
    gap = (distance - surface).abs()
    inside = mask & (place.abs() < 1).all(dim=-1)
    seen = inside & (gap < DEPTH_TOLERANCE)
    difference = (grid_sample(colours[1], place, **sample) - colours[0]).abs().mean(dim=1)
    median = torch.where(inside, gap, torch.nan).flatten(1).nanmedian(dim=1).values
    return torch.stack([_mean(difference, seen), median, seen.sum(dim=(1, 2)) / mask.sum(dim=(1, 2))], dim=1)


def animation(subject: Subject, count: int) -> tuple[dict[str, float], dict]:
    """How much the picture changes where one expression moves the mesh, and elsewhere.

    Five moves in turn: jaw, blink, smile, brows, pucker. The region: pixels whose point of the mesh, before or after,
    moves by a tenth of the largest displacement or more, with a margin of 1/32 of the side. animation_inside,
    animation_outside: mean absolute change of colours from 0 to 1; animation_leak: the second over the first.
    """
    expect_truth(subject.truth, subject.head)
    total = subject.num or count

    def work(numbers):
        items = subject.items(numbers)
        c, v = subject.cameras_and_meshes(items)
        v_moved = _moved(subject, items, [MOVES[i % len(MOVES)] for i in numbers])
        z, same = subject.latents(numbers), subject.same_conditioning(len(items))
        before, after = (subject.drawer(Request(z, same, c, mesh, items)).picture for mesh in (v, v_moved))
        region = moving_region(subject.renderer(before.shape[-1]), v, v_moved, c)
        change = (after.float() - before.float()).abs().mean(dim=1) / 255
        inside, outside = _mean(change, region), _mean(change, ~region)
        return torch.stack([inside, outside, outside / inside], dim=1)

    rows = subject.rows(total, 3, work, 'moves')
    names = ('animation_inside', 'animation_outside', 'animation_leak')
    values, counts = _by_item(subject, rows, names, 'num_pairs')
    moves = ['+'.join(move) for move in MOVES]
    return values, {**counts, 'moves': moves, 'estimator': "none: the region is the rasterised mesh's"}


def _by_item(subject, rows, names, kind):
    """Summarise rows of one picture or pair each; return how many there are, as `kind`, and of how many items, too."""
    items = torch.tensor(subject.items(range(len(rows))))
    return summarise(rows, names, items), {kind: len(rows), 'num_items': len(items.unique())}


def expect_truth(truth, head) -> None:
    """Raise MetricError where a data set's expressions cannot be moved: no coefficients, or not of a head at hand."""
    if truth is None or head is None:
        raise MetricError('animation: expected coefficients.npz beside the data set, to move expressions; found none')


def _moved(subject, items, moves):
    """Return meshes of the items with one expression moved: to its value, or away from it where it is there already."""
    truth = subject.truth
    expression = truth.expression[items].copy()
    for row, move in zip(expression, moves):
        for name, value in move.items():
            column = truth.expression_names.index(name)
            row[column] = value if row[column] < value / 2 else 0
    identity = subject.on_device(truth.identity[items]).float()
    return subject.head(identity, subject.on_device(expression).float()).stacked()


def moving_region(renderer, v: torch.Tensor, v_moved: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the pixels [N, R, R] where the mesh moves, before or after, with a margin."""
    distance = (v_moved - v).norm(dim=-1, keepdim=True)
    distance = distance / distance.amax(dim=1, keepdim=True).clamp(min=1e-9)
    views = [renderer.paint(renderer.look(mesh, c), distance)[:, 0] for mesh in (v, v_moved)]
    region = ((views[0] >= MOVED) | (views[1] >= MOVED)).cpu().numpy()
    steps = max(1, round(region.shape[-1] * MARGIN))
    return torch.from_numpy(np.stack([binary_dilation(each, iterations=steps) for each in region])).to(v.device)
