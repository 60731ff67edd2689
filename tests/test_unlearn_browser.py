"""The page in headless Chromium and Firefox, opened from file://: it unlearns, without an error or a request.

The page runs 20 steps of npo+rt by itself under the address #selftest, and writes the result into its title.
With NPO_SCREENSHOTS=FOLDER the test also writes pictures of the page there, 1280 and 390 pixels wide.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from conftest import ROOT

PAGE = (ROOT / "docs" / "unlearn" / "index.html").as_uri()
WIDTHS, SECONDS = (1280, 390), 120
# Loaded files that are not part of the page, its visible error, its address, whether section 3 is at
# the top of the window, and whether the page can be scrolled sideways.
CHECK = """({
    requests: performance.getEntriesByType("resource").map(entry => entry.name)
        .filter(name => !/^(file|data|blob):/.test(name)),
    message: document.getElementById("message").textContent,
    hash: location.hash,
    atRuns: Math.abs(document.getElementById("runs").getBoundingClientRect().top) < 2,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth})"""


class Chromium:
    """Chromium's DevTools protocol over a pipe: JSON messages that end with a zero byte."""

    def __init__(self, folder: Path):
        (read, self.out), (self.into, write) = os.pipe(), os.pipe()

        def connect():  # the browser reads from descriptor 3 and writes to 4
            a, b = os.dup(read), os.dup(write)
            os.dup2(a, 3)
            os.dup2(b, 4)

        self.process = subprocess.Popen(
            [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu",
             "--remote-debugging-pipe", "--disable-background-networking",
             f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL)
        self.events, self.number, self.rest, self.session = [], 0, b"", {}
        [target] = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.into, 1 << 20)
            text, _, self.rest = self.rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def resize(self, width: int):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=False)

    def open(self, address: str):
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        ready = "location.protocol == 'file:' && document.readyState == 'complete'"
        while self.evaluate(ready) is not True:
            time.sleep(0.1)

    def evaluate(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self) -> str:
        return self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]

    def errors(self) -> list:
        """Console errors, uncaught exceptions, and requests that leave the machine."""
        def is_error(event: dict) -> bool:
            params = event["params"]
            level = params.get("type") if event["method"] == "Runtime.consoleAPICalled" else params.get(
                "entry", {}).get("level")
            address = params.get("request", {}).get("url", "")
            return (event["method"] == "Runtime.exceptionThrown" or level == "error"
                    or address.startswith(("http", "ws")))
        return [event for event in self.events if is_error(event)]

    def close(self):
        self.process.kill()
        self.process.wait()


class Firefox:
    """Firefox's Marionette protocol: messages are LENGTH:JSON over a local socket."""

    def __init__(self, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir()
        (folder / "user.js").write_text(f'user_pref("marionette.port", {port});\n')
        self.process = subprocess.Popen(
            [shutil.which("firefox-esr") or shutil.which("firefox"), "--headless", "--marionette",
             "--no-remote", "--profile", folder], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.number, end = 0, time.monotonic() + 60
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                assert time.monotonic() < end, "Firefox opened no Marionette port"
                time.sleep(0.2)
        self.read()
        self.call("WebDriver:NewSession")

    def read(self) -> list:
        length = b""
        while not length.endswith(b":"):
            length += self.socket.recv(1)
        data = b""
        while len(data) < int(length[:-1]):
            data += self.socket.recv(1 << 20)
        return json.loads(data)

    def call(self, method: str, **params):
        self.number += 1
        text = json.dumps([0, self.number, method, params])
        self.socket.sendall(f"{len(text)}:{text}".encode())
        _, _, error, result = self.read()
        assert error is None, error
        return result

    def resize(self, width: int):
        # Firefox makes its window no narrower than about 500 pixels.
        self.call("WebDriver:SetWindowRect", width=width, height=900)

    def open(self, address: str):
        self.call("WebDriver:Navigate", url="about:blank")
        self.call("WebDriver:Navigate", url=address)

    def evaluate(self, expression: str):
        return self.call("WebDriver:ExecuteScript", script=f"return {expression}", args=[])["value"]

    def picture(self) -> str:
        return self.call("WebDriver:TakeScreenshot", full=True)["value"]

    def errors(self) -> list:
        return []  # the page shows its own errors; Marionette has no console

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.mark.parametrize("kind, programs", [(Chromium, ["chromium"]), (Firefox, ["firefox-esr", "firefox"])],
                         ids=["chromium", "firefox"])
def test_the_page_unlearns_in_a_browser(kind, programs, tmp_path):
    if not any(map(shutil.which, programs)):
        pytest.skip(f"{' or '.join(programs)} is not installed")
    pictures, browser = os.environ.get("NPO_SCREENSHOTS"), kind(tmp_path / "profile")
    try:
        for width in WIDTHS:
            browser.resize(width)
            browser.open(f"{PAGE}#run=npo&with=npo%2Brt&step=27")
            checked = browser.evaluate(CHECK)
            assert checked == {"requests": [], "message": "", "overflow": 0, "atRuns": True,
                               "hash": "#run=npo&with=npo+rt&step=26"}, width
            if pictures:
                file = Path(pictures) / f"{kind.__name__.lower()}_{width}.png"
                file.write_bytes(base64.b64decode(browser.picture()))
        browser.resize(1280)
        browser.open(f"{PAGE}#selftest")
        end = time.monotonic() + SECONDS
        while not (title := browser.evaluate("document.title") or "").startswith("selftest"):
            assert time.monotonic() < end, browser.evaluate(CHECK)
            time.sleep(0.5)
        result, checked = json.loads(title.removeprefix("selftest")), browser.evaluate(CHECK)
        print(result)
        assert checked["requests"] == [] and checked["message"] == "" and browser.errors() == []
        assert result["probability"]["forget"] < 0.3
        assert result["probability"]["retain"] > 0.6
        if pictures:
            file = Path(pictures) / f"{kind.__name__.lower()}_live.png"
            file.write_bytes(base64.b64decode(browser.picture()))
    finally:
        browser.close()
