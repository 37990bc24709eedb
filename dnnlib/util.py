# SPDX-License-Identifier: Apache-2.0
"""Owns how files come in and go out: local paths and URLs opened through a resumable download cache, atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import html.parser
import http.client
import json
import logging
import os
import pathlib
import platform
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, BinaryIO

import tqdm

try:
    import fcntl
except ImportError:  # Not a POSIX system: downloads then use private partial files in place of a lock.
    fcntl = None

_LOGGER = logging.getLogger(__name__)

_RETRY_DELAYS = (0.5, 1.0, 2.0)  # Seconds before each further attempt.
_RETRY_STATUSES = frozenset({429, 500, 502, 503, 504})
_TIMEOUT = 30.0  # Seconds without any byte from the server.
_BLOCK_BYTES = 256 * 1024
_PAGE_BYTES = 1024 * 1024
_BAR_DELAY = 2.0  # Seconds: a shorter download shows no progress bar.
_TAIL_CHARACTERS = 48  # Leaves room for prefixes within the usual limit of 255 bytes, even at 4 bytes a character.

_SCHEME = re.compile(r'file(?=:/)|[a-z][a-z0-9+.-]+(?=://)', re.IGNORECASE)
_CONTENT_RANGE = re.compile(r'bytes (\d+)-\d+/(\d+|\*)', re.ASCII)
_DRIVE_HOSTS = frozenset({'drive.google.com', 'docs.google.com', 'drive.usercontent.google.com'})
_DRIVE_FILE_PATH = re.compile(r'(?:/a/[^/]+)?/file(?:/u/\d+)?/d/([\w-]+)(?:/.*)?', re.ASCII)
_DRIVE_QUERY_PATH = re.compile(r'(?:/a/[^/]+)?(?:/u/\d+)?/(?:open|uc|download)/?', re.ASCII)
_DRIVE_KEY = re.compile(r'[\w-]+', re.ASCII)


class DownloadError(OSError):
    """Raised where a URL could not be brought into the cache; one line: the URL, what was expected, what was found."""


class _ConnectionLost(DownloadError):
    """A failure that a further attempt may get past."""


@dataclass(frozen=True)
class _Version:
    """Which version of a remote file the bytes of a partial download belong to.

    validator: what If-Range takes (a strong ETag or a Last-Modified date); None: such bytes cannot be resumed.
    total: the length of the whole file in bytes; None: the server did not say.
    """

    validator: str | None
    total: int | None


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def is_url(text: str) -> bool:
    """Tell whether text is a URL that open_url accepts, and not a local path.

    text: any string; True for http://, https:// and file:/ in either case of letters.
    """
    return _scheme(text) in ('http', 'https', 'file')


def open_url(path_or_url: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> BinaryIO:
    """Open a local path, a file URL or an http(s) URL as a seekable binary file.

    path_or_url: a path, or a URL; an http(s) one is downloaded once and from then on opened without any request.
        Google Drive share links are understood.
    cache_dir: the cache folder; None: $NEXT3D_CACHE_DIR, else $XDG_CACHE_HOME/next3d, else ~/.cache/next3d.

    Raises FileNotFoundError for a local path that is not there, DownloadError where a download fails, ValueError for
    a URL of another scheme or without a host.
    """
    scheme = _scheme(path_or_url)
    if scheme is None:
        return open(os.fsdecode(path_or_url), 'rb')
    if scheme == 'file':
        return open(_file_url_path(path_or_url), 'rb')
    if scheme not in ('http', 'https'):
        raise ValueError(f'path_or_url: expected a path or an http, https or file URL, got scheme {scheme!r}')
    if not urllib.parse.urlsplit(path_or_url).hostname:
        raise ValueError(f'path_or_url: expected a URL with a host, got {path_or_url!r}')
    final = cache_path(path_or_url, cache_dir)
    if not final.exists():
        _download(path_or_url, final)
    return open(final, 'rb')


def cache_path(url: str, cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Give the path under which open_url keeps the file of an http(s) URL, without touching the disk.

    url: an http(s) URL; the part after '#' does not count, and all forms of one Google Drive link share one path.
    cache_dir: the cache folder; None: as in open_url.
    """
    address = urllib.parse.urldefrag(drive_download_url(url) or url).url
    tail = _readable_name(url)
    digest = hashlib.sha256(address.encode('utf-8')).hexdigest()[:32]
    return cache_root(cache_dir) / 'downloads' / (f'{digest}-{tail}' if tail else digest)


