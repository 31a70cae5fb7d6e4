"""A headless Chromium, driven over its pipe: a page at a width and a colour scheme, what it holds, a picture of it."""

import base64
import contextlib
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "about:blank",
)  # fmt: skip
# The pipe's ends must be file descriptors 3 and 4 of the browser.
_PLUG = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 13); os.dup2(w, 14); os.dup2(13, 3); " \
        "os.dup2(14, 4); os.execvp(sys.argv[3], sys.argv[3:])"  # fmt: skip


def installed():
    """Returns the path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one tab, which keeps what the page logged and what it asked the network for."""

    def __init__(self, process, to, back):
        self._process, self._to, self._back, self._rest = process, to, back, b""
        self._numbers, self._session = itertools.count(1), {}
        self._events = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        """Sends one command of the DevTools protocol and waits for its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self, seconds=60):
        deadline = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._back], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self._back, 1 << 20)
            if not read:
                raise EOFError("the browser ended")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, url, *, width=1280, height=900, dark=False):
        """Loads a page; a narrow one as a phone would."""
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media="screen", features=[scheme])
        self._events.clear()
        self.send("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            self._events.append(self._receive())

    def evaluate(self, script):
        """Returns the value of a script's expression."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
        return found["result"].get("value")

    def complaints(self):
        """Returns what the page wrote to the console, and what the browser logged about it."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
        said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event["params"] for event in self._events if event.get("method") in said]

    def requests(self):
        """Returns the addresses that were asked for."""
        sent = [event for event in self._events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def picture(self, path, *, whole=True):
        """Writes a PNG of the page, all of it or what a window shows."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        pathlib.Path(path).write_bytes(base64.b64decode(shot["data"]))
        return path


@contextlib.contextmanager
def started():
    """Starts a browser with a profile of its own, and ends it."""
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        plugged = [sys.executable, "-c", _PLUG, str(commands_out), str(answers_in)]
        process = subprocess.Popen(
            [*plugged, installed(), f"--user-data-dir={profile}", *_FLAGS],
            pass_fds=(commands_out, answers_in), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands_out)
        os.close(answers_in)
        try:
            browser = Browser(process, commands_in, answers_out)
            yield browser
            with contextlib.suppress(EOFError, OSError):
                browser.send("Browser.close")
        finally:
            process.kill()
            process.wait()
            os.close(commands_in)
            os.close(answers_out)
