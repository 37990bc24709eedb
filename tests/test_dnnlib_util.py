# SPDX-License-Identifier: Apache-2.0
"""Owns the tests of dnnlib.util: paths and URLs, the download cache (against a local server), atomic writes."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

from dnnlib import util

ROOT = pathlib.Path(__file__).resolve().parents[1]
BODY = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
DRIVE_ID = '1AbC_dEf-GhIjKlMnOpQrStUvWxYz01234'
DRIVE_LINK = f'https://drive.google.com/file/d/{DRIVE_ID}/view?usp=sharing'
FETCH_SCRIPT = """
import logging, sys
from dnnlib import util
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format='%(message)s')
with util.open_url(sys.argv[1], sys.argv[2]) as file:
    sys.stdout.buffer.write(file.read())
"""


class Site:
    """A web server on 127.0.0.1 whose answers are functions of the request handler, by path."""

    def __init__(self):
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self):
                site.requests.append((self.path, dict(self.headers)))
                with contextlib.suppress(ConnectionError):
                    site.routes[urllib.parse.urlsplit(self.path).path](self)

            def log_message(self, *_):
                pass

        self.routes = {}
        self.requests = []
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def ranges(self):
        """The Range header of each request so far, None where there was none."""
        return [headers.get('Range') for _, headers in self.requests]


def send(handler, status, headers, body=b''):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


class File:
    """A file as a well-behaved server gives it out, except for the faults asked for."""

    def __init__(self, body=BODY, tag='"one"', ranges=True, cuts=(), hold=None, honour_if_range=True, headers=None):
        self.body, self.tag, self.ranges, self.honour_if_range = body, tag, ranges, honour_if_range
        self.cuts = list(cuts)  # Bytes of body after which the first, second, ... answer breaks off.
        self.hold = hold  # An event that each answer waits for in the middle of its body.
        self.headers = headers or {}

    def __call__(self, handler):
        start = self.start(handler.headers)
        headers = {'Content-Length': len(self.body) - start, **({'ETag': self.tag} if self.tag else {}), **self.headers}
        if start >= len(self.body):
            return send(handler, 416, {'Content-Range': f'bytes */{len(self.body)}', 'Content-Length': 0})
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(self.body) - 1}/{len(self.body)}'
        rest = self.body[start:]
        middle = self.cuts.pop(0) if self.cuts else None if self.hold is None else len(rest) // 2
        send(handler, 206 if start else 200, headers, rest[:middle])
        if self.hold is not None:
            handler.wfile.flush()
            assert self.hold.wait(10)
            handler.wfile.write(rest[middle:])

    def start(self, request):
        asked = re.fullmatch(r'bytes=(\d+)-', request.get('Range', ''))
        if not asked or not self.ranges:
            return 0
        if self.honour_if_range and request.get('If-Range') not in (self.tag, self.headers.get('Last-Modified')):
            return 0
        return int(asked[1])


@pytest.fixture
def site(monkeypatch):
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(util, '_RETRY_DELAYS', (0.01, 0.01, 0.01))
    server = Site()
    yield server
    server.close()


def fetch(url, cache):
    with util.open_url(url, cache) as file:
        return file.read()


def downloads(cache):
    """The names in the cache other than lock files."""
    return sorted(path.name for path in (cache / 'downloads').glob('*') if path.suffix != '.lock')


def leave_partial(site, cache, path, kept, **faults):
    """Leave a partial download of `kept` bytes behind, as an interrupted process does."""
    site.routes[path] = File(cuts=[kept], **faults)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, '_RETRY_DELAYS', ())
        with pytest.raises(util.DownloadError):
            fetch(site.url + path, cache)
    site.requests.clear()
    part = util.cache_path(site.url + path, cache).with_name(util.cache_path(site.url + path, cache).name + '.part')
    assert part.read_bytes() == BODY[:kept]
    return part


def start_fetching(url, cache):
    command = [sys.executable, '-c', FETCH_SCRIPT, url, str(cache)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, 'waited for 10 s in vain'
        time.sleep(0.01)


# Paths and URLs


def test_local_path_and_file_url_open_the_file(tmp_path):
    path = tmp_path / 'a b%20c.bin'
    path.write_bytes(b'abcdef')
    for name in (path, str(path), path.as_uri(), path.as_uri().replace('file://', 'file://localhost')):
        with util.open_url(name) as file:
            file.seek(2)
            assert file.read() == b'cdef'


@pytest.mark.parametrize('as_url', [False, True])
def test_missing_local_path_is_named(tmp_path, as_url):
    path = tmp_path / 'absent.pkl'
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        util.open_url(path.as_uri() if as_url else path)


@pytest.mark.parametrize(
    'url, named',
    [('ftp://127.0.0.1/a', "'ftp'"), ('S3://bucket/a', "'s3'"), ('file://server/a', "'server'"), ('http:///a', 'host')],
)
def test_other_urls_are_refused(tmp_path, url, named):
    with pytest.raises(ValueError, match=named):
        util.open_url(url, tmp_path)


def test_is_url():
    accepted = ['http://a/b', 'HTTPS://a/b', 'file:///a', 'file:/a']
    others = ['a/b', '/a/b', 'ftp://a/b', 'C:/a', 'C://a', 'http', 'http:a', './http://a', 'file', '']
    assert [text for text in accepted + others if util.is_url(text)] == accepted


def test_cache_folder_is_chosen_in_order(monkeypatch, tmp_path):
    folders = []
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('NEXT3D_CACHE_DIR', str(tmp_path / 'own'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    folders.append(util.cache_path('http://a/b', tmp_path / 'given').parent)
    folders.append(util.cache_path('http://a/b').parent)
    monkeypatch.setenv('NEXT3D_CACHE_DIR', '')
    folders.append(util.cache_path('http://a/b').parent)
    monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
    folders.append(util.cache_path('http://a/b').parent)
    expected = ['given/downloads', 'own/downloads', 'xdg/next3d/downloads', 'home/.cache/next3d/downloads']
    assert folders == [tmp_path / name for name in expected]
    assert not list(tmp_path.iterdir())


def test_cache_path_tells_urls_apart():
    urls = ['http://a/b.pkl', 'http://a/c/b.pkl', 'http://a/b.pkl?v=2', 'https://a/b.pkl', 'http://a/b.pkl#part']
    paths = [util.cache_path(url, '/cache') for url in urls]
    assert len(set(paths)) == 4 and paths[0] == paths[4]
    assert all(path.name.endswith('-b.pkl') for path in paths)


@pytest.mark.parametrize(
    'tail',
    ['..', '..%2f..%2fpasswd', '..%5c..%5cwin.ini', '%00', 'a%0Ab', '~root', '-rf', 'x' * 4000, '', '%F0%9F%92%A9'],
)
def test_hostile_names_stay_in_the_cache_folder(tail):
    path = util.cache_path('http://a/dir/' + tail, '/cache')
    assert path.parent == pathlib.Path('/cache/downloads')
    assert re.fullmatch(r'[0-9a-f]{32}(-[A-Za-z0-9_][A-Za-z0-9._-]*)?', path.name)
    assert len(path.name) < 120


def test_hostile_name_is_downloaded_under_its_safe_name(site, tmp_path):
    url = f'{site.url}/x/..%2f..%2f..%2fescaped.pkl'
    site.routes['/x/..%2f..%2f..%2fescaped.pkl'] = File()
    assert fetch(url, tmp_path / 'cache') == BODY
    assert downloads(tmp_path / 'cache') == [util.cache_path(url, tmp_path / 'cache').name]
    assert [path.name for path in tmp_path.iterdir()] == ['cache']


# Google Drive


@pytest.mark.parametrize(
    'link',
    [
        f'https://drive.google.com/file/d/{DRIVE_ID}/view?usp=sharing',
        f'http://drive.google.com/file/d/{DRIVE_ID}',
        f'https://drive.google.com/file/u/1/d/{DRIVE_ID}/edit',
        f'https://drive.google.com/a/example.org/file/d/{DRIVE_ID}/preview#top',
        f'https://drive.google.com/open?usp=drive_copy&id={DRIVE_ID}',
        f'https://drive.google.com/u/0/uc?id={DRIVE_ID}&export=download',
        f'https://DRIVE.google.com/uc?export=view&id={DRIVE_ID}&confirm=t',
        f'https://docs.google.com/uc?export=download&id={DRIVE_ID}',
        f'https://docs.google.com/file/d/{DRIVE_ID}/edit?usp=sharing',
        f'https://drive.usercontent.google.com/download?id={DRIVE_ID}&export=download&authuser=0',
    ],
)
def test_drive_links_lead_to_the_file(link):
    direct = f'https://drive.google.com/uc?export=download&id={DRIVE_ID}'
    assert util.drive_download_url(link) == direct
    assert util.cache_path(link, '/cache') == util.cache_path(direct, '/cache')
    keyed = link.partition('#')[0] + ('&' if '?' in link else '?') + 'resourcekey=0-aB_c'
    assert util.drive_download_url(keyed) == direct + '&resourcekey=0-aB_c'


@pytest.mark.parametrize(
    'link',
    [
        f'https://drive.google.com/drive/folders/{DRIVE_ID}',
        f'https://docs.google.com/document/d/{DRIVE_ID}/edit',
        'https://drive.google.com/uc?export=download',
        'https://drive.google.com/open?id=a/../b',
        f'https://drive.google.com.example.org/uc?id={DRIVE_ID}',
        f'https://example.org/file/d/{DRIVE_ID}/view',
        f'ftp://drive.google.com/file/d/{DRIVE_ID}/view',
        f'file/d/{DRIVE_ID}',
    ],
)
def test_other_links_are_no_drive_files(link):
    assert util.drive_download_url(link) is None


def page(text, status=200):
    body = f'<!DOCTYPE html><html><head><style>quota</style></head><body>{text}</body></html>'.encode()
    return lambda handler: send(handler, status, {'Content-Type': 'text/html', 'Content-Length': len(body)}, body)


@pytest.fixture
def drive(site, monkeypatch):
    """The site standing in for Drive: the share link leads to its /uc."""
    monkeypatch.setattr(util, 'drive_download_url', lambda url: f'{site.url}/uc?id=ID' if 'google' in url else None)
    return site


def test_drive_confirm_page_is_followed(drive, tmp_path):
    drive.routes['/uc'] = page(
        '<form action="/search"><input type="hidden" name="wrong" value="1"></form>'
        '<form id="download-form" action="/download?kept=1" method="get">'
        '<input type="submit" name="button" value="Download anyway"/>'
        '<input type="hidden" name="id" value="ID"><input type="hidden" name="confirm" value="t&amp;x">'
        '</form><input type="hidden" name="outside" value="1">'
    )
    drive.routes['/download'] = File(headers={'Content-Type': 'application/octet-stream'})
    assert fetch(DRIVE_LINK, tmp_path) == BODY
    assert [path for path, _ in drive.requests] == ['/uc?id=ID', '/download?kept=1&id=ID&confirm=t%26x']


def test_drive_confirm_form_is_sent_with_the_cookies_of_its_page(drive, tmp_path):
    body = b'<form action="/download"><input type="hidden" name="confirm" value="t"></form>'
    headers = {'Content-Type': 'text/html', 'Content-Length': len(body), 'Set-Cookie': 'warned=yes; Path=/'}
    drive.routes['/uc'] = lambda handler: send(handler, 200, headers, body)
    drive.routes['/download'] = File()
    assert fetch(DRIVE_LINK, tmp_path) == BODY
    assert [sent.get('Cookie') for _, sent in drive.requests] == [None, 'warned=yes']


def test_drive_error_names_the_link_itself(drive, tmp_path):
    drive.routes['/uc'] = page('', 404)
    with pytest.raises(util.DownloadError, match='404') as caught:
        fetch(DRIVE_LINK, tmp_path)
    assert str(caught.value).startswith(f'{DRIVE_LINK}: expected ')


def test_drive_file_that_is_html_itself_is_a_file(drive, tmp_path):
    attached = {'Content-Type': 'text/html', 'Content-Disposition': 'attachment; filename="a.html"'}
    drive.routes['/uc'] = File(headers=attached)
    assert fetch(DRIVE_LINK, tmp_path) == BODY


def test_drive_resumes_past_the_confirm_page(drive, tmp_path):
    drive.routes['/uc'] = page('<form action="/download"><input type="hidden" name="confirm" value="t"></form>')
    drive.routes['/download'] = File(cuts=[100_000])
    assert fetch(DRIVE_LINK, tmp_path) == BODY
    assert drive.ranges() == [None, None, 'bytes=100000-', 'bytes=100000-']


@pytest.mark.parametrize(
    'text, words',
    [
        ('Sorry, too many users have viewed or downloaded this file recently.', 'quota'),
        ('<form action="/login"><input type="hidden" name="continue" value="x">Sign in</form>', 'sign-in'),
        ('<script>var quota = "sign in";</script>Something\n else', 'found a web page: Something else'),
        ('<form id="download-form" action="/uc"><input type="hidden" name="confirm" value="t">again', 'again'),
        ('<form id="download-form" action="file:///etc/hostname"></form>', 'redirect to file:///etc/hostname'),
    ],
)
def test_other_drive_pages_are_errors(drive, tmp_path, text, words):
    drive.routes['/uc'] = page(text)
    with pytest.raises(util.DownloadError, match=re.escape(words)) as caught:
        fetch(DRIVE_LINK, tmp_path)
    assert str(caught.value).startswith(DRIVE_LINK) and '\n' not in str(caught.value)
    assert downloads(tmp_path) == []
    assert all(path.startswith('/uc') for path, _ in drive.requests)


# Downloads


def test_download_then_cache_hit_without_request(site, tmp_path):
    site.routes['/a.pkl'] = File()
    with util.open_url(f'{site.url}/a.pkl', tmp_path) as file:
        assert file.seekable() and file.read() == BODY
    assert len(site.requests) == 1
    lock = tmp_path / 'downloads' / (util.cache_path(f'{site.url}/a.pkl').name + '.lock')
    lock.unlink()
    assert fetch(f'{site.url}/a.pkl', tmp_path) == BODY
    assert len(site.requests) == 1
    assert not lock.exists()
    assert downloads(tmp_path) == [util.cache_path(f'{site.url}/a.pkl').name]


def test_bare_characters_are_quoted(site, tmp_path):
    site.routes['/a%20%C3%A9%25.pkl'] = File()
    assert fetch(f'{site.url}/a é%25.pkl?q=a b#part', tmp_path) == BODY
    assert site.requests[0][0] == '/a%20%C3%A9%25.pkl?q=a%20b'


def test_empty_file_is_a_file(site, tmp_path):
    site.routes['/a'] = lambda handler: send(handler, 200, {'Content-Length': 0})
    assert fetch(f'{site.url}/a', tmp_path) == b''


def test_cut_connection_is_resumed_within_one_call(site, tmp_path):
    site.routes['/a'] = File(cuts=[150_000, 50_000])
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == [None, 'bytes=150000-', 'bytes=200000-']
    assert site.requests[1][1]['If-Range'] == '"one"'


def test_partial_download_is_resumed_by_the_next_call(site, tmp_path):
    leave_partial(site, tmp_path, '/a', 120_000)
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == ['bytes=120000-']
    assert downloads(tmp_path) == [util.cache_path(f'{site.url}/a').name]


def test_killed_download_is_resumed_by_the_next_call(site, tmp_path):
    release = threading.Event()
    site.routes['/a'] = File(hold=release)
    part = tmp_path / 'downloads' / (util.cache_path(f'{site.url}/a').name + '.part')
    with start_fetching(f'{site.url}/a', tmp_path) as process:
        # What Python still buffers at the kill is lost, so not every byte sent needs to be there.
        wait_for(lambda: part.exists() and part.stat().st_size >= 100_000)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    release.set()
    kept = part.stat().st_size
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == [None, f'bytes={kept}-']


def test_answer_for_another_range_restarts(site, tmp_path):
    leave_partial(site, tmp_path, '/a', 120_000)

    def off_by_one(handler):
        if 'Range' not in handler.headers:
            return File()(handler)
        headers = {'Content-Range': 'bytes 119999-299998/300000', 'Content-Length': 180_000, 'ETag': '"one"'}
        send(handler, 206, headers, BODY[119_999:299_999])

    site.routes['/a'] = off_by_one
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == ['bytes=120000-', None]


def test_file_given_in_pieces_is_put_in_place_when_whole(site, tmp_path):
    def pieces(handler):
        asked = handler.headers.get('Range')
        if asked is None:
            handler.protocol_version = 'HTTP/1.1'
            headers = {'Transfer-Encoding': 'chunked', 'Connection': 'close', 'ETag': '"one"'}
            return send(handler, 200, headers, b'4\r\nabcd\r\n')
        start = int(asked[6:-1])
        headers = {'Content-Range': f'bytes {start}-{start + 1}/8', 'Content-Length': 2, 'ETag': '"one"'}
        send(handler, 206, headers, b'abcdefgh'[start : start + 2])

    site.routes['/a'] = pieces
    assert fetch(f'{site.url}/a', tmp_path) == b'abcdefgh'
    assert site.ranges() == [None, 'bytes=4-', 'bytes=6-']


def test_server_without_ranges_restarts(site, tmp_path):
    site.routes['/a'] = File(cuts=[150_000], ranges=False)
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == [None, 'bytes=150000-']


@pytest.mark.parametrize('honour', [True, False], ids=['If-Range honoured', 'If-Range ignored'])
def test_changed_etag_restarts(site, tmp_path, honour):
    leave_partial(site, tmp_path, '/a', 120_000)
    site.routes['/a'] = File(body=OTHER, tag='"two"', honour_if_range=honour)
    assert fetch(f'{site.url}/a', tmp_path) == OTHER
    assert site.ranges() == ['bytes=120000-'] + ([] if honour else [None])


def test_file_that_shrank_restarts_after_416(site, tmp_path):
    leave_partial(site, tmp_path, '/a', 120_000)
    site.routes['/a'] = File(body=OTHER[:1000], tag='"two"', honour_if_range=False)
    assert fetch(f'{site.url}/a', tmp_path) == OTHER[:1000]
    assert site.ranges() == ['bytes=120000-', None]


def test_last_modified_serves_where_the_etag_is_weak(site, tmp_path):
    date = 'Wed, 01 Jan 2025 00:00:00 GMT'
    site.routes['/a'] = File(tag='W/"weak"', cuts=[150_000], headers={'Last-Modified': date})
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == [None, 'bytes=150000-']
    assert site.requests[1][1]['If-Range'] == date


def test_without_etag_or_date_nothing_is_resumed(site, tmp_path):
    leave_partial(site, tmp_path, '/a', 120_000, tag=None)
    site.routes['/a'] = File(body=OTHER, tag=None, honour_if_range=False)
    assert fetch(f'{site.url}/a', tmp_path) == OTHER
    assert site.ranges() == [None]


@pytest.mark.parametrize('text', ['', '{"etag": 1', '[]', '{}'])
def test_damaged_sidecar_restarts(site, tmp_path, text):
    part = leave_partial(site, tmp_path, '/a', 120_000)
    part.with_name(part.name + '.json').write_text(text)
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == [None]


def test_partial_file_that_is_whole_is_put_in_place(site, tmp_path):
    part = leave_partial(site, tmp_path, '/a', 120_000)
    part.write_bytes(BODY)
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.requests == []


def test_partial_file_that_is_too_long_restarts(site, tmp_path):
    part = leave_partial(site, tmp_path, '/a', 120_000)
    part.write_bytes(BODY + b'more')
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == [None]


def test_new_version_replaces_the_sidecar(site, tmp_path):
    part = leave_partial(site, tmp_path, '/a', 120_000)
    site.routes['/a'] = File(body=OTHER, tag='"two"', cuts=[7000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, '_RETRY_DELAYS', ())
        with pytest.raises(util.DownloadError):
            fetch(f'{site.url}/a', tmp_path)
    assert part.read_bytes() == OTHER[:7000]
    assert json.loads(part.with_name(part.name + '.json').read_text())['validator'] == '"two"'


def test_short_body_is_never_put_in_place(site, tmp_path):
    site.routes['/a'] = File(ranges=False, cuts=[299_999] * 9)
    with pytest.raises(util.DownloadError, match='expected 300000 bytes, found 299999 bytes') as caught:
        fetch(f'{site.url}/a', tmp_path)
    assert type(caught.value) is util.DownloadError
    assert len(site.requests) == 4
    name = util.cache_path(f'{site.url}/a').name
    assert downloads(tmp_path) == [name + '.part', name + '.part.json']


def test_cut_chunked_body_is_never_put_in_place(site, tmp_path):
    def chunked(handler):
        handler.protocol_version = 'HTTP/1.1'
        headers = {'Transfer-Encoding': 'chunked', 'Content-Length': 3, 'Connection': 'close'}
        send(handler, 200, headers, b'4\r\nabcd\r\n')
        if len(site.requests) > 2:
            handler.wfile.write(b'0\r\n\r\n')

    site.routes['/a'] = chunked
    assert fetch(f'{site.url}/a', tmp_path) == b'abcd'
    assert len(site.requests) == 3


def test_passing_server_error_is_retried(site, tmp_path):
    site.routes['/a'] = lambda handler: (page('', 503) if len(site.requests) < 3 else File())(handler)
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert len(site.requests) == 3


def test_404_is_an_error_at_once(site, tmp_path):
    site.routes['/a'] = page('gone', 404)
    with pytest.raises(util.DownloadError, match='404') as caught:
        fetch(f'{site.url}/a', tmp_path)
    assert str(caught.value).startswith(f'{site.url}/a: expected ')
    assert len(site.requests) == 1
    assert downloads(tmp_path) == []
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_refused_connection_is_an_error(site, tmp_path):
    site.close()
    with pytest.raises(util.DownloadError, match=os.strerror(errno.ECONNREFUSED)) as caught:
        fetch(f'{site.url}/a', tmp_path)
    assert str(caught.value).startswith(f'{site.url}/a: expected ') and type(caught.value) is util.DownloadError


def test_web_page_in_place_of_a_file_is_an_error(site, tmp_path):
    site.routes['/a.pkl'] = site.routes['/a.html'] = page('log in first')
    with pytest.raises(util.DownloadError, match='web page'):
        fetch(f'{site.url}/a.pkl', tmp_path)
    assert downloads(tmp_path) == []
    assert b'log in first' in fetch(f'{site.url}/a.html', tmp_path)


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_redirects_are_followed_to_http_only(site, tmp_path, status):
    targets = iter(['/b', f'file://{__file__}', 'ftp://127.0.0.1/a', 'data:,text', 'http://[broken'])
    site.routes['/a'] = lambda handler: send(handler, status, {'Location': next(targets), 'Content-Length': 0})
    site.routes['/b'] = File()
    assert fetch(f'{site.url}/a', tmp_path / 'first') == BODY
    for found in ('redirect to file:', 'redirect to ftp:', 'redirect to data:', 'Invalid'):
        with pytest.raises(util.DownloadError, match=found):
            fetch(f'{site.url}/a', tmp_path)
    assert len(site.requests) == 6
    assert downloads(tmp_path) == []


def test_redirect_from_https_back_to_http_is_refused():
    util._check_hop('u', 'http://a/b', 'https://a/b')
    util._check_hop('u', 'https://a/b', 'https://a/c')
    with pytest.raises(util.DownloadError, match='redirect to http://a/b'):
        util._check_hop('u', 'https://a/b', 'http://a/b')


def test_resuming_keeps_its_headers_over_a_redirect(site, tmp_path):
    site.routes['/a'] = lambda handler: send(handler, 302, {'Location': '/b', 'Content-Length': 0})
    site.routes['/b'] = File(cuts=[100_000])
    assert fetch(f'{site.url}/a', tmp_path) == BODY
    assert site.ranges() == [None, None, 'bytes=100000-', 'bytes=100000-']


def test_two_threads_download_once(site, tmp_path):
    release = threading.Event()
    site.routes['/a'] = File(hold=release)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(f'{site.url}/a', tmp_path)), daemon=True) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: site.requests)
    # Long enough for the other thread to send its request, if nothing held it back.
    time.sleep(0.2)
    release.set()
    for thread in threads:
        thread.join(10)
    assert found == [BODY, BODY]
    assert len(site.requests) == 1


def test_two_processes_download_once(site, tmp_path):
    release = threading.Event()
    site.routes['/a'] = File(hold=release)
    with start_fetching(f'{site.url}/a', tmp_path) as first:
        wait_for(lambda: site.requests)
        with start_fetching(f'{site.url}/a', tmp_path) as second:
            watchdog = threading.Timer(10, second.kill)
            watchdog.start()
            assert b'waiting for another download' in second.stderr.readline()
            release.set()
            outputs = [process.communicate(timeout=10)[0] for process in (first, second)]
            watchdog.cancel()
    assert [hashlib.sha256(output).digest() for output in outputs] == [hashlib.sha256(BODY).digest()] * 2
    assert len(site.requests) == 1


def test_without_locks_partial_files_are_private(site, tmp_path, monkeypatch):
    monkeypatch.setattr(util, 'fcntl', None)
    barrier = threading.Barrier(2)
    whole = File()

    def together(handler):
        barrier.wait(10)
        whole(handler)

    site.routes['/a'] = together
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(f'{site.url}/a', tmp_path)), daemon=True) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [BODY, BODY]
    site.routes['/b'] = File(ranges=False, cuts=[10] * 9)
    with pytest.raises(util.DownloadError):
        fetch(f'{site.url}/b', tmp_path)
    assert downloads(tmp_path) == [util.cache_path(f'{site.url}/a').name]


FORK_SCRIPT = """
import fcntl, os, pathlib, signal, sys, time
from dnnlib import util
path = pathlib.Path(sys.argv[1])
with util._locked(path, 'url') as held:
    child = os.fork()
    if child == 0:
        time.sleep(10)
        os._exit(0)
