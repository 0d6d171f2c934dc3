"""A headless Chromium driven through its debugging pipe with real key events, by the standard library alone."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
_FLAGS += ["--disable-component-update", "--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
_FLAGS += ["--window-size=1100,1300", "--hide-scrollbars"]
_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}
_DEADLINE_S = 60.0


class Page:
    """One tab. `console` holds what the page and the browser said of it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _DEADLINE_S
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            if answer.get("method") == "Log.entryAdded":
                self.console.append(answer["params"]["entry"]["text"])
            if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.console.append(json.dumps(answer["params"]))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._from, 2**16) if ready else b""
            assert data, "the browser does not answer"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Return once the expression is true."""
        deadline = time.monotonic() + _DEADLINE_S
        while not self.value(expression):
            assert time.monotonic() < deadline, f"{expression} never came true: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """Press and release a key, as the keyboard would."""
        code, text = _KEYS.get(key, (ord(key.upper()) if len(key) == 1 else 0, key))
        common = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 2 if ctrl else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="" if ctrl else text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def open_browser(folder: Path) -> Iterator[Page]:
    """A browser with a fresh profile under `folder`, ended afterwards."""
    commands, answers = os.pipe(), os.pipe()
    script = f'exec "$0" "$@" 3<&{commands[0]} 4>&{answers[1]}'
    command = ["/bin/bash", "-c", script, str(CHROMIUM), *_FLAGS, f"--user-data-dir={folder / 'profile'}"]
    with open(folder / "browser.log", "wb") as log:
        browser = subprocess.Popen(command, pass_fds=(commands[0], answers[1]), stdout=log, stderr=log)
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Page(commands[1], answers[0])
    finally:
        browser.terminate()
        browser.wait(30)
        os.close(commands[1])
        os.close(answers[0])
