# SPDX-License-Identifier: Apache-2.0
"""Who is in a picture: everything about a person, the light and the camera, drawn from a seed and an index."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from dataset_preprocessing.synthetic.anatomy import Anatomy
from dataset_preprocessing.synthetic.expressions import random_expression
from geometry.cameras import intrinsics, make_label

# Each part of a picture has random numbers of its own: an expression tells nothing about who makes it.
LOOKS, EXPRESSION, CAMERA, SCENE = range(4)
FEMININE, MASCULINE = (1.2, 3.0), (-1.2, 0.8)  # Standard deviations along `Anatomy.feminine`.
NARROW, NARROW_SPREAD = 1.2, 0.9  # Likewise along `Anatomy.narrow`: the mean jaw is broad, and jaws are much alike.
IDENTITY_SPREAD, IDENTITY_LIMIT = 0.85, 2.2  # Of standard deviations; far ones are caricatures.
# Light reflected by skin, linear RGB: from the fairest to the darkest of ten tones.
SKIN_TONES = np.array([
    (0.74, 0.525, 0.415), (0.71, 0.480, 0.360), (0.67, 0.435, 0.310), (0.66, 0.42, 0.29), (0.57, 0.34, 0.215),
    (0.46, 0.255, 0.150), (0.35, 0.180, 0.100), (0.245, 0.120, 0.066), (0.160, 0.076, 0.043), (0.100, 0.048, 0.029),
])  # fmt: skip
HAIR_COLOURS = {
    'black': (0.012, 0.010, 0.009), 'dark brown': (0.035, 0.020, 0.012), 'brown': (0.085, 0.045, 0.022),
    'chestnut': (0.13, 0.055, 0.025), 'red': (0.30, 0.085, 0.022), 'dark blond': (0.24, 0.150, 0.070),
    'blond': (0.48, 0.33, 0.155), 'platinum': (0.72, 0.62, 0.45), 'grey': (0.30, 0.29, 0.28),
    'white': (0.68, 0.67, 0.65), 'dyed': (0.20, 0.03, 0.12),
}  # fmt: skip
FAIR_HAIR = {'black': 8, 'dark brown': 17, 'brown': 20, 'chestnut': 12, 'red': 9, 'dark blond': 14, 'blond': 13,
             'platinum': 4, 'grey': 8, 'white': 5, 'dyed': 1}
DARK_HAIR = {'black': 58, 'dark brown': 24, 'brown': 4, 'chestnut': 2, 'blond': 2, 'grey': 6, 'white': 3, 'dyed': 0.5}
STYLES = {
    'buzz': 8, 'crop': 11, 'side part': 13, 'quiff': 9, 'slicked back': 6, 'fringe': 8, 'bob': 10, 'long straight': 12,
    'long wavy': 12, 'long curly': 6, 'afro': 7, 'short curls': 8, 'bun': 6, 'ponytail': 6, 'receding': 6, 'bald': 5,
}  # fmt: skip
LONG_STYLES = {'bob', 'long straight', 'long wavy', 'long curly', 'bun', 'ponytail'}
CURLY_STYLES = {'afro', 'short curls', 'long curly'}
IRIS_COLOURS = {
    'dark brown': (0.045, 0.020, 0.010), 'brown': (0.12, 0.052, 0.020), 'hazel': (0.19, 0.12, 0.040),
    'green': (0.13, 0.19, 0.085), 'blue': (0.11, 0.21, 0.34), 'light blue': (0.24, 0.36, 0.47),
    'grey': (0.23, 0.27, 0.29),
}  # fmt: skip
FAIR_IRISES = [14, 20, 14, 13, 19, 11, 9]
DARK_IRISES = [68, 24, 5, 1, 1, 0.5, 0.5]
BEARDS = {'none': 46, 'stubble': 22, 'short': 12, 'full': 9, 'goatee': 6, 'moustache': 5}
GLASSES = {'none': 76, 'round': 8, 'rectangular': 8, 'thick': 4, 'sunglasses': 4}
HATS = {'none': 86, 'beanie': 8, 'cap': 6}
TOPS = {'crew': 45, 'turtleneck': 12, 'hood': 18, 'shirt': 25}
YAW_STD, WIDE_SHARE, WIDE_YAW = 0.28, 0.16, 0.9  # FFHQ's yaw: a normal core and a tail up to three quarter views.
PITCH_MEAN, PITCH_STD, ROLL_STD = 0.07, 0.145, 0.035
RADIUS = 2.7
LOOK_AT, LOOK_AT_STD = (0.0, 0.012, 0.13), (0.010, 0.010, 0.03)  # The crop's centre, in the face; world units.
POSITION_STD = 0.010


@dataclass(kw_only=True)
class Person:
    """What `paint.picture` draws. Colours are linear RGB; identity [I] in standard deviations; label [25]."""

    seed: int
    index: int
    identity: np.ndarray
    expression: dict[str, float]
    label: np.ndarray
    tone: float  # 0, fairest, to 9.
    skin: np.ndarray
    redness: float
    freckles: float
    mottling: float
    gloss: float
    age: float  # 0, young, to 1.
    makeup: float
    lip_colour: np.ndarray
    iris_name: str
    iris: np.ndarray
    brow_width: float
    brow_density: float
    style: str
    hair_name: str
    hair: np.ndarray
    hair_length: float  # Factor of the style's.
    parting: float  # Metres from the middle, to the picture's right.
    recession: float
    beard: str
    beard_density: float
    glasses: str
    hat: str
    top: str
    cloth: np.ndarray
    accent: np.ndarray
    light: np.ndarray  # Unit vector towards the key light.
    light_colour: np.ndarray
    fill_colour: np.ndarray
    sky: np.ndarray
    ground: np.ndarray
    backdrop: np.ndarray  # [4, 3] colours.
    exposure: float

    def attributes(self) -> dict[str, float | str]:
        """Return the numbers and names that describe looks, by their field."""
        row = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float, str)):
                row[field.name] = value
            elif isinstance(value, np.ndarray) and value.shape == (3,):
                row |= {f'{field.name}_{axis}': float(x) for axis, x in zip('xyz', value, strict=True)}
        return row

    def rng(self, part: int) -> np.random.Generator:
        """Return random numbers of one part of the picture, the same at each call."""
        return np.random.default_rng([self.seed, self.index, part])


def random_person(anatomy: Anatomy, seed: int, index: int, label: np.ndarray | None = None) -> Person:
    """Return the person `index` of a seed: a function of these two alone."""
    streams = [np.random.default_rng([seed, index, part]) for part in (LOOKS, EXPRESSION, CAMERA, SCENE)]
    looks, scene = random_looks(streams[LOOKS], anatomy), random_scene(streams[SCENE])
    looks['exposure'] = scene.pop('exposure') * (looks['skin'].mean() / 0.35) ** -0.28  # As a camera would.
    fields = {name: value.astype(np.float32) if isinstance(value, np.ndarray) else value
              for name, value in {**looks, **scene}.items()}  # fmt: skip
    return Person(
        seed=seed,
        index=index,
        expression=random_expression(streams[EXPRESSION], anatomy.expression_names),
        label=random_label(streams[CAMERA]) if label is None else label,
        **fields,
    )


def random_looks(rng: np.random.Generator, anatomy: Anatomy) -> dict:
    """Return the fields of a Person that do not change with a moment."""
    tone = float(np.clip(rng.beta(1.05, 1.25) * 9, 0, 9))
    undertone = rng.normal(0, 1, 2) * (0.05, 0.04)
    skin = _between(SKIN_TONES, tone) * np.exp([undertone[0], 0, -undertone[0] + undertone[1]])
    darkness = np.clip((tone - 2) / 5, 0, 1)
    shares = {name: (1 - darkness) * FAIR_HAIR.get(name, 0) + darkness * DARK_HAIR.get(name, 0)
              for name in HAIR_COLOURS}  # fmt: skip
    hair_name = pick(rng, shares)
    old = hair_name in ('grey', 'white')
    age = float(np.clip(rng.beta(1.3, 2.2) + 0.45 * old, 0, 1))
    styles = dict(STYLES)
    for name in CURLY_STYLES:
        styles[name] *= 0.55 + 1.6 * darkness
    for name in ('receding', 'bald'):
        styles[name] *= 0.5 + 2 * age
    style = pick(rng, styles)
    hair = np.array(HAIR_COLOURS[hair_name]) * np.exp(rng.normal(0, 0.18) + rng.normal(0, 0.05, 3))
    if hair_name == 'dyed':
        hair = hair[rng.permutation(3)] * rng.uniform(0.8, 2.0)
    feminine = rng.random() < (0.9 if style in LONG_STYLES else 0.22)
    iris_name = pick(rng, {name: (1 - darkness) * fair + darkness * dark for name, fair, dark
                           in zip(IRIS_COLOURS, FAIR_IRISES, DARK_IRISES, strict=True)})  # fmt: skip
    lip = skin * np.array([0.80, 0.52, 0.55]) * np.exp(rng.normal(0, 0.10, 3))
    makeup = float(rng.random() ** 1.5) if feminine else 0.0
    lipstick = np.array([rng.uniform(0.25, 0.6), rng.uniform(0.02, 0.14), rng.uniform(0.03, 0.16)])
    hat = pick(rng, HATS)
    if hat != 'none' and style in ('afro', 'bun', 'quiff'):
        hat = 'none'
    looks = {
        'identity': _identity(rng, anatomy, feminine),
        'tone': tone,
        'skin': np.clip(skin, 0.02, 0.92),
        'redness': float(rng.uniform(0.3, 1.2)),
        'freckles': float(rng.random() < 0.22) * float(rng.uniform(0.3, 1)) * float(1 - darkness),
        'mottling': float(rng.uniform(0.5, 1.3)),
        'gloss': float(rng.uniform(0.5, 1.3)),
        'age': age,
        'makeup': makeup,
        'lip_colour': lip + 0.75 * makeup * (lipstick - lip),
        'iris_name': iris_name,
        'iris': np.array(IRIS_COLOURS[iris_name]) * np.exp(rng.normal(0, 0.12, 3)),
        'brow_width': float(rng.uniform(0.7, 1.05) if feminine else rng.uniform(0.9, 1.5)),
        'brow_density': float(rng.uniform(0.7, 1.0)),
        'style': style,
        'hair_name': hair_name,
        'hair': np.clip(hair, 0.004, 0.8),
        'hair_length': float(rng.uniform(0.75, 1.3)),
        'parting': float(rng.choice([-1, 1]) * rng.uniform(0.0, 0.035)),
        'recession': float(rng.normal(0, 0.003) + (0.001 if feminine else 0.010) * age),
        'beard': 'none' if feminine else pick(rng, BEARDS),
        'beard_density': float(rng.uniform(0.5, 1)),
        'glasses': pick(rng, GLASSES),
        'hat': hat,
        'top': pick(rng, TOPS),
        'cloth': _cloth_colour(rng),
        'accent': _cloth_colour(rng),
    }
    looks['identity'] += anatomy.narrow * np.clip(rng.normal(NARROW, NARROW_SPREAD), -0.5, 3.0)
    return looks


def _identity(rng, anatomy, feminine):
    spread = np.clip(rng.normal(0, IDENTITY_SPREAD, len(anatomy.feminine)), -IDENTITY_LIMIT, IDENTITY_LIMIT)
    return spread + anatomy.feminine * rng.uniform(*(FEMININE if feminine else MASCULINE))


def random_scene(rng: np.random.Generator) -> dict:
    """Return the fields of a Person about light and backdrop."""
    azimuth, height = rng.normal(0, 0.75), rng.uniform(0.05, 1.0)
    light = np.array([np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)])
    warmth, strength = rng.normal(0, 0.10), rng.uniform(0.75, 1.55)
    fill = rng.uniform(0.10, 0.40)
    cool = -warmth * rng.uniform(0, 1) + rng.normal(0, 0.04)
    hue = rng.random(3)
    base = 0.03 + 0.55 * rng.random() ** 1.6 * (0.45 + 0.55 * hue)
    backdrop = np.clip(base * np.exp(rng.normal(0, 0.35, (4, 3)) * 0.5 + rng.normal(0, 0.5, (4, 1))), 0.004, 0.95)
    return {
        'light': light,
        'light_colour': strength * np.exp([warmth, 0, -warmth]),
        'fill_colour': fill * np.exp([cool, 0, -cool]),
        'sky': rng.uniform(0.18, 0.40) * np.exp([cool, 0, -cool]),
        'ground': rng.uniform(0.10, 0.24) * np.exp([0.1, 0, -0.1]),
        'backdrop': backdrop,
        'exposure': float(rng.uniform(0.9, 1.2)),
    }


def random_label(rng: np.random.Generator) -> np.ndarray:
    """Return a label [25] of a camera such as those of FFHQ: distance 2.7 exactly, turned by a fit, not aimed."""
    is_wide = rng.random() < WIDE_SHARE
    yaw = rng.uniform(-WIDE_YAW, WIDE_YAW) if is_wide else rng.normal(0, YAW_STD)
    pitch = np.clip(rng.normal(PITCH_MEAN, PITCH_STD), -0.5, 0.5)
    return camera_label(
        np.clip(yaw, -WIDE_YAW, WIDE_YAW), pitch, rng.normal(0, ROLL_STD),
        np.array(LOOK_AT) + rng.normal(0, 1, 3) * LOOK_AT_STD, rng.normal(0, POSITION_STD, 3),
    )  # fmt: skip


def camera_label(yaw: float, pitch: float, roll: float, look_at=LOOK_AT, shift=(0, 0, 0)) -> np.ndarray:
    """Return a label [25] float32. yaw > 0: the camera is on the +x side; pitch > 0: above; radians.

    look_at: world point in the picture's middle before `shift`, in world units, moves the camera without turning it;
    its distance from the origin is then made 2.7, as mode 'orig' of the published fit does.
    """
    look_at = np.asarray(look_at, dtype=np.float64)
    away = np.array([np.sin(yaw) * np.cos(pitch), np.sin(pitch), np.cos(yaw) * np.cos(pitch)])
    forward = -away
    right = np.cross(forward, [0, 1, 0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    turned = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    # The distance along `away` at which the camera, seen from the origin, is at RADIUS: nothing is rescaled, so that
    # look_at stays in the middle where shift is 0.
    start = look_at + np.asarray(shift, dtype=np.float64)
    along = start @ away
    origin = start + away * (np.sqrt(along**2 + RADIUS**2 - start @ start) - along)
    pose = np.eye(4)
    pose[:3] = np.stack([*turned, forward, origin], axis=1)
    pose = torch.from_numpy(pose).float()[None]
    return make_label(pose, intrinsics())[0].numpy()


def pick(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """Return a name, drawn by its share."""
    values = np.array(list(shares.values()), dtype=float)
    return list(shares)[rng.choice(len(values), p=values / values.sum())]


def _between(table, position):
    low = min(int(position), len(table) - 2)
    return table[low] + (position - low) * (table[low + 1] - table[low])


def _cloth_colour(rng):
    grey = rng.uniform(0.01, 0.6)
    saturation = rng.random() ** 2
    return np.clip(grey * ((1 - saturation) + saturation * 2 * rng.random(3)), 0.005, 0.8)