try:
    with open(path, 'ab') as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    sys.stdout.write(f'{held} free')
finally:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_lock_does_not_stay_with_a_forked_process(tmp_path):
    command = [sys.executable, '-c', FORK_SCRIPT, str(tmp_path / 'a.lock')]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=20, check=True).stdout == b'True free'


LIMIT_SCRIPT = """
import resource, sys
from dnnlib import util
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    util.open_url(sys.argv[1], sys.argv[2])
except util.DownloadError as error:
    sys.stdout.write(f'{error}\\n')
try:
    with util.atomic_write(sys.argv[3]) as file:
        file.write(bytes(200_000))
except OSError as error:
    sys.stdout.write(f'{error.strerror}\\n')
"""


def test_full_disk_leaves_nothing_half_written(site, tmp_path):
    site.routes['/a'] = File()
    target = tmp_path / 'out' / 'old.bin'
    target.parent.mkdir()
    target.write_bytes(b'old')
    command = [sys.executable, '-c', LIMIT_SCRIPT, f'{site.url}/a', str(tmp_path / 'cache'), str(target)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=20, check=True, text=True)
    final = util.cache_path(f'{site.url}/a', tmp_path / 'cache')
    reason = os.strerror(errno.EFBIG)
    assert ended.stdout.splitlines() == [f'{site.url}/a: expected to write it to {final}, found {reason}', reason]
    assert len(site.requests) == 1
    assert downloads(tmp_path / 'cache') == [final.name + '.part', final.name + '.part.json']
    assert target.read_bytes() == b'old' and list(target.parent.iterdir()) == [target]
    assert fetch(f'{site.url}/a', tmp_path / 'cache') == BODY
    assert site.ranges() == [None, 'bytes=100000-']


