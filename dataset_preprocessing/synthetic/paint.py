# SPDX-License-Identifier: Apache-2.0
"""A person as a picture: geometry in one perspective pass, light per vertex, skin, eyes and hair per pixel."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import embedding_bag

from dataset_preprocessing.synthetic import hair, wear
from dataset_preprocessing.synthetic.anatomy import CENTRE, MAP_EXTENT, MAP_SIZE, Anatomy, DepthMap
from dataset_preprocessing.synthetic.noise import look_up, smoothstep, texture, unit
from dataset_preprocessing.synthetic.people import Person
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT, to_world
from torch_utils.ops.rasterize import rasterize
from training.mesh_render import project

SUPERSAMPLING = 2
SHADOW_SIZE, SHADOW_BIAS, SHADOW_SOFTNESS = 160, 0.004, 0.007
SHADOW_TAPS = [(-1.5, -0.5), (0.5, -1.5), (1.5, 0.5), (-0.5, 1.5), (0, 0), (-2.6, 2.2), (2.6, -2.2)]
# How far light reaches behind the terminator in skin, RGB: red the furthest.
SKIN_WRAP, CLOTH_WRAP = np.array([0.42, 0.20, 0.14], np.float32), np.array([0.15, 0.15, 0.15], np.float32)
IRIS_RADIUS, PUPIL_RADIUS = 0.50, 0.20  # Over the eyeball's radius.
FILL_DIRECTION = unit(np.array([0.0, 0.25, 1.0], np.float32))
HAIR_PART = 4
SKULL_RADIUS = 0.071  # What hides hair behind it, seen from anywhere around.
TEXTURES = {'mottle': (11, 1.6, 3), 'pores': (12, 0.6, 24), 'spots': (13, 0.0, 1), 'soft': (15, 2.0, 1),
            'lanes': (17, 0.3, 4)}


class Pictured(NamedTuple):
    """image uint8 [R, R, 3]; vertices [V, 3] and landmarks [68, 3] float32 of the head in it; head [R·S, R·S] bool,
    where the supersampled picture shows the head's mesh; hair likewise."""

    image: np.ndarray
    vertices: np.ndarray
    landmarks: np.ndarray
    head: np.ndarray
    hair: np.ndarray


def picture(anatomy: Anatomy, person: Person, resolution: int) -> Pictured:
    """Return a person's picture with resolution² pixels, and the mesh that is in it."""
    vertices, landmarks = anatomy.head(person.identity, person.expression)
    scene = _Scene(anatomy, person, vertices, landmarks)
    size = resolution * SUPERSAMPLING
    view = scene.look(size)
    # Colours are planes, red, green, blue: arithmetic over long rows is several times faster than over threes.
    colours = np.empty((3, resolution, SUPERSAMPLING, resolution, SUPERSAMPLING), dtype=np.float32)
    colours[:] = _backdrop(person, resolution)[:, :, None, :, None]
    colours = colours.reshape(3, size * size)
    scene.shade(view, colours)
    image = _developed(_reduced(colours, size) * np.float32(person.exposure))
    masks = np.zeros((2, size * size), dtype=bool)
    masks[0, view.pixel] = view.face < len(anatomy.faces)
    masks[1, view.pixel] = (view.face >= scene.hair_faces[0]) & (view.face < scene.hair_faces[1])
    return Pictured(image, vertices, landmarks, *masks.reshape(2, size, size))


class _View(NamedTuple):
    """Foreground pixels: number [P] and face [P]; weights [size², 3] of all pixels."""

    pixel: np.ndarray
    face: np.ndarray
    weights: np.ndarray


class _Part(NamedTuple):
    """Some of the pixels: number, face, corner vertices [P, 3], weights [P, 3]."""

    pixel: np.ndarray
    face: np.ndarray
    corners: np.ndarray
    weights: np.ndarray


