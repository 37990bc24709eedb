# SPDX-License-Identifier: Apache-2.0
"""From found faces to heads and cameras: crops, batches for `solver`, and the file that a fit is kept in."""

import hashlib
import io
import math
import pathlib
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d

from dataset_preprocessing.ffhq import alignment, head_turn, solver
from dataset_preprocessing.ffhq.alignment import OUTPUT_SIDE, Crop, Placement
from dataset_preprocessing.ffhq.dense_points import load_dense_points, load_detector_errors
from dataset_preprocessing.ffhq.faces_file import FoundFace
from dataset_preprocessing.ffhq.files import PreprocessError, list_written, write_text
from dataset_preprocessing.ffhq.flame_points import FlamePoints, load_flame_head
from dataset_preprocessing.ffhq.head_points import EmbeddedPoints
from dataset_preprocessing.ffhq.head_turn import Turn
from dataset_preprocessing.ffhq.solver import Turned
from dnnlib import atomic_write
from geometry.cameras import intrinsics, make_label
from geometry.head_model import HeadMesh, load_embedded_head
from geometry.meshes import from_world, to_world

BATCH = 16  # Items solved together, always the same ones: rounding depends on the company.
MAX_IDENTITY_ITEMS = 48  # Of one person's pictures, spread over all, tell the identity.
CROP_SECONDS = 0.5  # Standard deviation, in time, of the smoothing of a video's crops.
DECIMALS = 6  # Of what is kept.
TURN_SHARE = 10.0  # Of a turn's precision, beside points that seem surer than they are (docs/preprocessing.md).
PERSON_FILE, EACH = 'person.txt', 'each'  # Of which pictures of one person fits are, as a hash; or each of its own.
HEAD_MODELS = ('embedded', 'flame')


class HeadFit(NamedTuple):
    """A fit of one item: identity [100], expression [52], label [25]. size: of the head, about the world's origin.

    points [478, 2]: of the training picture in pixels; reprojected likewise. gaze [4]: pitch and yaw of the person's
    left, then right eye, radians, up and towards the picture's right positive. error: median distance of both over that
    of the eyes. Of FLAME: expression [57], the local coefficients of FlamePoints, and points [70, 2].
    """

    identity: np.ndarray
    expression: np.ndarray
    label: np.ndarray
    size: np.ndarray
    points: np.ndarray
    reprojected: np.ndarray
    gaze: np.ndarray
    error: np.ndarray


def crops_of(faces: list[FoundFace], reference: np.ndarray, fps: float | None = None) -> list[Crop]:
    """Return the crop of each face; those of a sequence (fps given) follow the face slowly, without its jitter."""
    placements = [alignment.place_face(face.five, face.size[1], reference) for face in faces]
    if fps is not None and len(placements) > 1:
        values = np.array(placements)
        values[:, 0] = np.log(values[:, 0])
        values = gaussian_filter1d(values, CROP_SECONDS * fps, axis=0, mode='nearest')
        placements = [Placement(math.exp(scale), x, y_up) for scale, x, y_up in values]
    return [alignment.crop_of(place, face.size) for place, face in zip(placements, faces, strict=True)]


def crops_inside(
    faces: dict[str, FoundFace], reference: np.ndarray, fps: float | None = None
) -> tuple[dict[str, Crop], dict[str, str]]:
    """Return the crop of each face, as `crops_of` does, and reasons of those that have none."""
    if fps is not None:
        return dict(zip(faces, crops_of(list(faces.values()), reference, fps), strict=True)), {}
    crops, outside = {}, {}
    for name, face in faces.items():
        try:
            crops[name] = crops_of([face], reference)[0]
        except PreprocessError as error:
            outside[name] = str(error)
    return crops, outside


def points_of(face: FoundFace, crop: Crop) -> np.ndarray:
    """Return a face's points [478, 2] in the training picture, in pixels."""
    return alignment.points_in_training_picture(face.points, face.size, crop)


