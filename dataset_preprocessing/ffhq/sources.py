# SPDX-License-Identifier: Apache-2.0
"""Where pictures come from: a folder of photographs, or the frames of a video file."""

import pathlib
from collections.abc import Callable, Iterator

from PIL import Image

from dataset_preprocessing.ffhq import files
from dataset_preprocessing.ffhq.files import PreprocessError
from training.video import probe, read_video

VIDEO_ENDINGS = ('.mp4', '.mov', '.avi', '.mkv', '.webm', '.m4v')
BETWEEN = '-'  # Joins folders and name: what is written lies in one folder.


class Photos:
    """Photographs of a folder at any depth, named by where they lie below it. fps: None, they are no sequence."""

    fps = None

    def __init__(self, folder: pathlib.Path):
        self.paths = {}
        for name, path in files.list_pictures(folder).items():
            flat = name.replace('/', BETWEEN)
            if flat in self.paths:
                raise PreprocessError(f'{path}: expected a name of its own, found that of {self.paths[flat]}')
            self.paths[flat] = path

    def __len__(self):
        return len(self.paths)

    def pictures(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Image.Image | PreprocessError]]:
        """Yield name and picture, upright RGB, of those wanted; where one cannot be read, the error instead."""
        for name, path in self.paths.items():
            if is_wanted(name):
                try:
                    yield name, files.read_picture(path)
                except PreprocessError as error:
                    yield name, error


class Video:
    """Frames of a video file, named 00000 and so on. fps: its own."""

    def __init__(self, path: pathlib.Path):
        self.path, self.fps = path, probe(path).fps

    def __len__(self):
        return 0  # Not known before all are read.

    def pictures(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Image.Image]]:
        """Yield name and picture of the frames wanted."""
        for number, frame in enumerate(read_video(self.path)):
            if is_wanted(name := f'{number:05d}'):
                yield name, Image.fromarray(frame)


def find_sources(indir: pathlib.Path) -> dict[str, Photos | Video]:
    """Return what to work on by the name of its output folder; '' stands for the output folder itself.

    A video file, a folder of photographs, or a folder of videos; PreprocessError for anything else, or for both kinds.
    """
    if indir.is_file():
        return {'': Video(indir)}
    if not indir.is_dir():
        raise PreprocessError(f'{indir}: expected a folder of photographs or videos, or a video, found nothing')
    videos = sorted(path for path in indir.iterdir() if path.suffix.lower() in VIDEO_ENDINGS and path.is_file())
    if not videos:
        return {'': Photos(indir)}
    pictures = [path for path in indir.iterdir() if path.suffix.lower() in files.PICTURE_ENDINGS]
    if pictures:
        raise PreprocessError(f'{indir}: expected photographs or videos, found both: {pictures[0].name}')
    found = {path.stem: Video(path) for path in videos}
    if len(found) < len(videos):
        raise PreprocessError(f'{indir}: expected videos of different names, found two that differ in their endings')
    return found