class _Scene:
    """Geometry around a head, with the light that reaches each vertex."""

    def __init__(self, anatomy, person, vertices, landmarks):
        self.anatomy, self.person, self.vertices = anatomy, person, vertices
        self.normals = anatomy.normals(vertices)
        pose = person.label[:16].reshape(4, 4)
        self.eye = (pose[:3, 3] - np.array(WORLD_SHIFT)) / WORLD_SCALE
        self.view = unit(self.eye - CENTRE).astype(np.float32)
        shell = anatomy.shell(vertices)
        rng = person.rng(HAIR_PART)
        self.strands = self._strands(shell, rng)
        self.parts, self.lenses = self._worn(shell, landmarks)
        self._assemble()
        self._light()

    def _strands(self, shell, rng):
        person, anatomy, found = self.person, self.anatomy, []
        style = hair.STYLES.get(person.style)
        if style is not None:
            ceiling = None if person.hat == 'none' else wear.ceiling_under(person.hat, shell)
            strands = hair.grow_hair(person, style, anatomy.roots, self.vertices, self.normals, shell, rng, ceiling)
            found.append((strands, person.hair))
        beard = hair.grow_beard(person, anatomy.beard_roots, self.vertices, self.normals, shell, rng)
        if beard is not None:
            found.append((beard, person.hair * (0.85, 0.75, 0.7) + 0.004))
        return found

    def _worn(self, shell, landmarks):
        person, anatomy = self.person, self.anatomy
        parts = [wear.top(person.top, anatomy.neck(self.vertices).astype(np.float64), person.cloth, person.accent)]
        lenses = []
        if person.hat != 'none':
            parts += wear.hat(person.hat, shell, person.accent, person.cloth)
        if person.glasses != 'none':
            metal = person.cloth * 0.3 if person.glasses == 'thick' else np.array([0.03, 0.028, 0.026])
            face, ears = self.vertices[anatomy.front_face], self.vertices[anatomy.ear_rests].astype(np.float64)
            frames, lenses = wear.glasses(
                person.glasses, landmarks.astype(np.float64), ears, face, shell, metal
            )
            parts += frames
        return parts, lenses

    def _assemble(self):
        """Put all geometry into one list of vertices and faces; ribbons of hair are last."""
        vertices, faces = [self.vertices], [self.anatomy.faces]
        start = len(self.vertices)
        for part in [*self.parts, *self.lenses]:
            vertices.append(part.vertices)
            faces.append(part.faces + start)
            start += len(part.vertices)
        self.tangents, shadows = [], list(faces)
        first = sum(len(part) for part in faces)
        for strands, _ in self.strands:
            points, tangent = hair.ribbons(strands, self.eye)
            vertices.append(points.reshape(-1, 3))
            ribbons = _ribbon_faces(*points.shape[:2])
            faces.append(ribbons[self._may_be_seen(strands.points)] + start)
            a_third = ribbons.reshape(len(points), -1, 3)[::3].reshape(-1, 3)  # Casts shadow enough.
            shadows.append(a_third + start)
            self.tangents.append(tangent)
            start += points.size // 3
        self.all_vertices = np.concatenate(vertices).astype(np.float32)
        # Rows of a picture grow downwards: the rasteriser draws corners that are clockwise there.
        self.faces, self.shadow_faces = (np.concatenate(part)[:, [0, 2, 1]] for part in (faces, shadows))
        self.hair_faces = first, len(self.faces)

    def _may_be_seen(self, points):
        """Return which faces [N·(S-1)·2] of ribbons along points [N, S, 3] can be: not behind the skull.

        A third of all: the rasteriser is most of the work.
        """
        offset = points - CENTRE
        deep = offset @ self.view
        aside = (offset * offset).sum(axis=2) - deep * deep
        is_hidden = (deep < 0) & (aside < SKULL_RADIUS**2) & (points[..., 1] > -0.02)
        return np.repeat(~(is_hidden[:, 1:] & is_hidden[:, :-1]).ravel(), 2)

    def _light(self):
        """Set the radiance [all, 3] of each vertex, its side [all, 1] of a ribbon, and what skin needs per pixel."""
        person, anatomy = self.person, self.anatomy
        self.key = person.light.astype(np.float32)
        self.shadow = DepthMap(self.all_vertices, torch.from_numpy(self.shadow_faces), self.key, SHADOW_SIZE)
        lit = self._lit(self.vertices, self.normals)
        arriving = self._arriving(self.normals, lit, anatomy.occlusion, SKIN_WRAP)
        # Light spreads below the skin, red light the furthest.
        soft = anatomy.average @ arriving
        soft[:, 0] = anatomy.average @ soft[:, 0]
        arriving = np.where(anatomy.skin[:, None], 0.3 * arriving + 0.7 * soft, arriving)
        self.head_lit, self.arriving = lit, arriving
        radiance = [arriving * _head_albedo(anatomy, person)]
        for part in [*self.parts, *self.lenses]:
            radiance.append(self._worn_radiance(part))
        for (strands, colour), tangent in zip(self.strands, self.tangents, strict=True):
            radiance.append(np.repeat(self._hair_radiance(strands, colour, tangent), 2, axis=0))
        radiance = np.concatenate(radiance)
        side = np.arange(len(radiance))[:, None] & 1
        self.radiance = np.concatenate([radiance, side], axis=1, dtype=np.float32)

    def _lit(self, points, normals, taps=SHADOW_TAPS):
        """Return the share [n] of the key light that is not in shadow."""
        placed = self.shadow.place(points + SHADOW_BIAS * normals)
        total = 0
        for tap in taps:
            total = total + smoothstep(SHADOW_SOFTNESS, 0, self.shadow.depth_behind(placed, tap))
        return (total / len(taps)).astype(np.float32)

    def _arriving(self, normals, lit, sky_share, wrap):
        """Return light [n, 3] that arrives at a surface."""
        person = self.person
        key = np.clip(((normals @ self.key)[:, None] + wrap) / (1 + wrap), 0, None) * (0.06 * wrap / 0.2 + lit[:, None])
        fill = np.clip((normals @ FILL_DIRECTION)[:, None] * 0.6 + 0.4, 0, None) * sky_share[:, None]
        up = 0.5 + 0.5 * normals[:, 1:2]
        ambient = (person.sky * up + person.ground * (1 - up)) * sky_share[:, None]
        return key * person.light_colour * 1.05 + fill * person.fill_colour + ambient

    def _worn_radiance(self, part):
        normals = _vertex_normals(part.vertices, part.faces)
        shade = np.full(len(part.vertices), 0.85) if part.shade is None else part.shade
        lit = self._lit(part.vertices, normals)
        half = unit(self.key + self.view)
        shine = part.gloss * np.clip(normals @ half, 0, 1) ** 40 * lit
        return self._arriving(normals, lit, shade, CLOTH_WRAP) * part.albedo + shine[:, None] * self.person.light_colour

    def _hair_radiance(self, strands, colour, tangent):
        """Return radiance [N·S, 3] of strands: Kajiya and Kay's two terms, darker where hair is deep."""
        person = self.person
        normals, tangent = strands.normal.reshape(-1, 3), tangent.reshape(-1, 3)
        shade = (0.30 + 0.70 * strands.shade).reshape(-1, 1)
        tone = np.broadcast_to(strands.tone, (*strands.points.shape[:2], 1)).reshape(-1, 1)
        lit = self._lit(strands.points.reshape(-1, 3), normals, SHADOW_TAPS[:4])[:, None]
        along = (tangent @ self.key)[:, None]
        facing = np.clip(0.35 + 0.65 * (normals @ self.key), 0, 1)[:, None]
        key = np.sqrt(np.clip(1 - along**2, 0, 1)) * facing * (0.15 + 0.85 * lit)
        sky = 0.5 + 0.5 * normals[:, 1:2]
        front = np.clip(0.4 + 0.6 * (normals @ FILL_DIRECTION), 0, None)[:, None]
        half_along = (tangent @ unit(self.key + self.view))[:, None] + 0.12 * (tone - 1)
        gleam = np.clip(1 - half_along**2, 0, 1)
        wide = gleam * gleam
        wide = wide * wide * wide * wide
        narrow = wide * wide * wide * wide * wide
        shares = np.concatenate([key, front, sky, 1 - sky, key * narrow, key * wide], axis=1, dtype=np.float32)
        lights = np.stack([
            1.2 * colour * person.light_colour, colour * person.fill_colour, colour * person.sky,
            colour * person.ground, (0.04 + 0.2 * colour) * person.light_colour, 0.35 * colour * person.light_colour,
        ]).astype(np.float32)  # fmt: skip
        return (shares @ lights) * (shade * tone)

    def _screen(self):
        """Return all vertices as the camera sees them [1, n, 3]."""
        label, count = self.person.label, len(self.vertices)
        pose = label[:16].reshape(4, 4)
        seen = (to_world(self.all_vertices[count:]) - pose[:3, 3]) @ pose[:3, :3]
        seen[:, 2] = -1 / seen[:, 2]
        seen[:, :2] *= seen[:, 2:] * (-2 * label[16])
        # The head takes the way that all other parts of the project take, so that it lies where they expect it.
        world = to_world(torch.from_numpy(self.vertices))[None]
        return torch.cat([project(world, torch.from_numpy(label)[None]), torch.from_numpy(seen)[None]], dim=1)

    def look(self, size):
        """Return what the camera sees."""
        screen = self._screen()
        result = rasterize(screen, torch.from_numpy(self.faces), size)
        face = result.face.numpy().ravel()
        pixel = np.flatnonzero(face >= 0)
        return _View(pixel, face.take(pixel), result.barycentric.view(-1, 3).numpy())

    def shade(self, view, colours):
        """Write linear RGB of the foreground into colours [3, P]."""
        is_head = view.face < len(self.anatomy.faces)
        is_hair = view.face >= self.hair_faces[0]
        others = ~(is_head | is_hair)
        for chosen, paint in ((is_head, self._head_pixels), (is_hair, self._hair_pixels), (others, self._worn_pixels)):
            part = self._part(view, np.flatnonzero(chosen))
            for plane, painted in zip(colours, paint(part), strict=True):
                plane[part.pixel] = painted

    def _part(self, view, chosen):
        pixel, face = view.pixel.take(chosen), view.face.take(chosen)
        return _Part(pixel, face, self.faces.take(face, axis=0), view.weights.take(pixel, axis=0))

    def _worn_pixels(self, part):
        return _planes(self.radiance, part)[:3]

    def _hair_pixels(self, part):
        *colours, side = _planes(self.radiance, part)
        lanes = look_up(texture(*TEXTURES['lanes']), side * 9, (part.corners[:, 0] >> 5) * 7)
        # Round across a ribbon, with finer hairs along it.
        streaks = (1.06 - 0.38 * (2 * side - 1) ** 2) * (1 + 0.13 * lanes)
        return [plane * streaks for plane in colours]

    def _head_pixels(self, view):
        anatomy, person = self.anatomy, self.person
        fields = np.concatenate([
            self.normals, self.head_lit[:, None], anatomy.neutral, _constants(anatomy),
            self.radiance[: len(self.vertices), :3],
        ], axis=1, dtype=np.float32)  # fmt: skip
        values = _planes(fields, view)
        normal, lit, rest, colours = values[:3], values[3], values[4:7], values[12:]
        around, margin, gloss, beard, spots = values[7:12]
        colours *= _skin_detail(person, rest, around, margin, beard, spots)
        _paint_brows(anatomy, person, rest, colours)
        pores = look_up(texture(*TEXTURES['pores']), around * 2500 + person.index % 509, rest[1] * 2500)
        half = unit(self.key + self.view)
        wide = _power16(np.clip(half @ normal, 0, 1))
        shine = gloss * lit * (0.040 * wide + 0.075 * _power4(wide) * (1 + 0.2 * pores)) * np.float32(person.gloss)
        rim = 0.10 * _power4(1 - np.clip(self.view @ normal, 0, 1)) * gloss
        for plane, light, sky in zip(colours, person.light_colour, person.sky, strict=True):
            plane += shine * light + rim * sky
        chosen = np.flatnonzero(anatomy.eyes[view.corners[:, 0]])
        if len(chosen):
            part = _Part(*(field[chosen] for field in view))
            colours[:, chosen] = self._eye_pixels(part, rest[:, chosen].T, unit(normal[:, chosen].T)).T
        return colours

    def _eye_pixels(self, part, rest, normal):
        """Return the colours [n, 3] of eyeballs: sclera, iris, pupil, and the light mirrored in them."""
        anatomy, person = self.anatomy, self.person
        left, right = (_eyeball(anatomy, side) for side in (0, 1))
        is_left = anatomy.eye_sides[0][part.corners[:, 0]][:, None]
        centre, radius = np.where(is_left, left[0], right[0]), np.where(is_left[:, 0], left[1], right[1])
        offset = (rest - centre) / radius[:, None]
        out = np.hypot(offset[:, 0], offset[:, 1])
        angle = np.arctan2(offset[:, 1], offset[:, 0])
        fibres = look_up(texture(*TEXTURES['pores']), angle * 40, out * 25 + person.index % 7)
        white = np.array([0.78, 0.72, 0.69]) * (1 - 0.22 * smoothstep(0.45, 1.0, out)[:, None] * np.array([0.3, 1, 1]))
        share = out / IRIS_RADIUS
        iris = person.iris * (0.75 + 0.55 * smoothstep(0.9, 0.45, share) + 0.22 * fibres)[:, None]
        iris = iris * (1 - 0.8 * smoothstep(0.78, 1.0, share))[:, None]
        iris = iris * (smoothstep(PUPIL_RADIUS, PUPIL_RADIUS + 0.06, out) * 0.97 + 0.03)[:, None]
        cover = smoothstep(1.06, 0.94, share)[:, None] * (offset[:, 2:] > 0)
        # Lids and lashes darken the upper part.
        shade = 1 - 0.45 * smoothstep(0.05, 0.55, offset[:, 1])
        colours = (white + cover * (iris - white)) * np.minimum(_mixed(self.arriving, part), 1.5) * shade[:, None]
        mirror = unit(0.4 * self.key + self.view + np.array([0, 0.3, 0]))
        catch = smoothstep(0.988, 0.995, normal @ mirror)
        return colours + catch[:, None] * person.light_colour * 0.8