def cameras_of_turns(turns: list[Turn | None], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rotations [N, 3, 3] from the world to cameras of training pictures, and the precisions [N, 3, 3] of small
    turns about their axes; 0 where turns are not known. points: [N, 478, 2], of the same faces in these pictures."""
    frames = head_turn.frames_of((points + 0.5) / OUTPUT_SIDE, head_turn.load_head_turn().template)
    mean = np.stack([np.zeros(3) if turn is None else turn.mean for turn in turns])
    weight = np.stack([np.zeros(3) if turn is None else turn.deviation**-2.0 for turn in turns])
    slopes = head_turn.slopes_of(mean) @ head_turn.camera_rotations(frames).transpose(0, 2, 1)
    precision = slopes.transpose(0, 2, 1) @ (TURN_SHARE * weight[..., None] * slopes)
    return head_turn.rotations_of(mean, frames), precision


class HeadFitter:
    """Fits a head model: the embedded one, or FLAME of files at flame_path (None: the published place).

    Raises PreprocessError for files of FLAME that are missing or others.
    """

    def __init__(
        self, device: torch.device | str = 'cpu', head_model: str = HEAD_MODELS[0], flame_path: str | None = None
    ):
        # In double precision: what rounding adds, which depends on threads and memory, stays below DECIMALS.
        embedded, table, dtype = load_embedded_head(), load_dense_points(), torch.float64
        if head_model == 'flame':
            self.model = FlamePoints(load_flame_head(flame_path).to(device), embedded, table, dtype)
        else:
            self.model = EmbeddedPoints(embedded.to(device), table, load_detector_errors(), dtype)
        self.head = self.model.head
        # Turns are told against the embedded head; how FLAME's neutral head looks, to a degree, is not known here.
        self.takes_turns = head_model != 'flame'

    @property
    def num_vertices(self) -> int:
        """Number of vertices of the head."""
        return len(self.neutral().vertices[0])

    def neutral(self) -> HeadMesh:
        """Return the mean head."""
        zero = self.head.uvs.new_zeros
        return self.model.mesh(zero([1, self.head.num_identity]), zero([1, len(self.model.lower)]))

    @torch.no_grad()
    def mesh(self, fit: HeadFit) -> tuple[np.ndarray, np.ndarray]:
        """Return vertices [V, 3] and landmarks [68, 3] of a fit, metres, as they lie in its label's picture."""
        device = self.model.deviation.device
        mesh = self.model.mesh(*(torch.from_numpy(x)[None].to(device) for x in (fit.identity, fit.expression)))
        return tuple(from_world(fit.size * to_world(x[0].cpu().numpy())) for x in (mesh.vertices, mesh.landmarks))

    def batch(
        self,
        points: np.ndarray,
        scores: np.ndarray,
        identity: np.ndarray | None = None,
        turns: list[Turn | None] | None = None,
        **options,
    ) -> list[HeadFit]:
        """Return fits of points [N, 478, 2] in the training picture and expected local coefficients [N, L].

        identity: [100], known; turns: of the heads, None where they are not known; options: those of `solver.fit`.
        """
        device, dtype = self.model.deviation.device, self.model.deviation.dtype
        targets = torch.tensor((self.model.targets(points) + 0.5) / OUTPUT_SIDE, device=device, dtype=dtype)
        prior = torch.tensor(scores, device=device, dtype=dtype)
        groups = options.pop('groups', None)
        if groups is None:
            groups = torch.zeros(len(points), dtype=torch.long) if identity is not None else torch.arange(len(points))
        if identity is not None:
            identity = torch.tensor(identity, device=device, dtype=dtype)[None]
        turned = None
        if turns is not None and any(turns):
            turned = Turned(*(torch.tensor(x, device=device, dtype=dtype) for x in cameras_of_turns(turns, points)))
        fit = solver.fit(self.model, targets, prior, groups.to(device), identity, turned, **options)
        return self._told(fit, targets, groups)

    def shared_identity(
        self, points: np.ndarray, scores: np.ndarray, turns: list[Turn | None] | None = None, **options
    ) -> np.ndarray:
        """Return the identity [100] of one person's pictures."""
        chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), MAX_IDENTITY_ITEMS)).round().astype(int))
        groups = torch.zeros(len(chosen), dtype=torch.long)
        turns = turns and [turns[number] for number in chosen]
        return self.batch(points[chosen], scores[chosen], turns=turns, groups=groups, **options)[0].identity

    def read(self, path: pathlib.Path) -> HeadFit:
        """Return the fit of a file; PreprocessError for another file, or a fit of another head model."""
        fit = read_fit(path)
        if (len(fit.identity), len(fit.expression)) != (self.model.num_identity, len(self.model.lower)):
            raise PreprocessError(f'{path}: expected a fit of this head model, found one of another: write elsewhere')
        return fit

    def _told(self, fit, targets, groups):
        identity = fit.identity[groups.to(fit.identity.device)]
        seen = solver.see(self.model.points(identity, fit.local), fit.rotation, fit.place)
        reprojected = solver.project(seen)
        labels = make_label(fit.cam2world(), intrinsics().to(targets))
        first, second = self.model.eyes
        eyes = targets[:, first].mean(dim=1) - targets[:, second].mean(dim=1)
        error = (reprojected - targets).norm(dim=2).median(dim=1).values / eyes.norm(dim=1)
        arrays = (
            identity, fit.local, labels, fit.size, targets * OUTPUT_SIDE - 0.5, reprojected * OUTPUT_SIDE - 0.5,
            self.model.gaze(fit.local), error,
        )  # fmt: skip
        rounded = (array.cpu().numpy().round(DECIMALS).astype(np.float32) for array in arrays)
        return [HeadFit(*row) for row in zip(*rounded, strict=True)]


