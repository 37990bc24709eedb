# SPDX-License-Identifier: Apache-2.0
"""Use viewer.py as a person does: its page in headless Chromium. Run as a script, it retakes docs/viewer.png.

python tests/browser.py --network=NETWORK.pkl --out=docs/viewer.png --measure=15
"""

import contextlib
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import click
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
DRIVER = shutil.which('chromedriver')
PATIENCE = 60  # Seconds: machines of CI are shared.
STILL_SECONDS = 0.5  # Longer than the viewer waits with the full picture.
OTHER = 0.03  # Mean difference in bytes that tells a change of a picture: full ones are sent without loss.
ALIKE = 0.2  # The same picture drawn in another way, as two seeds in one batch, may differ by a last place.
PIXELS = 96  # To a side of what is read of a picture.
MOVE_MS = 50  # Of each piece of a drag.
# Software GL, and no connection to other hosts.
FLAGS = ('--headless', '--no-sandbox', '--disable-dev-shm-usage', '--use-angle=swiftshader',
         '--enable-unsafe-swiftshader', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync')
# Presses a key on a slider and tells the milliseconds until the drawn pixels are others.
MEASURE = """
const [thumb, key, canvas, done] = arguments;
const small = new OffscreenCanvas(64, 48).getContext('2d', {willReadFrequently: true});
const read = () => { small.drawImage(canvas, 0, 0, 64, 48); return small.getImageData(0, 0, 64, 48).data; };
const before = read(), begin = performance.now();
const look = () => read().some((x, i) => x !== before[i]) ? done(performance.now() - begin) : setTimeout(look, 30);
thumb.dispatchEvent(new KeyboardEvent('keydown', {key: key, code: key, bubbles: true}));
look();
"""
# What the middle of the canvas shows, as much as is free of the panel, once all that has arrived is decoded and drawn.
READ = """
const [canvas, side, done] = arguments, {width, height} = canvas;
const small = new OffscreenCanvas(side, side).getContext('2d', {willReadFrequently: true});
const read = () => {
  small.drawImage(canvas, width / 2 - height / 3, height / 4, 2 * height / 3, 0.7 * height, 0, 0, side, side);
  done(Array.from(small.getImageData(0, 0, side, side).data));
};
const look = () => decoding.size ? setTimeout(look, 10) : requestAnimationFrame(() => requestAnimationFrame(read));
look();
"""
# Pixels of the canvas can be read, and which pictures are being decoded is known: viser has each at an URL meanwhile.
PREPARE = """
const get = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function(kind, options) {
  return get.call(this, kind, {...options, preserveDrawingBuffer: true});
};
const decoding = new Set(), create = URL.createObjectURL, revoke = URL.revokeObjectURL;
URL.createObjectURL = content => {
  const url = create.call(URL, content);
  if (content.type.startsWith('image/')) decoding.add(url);
  return url;
};
URL.revokeObjectURL = url => {
  decoding.delete(url);
  revoke.call(URL, url);
};
"""

LABELS = """
const labels = [...document.querySelectorAll('label[for]')].filter(x => x.offsetParent && x.textContent);
"""
HIDE_MESSAGES = """
const sheet = document.createElement('style');
sheet.textContent = '.mantine-Notifications-root { display: none }';
document.head.append(sheet);
"""


def problem() -> str | None:
    """Return why there is no browser to test with, or None."""
    for package in ('viser', 'selenium'):
        try:
            __import__(package)
        except ImportError:
            return f'{package} is not installed (requirements-dev.txt)'
    if CHROMIUM is None or DRIVER is None:
        return 'Chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)'
    return None


@contextlib.contextmanager
def served(*arguments):
    """Run viewer.py on a free port and yield its address, process and the lines that it has printed."""
    command = [sys.executable, str(ROOT / 'viewer.py'), '--port=0', '--device=cpu', *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # Shells ignore it in background jobs.
    )  # fmt: skip
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r'Serving (http://\S+)', line):
                break
        else:
            raise AssertionError(f'viewer.py ended: {"".join(lines)}')
        yield SimpleNamespace(address=found[1], process=process, lines=lines)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def is_other(a: np.ndarray, b: np.ndarray, tolerance: float = OTHER) -> bool:
    """Tell whether two pictures of `Page.picture` are not the same one."""
    return bool(np.abs(a - b).mean() > tolerance)