def _head_albedo(anatomy, person):
    """Return the light that each vertex of the head reflects [V, 3], linear RGB."""
    skin = person.skin
    fair = 1 - person.tone / 12
    albedo = np.broadcast_to(skin, (len(anatomy.neutral), 3)).copy()
    blush = (0.34 * person.redness * fair + 0.25 * person.makeup) * anatomy.blush[:, None]
    albedo *= 1 - blush * np.array([0.02, 0.55, 0.45])
    lids = anatomy.eyelids[:, None] * (0.16 + 0.14 * person.age)
    albedo *= 1 - lids * np.array([0.7, 1.0, 0.85])
    if person.makeup > 0.35:
        albedo *= 1 - 0.4 * (person.makeup - 0.35) * anatomy.eyelids[:, None] * (1 - person.accent)
    lips = anatomy.lips[:, None]
    albedo += lips * (person.lip_colour - albedo)
    albedo[anatomy.mouth_bag] = (0.16, 0.035, 0.03)
    albedo[anatomy.teeth] = np.array([0.82, 0.76, 0.66]) * (1 - 0.2 * person.age)
    albedo[anatomy.tongue] = (0.42, 0.14, 0.13)
    albedo *= anatomy.in_mouth[:, None]
    albedo[anatomy.lashes] = 0.02 + 0.12 * skin
    return albedo