def test_progress_bar_counts_what_was_there(site, tmp_path, monkeypatch):
    bars = []

    class Bar(util.tqdm.tqdm):
        def __init__(self, **options):
            bars.append(self)
            super().__init__(**{**options, 'disable': False, 'file': open(os.devnull, 'w')})
            self.asked = options

    monkeypatch.setattr(util.tqdm, 'tqdm', Bar)
    leave_partial(site, tmp_path, '/a.pkl', 120_000)
    fetch(f'{site.url}/a.pkl', tmp_path)
    bar = bars[-1]
    for opened in bars:
        opened.fp.close()
    assert (bar.asked['initial'], bar.n, bar.total, bar.asked['desc']) == (120_000, 300_000, 300_000, 'a.pkl')
    assert bar.asked['delay'] == 2


# Atomic writes


@pytest.mark.parametrize('mode, content', [('wb', b'new'), ('w+b', b'new'), ('w', 'né'), ('w+t', 'né')])
def test_atomic_write_replaces_on_success(tmp_path, mode, content):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'old content')
    with util.atomic_write(path, mode) as file:
        file.write(content)
        file.flush()
        temporary = pathlib.Path(file.name)
        assert temporary.parent == tmp_path and temporary.exists()
        assert path.read_bytes() == b'old content'
    assert path.read_bytes() == (content if 'b' in mode else content.encode('utf-8'))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('existing', [False, True])
