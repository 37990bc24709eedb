# SPDX-License-Identifier: Apache-2.0
"""Video files through ffmpeg: encoded beside the drawing, and under their name only when they are whole."""

import contextlib
import fractions
import os
import pathlib
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from dnnlib.util import atomic_path, clear_leftovers

FRAMES_WAITING = 8  # Pictures between drawing and encoding: enough to even out their paces.
FRAME_NAME = '{:05d}.png'
QUALITY = 17  # x264's rate factor: about where H.264 can no longer be told from the picture.
# RGB becomes the YUV of BT.709 and says so: players guess from the size otherwise, and colours shift.
COLOURS = ('scale=in_range=pc:out_range=tv:out_color_matrix=bt709:flags=bicubic+accurate_rnd,format=yuv420p,'
           'setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv')


class VideoError(ValueError):
    """A video that cannot be read or written; one line that names the file."""


class VideoFacts(NamedTuple):
    """Frames a second of a video file, and whether it has sound."""

    fps: float
    has_audio: bool


def probe(path: str | os.PathLike) -> VideoFacts:
    """Return what a video file says of itself; FileNotFoundError, or VideoError where it is none."""
    import imageio_ffmpeg  # Here: every script imports this module's error, few write videos.

    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(2, 'No such file or directory', str(path))
    reader = imageio_ffmpeg.read_frames(os.path.abspath(path))
    try:
        facts = next(reader)
    except (OSError, RuntimeError, StopIteration, ValueError, KeyError, IndexError):
        raise VideoError(f'{path}: expected a video, found none that ffmpeg can read') from None
    finally:
        reader.close()
    return VideoFacts(float(facts['fps']), bool(facts.get('audio_codec')))


def read_video(path: str | os.PathLike) -> Iterator[np.ndarray]:
    """Yield the frames [H, W, 3] uint8 RGB of a video file, upright, each once; errors as those of `probe`."""
    import imageio_ffmpeg

    probe(path)
    reader = imageio_ffmpeg.read_frames(os.path.abspath(pathlib.Path(path).expanduser()), pix_fmt='rgb24')
    try:
        width, height = next(reader)['size']
        for data in reader:
            yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
    finally:
        reader.close()


@contextlib.contextmanager
def video_file(
    path: str | os.PathLike,
    fps: float,
    audio: str | os.PathLike | None = None,
    frames: str | os.PathLike | None = None,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a picture [H, W, 3] uint8 to an H.264 file, which appears when the block succeeds.

    Pictures of one size, which the caller leaves unchanged; odd sides get one more row or column. audio: a file whose
    sound is laid under, from its start to the end of the pictures. frames: a folder for pictures 00000.png and so on;
    those of an earlier, longer video are removed.
    Encoding happens in a thread and a process of its own. What killed runs left of the same file is removed. Raises
    VideoError where it fails or there was no picture.
    """
    clear_leftovers(path)
    with atomic_path(path) as temporary:
        encoder = _Encoder(path, temporary, fps, audio, frames)
        try:
            yield encoder.add
            encoder.finish()
        finally:
            encoder.stop()


def _ffmpeg():
    import imageio_ffmpeg

    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise VideoError(f'ffmpeg: expected the program that imageio-ffmpeg brings, found none: {error}') from None


class _Encoder:
    def __init__(self, path, temporary, fps, audio, frames):
        self._path, self._temporary, self._audio = path, temporary, audio
        self._rate = str(fractions.Fraction(fps).limit_denominator(1001))  # 29.97 is 30000/1001.
        self._frames = None if frames is None else pathlib.Path(frames).expanduser()
        self._process = self._error = self._shape = None
        self._count = 0
        self._log = tempfile.TemporaryFile()
        self._queue = queue.Queue(FRAMES_WAITING)
        self._thread = threading.Thread(target=self._work, name='video', daemon=True)
        if self._frames is not None:
            self._frames.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    def add(self, picture):
        """Hand a picture over; waits where encoding lags behind."""
        self._raise_error()
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f'picture: expected uint8 [H, W, 3], got {picture.dtype} {list(picture.shape)}')
        if self._shape not in (None, picture.shape):
            raise ValueError(f'picture: expected {list(self._shape)} like the first, got {list(picture.shape)}')
        self._shape = picture.shape
        self._queue.put(picture)

    def finish(self):
        """Wait for the file to be complete."""
        self._queue.put(None)
        self._thread.join()
        self._raise_error()
        if self._process is None:
            raise VideoError(f'{self._path}: expected at least one picture, got none')
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # Its exit status tells.
        if self._process.wait() != 0:
            raise self._failure()
        self._remove_old_frames()

    def _remove_old_frames(self):
        """Remove what an earlier, longer video of the same name left beyond the last frame."""
        number = self._count
        while self._frames is not None and (old := self._frames / FRAME_NAME.format(number)).is_file():
            old.unlink()
            number += 1

    def stop(self):
        """End thread and process, whatever happened."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._thread.is_alive():
            self._error = self._error or VideoError('stopped')  # The thread drops what still waits.
            self._queue.put(None)
            self._thread.join()
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._log.close()

    def _work(self):
        while (picture := self._queue.get()) is not None:
            if self._error is None:  # After an error pictures are taken and dropped, so that nobody waits for ever.
                try:
                    self._write(picture)
                except Exception as error:  # Handed over to the caller's thread.
                    self._error = error

    def _write(self, picture):
        if self._frames is not None:
            with atomic_path(self._frames / FRAME_NAME.format(self._count)) as temporary:
                Image.fromarray(picture).save(temporary, format='PNG', compress_level=1)
        height, width = picture.shape[:2]
        if height % 2 or width % 2:
            picture = np.pad(picture, [(0, height % 2), (0, width % 2), (0, 0)], mode='edge')
        if self._process is None:
            self._start(*picture.shape[:2])
        try:
            self._process.stdin.write(np.ascontiguousarray(picture).data)
        except BrokenPipeError:
            self._process.wait()
            raise self._failure() from None
        self._count += 1

    def _start(self, height, width):
        sound, lay_under = [], []
        if self._audio is not None:
            sound = ['-i', os.path.abspath(os.path.expanduser(self._audio))]
            # Silence follows sound that is too short: no picture may be cut off.
            lay_under = ['-map', '0:v:0', '-map', '1:a:0', '-c:a', 'aac', '-b:a', '192k', '-af', 'apad', '-shortest']
        command = [
            _ffmpeg(), '-y', '-loglevel', 'error', '-nostdin',
            '-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}', '-r', self._rate, '-i', 'pipe:0', *sound,
            *lay_under, '-vf', COLOURS, '-c:v', 'libx264', '-preset', 'fast', '-crf', str(QUALITY),
            '-movflags', '+faststart', str(self._temporary),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log)

    def _raise_error(self):
        if self._error is not None:
            raise self._error

    def _failure(self):
        self._log.seek(0)
        lines = self._log.read().decode('utf-8', errors='replace').split('\n')
        reason = next((line.strip() for line in reversed(lines) if line.strip()), f'status {self._process.returncode}')
        return VideoError(f'{self._path}: expected ffmpeg to write the video, but it says: {reason}')
