"""A page in chromium that a test clicks, types into and reads, over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.browser import CHROMIUM
from tests.support.processes import PATIENCE_SECONDS


class Page:
    """One page. `requests`: the address of everything it asked for; `errors`: what its scripts raised."""

    def __init__(self, told: int, tell: int) -> None:
        self._told, self._tell, self._number, self._waiting = told, tell, 0, b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        (target,) = [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session: str | None = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._tell, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)
        raise AssertionError(f"{method} was not answered")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            more = os.read(self._told, 1 << 20)
            assert more, "chromium has ended"
            self._waiting += more
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])

    def look(self, width: int = 1280, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """The size of its window in pixels, and the colours that it is asked for."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.call("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, address: str, ready: str) -> None:
        """Go there, and wait until the expression `ready` is true."""
        self.call("Page.navigate", url=address)
        self.wait(ready)

    def wait(self, expression: str) -> None:
        """Until it is true."""
        end = time.monotonic() + PATIENCE_SECONDS
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never: {expression}; errors: {self.errors}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, awaited, as JSON."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]["exception"]["description"]
        return done["result"].get("value")

    def key(self, name: str, text: str = "") -> None:
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, **more)

    def click(self, selector: str) -> None:
        """Click the middle of the first element that `selector` names, scrolled into view."""
        where = self.value(
            f"(async () => {{const one = document.querySelector({json.dumps(selector)});"
            "one.scrollIntoView({block: 'center', behavior: 'instant'});"
            "await new Promise((then) => requestAnimationFrame(() => requestAnimationFrame(then)));"
            "const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]})()"
        )
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            more = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], **more)

    def picture(self, whole: bool = True) -> bytes:
        """A PNG of the page, as long as it is, or of what its window shows."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])


@contextmanager
def browser() -> Iterator[Page]:
    """Chromium without a window, a profile or a network: every name resolves to nothing."""
    assert CHROMIUM is not None
    told, its_out = os.pipe()
    its_in, tell = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *(f"--user-data-dir={profile}", "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *("--remote-debugging-pipe", "about:blank"),
        ]
        # The protocol is spoken on file descriptors 3 and 4.
        line = f'exec "$@" 3<&{its_in} 4>&{its_out}'
        process = subprocess.Popen(
            ["bash", "-c", line, "chromium", CHROMIUM, *options], pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL
        )
        os.close(its_in)
        os.close(its_out)
        try:
            yield Page(told, tell)
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)
            os.close(told)
            os.close(tell)