def test_failed_atomic_write_leaves_nothing(tmp_path, error, existing):
    path = tmp_path / 'a.bin'
    if existing:
        path.write_bytes(b'old')
    with pytest.raises(error), util.atomic_write(path) as file:
        file.write(b'half')
        raise error
    left = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    assert left == ({'a.bin': b'old'} if existing else {})
    assert file.closed


def test_atomic_write_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor):
        events.append(('fsync', os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        sync(descriptor)

    def noted_replace(source, target):
        events.append(('replace', os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, 'fsync', noted_sync)
    monkeypatch.setattr(os, 'replace', noted_replace)
    with util.atomic_write(tmp_path / 'a') as file:
        file.write(b'abc')
    inode = (tmp_path / 'a').stat().st_ino
    assert events == [('fsync', inode, 3), ('replace', inode, 3)]


def test_atomic_write_obeys_the_umask_and_symbolic_links(tmp_path):
    target = tmp_path / 'real' / 'a.bin'
    target.parent.mkdir()
    link = tmp_path / 'link.bin'
    link.symlink_to(target)
    before = os.umask(0o027)
    try:
        with util.atomic_write(link) as file:
            file.write(b'new')
    finally:
        os.umask(before)
    assert link.is_symlink() and target.read_bytes() == b'new'
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize('mode', ['rb', 'ab', 'r+', 'x', ''])
def test_atomic_write_refuses_other_modes(tmp_path, mode):
    with pytest.raises(ValueError, match='mode: expected'), util.atomic_write(tmp_path / 'a', mode):
        pass
    assert not list(tmp_path.iterdir())


def test_atomic_write_refuses_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path, tmp_path / 'pipe', '/dev/null'):
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))), util.atomic_path(path):
            pass
    with pytest.raises(FileNotFoundError), util.atomic_write(tmp_path / 'absent' / 'a'):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ['pipe']