@functools.lru_cache(maxsize=1)
def _constants(anatomy):
    """Return fields [V, 5] that are the same for all heads: way around, scalp, gloss, beard, freckles."""
    x, y, z = anatomy.neutral.T
    around = np.arctan2(x, z - CENTRE[2]) * 0.09
    gloss = np.where(anatomy.lashes | anatomy.mouth_bag, 0.0, 1.0) + 1.2 * anatomy.lips + 1.5 * anatomy.teeth
    gloss = gloss + 0.6 * np.exp(-((x / 0.05) ** 2)) * (y > 0.045) * anatomy.skin
    spots = np.exp(-(((abs(x) - 0.025) / 0.035) ** 2) - ((y + 0.008) / 0.024) ** 2) * anatomy.skin * (1 - anatomy.lips)
    margin = np.where(anatomy.skin, anatomy.scalp_margin, -1)
    return np.stack([around, margin, gloss * np.clip(anatomy.occlusion * 1.4, 0, 1), anatomy.beard, spots], axis=1)


def _skin_detail(person, rest, around, margin, beard, spots):
    """Return factors [3, P] of the skin's colour: mottling, freckles, stubble, and hair cut close to the scalp."""
    x, y = around * 2200 + 97 * (person.index % 512), rest[1] * 2200
    mottle = look_up(texture(*TEXTURES['mottle']), x, y)
    factors = 1 + np.array([[0.6], [1.0], [1.1]], np.float32) * (np.float32(0.035 * person.mottling) * mottle)
    if person.freckles > 0:
        chosen = np.flatnonzero(spots > 0.05)
        fleck = look_up(texture(14, 0.9, 40), x[chosen] * 0.8, y[chosen] * 0.8)
        dark = person.freckles * spots[chosen] * smoothstep(0.9, 1.8, fleck)
        _tint(factors, chosen, dark, (0.72, 0.52, 0.38))
    colour = np.clip(person.hair / person.skin, 0.02, 1.3)
    if person.beard != 'none':
        chosen = np.flatnonzero(beard > 0.02)
        share = {'stubble': 0.55, 'moustache': 0.25, 'goatee': 0.5}.get(person.beard, 0.95)
        share = share * (0.4 + 0.6 * person.beard_density)
        cover = share * beard[chosen] * np.clip(0.75 + 0.22 * _grain(x[chosen], y[chosen]), 0, 1)
        _tint(factors, chosen, cover, colour * 0.65 + np.array([0.05, 0.06, 0.08], dtype=np.float32))
    if person.style != 'bald':
        chosen = np.flatnonzero(margin > -0.012)
        grain = _grain(x[chosen], y[chosen])
        shift = hair.hairline_shift(person, rest[:, chosen].T).astype(np.float32)
        edge = margin[chosen] - shift + 0.0022 * mottle[chosen] + 0.0012 * grain
        is_tied = person.style in hair.TIES
        cover = smoothstep(-0.002, 0.004 if is_tied else 0.010, edge) * (0.82 if person.style == 'buzz' else 0.99)
        if person.style == 'buzz':
            cover = np.clip(cover * (0.88 + 0.14 * grain), 0, 1)
        _tint(factors, chosen, cover, colour * 0.9 + 0.01)
    return factors