def fit_all(
    fitter: HeadFitter,
    faces: dict[str, FoundFace],
    crops: dict[str, Crop],
    folder: pathlib.Path,
    fps: float | None = None,
    is_same_person: bool = False,
    on_items: Callable[[int], None] = lambda count: None,
    forget: Callable[[str], None] = lambda name: None,
) -> dict[str, HeadFit]:
    """Write folder/<name>.npz for each face that lacks it; return all. fps: of a sequence, one person's and smooth.

    Pictures of one person tell the identity together: where they became others, or were not one person's before, all
    are fitted again. forget: called with the name of each fit that goes.
    """
    names, is_one_person = list(faces), is_same_person or fps is not None
    points = np.array([points_of(faces[name], crops[name]) for name in names])
    scores = np.array([fitter.model.expected(faces[name]) for name in names])
    turns = [faces[name].turn if fitter.takes_turns else None for name in names]
    _keep_person(folder, names, points if is_one_person else None, forget)
    fits = {name: fitter.read(folder / f'{name}.npz') for name in names if (folder / f'{name}.npz').exists()}
    missing = set(names) - set(fits)
    identity = fitter.shared_identity(points, scores, turns) if is_one_person and missing else None
    size = len(names) if fps is not None else BATCH
    for start in range(0, len(names), size):
        part = slice(start, start + size)
        if missing.intersection(names[part]):
            found = fitter.batch(points[part], scores[part], identity, turns[part], is_sequence=fps is not None)
            for name, fit in zip(names[part], found, strict=True):
                if name in missing:
                    write_fit(fit, folder / f'{name}.npz')
                    fits[name] = fit
        on_items(len(names[part]))
    return {name: fits[name] for name in names}


def _keep_person(folder, names, points, forget):
    """Remove all fits of a folder unless they are of these pictures of one person; points None: each of its own."""
    path, told = folder / PERSON_FILE, EACH
    if points is not None:
        told = hashlib.sha256('\n'.join(names).encode() + points.tobytes()).hexdigest()
    before = path.read_text(encoding='utf-8') if path.exists() else EACH
    if before != told:
        for name, fit in list_written(folder, '.npz').items():
            forget(name)
            fit.unlink()
        write_text(told, path)


def write_fit(fit: HeadFit, path: pathlib.Path) -> None:
    """Write a fit; the file appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not all(np.isfinite(array).all() for array in fit):
        raise PreprocessError(f'{path}: expected finite numbers of the fit, found others')
    stream = io.BytesIO()
    np.savez(stream, **fit._asdict())
    with atomic_write(path) as file:
        file.write(stream.getvalue())


def read_fit(path: pathlib.Path) -> HeadFit:
    """Return the fit of a file; PreprocessError for another."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return HeadFit(*(content[name] for name in HeadFit._fields))
    except (OSError, ValueError, LookupError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise PreprocessError(f'{path}: expected a fit, found another file ({error})') from error