def _scheme(text: str | os.PathLike) -> str | None:
    # Two letters at least, so that a Windows drive such as 'C:' stays a path.
    match = _SCHEME.match(text) if isinstance(text, str) else None
    return match[0].lower() if match else None


def _file_url_path(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.netloc.lower() not in ('', 'localhost'):
        raise ValueError(f'path_or_url: expected a file URL of this machine, got host {parts.netloc!r}')
    return urllib.request.url2pathname(parts.path)


def cache_root(cache_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Return the cache folder; None: as in open_url."""
    chosen = cache_dir or os.environ.get('NEXT3D_CACHE_DIR')
    if chosen:
        return pathlib.Path(chosen).expanduser()
    base = os.environ.get('XDG_CACHE_HOME', '')
    # The XDG specification asks that relative paths be ignored.
    return (pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / '.cache') / 'next3d'


def _readable_name(url: str) -> str:
    """Give the end of the name of the file behind url, in characters that are safe anywhere; may be empty."""
    drive_file = _drive_file(url)
    path = drive_file[0] if drive_file else urllib.parse.urlsplit(url).path
    name = re.split(r'[/\\]', urllib.parse.unquote(path))[-1]
    return re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-_TAIL_CHARACTERS:].strip('._-')


# ---------------------------------------------------------------------------------------------------------------------
# Google Drive


def drive_download_url(url: str) -> str | None:
    """Turn a Google Drive share link into the address that answers with the file itself.

    url: any URL; accepted are the /file/d/ID/..., /open?id=ID, /uc?id=ID and /download?id=ID forms on
        drive.google.com, docs.google.com and drive.usercontent.google.com, with or without resourcekey=.

    Returns None for everything else, folders and Google Docs documents among it.
    """
    drive_file = _drive_file(url)
    if drive_file is None:
        return None
    file_id, resource_key = drive_file
    fields = {'export': 'download', 'id': file_id}
    if resource_key:
        fields['resourcekey'] = resource_key
    return 'https://drive.google.com/uc?' + urllib.parse.urlencode(fields)


def _drive_file(url: str) -> tuple[str, str] | None:
    """Find the file id and the resource key ('' where there is none) in a Drive link."""
    if not _is_drive(url):
        return None
    parts = urllib.parse.urlsplit(url)
    fields = dict(urllib.parse.parse_qsl(parts.query))
    in_path = _DRIVE_FILE_PATH.fullmatch(parts.path)
    in_query = _DRIVE_QUERY_PATH.fullmatch(parts.path)
    file_id = in_path[1] if in_path else fields.get('id', '') if in_query else ''
    return (file_id, fields.get('resourcekey', '')) if _DRIVE_KEY.fullmatch(file_id) else None


def _is_drive(url: str) -> bool:
    return _scheme(url) in ('http', 'https') and urllib.parse.urlsplit(url).hostname in _DRIVE_HOSTS


class _PageParser(html.parser.HTMLParser):
    """Collects the forms (id, action, hidden fields) and the visible words of a web page."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[tuple[str, str, dict[str, str]]] = []
        self.words: list[str] = []
        self._form_open = False
        self._hidden_text = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or '' for name, value in attrs}
        if tag == 'form':
            self.forms.append((values.get('id', ''), values.get('action', ''), {}))
            self._form_open = True
        elif tag == 'input' and self._form_open and values.get('type', '').lower() == 'hidden' and values.get('name'):
            self.forms[-1][2][values['name']] = values.get('value', '')
        elif tag in ('script', 'style'):
            self._hidden_text = True

    def handle_endtag(self, tag: str) -> None:
        if tag == 'form':
            self._form_open = False
        elif tag in ('script', 'style'):
            self._hidden_text = False

    def handle_data(self, data: str) -> None:
        if not self._hidden_text:
            self.words += data.split()


def _read_page(url: str, response: http.client.HTTPResponse) -> _PageParser:
    parser = _PageParser()
    # Block by block, since a plain read would take a lost connection for the end of the page.
    page = b''
    while len(page) < _PAGE_BYTES and (block := _read_block(url, response)):
        page += block
    parser.feed(page.decode('utf-8', errors='replace'))
    parser.close()
    return parser


def _confirm_address(url: str, page: _PageParser, page_url: str) -> str | None:
    """Give the address that Drive's 'cannot scan for viruses' form leads to; None where the page is another one."""
    for form_id, action, fields in page.forms:
        # A sign-in page has forms too, and must not be followed.
        if form_id == 'download-form' or 'confirm' in fields:
            target = urllib.parse.urlsplit(urllib.parse.urljoin(page_url, action))
            merged = {**dict(urllib.parse.parse_qsl(target.query)), **fields}
            address = target._replace(query=urllib.parse.urlencode(merged), fragment='').geturl()
            _check_hop(url, page_url, address)
            return address
    return None


def _drive_page_error(url: str, page: _PageParser, page_url: str) -> DownloadError:
    text = ' '.join(page.words)
    lowered = text.lower()
    if 'quota' in lowered or 'too many users' in lowered:
        found = "a web page: the file's download quota on Google Drive is used up, try again in a day"
    elif urllib.parse.urlsplit(page_url).hostname == 'accounts.google.com' or re.search(r'\bsign[ -]?in\b', lowered):
        found = 'a web page: Google Drive asks for a sign-in, the file is not shared with everyone who has the link'
    else:
        found = f'a web page: {text[:120] or "without text"}'
    return DownloadError(_explain(url, 'a file', found))


# ---------------------------------------------------------------------------------------------------------------------
# Requests


def _explain(url: str, expected: str, found: object) -> str:
    return ' '.join(f'{url}: expected {expected}, found {found}'.split())


def _reason(error: BaseException) -> str:
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _check_hop(url: str, source: str, target: str) -> None:
    """Refuse to be led from source to anything but http(s), and from https back to http."""
    allowed = ('https',) if urllib.parse.urlsplit(source).scheme == 'https' else ('http', 'https')
    if urllib.parse.urlsplit(target).scheme not in allowed:
        raise DownloadError(_explain(url, f'to be led to {" or ".join(allowed)} only', f'a redirect to {target}'))


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only where _check_hop allows them."""

    def http_error_302(self, request, response, code, message, headers):
        location = headers.get('location') or headers.get('uri') or ''
        try:
            _check_hop(request.full_url, request.full_url, urllib.parse.urljoin(request.full_url, location))
        except (DownloadError, ValueError):
            response.close()
            raise
        # Python 3.10 does not know 308, which asks of a GET the same as 307.
        return super().http_error_302(request, response, 307 if code == 308 else code, message, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _build_opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.OpenerDirector()
    # By hand, because the ready-made opener also handles ftp:, file: and data:.
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPCookieProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    return opener


def _quoted(address: str) -> str:
    """Percent-encode what people leave bare in URLs, such as spaces and letters beyond ASCII."""
    parts = urllib.parse.urlsplit(address)
    path, query = (urllib.parse.quote(text, safe="%/:=&?~+!$,;'@()*") for text in (parts.path, parts.query))
    return parts._replace(path=path, query=query, fragment='').geturl()


def _request(
    url: str, address: str, headers: dict[str, str], opener: urllib.request.OpenerDirector
) -> http.client.HTTPResponse:
    """Send one GET for url to address; a 416 comes back as a response, every other failure is a DownloadError."""
    request = urllib.request.Request(_quoted(address), headers={'User-Agent': 'next3d', **headers})
    try:
        return opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return error
        error.close()
        kind = _ConnectionLost if error.code in _RETRY_STATUSES else DownloadError
        raise kind(_explain(url, 'a file', f'HTTP status {error.code} {error.msg}')) from error
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(getattr(error, 'reason', None), OSError) else error
        # A ValueError is a host name or redirect that cannot be parsed, or a certificate that does not verify.
        permanent = isinstance(cause, (http.client.InvalidURL, ValueError))
        kind = DownloadError if permanent else _ConnectionLost
        raise kind(_explain(url, 'an answer', f'no connection: {_reason(cause)}')) from error


def _is_page(response: http.client.HTTPResponse) -> bool:
    headers = response.headers
    return (
        response.status in (200, 206)
        and headers.get_content_type() in ('text/html', 'application/xhtml+xml')
        and headers.get_content_disposition() != 'attachment'
    )


def _request_file(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Request the file of url, past Drive's confirm page; a web page in its place is a DownloadError."""
    opener = _build_opener()
    response = _request(url, drive_download_url(url) or url, headers, opener)
    if _is_drive(url) and _is_page(response):
        with response:
            page = _read_page(url, response)
        address = _confirm_address(url, page, response.geturl())
        if address is None:
            raise _drive_page_error(url, page, response.geturl())
        response = _request(url, address, headers, opener)
        if _is_page(response):
            with response:
                raise _drive_page_error(url, _read_page(url, response), response.geturl())
    if _is_page(response) and not urllib.parse.urlsplit(url).path.lower().endswith(('.html', '.htm')):
        response.close()
        raise DownloadError(_explain(url, 'a file', 'a web page (HTML)'))
    return response


def _read_block(url: str, response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _ConnectionLost(_explain(url, 'the whole file', f'a lost connection: {_reason(error)}')) from error


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


def _sibling(path: pathlib.Path, ending: str) -> pathlib.Path:
    return path.with_name(path.name + ending)


def _sidecar(part: pathlib.Path) -> pathlib.Path:
    return _sibling(part, '.json')


def _validator(response: http.client.HTTPResponse) -> str | None:
    # If-Range does not allow weak ETags; a folded header could not be sent back.
    for value in (response.headers.get('ETag'), response.headers.get('Last-Modified')):
        if value and not value.startswith('W/') and value.isascii() and value.isprintable():
            return value
    return None


def _resume_point(part: pathlib.Path) -> tuple[_Version | None, int]:
    """Read the version and the number of bytes of a partial download; (None, 0) where there is nothing of use."""
    try:
        fields = json.loads(_sidecar(part).read_text(encoding='utf-8'))
        return _Version(fields['validator'], fields['total']), part.stat().st_size
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None, 0


def _content_range(response: http.client.HTTPResponse) -> tuple[int, int | None] | None:
    """Parse Content-Range to (first byte, length of the whole file or None)."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get('Content-Range', '').strip())
    return (int(match[1]), None if match[2] == '*' else int(match[2])) if match else None


def _continues(response: http.client.HTTPResponse, version: _Version, size: int) -> bool:
    """Tell whether the body goes on after the size bytes of version that are on disk."""
    found = _content_range(response) if response.status == 206 else None
    if found is None or found[0] != size:
        return False
    # Some servers ignore If-Range, so what they send is compared once more.
    return _validator(response) in (None, version.validator) and (
        found[1] is None or version.total is None or found[1] == version.total
    )


def _request_rest(url: str, version: _Version | None, size: int) -> tuple[http.client.HTTPResponse, int]:
    """Request what is missing; gives the response and the offset its body starts at, 0 where all is sent anew."""
    if version and version.validator and 0 < size and (version.total is None or size < version.total):
        response = _request_file(url, {'Range': f'bytes={size}-', 'If-Range': version.validator})
        if _continues(response, version, size):
            return response, size
        if response.status == 200:
            return response, 0
        response.close()
    response = _request_file(url, {})
    if response.status != 200:
        response.close()
        raise DownloadError(_explain(url, 'HTTP status 200', f'HTTP status {response.status}'))
    return response, 0


def _whole_length(response: http.client.HTTPResponse, offset: int, version: _Version | None) -> int | None:
    """Work out the length in bytes of the whole file; None where the server does not say."""
    promised = response.headers.get('Content-Length', '')
    # Content-Length has no meaning beside a transfer encoding.
    length = int(promised) if promised.isdecimal() and 'Transfer-Encoding' not in response.headers else None
    if not offset:
        return length
    totals = (_content_range(response)[1], version.total, None if length is None else offset + length)
    return next((total for total in totals if total is not None), None)


def _append_body(url: str, response: http.client.HTTPResponse, part: pathlib.Path, total: int | None) -> None:
    with open(part, 'ab') as file, tqdm.tqdm(
        desc=_readable_name(url),
        initial=file.tell(),
        total=total,
        unit='B',
        unit_scale=True,
        delay=_BAR_DELAY,
        disable=None,
    ) as bar:
        while block := _read_block(url, response):
            file.write(block)
            bar.update(len(block))


def _fetch_once(url: str, part: pathlib.Path) -> None:
    """Bring part up to the whole file with one request; what arrived before a failure stays in part."""
    version, size = _resume_point(part)
    if version and version.total == size:
        return
    response, offset = _request_rest(url, version, size)
    with response:
        total = _whole_length(response, offset, version)
        if not offset:
            # Emptied before the sidecar changes, which must never describe the bytes of another version.
            part.write_bytes(b'')
            with atomic_write(_sidecar(part), 'w') as file:
                json.dump(asdict(_Version(_validator(response), total)), file)
        _append_body(url, response, part, total)
    found = part.stat().st_size
    if total is not None and found != total:
        raise _ConnectionLost(_explain(url, f'{total} bytes', f'{found} bytes when the connection closed'))


def _fetch(url: str, part: pathlib.Path) -> None:
    for delay in (*_RETRY_DELAYS, None):
        try:
            return _fetch_once(url, part)
        except _ConnectionLost as error:
            if delay is None:
                raise DownloadError(str(error)) from error
            _LOGGER.info('%s; trying again in %.1f s', error, delay)
            time.sleep(delay)


def _lock(file: IO, url: str) -> bool:
    """Wait for the exclusive lock on file; False where the system or the file system has no locks."""
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOGGER.info('%s: waiting for another download of it to end', url)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: pathlib.Path, url: str) -> Iterator[bool]:
    with open(path, 'ab') as file:
        held = _lock(file, url)
        try:
            yield held
        finally:
            if held:
                # Closing alone would leave the lock with any process forked meanwhile.
                fcntl.flock(file, fcntl.LOCK_UN)


def _download_exclusively(url: str, final: pathlib.Path) -> None:
    # The lock file stays: removing it would let a third process lock a new file while a second holds the old one.
    with _locked(_sibling(final, '.lock'), url) as held:
        if final.exists():
            return
        # Without a lock nobody else may write this partial file, so its name is not shared and it is not resumed.
        part = _sibling(final, '.part' if held else f'.{_unique()}.part')
        try:
            _fetch(url, part)
            _publish(part, final)
            _sidecar(part).unlink(missing_ok=True)
        finally:
            if not held:
                part.unlink(missing_ok=True)
                _sidecar(part).unlink(missing_ok=True)


def _download(url: str, final: pathlib.Path) -> None:
    """Download url to final, which appears only when whole."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _download_exclusively(url, final)
    except DownloadError:
        raise
    except OSError as error:
        # Network failures are DownloadErrors by now, so this one is the disk's.
        raise DownloadError(_explain(url, f'to write it to {final}', _reason(error))) from error


# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a temporary path beside path, and put what was written there in path's place once the block succeeds.

    path: the file to write; its folder must exist; a symbolic link is written through. The temporary path does not
        exist yet and has path's suffix, for writers that open files by name. It is removed if the block raises.

    Raises ValueError where path is there and is no regular file, FileNotFoundError where the block wrote nothing.
    """
    final = pathlib.Path(os.path.realpath(path))
    if final.exists() and not final.is_file():
        raise ValueError(f'path: expected a regular file or a new name, got {os.fspath(path)!r}')
    temporary = final.with_name(f'.tmp-{_unique()}-{final.name[-_TAIL_CHARACTERS:]}')
    try:
        yield temporary
        _publish(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = 'wb') -> Iterator[IO]:
    """Yield a new file that takes path's place once the block succeeds, and vanishes if it raises.

    path: the file to write; its folder must exist; a symbolic link is written through.
    mode: 'wb', 'w', 'w+b' or 'w+', 't' and the order of the letters being free; text is UTF-8. The file's .name is
        its temporary path.

    Raises ValueError for another mode, or where path is there and is no regular file.
    """
    if 'w' not in mode or set(mode) - set('wbt+'):
        raise ValueError(f"mode: expected 'wb', 'w', 'w+b' or 'w+', got {mode!r}")
    with atomic_path(path) as temporary:
        # Exclusive creation: what somebody else put under the temporary name is never written through.
        with open(temporary, mode.replace('w', 'x'), encoding=None if 'b' in mode else 'utf-8') as file:
            yield file


def clear_leftovers(path: str | os.PathLike) -> None:
    """Remove what `atomic_path` of the same path left beside it in processes of this machine that were killed.

    Of a folder: what it left anywhere below. Files of processes that run, and of other machines that share the folder,
    stay.
    """
    final = pathlib.Path(os.path.realpath(path))
    is_folder = final.is_dir()
    ending = '.*' if is_folder else re.escape(final.name[-_TAIL_CHARACTERS:])
    name = re.compile(rf'\.tmp-{_machine()}-(\d+)-[0-9a-f]{{12}}-{ending}', re.DOTALL)
    for other in final.rglob('.tmp-*') if is_folder else final.parent.glob('.tmp-*'):
        match = name.fullmatch(other.name)
        if match and not _is_running(int(match[1])):
            other.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    if os.name != 'posix':
        return True  # Elsewhere, asking would end the process.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # Somebody else's.
    return True


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _unique() -> str:
    return f'{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:12]}'


def _publish(temporary: pathlib.Path, final: pathlib.Path) -> None:
    """Put a finished file in place: on the disk first, then under its name."""
    with open(temporary, 'rb+') as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
