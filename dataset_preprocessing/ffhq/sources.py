# SPDX-License-Identifier: Apache-2.0
"""Where pictures come from: photographs, or the frames of a video file."""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator

from PIL import Image

from dataset_preprocessing.ffhq import files
from dataset_preprocessing.ffhq.faces_file import Stamp
from dataset_preprocessing.ffhq.files import PreprocessError
from training.video import probe, read_video

VIDEO_ENDINGS = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v')
BETWEEN = '-'  # Joins folders and name: what is written lies in one folder.


def _stamp(path):
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class Photos:
    """Photographs by name. fps: None, for no sequence. unread: reasons of pictures of formats that are not read."""

    fps = None

    def __init__(self, paths: dict[str, pathlib.Path], unread: dict[str, str]):
        self.paths, self.unread = paths, unread

    @classmethod
    def below(cls, folder: pathlib.Path) -> 'Photos':
        """Return those of a folder at any depth, named by where they lie below it."""
        unread, paths = files.list_unread(folder), {}
        try:
            found = files.list_pictures(folder)
        except PreprocessError as error:
            told = ''.join(f'; {name}: {reason}' for name, reason in list(unread.items())[:1])
            raise PreprocessError(f'{error}{told}') from error
        for name, path in found.items():
            flat = name.replace('/', BETWEEN)
            if flat in paths:
                raise PreprocessError(f'{path}: expected a name of its own, found that of {paths[flat]}')
            paths[flat] = path
        return cls(paths, unread)

    def __len__(self):
        return len(self.paths)

    def stamp(self, name: str) -> Stamp | None:
        """Return what changes when a picture does; None where it is gone. To be asked for before it is read."""
        return _stamp(self.paths[name])

    def pictures(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Image.Image | PreprocessError]]:
        """Yield name and picture, upright RGB, of those wanted; where one cannot be read, the error instead."""
        for name, path in self.paths.items():
            if is_wanted(name):
                try:
                    yield name, files.read_picture(path)
                except PreprocessError as error:
                    yield name, error


class Video:
    """Frames of a video file, named 00000 and so on."""

    unread = {}

    def __init__(self, path: pathlib.Path):
        self.path, self._stamp = path, _stamp(path)

    @functools.cached_property
    def fps(self) -> float:
        """Frames a second; VideoError for a file that is no video."""
        return probe(self.path).fps

    def __len__(self):
        return 0  # Not known before all are read.

    def stamp(self, _name: str) -> Stamp | None:
        """Return what changes when the video does, as it was when this was made."""
        return self._stamp

    def pictures(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Image.Image]]:
        """Yield name and picture of the frames wanted."""
        for number, frame in enumerate(read_video(self.path)):
            if is_wanted(name := f'{number:05d}'):
                yield name, Image.fromarray(frame)


def find_sources(indir: pathlib.Path) -> dict[str, Photos | Video]:
    """Return what to work on by the name of its output folder; '' stands for the output folder itself.

    A photograph, a video file, a folder of photographs, or a folder of videos; PreprocessError for anything else, or
    for both kinds, VideoError for a file that is neither.
    """
    if indir.is_file():
        if indir.suffix.lower() in files.PICTURE_ENDINGS:
            return {'': Photos({indir.stem: indir}, {})}
        if indir.suffix.lower() in files.UNREAD_ENDINGS:
            raise PreprocessError(f'{indir}: {files.unread_reason(indir)}')
        probe(indir)  # Told before anything is written.
        return {'': Video(indir)}
    if not indir.is_dir():
        raise PreprocessError(f'{indir}: expected a folder of photographs or videos, or a video, found nothing')
    videos = sorted(path for path in indir.iterdir() if path.suffix.lower() in VIDEO_ENDINGS and path.is_file())
    if not videos:
        return {'': Photos.below(indir)}
    pictures = [path for path in indir.iterdir() if path.suffix.lower() in files.PICTURE_ENDINGS]
    if pictures:
        raise PreprocessError(f'{indir}: expected photographs or videos, found both: {pictures[0].name}')
    found = {path.stem: Video(path) for path in videos}
    if len(found) < len(videos):
        raise PreprocessError(f'{indir}: expected videos of different names, found two that differ in their endings')
    return found