class Page:
    """A browser of its own on the page at an address; usable in `with`."""

    def __init__(self, address: str, downloads: pathlib.Path | None = None, size: tuple[int, int] = (1280, 900)):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f'--window-size={size[0]},{size[1]}'):
            options.add_argument(flag)
        if downloads is not None:
            options.add_experimental_option('prefs', {'download.default_directory': str(downloads)})
        options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
        self._seen = (0, None)  # Number and pixels of the picture that was read last.
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.driver.set_script_timeout(PATIENCE)
        self.driver.execute_cdp_cmd('Page.addScriptToEvaluateOnNewDocument', {'source': PREPARE})
        self.driver.get(address)
        self.driver.execute_script(HIDE_MESSAGES)
        self.until_still()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.driver.quit()

    def find(self, css: str) -> list:
        """Return the elements of a selector."""
        return self.driver.find_elements('css selector', css)

    def canvas(self):
        """Return the element that shows the avatar: there are small ones, too."""
        return max(self.find('canvas'), key=lambda x: x.get_property('width') * x.get_property('height'))

    def status(self) -> tuple[int, str]:
        """Return (number, full or coarse) of the last picture; (0, '') before the first."""
        text = self.driver.execute_script("return document.querySelector('[data-status]')?.textContent ?? ''")
        found = re.match(r'Picture (\d+): (\w+)', text)
        return (int(found[1]), found[2]) if found else (0, '')

    def until(self, is_so, what: str):
        """Wait for a function of nothing to return something true, and return that."""
        end = time.monotonic() + PATIENCE
        while not (result := is_so()):
            assert time.monotonic() < end, f'{what}: not after {PATIENCE} s; {self.status()}'
            time.sleep(0.05)
        return result

    def until_still(self) -> None:
        """Wait until a full picture has stood for a while: then nothing is due any more."""
        seen, since = None, time.monotonic()

        def is_still():
            nonlocal seen, since
            status, now = self.status(), time.monotonic()
            seen, since = status, since if status == seen else now
            return status[1] == 'full' and now - since > STILL_SECONDS

        self.until(is_still, 'a picture that stays')

    @contextlib.contextmanager
    def another_picture(self, is_one_event: bool = True):
        """Expect that the block has the page show another picture, in full in the end.

        is_one_event: the block moves a control once: the full picture is the last. Otherwise it has to stay.
        """
        number = self.status()[0]
        before = self._seen[1] if self._seen[0] == number else self.picture()
        yield
        self.until(lambda: self.status()[0] > number and self.status()[1] == 'full', f'a picture after {number}')
        if not is_one_event:
            self.until_still()
        self.until(lambda: is_other(self.picture(), before), 'other pixels')

    def kept_picture(self) -> np.ndarray:
        """Return the full picture that the page comes to rest at, for `until_shown`.

        The line of the status is written before the canvas is drawn: that may show a coarse one for a moment more.
        """
        self.until_still()

        def settled():
            picture = self.picture()
            time.sleep(STILL_SECONDS / 2)
            return (picture,) if np.array_equal(self.picture(), picture) else ()

        return self.until(settled, 'a canvas that stays')[0]

    def until_shown(self, picture: np.ndarray) -> None:
        """Wait until the page shows a picture that it has shown before."""
        self.until(lambda: not is_other(self.picture(), picture, ALIKE), 'the same pixels')

    def picture(self) -> np.ndarray:
        """Return what the page shows of the avatar [R, R, 3]: the middle of the canvas, made small."""
        number = self.status()[0]
        pixels = self.driver.execute_async_script(READ, self.canvas(), PIXELS)
        self._seen = number, np.array(pixels).reshape(PIXELS, PIXELS, 4)[..., :3]
        return self._seen[1]

    def messages(self) -> list[str]:
        """Return the texts of messages, which are kept from lying over the avatar."""
        return [x.get_property('textContent') for x in self.find('.mantine-Notification-root')]

    def tab(self, name: str) -> None:
        """Open a tab."""
        next(x for x in self.find('[role=tab]') if x.text == name).click()
        time.sleep(0.1)

    def click(self, name: str) -> None:
        """Press a button."""
        next(x for x in self.find('button') if x.text == name).click()

    def labels(self) -> list[str]:
        """Return the labels of all controls that are to be seen."""
        return self.driver.execute_script(LABELS + 'return labels.map(x => x.textContent)')

    def control(self, label: str):
        """Return the element that a label is for."""
        find = 'return document.getElementById(labels.find(x => x.textContent === arguments[0]).htmlFor)'
        return self.driver.execute_script(LABELS + find, label)

    def thumb(self, label: str):
        """Return what a person drags of a slider."""
        return self.control(label).find_element('css selector', '[role=slider]')

    def value(self, label: str) -> float:
        """Return what a slider says."""
        return float(self.thumb(label).get_attribute('aria-valuenow'))

    def press(self, label: str, *keys: str) -> None:
        """Press keys on a slider."""
        thumb = self.thumb(label)
        self.driver.execute_script('arguments[0].scrollIntoView({block: "center"})', thumb)
        thumb.send_keys(*keys)

    def tick(self, label: str) -> None:
        """Tick a box, or take the tick away."""
        self.driver.execute_script('arguments[0].click()', self.control(label))

    def choose(self, label: str, option: str) -> None:
        """Choose from a list."""
        self.control(label).click()
        shown = lambda: [x for x in self.find('[role=option]') if x.is_displayed() and x.text == option]
        self.until(shown, f'the option {option}')[0].click()

    def enter(self, label: str, number: int) -> None:
        """Put a number in place of another, all at once."""
        self.driver.execute_script('arguments[0].select()', self.control(label))
        self.control(label).send_keys(str(number))

    def text_field(self, label: str):
        """Return the text field beside a label."""
        found = self.driver.execute_script(LABELS + 'return labels.find(x => x.textContent === arguments[0])', label)
        return found.find_element('xpath', './ancestor::div[.//input][1]//input')

    def drag(self, right: int, down: int) -> None:
        """Drag the mouse over the avatar."""
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.driver, duration=MOVE_MS).move_to_element(self.canvas()).click_and_hold()
        for _ in range(5):
            chain = chain.move_by_offset(right // 5, down // 5)
        chain.release().perform()

    def seconds_to_picture(self, label: str, count: int) -> list[float]:
        """Return the seconds from a slider's change to other pixels on the page, `count` times."""
        thumb, seconds = self.thumb(label), []
        for number in range(count):
            self.until_still()
            key = 'Home' if number % 2 else 'End'
            seconds.append(self.driver.execute_async_script(MEASURE, thumb, key, self.canvas()) / 1000)
        self.until_still()
        return seconds

    def hosts(self) -> set[str]:
        """Return the hosts that the page has asked for something."""
        import json

        messages = (json.loads(entry['message'])['message'] for entry in self.driver.get_log('performance'))
        urls = (m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent')
        return {url.split('/')[2] for url in urls if re.match(r'(http|ws)s?:', url)}


@click.command()
@click.option('--network', required=True)
@click.option('--out', default='docs/viewer.png', show_default=True)
@click.option('--measure', type=int, default=0, help='Times that a slider is moved for the median time to a picture.')
@click.option('--seed', type=int, default=0)
def main(network, out, measure, seed):
    """Take docs/viewer.png, and measure how long a slider's change takes to be seen."""
    server = served(f'--network={network}', f'--seed={seed}')
    with server as running, Page(running.address, size=(1280, 880)) as page:
        page.tab('Face')
        if measure:
            for label in ('Jaw', 'mouth smile left'):
                seconds = page.seconds_to_picture(label, measure)
                print(f'{label}: median {statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f}')
            page.click('Reset face')
            page.until_still()
        page.press('Jaw', *['\ue014'] * 25)
        for side in ('left', 'right'):
            page.press(f'mouth smile {side}', *['\ue014'] * 60)
        page.driver.execute_script('arguments[0].scrollIntoView({block: "end"})', page.control('Jaw'))
        page.drag(25, 10)
        page.until_still()
        page.driver.save_screenshot(out)


if __name__ == '__main__':
    main()
