# SPDX-License-Identifier: Apache-2.0
"""Where a face lies in a photograph, and the crops that put it at one place and size: EG3D's two steps for FFHQ.

Points are pixels, x right, y down, unless a name says `y up`. The resampling is Pillow's.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dataset_preprocessing.ffhq.files import PreprocessError, read_mat
from dataset_preprocessing.ffhq.gaze import rotation_to
from geometry.meshes import NUM_LANDMARKS, to_world

DECIMETRE = 0.27  # World units: 2.7 a metre.
BFM_SHIFT = (0.0, 0.006, 0.161)  # Origin of the Basel Face Model in the world of EG3D, measured by its authors.
CAMERA_SCALE, CAMERA_SIDE = 102.0, 224  # Pixels a reference unit, and side, of what the camera network sees.
PICTURE_SCALE, PICTURE_SIDE = 300.0, 1024  # The same of the crop that training pictures are cut from.
CENTRE_SIDE, OUTPUT_SIDE = 700, 512  # Its middle part, and the training picture that this is reduced to.
MAX_ENLARGED_PIXELS = 2**26  # Photographs that would grow beyond this are resampled just where the crop is.

FFHQ_SIDE, FFHQ_SAMPLED_SIDE = 1500, 4096
FFHQ_ZOOM = 1.8  # The published FFHQ's own crop has 1.
EYE_FACTOR, MOUTH_FACTOR, CENTRE_SHIFT = 2.0, 1.8, 0.1  # Of FFHQ: size by the eyes and by the mouth; shift downwards.
BORDER, PADDING, BLUR = 0.1, 0.3, 0.02  # Shares of the crop's side.
SIGMAS_OF_BLOCK = 6  # Of a wide blur, which is made of means of blocks, in their sides.


class Placement(NamedTuple):
    """Scaled orthography of a face: pixels a reference unit, and where the reference's origin lies (y up)."""

    scale: float
    x: float
    y_up: float


class Crop(NamedTuple):
    """A square of `side` pixels at (left, top) of the photograph when that is resized to width x height."""

    width: int
    height: int
    left: int
    top: int
    side: int


def five_of_68(points: np.ndarray) -> np.ndarray:
    """Return left eye, right eye, nose tip, left and right mouth corner [5, D] of 68 landmarks; left: image-left.

    An eye is the mean of its two corners.
    """
    eyes = [(points[36] + points[39]) / 2, (points[42] + points[45]) / 2]
    return np.stack([*eyes, points[30], points[48], points[54]])


def reference_from_head(landmarks: np.ndarray) -> np.ndarray:
    """Return reference points [5, 3], decimetres from BFM's origin, of a neutral head's landmarks [68, 3] in metres.

    Stands in for BFM's own points, which are licensed: the head is placed in the world as meshes are.
    """
    return five_of_68((to_world(landmarks.astype(np.float64)) - np.array(BFM_SHIFT)) / DECIMETRE)


def read_reference(path: pathlib.Path) -> np.ndarray:
    """Return the reference points [5, 3] of BFM's similarity_Lm3D_all.mat."""
    (landmarks,) = read_mat(path, ('lm',))
    if landmarks.shape != (NUM_LANDMARKS, 3):
        raise PreprocessError(f'{path}: expected lm: {NUM_LANDMARKS} x 3 numbers, found {landmarks.shape}')
    return five_of_68(landmarks)


# --- the crop by five points -----------------------------------------------------------------------------------------


def place_face(points: np.ndarray, height: int, reference: np.ndarray) -> Placement:
    """Return the scaled orthography that takes reference points [5, 3] to points [5, 2] of a picture, least squares.

    The two rows of the projection are free: eight unknowns, ten equations. Raises PreprocessError for points of no
    extent.
    """
    points = np.asarray(points, dtype=np.float64)
    targets = np.stack([points[:, 0], height - 1 - points[:, 1]], axis=1)
    unknowns = np.linalg.lstsq(np.pad(reference, [(0, 0), (0, 1)], constant_values=1.0), targets, rcond=None)[0]
    scale = np.linalg.norm(unknowns[:3], axis=0).mean()
    if not np.isfinite(scale) or scale < 1e-3:
        raise PreprocessError('expected five different points, found no extent')
    return Placement(float(scale), float(unknowns[3, 0]), float(unknowns[3, 1]))


def crop_of(
    placement: Placement, size: tuple[int, int], scale: float = PICTURE_SCALE, side: int = PICTURE_SIDE
) -> Crop:
    """Return the crop of a picture of size (width, height) in which a reference unit measures `scale` pixels."""
    factor = scale / placement.scale
    width, height = int(size[0] * factor), int(size[1] * factor)
    # Truncation towards zero, also of negative corners, is that of the published crops.
    left = int(width / 2 - side / 2 + (placement.x - size[0] / 2) * factor)
    top = int(height / 2 - side / 2 + (size[1] / 2 - placement.y_up) * factor)
    if not (left < width and top < height and left + side > 0 and top + side > 0):
        raise PreprocessError(f'expected a face within the picture of {size[0]}x{size[1]}, found one outside')
    return Crop(width, height, left, top, side)


