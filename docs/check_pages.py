"""Open every page of the built site in headless Chromium: at two widths, in both themes.

python docs/check_pages.py docs/_build/html

A page fails if it scrolls sideways, logs an error, asks another host for something, leaves a formula undrawn, or links
to a page or an anchor that does not exist. Without Chromium only links are checked. The script speaks the DevTools
protocol through a pipe and needs nothing else: the environment variable ``CHROMIUM`` names another program.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

WIDTHS = (390, 1400)
THEMES = ("light", "dark")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


# -- links -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The anchors and the links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note what an element defines and where it leads."""
        found = {name: value for name, value in attributes if value}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag in ("a", "link", "script", "img", "source"):
            self.links |= {found[name] for name in ("href", "src") if name in found}


def broken_links(folder: Path) -> Iterator[str]:
    """Every link to a file or an anchor that is not there."""
    pages = {path: Page(path) for path in sorted(folder.rglob("*.html"))}
    for path, page in pages.items():
        for link in sorted(page.links):
            address, anchor = urldefrag(link)
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            place = unquote(urlsplit(address).path)
            target = (path.parent / place).resolve() if place else path
            if not target.exists():
                yield f"{path.relative_to(folder)} links to {link}, which does not exist"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{path.relative_to(folder)} links to {link}, an anchor that does not exist"


# -- a browser ---------------------------------------------------------------------------------------------------------


class Browser:
    """A tab of headless Chromium.

    Args:
        program: What to run.
        profile: An empty folder.
    """

    def __init__(self, program: str, profile: str) -> None:
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--remote-debugging-pipe", "--no-first-run", "--disable-dev-shm-usage", "about:blank"]
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (from_us, to_us)]  # out of the way of 3 and 4

        def attach() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            command, preexec_fn=attach, pass_fds=(3, 4), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (from_us, to_us, *ends):
            os.close(end)
        self._out, self._in = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb")
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Open a tab."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        characters = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium has ended")
            characters += byte
        return json.loads(characters)

    def open(self, address: str) -> None:
        """Load a page, until it and its formulas are drawn."""
        self.events.clear()
        self("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        self.evaluate("window.MathJax?.startup?.promise?.then(() => 0) ?? 0")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        found = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def close(self) -> None:
        """End Chromium."""
        self._process.terminate()
        self._process.wait()
        self._out.close()
        self._in.close()


OVERFLOWING = """(() => {
    const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    if (wide <= 1) return '';
    const out = [...document.querySelectorAll('main *, article *')].filter(
        e => e.getBoundingClientRect().right > innerWidth + 1
             && !e.closest('.table-wrapper, pre, mjx-container, .math'));
    return wide + ' px, e.g. ' + (out.length ? out[0].tagName + '.' + out[0].className : 'unknown');
})()"""
RAW = """[...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length
    + document.querySelectorAll('[data-mjx-error], mjx-merror').length"""
UNNAMED = r"""[...document.querySelectorAll('article img')].filter(
    e => !e.closest('.sphx-glr-thumbcontainer') && (!e.alt.trim() || /[$\\]/.test(e.alt))).length"""


def complaints(browser: Browser, page: Path) -> Iterator[str]:
    """What is wrong with a page."""
    browser.open(page.resolve().as_uri())
    for event in browser.events:
        method, found = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            yield f"an exception: {found['exceptionDetails'].get('exception', {}).get('description', found)}"
        elif method == "Log.entryAdded" and found["entry"]["level"] == "error":
            yield f"an error in the console: {found['entry']['text']} {found['entry'].get('url', '')}"
        elif method == "Runtime.consoleAPICalled" and found["type"] == "error":
            yield f"an error in the console: {found['args'][0].get('value')}"
        elif method == "Network.requestWillBeSent":
            address = found["request"]["url"]
            if urlsplit(address).scheme not in ("file", "data", "about", "blob"):
                yield f"a request to another host: {address}"
    if raw := browser.evaluate(RAW):
        yield f"{raw} formulas are not drawn"
    if unnamed := browser.evaluate(UNNAMED):
        yield f"{unnamed} figures have no alt text, or one with LaTeX in it"
    for theme in THEMES:
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        for width in WIDTHS:
            browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            if wide := browser.evaluate(OVERFLOWING):
                yield f"it scrolls sideways at {width} px in the {theme} theme by {wide}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a site.

    Returns:
        1 if something is wrong, else 0.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the site was built")
    options = parser.parse_args(arguments)
    found = list(broken_links(options.folder))
    print(*found, sep="\n", end="\n" if found else "")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        print("Chromium is not installed: only links were checked")
        return int(bool(found))
    pages = sorted(options.folder.rglob("*.html"))
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        try:
            browser.begin()
            for page in pages:
                for complaint in complaints(browser, page):
                    found.append(complaint)
                    print(f"{page.relative_to(options.folder)}: {complaint}", flush=True)
        finally:
            browser.close()
    print(f"{len(pages)} pages, {len(WIDTHS)} widths, {len(THEMES)} themes: {len(found) or 'no'} complaints")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