@pytest.mark.parametrize('name', ['a.mrc', 'b.tar.gz', 'noending', 'x' * 240 + '.obj', 'é' * 120 + '.ply'])
def test_atomic_path_keeps_the_suffix_and_replaces(tmp_path, name):
    with util.atomic_path(tmp_path / name) as temporary, util.atomic_path(tmp_path / name) as other:
        assert temporary != other and temporary.parent == tmp_path and not temporary.exists()
        assert temporary.suffix == pathlib.Path(name).suffix
        temporary.write_bytes(b'first')
        other.write_bytes(b'second')
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b'first')]


def test_leftovers_of_killed_processes_are_cleared_from_a_folder(tmp_path):
    """Not those of processes that run, nor of other machines, nor other files."""
    (tmp_path / 'below').mkdir()
    with util.atomic_path(tmp_path / 'below' / 'mine.png') as mine:
        mine.touch()
        program = (
            f'import os, sys; sys.path.insert(0, {str(ROOT)!r})\nfrom dnnlib import util\n'
            f'with util.atomic_path({str(tmp_path)!r} + "/below/a b.png") as path:\n'
            '    open(path, "w"); os.kill(os.getpid(), 9)'
        )
        assert subprocess.run([sys.executable, '-c', program], timeout=60).returncode == -9
        elsewhere = mine.with_name(mine.name.replace(util._machine(), '00000000'))
        for path in (elsewhere, tmp_path / '.tmp-stats', tmp_path / 'below' / 'kept.png'):
            path.touch()
        assert len(list(tmp_path.rglob('*.png'))) == 4
        util.clear_leftovers(tmp_path)
        assert set(tmp_path.rglob('*.*')) == {mine, elsewhere, tmp_path / '.tmp-stats', tmp_path / 'below' / 'kept.png'}


def test_failed_atomic_path_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), util.atomic_path(tmp_path / 'a.obj') as temporary:
        temporary.write_bytes(b'half')
        raise RuntimeError
    with pytest.raises(FileNotFoundError, match='a.obj'), util.atomic_path(tmp_path / 'a.obj'):
        pass
    assert not list(tmp_path.iterdir())