def take_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """Return the crop of an RGB picture; what lies outside is black."""
    right, bottom = crop.left + crop.side, crop.top + crop.side
    if crop.width * crop.height <= MAX_ENLARGED_PIXELS:
        resized = image.resize((crop.width, crop.height), Image.Resampling.BICUBIC)
        return resized.crop((crop.left, crop.top, right, bottom))
    # The same filter at the same places: only the rounding of its weights differs, by a level or two in few pixels.
    inner = max(crop.left, 0), max(crop.top, 0), min(right, crop.width), min(bottom, crop.height)
    across, down = image.width / crop.width, image.height / crop.height
    box = inner[0] * across, inner[1] * down, inner[2] * across, inner[3] * down
    size = inner[2] - inner[0], inner[3] - inner[1]
    canvas = Image.new('RGB', (crop.side, crop.side))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC, box=box), (inner[0] - crop.left, inner[1] - crop.top))
    return canvas


def training_picture(image: Image.Image, crop: Crop) -> Image.Image:
    """Return the picture of 512 pixels that networks are trained with, of a photograph and its crop of 1024."""
    offset = int(crop.side / 2 - CENTRE_SIDE / 2)
    centre = take_crop(image, crop).crop((offset, offset, offset + CENTRE_SIDE, offset + CENTRE_SIDE))
    return centre.resize((OUTPUT_SIDE, OUTPUT_SIDE), Image.Resampling.LANCZOS)