def _tint(planes, chosen, cover, colour):
    """Multiply planes [3, P] at the pixels chosen [n] by a colour, as far as it covers [n] them."""
    for plane, factor in zip(planes, colour, strict=True):
        plane[chosen] *= 1 + cover * (factor - 1)


def _grain(x, y):
    return look_up(texture(*TEXTURES['spots']), x * 1.1, y * 1.1)


def _power4(x):
    x = x * x
    return x * x


def _power16(x):
    return _power4(_power4(x))


def _paint_brows(anatomy, person, rest, colours):
    """Darken colours [3, P] where brows grow, hair by hair, in place."""
    low, high = _brow_heights(anatomy)
    near = np.flatnonzero((rest[1] > low) & (rest[1] < high) & (rest[2] > -0.01))
    cells = MAP_SIZE / MAP_EXTENT
    column, row = (np.clip((rest[k, near] + MAP_EXTENT / 2) * cells, 0, MAP_SIZE - 1).astype(np.int32) for k in (0, 1))
    cell = row * MAP_SIZE + column
    above = anatomy.brow_map[1].ravel()[cell]
    is_brow = above < 0.5
    chosen, above, along = near[is_brow], above[is_brow], anatomy.brow_map[0].ravel()[cell[is_brow]]
    above = above - 0.0012 - 0.0022 * smoothstep(0.45, -0.1, along)  # Above the bone, level at the inner end.
    half = 0.0060 * person.brow_width * smoothstep(-0.10, 0.16, along) * (1 - 0.75 * smoothstep(0.45, 1.12, along))
    # Hairs lean outwards and up at the inner end, along the brow further out.
    lean = 0.8 - 0.6 * np.clip(along, 0, 1)
    x, y = along * 0.045 - above * (1.0 - lean), above * lean
    hairs = look_up(texture(16, 0.5, 10, 5.0), (x + y) * 6000 + 31 * (person.index % 97), (x - y) * 9000)
    ragged = 0.0009 * hairs
    cover = smoothstep(1.0, 0.35, abs(above + ragged) / np.maximum(half, 1e-5)) * (half > 1e-4)
    cover = person.brow_density * cover * np.clip(0.92 + 0.22 * hairs, 0.3, 1)
    tone = np.minimum(person.hair * 0.6 + 0.008, 0.13)
    _tint(colours, chosen, cover, np.clip(tone / person.skin, 0, 0.85))


