# SPDX-License-Identifier: Apache-2.0
"""Owns the small helpers every part of the project shares: opening paths or URLs, and writing files atomically."""

from dnnlib.util import (
    DownloadError,
    atomic_path,
    atomic_write,
    cache_path,
    cache_root,
    drive_download_url,
    is_url,
    open_url,
)

__all__ = [
    'DownloadError',
    'atomic_path',
    'atomic_write',
    'cache_path',
    'cache_root',
    'drive_download_url',
    'is_url',
    'open_url',
]