def points_in_crop(points: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    """Return where points [N, 2] of a picture of size (width, height) lie in its crop; centres of pixels are whole."""
    factors = np.array([crop.width / size[0], crop.height / size[1]])
    return (np.asarray(points, dtype=np.float64) + 0.5) * factors - 0.5 - np.array([crop.left, crop.top])


def points_in_training_picture(points: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    """Return where points [N, 2] of a photograph lie in its `training_picture`."""
    offset = int(crop.side / 2 - CENTRE_SIDE / 2)
    return (points_in_crop(points, size, crop) - offset + 0.5) * (OUTPUT_SIDE / CENTRE_SIDE) - 0.5


def label_in_training_picture(label: np.ndarray, size: tuple[int, int], crop: Crop) -> np.ndarray:
    """Return the label [25] that a square picture's label becomes for the `training_picture` cut from it.

    What the crop has in its middle was seen at an angle; read with a centred camera it lies ahead. So the camera stays
    where it is and turns until that ray is its axis, by the smallest rotation. Exact for the ray in the middle; others
    are off by the products of small angles. That the crop magnifies is left to the head's size: distances are the same.
    """
    corners = np.array([[-0.5, -0.5], [size[0] - 0.5, size[1] - 0.5]])  # In the picture; its edges.
    first, last = points_in_training_picture(corners, size, crop) + 0.5
    middle = (OUTPUT_SIDE / 2 - first) / (last - first)
    pose, k = label[:16].reshape(4, 4).astype(np.float64), label[16:].reshape(3, 3).astype(np.float64)
    ray = np.linalg.solve(k, [*middle, 1.0])
    pose[:3, :3] = pose[:3, :3] @ Rotation.from_rotvec(rotation_to(ray)).as_matrix()
    return np.concatenate([pose.ravel(), label[16:]]).astype(np.float32)


# --- FFHQ's alignment ------------------------------------------------------------------------------------------------


def ffhq_quad(landmarks: np.ndarray, zoom: float = FFHQ_ZOOM) -> np.ndarray:
    """Return the corners [4, 2] of the square around a face: top left, bottom left, bottom right, top right.

    landmarks: [68, 2]. Its axes follow the line of the eyes and the one from eyes to mouth; `zoom` 1 is FFHQ's crop.
    """
    landmarks = np.asarray(landmarks, dtype=np.float64)
    left_eye, right_eye = landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0)
    eyes, mouth = (left_eye + right_eye) / 2, (landmarks[48] + landmarks[54]) / 2
    across, down = right_eye - left_eye, mouth - eyes
    right = across - _turned(down)
    length = np.linalg.norm(right)
    if not length > 1e-6:
        raise PreprocessError('expected landmarks of a face, found no extent')
    right *= zoom * max(EYE_FACTOR * np.linalg.norm(across), MOUTH_FACTOR * np.linalg.norm(down)) / length
    bottom = _turned(right)
    centre = eyes + CENTRE_SHIFT * down
    return centre + np.stack([-right - bottom, -right + bottom, right + bottom, right - bottom])


def sample_quad(
    image: Image.Image, quad: np.ndarray, side: int = FFHQ_SIDE, sampled_side: int = FFHQ_SAMPLED_SIDE
) -> Image.Image:
    """Return the square of an RGB picture with corners quad [4, 2] as `side` pixels; FFHQ's way of resampling.

    What lies outside is the mirrored picture, fading into blur and its median colour.
    """
    quad = np.array(quad, dtype=np.float64)
    extent = np.linalg.norm(quad[3] - quad[0])
    shrink = int(extent / (2 * side))
    if shrink > 1:  # Bilinear samples of a much larger picture would skip pixels.
        size = tuple(max(round(length / shrink), 1) for length in image.size)
        image = image.resize(size, Image.Resampling.LANCZOS)
        quad, extent = quad / shrink, extent / shrink
    image, quad = _surroundings(image, quad, extent)
    corners = tuple((quad + 0.5).ravel())
    sampled = image.transform(
        (sampled_side, sampled_side), Image.Transform.QUAD, corners, Image.Resampling.BILINEAR
    )  # fmt: skip
    return sampled if side == sampled_side else sampled.resize((side, side), Image.Resampling.LANCZOS)


def points_in_quad(points: np.ndarray, quad: np.ndarray, side: int = FFHQ_SIDE) -> np.ndarray:
    """Return where points [N, 2] of a picture lie in the `sample_quad` of corners quad [4, 2]; centres are whole."""
    axes = np.stack([quad[3] - quad[0], quad[1] - quad[0]])  # Across and down; of equal length, at right angles.
    away = np.asarray(points, dtype=np.float64) - quad[0]
    return away @ axes.T / np.square(axes).sum(axis=1) * side - 0.5


def _turned(vector):
    """Return a vector turned by 90 degrees, from right to down."""
    return np.array([-vector[1], vector[0]])


def _surroundings(image, quad, extent):
    """Return the part of a picture around a quad, padded where the quad leaves it, and the quad's corners in it."""
    border = max(round(extent * BORDER), 3)
    low, high = np.floor(quad.min(axis=0)).astype(int) - border, np.ceil(quad.max(axis=0)).astype(int) + border
    size = np.array(image.size)
    start, stop = np.clip(low, 0, size), np.clip(high, 0, size)
    if (stop <= start).any():
        raise PreprocessError(f'expected a face within the picture of {size[0]}x{size[1]}, found one outside')
    before, after = start - low, high - stop
    part, quad = image.crop((*start, *stop)), quad - start
    if max(before.max(), after.max()) <= border - 4:
        return part, quad
    margin = round(extent * PADDING)  # Fading needs room.
    before, after = np.maximum(before, margin), np.maximum(after, margin)
    return _pad(np.asarray(part, dtype=np.float32), before, after, BLUR * extent), quad + before


def _pad(pixels, before, after, sigma):
    """Return a picture with mirrored margins (x, y) that blur and fade to the median colour with the distance."""
    widths = [(before[1], after[1]), (before[0], after[0]), (0, 0)]
    padded = np.pad(pixels, widths, mode='reflect' if min(pixels.shape[:2]) > 1 else 'edge')
    near = [_ramp(length, *width) for length, width in zip(padded.shape[:2], widths[:2], strict=True)]
    # 0 at the part's edge, 1 at the margin's; inside negative, so that the blur begins a little within the part.
    outside = 1 - np.minimum(near[0][:, None], near[1][None, :])[..., None]
    padded += (_blurred(padded, sigma) - padded) * np.clip(3 * outside + 1, 0, 1)
    padded += (np.median(padded, axis=(0, 1)) - padded) * np.clip(outside, 0, 1)
    return Image.fromarray(np.clip(np.rint(padded), 0, 255).astype(np.uint8))


def _blurred(pixels, sigma):
    """Return pixels [H, W, C] float32 blurred by a Gaussian; a wide one of means of blocks, enlarged again.

    Variances add up: those of the mean over a block and of the linear enlargement are left out of the Gaussian's.
    """
    block = int(sigma / SIGMAS_OF_BLOCK)
    if block < 2:
        return ndimage.gaussian_filter(pixels, [sigma, sigma, 0])
    height, width, channels = pixels.shape
    rows, columns = -(-height // block), -(-width // block)
    whole = [(0, rows * block - height), (0, columns * block - width), (0, 0)]
    means = np.pad(pixels, whole, mode='symmetric').reshape(rows, block, columns, block, channels).mean(axis=(1, 3))
    rest = np.sqrt(sigma**2 - (block**2 - 1) / 12 - block**2 / 6) / block
    means = ndimage.gaussian_filter(means, [rest, rest, 0])
    size, bilinear = (columns * block, rows * block), Image.Resampling.BILINEAR
    return np.stack([Image.fromarray(x).resize(size, bilinear) for x in means.transpose(2, 0, 1)], 2)[:height, :width]


def _ramp(length, before, after):
    """Return the distance [length] from the nearer end in units of the margin there."""
    place = np.arange(length, dtype=np.float32)
    return np.minimum(place / max(before, 1), (length - 1 - place) / max(after, 1))