@functools.lru_cache(maxsize=1)
def _brow_heights(anatomy):
    """Return the lowest and highest y of the map's cells near a brow, metres."""
    rows = np.flatnonzero((anatomy.brow_map[1] < 0.5).any(axis=1))
    low, high = (row * MAP_EXTENT / MAP_SIZE - MAP_EXTENT / 2 for row in (rows[0] - 1, rows[-1] + 2))
    return low, high


@functools.lru_cache(maxsize=2)
def _eyeball(anatomy, side):
    points = anatomy.neutral[anatomy.eye_sides[side]]
    low, high = points.min(axis=0), points.max(axis=0)
    return (low + high) / 2, float((high - low)[:2].mean() / 2)


@functools.lru_cache(maxsize=32)
def _ribbon_faces(count, points):
    return hair.ribbon_faces(count, points)


def _vertex_normals(vertices, faces):
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    across = np.cross(b - a, c - a)
    total = np.stack([
        np.bincount(faces.ravel(), np.repeat(across[:, axis], 3), len(vertices)) for axis in range(3)
    ], axis=1)  # fmt: skip
    return unit(total)


def _mixed(values, part):
    """Return values [V, C] of vertices, mixed at pixels: [P, C]."""
    return _mixed_tensor(values, part).numpy()


def _mixed_tensor(values, part):
    # One pass over memory, several times faster than three look-ups and their sum.
    table, corners, weights = (torch.from_numpy(np.ascontiguousarray(x)) for x in (values, part.corners, part.weights))
    return embedding_bag(corners, table, mode='sum', per_sample_weights=weights)


