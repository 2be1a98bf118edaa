"""A headless Chromium over the pipes of its DevTools protocol (https://chromedevtools.github.io/devtools-protocol/)."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PATIENCE_S = 20.0
"""Until something that must happen soon counts as never: no measurement."""

IDLE = "running.size === 0"
READY = 'byId("model").options.length > 0'
"""Conditions of the page: no answer is being written; it knows the server's model."""

_KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}
SHIFT = 8


class Page:
    """One tab.

    Args:
        beside: another tab of the same user; a user of its own without, for whom nothing is kept yet.

    Attributes:
        requests: addresses it asked the network for.
        bodies: of what it posted.
        complaints: errors, refusals of its policy, and whatever it wrote to its console.
    """

    def __init__(self, browser: Browser, beside: Page | None = None) -> None:
        self._browser = browser
        self.user: str = beside.user if beside else browser.call("Target.createBrowserContext")["browserContextId"]
        target = browser.call("Target.createTarget", url="about:blank", browserContextId=self.user)["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.requests: list[str] = []
        self.bodies: list[Any] = []
        self.complaints: list[str] = []
        browser.pages[self._session] = self
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        return self._browser.call(method, self._session, **parameters)

    def hear(self, method: str, about: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
            if about["request"].get("postData"):
                self.bodies.append(json.loads(about["request"]["postData"]))
        elif method == "Log.entryAdded" and about["entry"]["source"] != "network":
            self.complaints.append(about["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str([part.get("value") for part in about["args"]]))

    def show(self, width: int, height: int, *, is_phone: bool = False, scheme: str = "light") -> None:
        """As on a screen of that many CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=is_phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait('document.readyState === "complete" && location.href !== "about:blank"')

    def run(self, script: str) -> Any:
        """The value of an expression, awaited; as JSON carries it."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in reply:
            details = reply["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description", details["text"]))
        return reply["result"].get("value")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not self.run(condition):
            assert time.monotonic() < end, f"{condition}: not after {PATIENCE_S} s; {self.complaints}"
            time.sleep(0.02)

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        code, text = _KEYS[key]
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if kind == "keyDown" and text else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind, key=key, code=key, windowsVirtualKeyCode=code, modifiers=modifiers, **typed,
            )  # fmt: skip

    def picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


class Browser:
    """The program; its pages by session."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers, self._rest = itertools.count(1), b""
        self.pages: dict[str, Page] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == number:
                assert "error" not in found, f"{method}: {found['error']}"
                return found["result"]
            if found.get("sessionId") in self.pages:
                self.pages[found["sessionId"]].hear(found["method"], found["params"])

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], PATIENCE_S)[0], "the browser says nothing"
            read = os.read(self._answers, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser of its own."""
    assert CHROMIUM is not None
    hears, commands = os.pipe()
    answers, says = os.pipe()
    # The protocol is on descriptors 3 and 4.
    pipes = f'exec "$0" "$@" 3</dev/fd/{hears} 4>/dev/fd/{says}'
    options = (
        "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--hide-scrollbars", f"--user-data-dir={profile}",
    )  # fmt: skip
    process = subprocess.Popen(
        ["sh", "-c", pipes, CHROMIUM, *options],
        pass_fds=(hears, says),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(hears)
    os.close(says)
    browser = Browser(commands, answers)
    try:
        yield browser
        browser.call("Browser.close")
    finally:
        os.close(commands)
        os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(page: Page, text: str, **settings: Any) -> str:
    """Send a message as one does at the keyboard; the answer, once it is whole."""
    page.run(f"current.settings = {json.dumps({'temperature': 0, 'max_tokens': 8} | settings)}")
    page.run('byId("draft").focus()')
    page.write(text)
    page.press("Enter")
    page.wait(f"{IDLE} && branch(current).at(-1)?.role === 'assistant'")
    return str(page.run("branch(current).at(-1).text"))


def click(page: Page, label: str, place: str = "document") -> None:
    """The last button that is called so."""
    found = f"[...{place}.querySelectorAll('button')].findLast((each) => (each.ariaLabel ?? each.textContent) === {label!r})"
    page.run(f"{found}.click()")
