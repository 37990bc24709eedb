# SPDX-License-Identifier: Apache-2.0
"""Hair that the head's template does not have: strands grown from the scalp or the chin, drawn as ribbons."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dataset_preprocessing.synthetic.anatomy import CENTRE, NUM_GUIDES, Roots, shell_at
from dataset_preprocessing.synthetic.noise import unit

NECK_Y, HANGING_Y = -0.085, -0.075  # Below, strands hang free of the head.


class Strands(NamedTuple):
    """points [N, S, 3] metres; width [N, S]; normal [N, S, 3]: of the hair's body, for soft light; shade [N, S, 1].

    tone [N, 1, 1]: brightness of a strand. shade: 0 deep inside, 1 outside.
    """

    points: np.ndarray
    width: np.ndarray
    normal: np.ndarray
    shade: np.ndarray
    tone: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Style:
    """How hair grows. Lengths and widths in metres.

    lengths: at the top, the sides and the nape. lift: 0, along the scalp, to 1, away from it. comb: 'crown', 'side',
    'middle', 'back', 'front', 'down', 'up' or 'tie'. stiffness: what is kept of the direction at each step. body:
    distance of the outermost layer from the skin. wave, waves: amplitude and number of turns; clump: how much strands
    join. messy: how much directions differ.
    """

    count: int = 2000
    steps: int = 10
    lengths: tuple[float, float, float] = (0.05, 0.02, 0.015)
    width: float = 0.0034
    lift: float = 0.25
    comb: str = 'crown'
    stiffness: float = 0.75
    gravity: float = 0.25
    body: float = 0.012
    wave: float = 0.0
    waves: float = 3.0
    clump: float = 0.3
    messy: float = 0.15
    frames: bool = False  # Keep clear of the face.


STYLES = {
    'crop': Style(count=1850, steps=4, lengths=(0.028, 0.012, 0.010), width=0.0034, lift=0.45, comb='front',
                  body=0.013),
    'side part': Style(count=1500, steps=8, lengths=(0.085, 0.022, 0.014), width=0.0037, lift=0.32, comb='side',
                       body=0.020, gravity=0.30),
    'quiff': Style(count=1700, steps=7, lengths=(0.075, 0.014, 0.011), width=0.0037, lift=0.55, comb='back',
                   gravity=0.20, body=0.030, stiffness=0.80),
    'slicked back': Style(count=1450, steps=8, lengths=(0.12, 0.045, 0.025), width=0.0037, lift=0.10, comb='back',
                          body=0.010, gravity=0.42, clump=0.5, messy=0.06),
    'fringe': Style(count=1500, steps=8, lengths=(0.080, 0.045, 0.03), width=0.0037, lift=0.25, comb='front',
                    gravity=0.35, body=0.018),
    'bob': Style(frames=True, count=950, steps=16, lengths=(0.215, 0.135, 0.085), comb='side', lift=0.18, gravity=0.55,
                 body=0.024, width=0.0056, messy=0.08, clump=0.35),
    'long straight': Style(frames=True, count=820, steps=17, lengths=(0.31, 0.26, 0.22), comb='middle', lift=0.15,
                           gravity=0.6, body=0.020, width=0.0062, messy=0.06, clump=0.4),
    'long wavy': Style(frames=True, count=820, steps=21, lengths=(0.31, 0.26, 0.22), comb='side', lift=0.22,
                       gravity=0.5, body=0.032, width=0.0062, wave=0.009, waves=3.2, clump=0.45, messy=0.10),
    'long curly': Style(frames=True, count=1000, steps=24, lengths=(0.25, 0.20, 0.16), comb='crown', lift=0.45,
                        gravity=0.38, body=0.050, width=0.0051, wave=0.010, waves=6, clump=0.25, messy=0.3),
    'afro': Style(count=2150, steps=7, lengths=(0.046, 0.042, 0.032), comb='up', lift=1.0, gravity=0.0, body=0.055,
                  width=0.0043, wave=0.010, waves=3.0, clump=0.0, messy=0.8, stiffness=0.6),
    'short curls': Style(count=1800, steps=8, lengths=(0.044, 0.022, 0.016), comb='crown', lift=0.7, gravity=0.12,
                         body=0.030, width=0.0037, wave=0.007, waves=2.5, clump=0.15, messy=0.5),
    'bun': Style(count=1150, steps=14, comb='tie', lift=0.05, gravity=0.0, body=0.007, messy=0.03, clump=0,
                 width=0.0042),
    'ponytail': Style(count=1150, steps=14, comb='tie', lift=0.05, gravity=0.0, body=0.007, messy=0.03, clump=0,
                      width=0.0042),
    'receding': Style(count=1350, steps=5, lengths=(0.024, 0.018, 0.012), width=0.0037, lift=0.3, comb='back',
                      body=0.010),
}  # fmt: skip
BEARDS = {
    'short': Style(count=1800, steps=3, lengths=(0.007, 0.006, 0.005), width=0.0015, lift=0.35, gravity=0.35,
                   comb='down', clump=0.1, messy=0.25),
    'full': Style(count=1800, steps=4, lengths=(0.018, 0.010, 0.016), width=0.0017, lift=0.35, gravity=0.45,
                  comb='down', clump=0.3, messy=0.3),
}  # fmt: skip
# Angle from the front that hair which frames the face keeps clear, over height.
FRAME = np.array([(-0.12, 0.80), (-0.06, 0.86), (0.0, 0.86), (0.04, 0.74), (0.07, 0.42), (0.09, 0.06), (0.10, 0.0)])
RECEDED = 0.055  # Metres by which the hairline of the style 'receding' is higher at the front.
TIES = {
    'bun': np.array([0.0, 0.098, -0.155], dtype=np.float32),
    'ponytail': np.array([0.0, 0.070, -0.172], dtype=np.float32),
}


def grow_hair(person, style: Style, roots: Roots, vertices, normals, shell, rng, ceiling=None) -> Strands:
    """Return the strands of a person's hair. ceiling: function of points that moves them under a hat, or None."""
    wanted = roots.margin > hairline_shift(person, roots.template)
    chosen = np.flatnonzero(wanted)[: style.count]
    start, normal = roots.on(vertices, chosen), unit(roots.on(normals, chosen))
    rest, margin = roots.template[chosen], roots.margin[chosen]
    length = _lengths(style, rest, margin) * person.hair_length * rng.uniform(0.8, 1.1, len(chosen))
    tie = TIES.get(person.style)
    direction = _combed(style, person, rest, start, normal, tie).astype(np.float32)
    if style.comb == 'tie':
        length = 1.12 * np.linalg.norm(tie - start, axis=1)
    layer = rng.beta(1.4, 1.1, len(chosen)).astype(np.float32)
    points = _grow(style, start, normal, direction, length, layer, shell, rng, tie)
    points = _clumped(points, style, roots.guide[chosen], rng)
    points = _waved(points, style, normal, length, roots.guide[chosen], rng)
    if style.frames:
        for step in range(2, points.shape[1]):
            points[:, step] = _beside_face(points[:, step], start, layer)
    points[:, 1:] = _outside(points[:, 1:], shell, 0.001 + 0.4 * (layer * style.body)[:, None])
    if tie is not None:
        points = np.concatenate([points, _tail(person, tie, len(points) // 4, style.steps, rng)])
        layer = np.concatenate([layer, rng.beta(1.4, 1.1, len(points) - len(layer)).astype(np.float32)])
    if ceiling is not None:
        points = ceiling(points)
    return _finished(points.astype(np.float32), style, shell, layer, rng, person.hair_length)


def grow_beard(person, roots: Roots, vertices, normals, shell, rng) -> Strands | None:
    """Return the strands of a beard or moustache, or None for a shaven or stubbled face."""
    if person.beard not in ('short', 'full', 'goatee', 'moustache'):
        return None
    style = BEARDS['full' if person.beard == 'full' or rng.random() < 0.4 else 'short']
    x, y, z = roots.template.T
    is_moustache = (y > -0.050) & (abs(x) < 0.027)
    wanted = np.ones(len(x), dtype=bool)
    if person.beard == 'moustache':
        wanted = is_moustache
    elif person.beard == 'goatee':
        wanted = is_moustache | (abs(x) < 0.026)
    # Hair thins out towards the edge.
    edge = rng.uniform(0.35, 0.6) + 0.35 * rng.random(len(x))
    chosen = np.flatnonzero(wanted & (roots.margin > edge))[: style.count]
    start, normal = roots.on(vertices, chosen), unit(roots.on(normals, chosen))
    rest = roots.template[chosen]
    top, side, low = style.lengths
    length = np.where(rest[:, 1] < -0.075, low, np.where(abs(rest[:, 0]) > 0.035, side, top))
    length = np.where(is_moustache[chosen], np.minimum(length, 0.006), length) * rng.uniform(0.7, 1.2, len(chosen))
    aside = np.where(is_moustache[chosen], np.sign(rest[:, 0]) * 0.9, 0)
    down = np.stack([aside, -np.ones_like(aside), np.zeros_like(aside)], axis=1)
    direction = unit(down - normal * (down * normal).sum(axis=1, keepdims=True))
    layer = rng.random(len(chosen)).astype(np.float32)
    points = _grow(style, start, normal, direction, length, layer, None, rng, None)
    strands = _finished(points.astype(np.float32), style, None, layer, rng, 1.0)
    return strands._replace(normal=np.repeat(normal[:, None], style.steps + 1, axis=1).astype(np.float32))


def hairline_shift(person, points: np.ndarray) -> np.ndarray:
    """Return by how much [N], in metres, a person's hairline lies higher at template points [N, 3] than the mean's."""
    azimuth = np.arctan2(abs(points[:, 0]), points[:, 2] - CENTRE[2])
    front = np.clip(1.5 - azimuth, 0, 1)
    shift = person.recession * front
    if person.style == 'receding':
        # The crown is bare, too; the ring of hair at the sides stays.
        shift = shift + RECEDED * np.clip(1.7 - azimuth, 0, 1) + np.where(points[:, 1] > 0.085, 0.1, 0)
    # The corners of the forehead recede first.
    corner = np.exp(-(((azimuth - 0.62) / 0.22) ** 2))
    return shift + (person.recession + 0.002) * corner


def ribbons(strands: Strands, eye: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (vertices [N, S, 2, 3], tangents [N, S, 3]) of ribbons that face a camera at eye [3], mesh metres."""
    points = strands.points
    tangent = np.empty_like(points)
    tangent[:, 1:-1] = points[:, 2:] - points[:, :-2]
    tangent[:, 0], tangent[:, -1] = points[:, 1] - points[:, 0], points[:, -1] - points[:, -2]
    tangent = unit(tangent)
    view = (eye - CENTRE).astype(np.float32)  # Far enough away to be one direction.
    side = np.empty_like(points)
    x, y, z = tangent[..., 0], tangent[..., 1], tangent[..., 2]
    side[..., 0], side[..., 1] = y * view[2] - z * view[1], z * view[0] - x * view[2]
    side[..., 2] = x * view[1] - y * view[0]
    side = unit(side) * (strands.width / 2)[..., None]
    return np.stack([points - side, points + side], axis=2), tangent


def ribbon_faces(count: int, points: int) -> np.ndarray:
    """Return faces [count·(points-1)·2, 3] int64 of `ribbons`, counter-clockwise for the camera."""
    step = np.arange(points - 1)[:, None] * 2
    quad = np.array([[0, 1, 3], [0, 3, 2]])
    one = (step[:, None] + quad[None]).reshape(-1, 3)
    return (one[None] + (np.arange(count) * 2 * points)[:, None, None]).reshape(-1, 3)


def _lengths(style, rest, margin):
    """Return lengths [N]: of the top, the sides and the nape, blended; short where hair begins."""
    top, side, nape = style.lengths
    height = np.clip((rest[:, 1] - 0.050) / 0.050, 0, 1)
    back = np.clip((-rest[:, 2] - 0.06) / 0.08, 0, 1) * np.clip((0.05 - rest[:, 1]) / 0.05, 0, 1)
    length = side + (top - side) * height
    length = length + (nape - length) * back
    return length * np.clip(0.55 + margin / 0.02, 0.55, 1)


def _combed(style, person, rest, start, normal, tie):
    """Return unit directions [N, 3] along the scalp in which strands lie."""
    x = rest[:, 0] - person.parting * (style.comb in ('side', 'front'))
    one = np.ones_like(x)
    if style.comb == 'side' or style.comb == 'middle':
        away = np.tanh(x / 0.006)
        if style.comb == 'side' and style.lengths[1] < 0.05:  # Short sides: all of the top goes over to one side.
            away = np.where(rest[:, 1] > 0.08, -np.sign(person.parting) * one, away)
        wanted = np.stack([away, -0.25 * one - 0.9 * (rest[:, 1] < 0.09), 0.30 * (rest[:, 2] > 0.0) - 0.25], axis=1)
    elif style.comb == 'front':
        wanted = np.stack([0.35 * np.sign(person.parting) * one, -0.3 * one - (rest[:, 1] < 0.07), one], axis=1)
        wanted[rest[:, 2] < -0.11] = (0, -1, 0)
    elif style.comb == 'back':
        wanted = np.stack([0.15 * np.sign(x), -0.1 * one - 0.5 * (rest[:, 1] < 0.06), -one], axis=1)
    elif style.comb == 'tie':
        wanted = tie - start
    elif style.comb == 'up':
        wanted = normal + 0
    else:  # From the crown outwards.
        crown = np.array([0.012 * np.sign(person.parting), 0.135, -0.10])
        wanted = rest - crown
        wanted[:, 1] -= 0.03
    return unit(wanted - normal * (wanted * normal).sum(axis=1, keepdims=True) * 0.999)


def _grow(style, start, normal, direction, length, layer, shell, rng, tie):
    """Return points [N, S, 3] of strands that bend under gravity and lie on one another around the head."""
    count, steps = len(start), style.steps
    noise = rng.standard_normal((2, count, 3)).astype(np.float32) * style.messy
    # Where sides are short they lie closer.
    height = np.clip((start[:, 1:2] - 0.04) / 0.05, 0, 1) if style.lengths[0] > 2 * style.lengths[1] else 1
    lift = style.lift * (0.3 + 0.7 * height)
    heading = unit(lift * normal + (1 - lift) * direction + 0.5 * noise[0]).astype(np.float32)
    points = np.empty((count, steps + 1, 3), dtype=np.float32)
    points[:, 0] = start - 0.002 * normal
    stride = (length / steps)[:, None].astype(np.float32)
    pull = np.array([0, -style.gravity, 0], dtype=np.float32)
    floor = 0.0015 + layer * style.body
    direction = direction.astype(np.float32)
    for step in range(1, steps + 1):
        along = tie - points[:, step - 1] if tie is not None else direction * (1 - step / steps) * (1 - style.lift)
        heading = unit(style.stiffness * heading + 0.35 * unit(along) + pull
                       + 0.3 * noise[step % 2])
        moved = points[:, step - 1] + heading * stride
        if shell is not None:
            moved = _outside(moved, shell, floor * min(1.0, step / (0.4 * steps)))
            if style.frames:
                moved = _beside_face(moved, points[:, 0], layer)
            heading = unit(moved - points[:, step - 1])
        points[:, step] = moved
    return points


def _outside(points, shell, floor):
    """Return points [..., 3] moved away from CENTRE to where they are `floor` above the skin."""
    offset = points - CENTRE
    distance = np.sqrt((offset * offset).sum(axis=-1))
    push = np.maximum((shell_at(shell, offset) + floor) / np.maximum(distance, 1e-6), 1)
    push = np.where(points[..., 1] > HANGING_Y, push, 1)  # Further down, rays from CENTRE meet the shoulders.
    return CENTRE + offset * push[..., None]


def _beside_face(points, start, layer):
    """Return points [N, 3] turned about the head's axis to where they do not hang before the face."""
    x, y, z = points[:, 0], points[:, 1], points[:, 2] - CENTRE[2]
    azimuth, radius = np.arctan2(x, z), np.hypot(x, z)
    side = np.where(start[:, 0] + 1e-5 >= 0, 1, -1)
    least = (np.interp(y, FRAME[:, 0], FRAME[:, 1]) + 0.12 * layer) * (y < FRAME[-1, 0])
    turned = np.where((azimuth * side < least) & (abs(azimuth) < 1.6), least * side, azimuth)
    return np.stack([radius * np.sin(turned), y, CENTRE[2] + radius * np.cos(turned)], axis=1).astype(np.float32)


def _clumped(points, style, guide, rng):
    """Draw strands towards the nearest of the guides, more so at their tips."""
    if style.clump == 0 or len(points) <= NUM_GUIDES:
        return points
    is_near = guide < len(points)
    target = points[np.where(is_near, guide, 0)] - points[np.where(is_near, guide, 0)][:, :1] + points[:, :1]
    share = np.linspace(0, 1, points.shape[1])[None, :, None] ** 1.5 * style.clump
    share = share * (is_near & (rng.random(len(points)) < 0.85))[:, None, None]
    return points + (target - points) * share.astype(np.float32)


def _waved(points, style, normal, length, guide, rng):
    """Turn strands about their way; neighbours nearly together."""
    if not style.wave:
        return points
    across = unit(np.cross(normal, np.array([0.3, 1.0, 0.2], np.float32)))
    t = np.linspace(0, 1, points.shape[1], dtype=np.float32)
    phase = rng.uniform(0, 2 * np.pi, NUM_GUIDES)[guide][:, None] + rng.normal(0, 0.5, (len(points), 1))
    turns = style.waves * (length / length.max())[:, None] * rng.uniform(0.85, 1.15, (len(points), 1))
    angle = (2 * np.pi * turns).astype(np.float32) * t + phase.astype(np.float32)
    size = np.float32(style.wave) * np.minimum(1, t * 3)[None, :, None]
    turn = size * (np.sin(angle)[..., None] * across[:, None] + np.cos(angle)[..., None] * normal[:, None] * 0.7)
    return (points + turn).astype(np.float32)


def _tail(person, tie, count, steps, rng):
    """Return strands [count, steps + 1, 3] of a knot or a tail behind the tie."""
    t = np.linspace(0, 1, steps + 1)
    if person.style == 'bun':
        radius = 0.032 * person.hair_length
        axis = unit(rng.standard_normal((count, 3)) * (0.4, 0.4, 1))
        across = unit(np.cross(axis, rng.standard_normal((count, 3))))
        third = np.cross(axis, across)
        angle = t[None] * 3.4 + rng.uniform(0, 6.3, (count, 1))
        size = radius * rng.uniform(0.85, 1.05, (count, 1, 1))
        ball = np.cos(angle)[..., None] * across[:, None] + np.sin(angle)[..., None] * third[:, None]
        return tie + np.array([0, 0.012, -0.015]) + size * ball
    spread = unit(rng.standard_normal((count, 3))) * rng.uniform(0, 0.026, (count, 1))
    path = np.stack([0.02 * np.sin(3 * t) * np.sign(person.parting), -0.20 * t**1.5, -0.045 * np.sin(2.2 * t)], axis=1)
    girth = 0.25 + 0.9 * np.sin(np.pi * (0.1 + 0.8 * t))
    return tie + path[None] * person.hair_length + spread[:, None] * girth[None, :, None]


def _finished(points, style, shell, layer, rng, scale):
    """Return Strands with widths that taper, normals of the hair's body and shades by depth in it."""
    count, steps = points.shape[:2]
    t = np.linspace(0, 1, steps, dtype=np.float32)
    width = style.width * rng.uniform(0.6, 1.3, (count, 1)) * (1 - 0.85 * t**4)[None]
    offset = points - CENTRE
    offset[..., 1] *= np.where(points[..., 1] < 0, 0.3, 1)  # Below the skull the body of hair stands upright.
    if shell is None:
        shade = 0.55 + 0.45 * t[None, :, None] + 0 * layer[:, None, None]
    else:
        depth = np.sqrt(((points - CENTRE) ** 2).sum(axis=2)) - shell_at(shell, points - CENTRE)
        shade = np.clip(depth / (0.9 * style.body + 0.004), 0, 1)
        shade = np.where(points[..., 1] < NECK_Y, 0.35 + 0.65 * layer[:, None], shade)[..., None]
    tone = np.exp(rng.normal(0, 0.16, (count, 1, 1)))
    return Strands(points, width.astype(np.float32), unit(offset).astype(np.float32), shade.astype(np.float32),
                   tone.astype(np.float32))  # fmt: skip