def _planes(values, part):
    """Return what `_mixed` does as planes [C, P]."""
    return _mixed_tensor(values, part).t().contiguous().numpy()


def _reduced(colours, size):
    """Return the means [3, R, R] of the pixels of a supersampled picture [3, size²]; very bright ones count less."""
    colours = np.minimum(colours, np.float32(1.6)).reshape(3, size, size)
    rows = colours[:, ::2] + colours[:, 1::2]
    return (rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25)


def _backdrop(person, resolution):
    """Return a soft background [3, R, R], linear RGB."""
    axis = np.linspace(0, 1, resolution, dtype=np.float32)
    x, y = axis[None, None], axis[None, :, None]
    a, b, c, d = person.backdrop.astype(np.float32)[..., None, None]
    smooth = (a * (1 - x) + b * x) * (1 - y) + (c * (1 - x) + d * x) * y
    cell = np.arange(resolution) * 200 / resolution
    column, row = cell[None] + 37 * (person.index % 1009), cell[:, None] + 91 * (person.seed % 997)
    cloud = look_up(texture(*TEXTURES['soft']), column, row)
    return np.maximum(smooth * np.exp(np.float32(0.35) * cloud), np.float32(0.002))


@functools.cache
def _curve():
    """Return the display value 0..255 of linear light k / 2048: a soft shoulder, then sRGB."""
    light = np.arange(4096) / 2048
    toned = light * (1 + light / 3.2) / (1 + 0.85 * light)
    toned = np.clip(toned * 1.08, 0, 1)
    encoded = np.where(toned < 0.0031308, 12.92 * toned, 1.055 * toned ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def _developed(light):
    """Return the picture [R, R, 3] uint8 of light [3, R, R]."""
    values = _curve().take(np.clip(light * np.float32(2048), 0, 4095).astype(np.int32))
    return np.ascontiguousarray(values.transpose(1, 2, 0))
