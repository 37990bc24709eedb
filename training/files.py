# SPDX-License-Identifier: Apache-2.0
"""A folder or a zip archive as a set of named files, for the readers of data sets."""

import os
import pathlib
import zipfile
import zlib

# What reading an entry of a damaged archive raises; NotImplementedError: a compression that zipfile does not know.
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class DatasetError(ValueError):
    """A data set that cannot be trained on; the message names the file, what was expected and what was found."""


class FileSet:
    """Files below a folder, or in a zip archive, by their name relative to it with forward slashes.

    May be sent to worker processes: each opens the archive anew. Raises FileNotFoundError where the path does not
    exist, DatasetError where it is a file that is no zip archive.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser()
        self._archive = None
        self._pid = None
        if not self.path.exists():
            raise FileNotFoundError(2, 'No such file or directory', str(path))
        if self.path.is_file() and not zipfile.is_zipfile(self.path):
            raise DatasetError(f'{path}: expected a folder or a zip archive')
        self.is_zip = self.path.is_file()

    def names(self) -> list[str]:
        """Return all names, sorted."""
        if self.is_zip:
            return sorted(name for name in self._open_archive().namelist() if not name.endswith('/'))
        found = []
        for folder, _, files in os.walk(self.path, followlinks=True):
            relative = pathlib.Path(folder).relative_to(self.path).as_posix()
            prefix = '' if relative == '.' else f'{relative}/'
            found.extend(prefix + name for name in files)
        return sorted(found)

    def read(self, name: str) -> bytes:
        """Return the content of a file; FileNotFoundError and DatasetError name it with the set's path."""
        if not self.is_zip:
            return (self.path / name).read_bytes()
        try:
            return self._open_archive().read(name)
        except KeyError:
            raise FileNotFoundError(2, 'No such file in the archive', f'{self.path}/{name}') from None
        except ARCHIVE_ERRORS as error:
            raise DatasetError(f'{self.path}/{name}: expected an undamaged entry of the archive, {error}') from None

    def states(self) -> list[tuple[str, int, int]]:
        """Return (name, bytes, time of change in ns) of all files, sorted; of an archive, its own."""
        if self.is_zip:
            stats = [('', os.stat(self.path))]
        else:
            stats = ((name, os.stat(os.path.join(self.path, name))) for name in self.names())
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def __getstate__(self):
        return {**self.__dict__, '_archive': None, '_pid': None}

    def _open_archive(self):
        """Return the archive, opened by this process: a handle shared after a fork would share its position."""
        if self._pid != os.getpid():
            try:
                self._archive, self._pid = zipfile.ZipFile(self.path), os.getpid()
            except ARCHIVE_ERRORS as error:
                raise DatasetError(f'{self.path}: expected an undamaged zip archive, {error}') from None
        return self._archive
