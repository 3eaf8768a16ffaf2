"""A headless Chromium for tests, driven over WebDriver; only the standard library is needed.

    with browser() as chromium:         # None where there is no Chromium with its driver
        chromium.open(path)
        chromium.run("return document.title")
"""
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--autoplay-policy=no-user-gesture-required")


class Chromium:
    """One window."""

    def __init__(self, base: str, profile: str):
        self.base = base
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"},
                                         method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, path, width: int = 1_024) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
        self._call("POST", "/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments):
        """The value that a script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments):
        """The value that a script hands to its last argument, a function."""
        return self._call("POST", "/execute/async", {"script": script, "args": list(arguments)})

    def press(self, selector: str, key: str) -> None:
        """A key on an element."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(found.values()))}/value", {"text": key})

    def console(self) -> list[dict]:
        """What was said on the console since the last call."""
        return self._call("POST", "/se/log", {"type": "browser"})


@contextlib.contextmanager
def browser():
    """A Chromium until the end of the block, or None."""
    if not CHROMIUM or not DRIVER:
        yield None
        return
    with socket.socket() as free, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        driver = subprocess.Popen([DRIVER, f"--port={port}", "--silent"], stdout=subprocess.DEVNULL)
        try:
            base = f"http://127.0.0.1:{port}"
            _wait_for(base)
            chromium = Chromium(base, profile)
            yield chromium
            chromium._call("DELETE", "")
        finally:
            driver.terminate()
            driver.wait()


def _wait_for(base: str) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(base + "/status", timeout=5).close()
            return
        time.sleep(0.1)
    raise OSError("the driver does not answer")
