"""A real Chromium for tests, controlled with the DevTools protocol over two pipes, without a port or a library.

See https://chromedevtools.github.io/devtools-protocol/.
"""

import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.daemon import environment
from tests.support.polling import block_until

__all__ = ["WITHIN_S", "Chromium", "JavaScriptError", "Page", "find_chromium"]

WITHIN_S = 60.0  # for a step of the browser on a busy machine
_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
]  # fmt: skip
# The program reads commands from descriptor 3 and writes to 4. $0 and $1 are the descriptors of the pipes.
_START = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'


def find_chromium() -> str | None:
    """Return the path of Chromium on this machine."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class JavaScriptError(Exception):
    """A JavaScript expression threw an exception."""


class Chromium:
    """A running browser. Its processes are killed at the end of the block."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._numbers = itertools.count(1)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        commands, self._commands = os.pipe()
        self._messages, messages = os.pipe()
        program = [str(find_chromium()), *_FLAGS, f"--user-data-dir={folder}", *flags, "about:blank"]
        try:
            self._process = subprocess.Popen(
                ["bash", "-c", _START, str(commands), str(messages), *program],
                env=environment(HOME=str(folder)), pass_fds=(commands, messages), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            os.close(commands)
            os.close(messages)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its process group: all its processes
        self._process.wait()
        os.close(self._commands)
        os.close(self._messages)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Run a command and return its result.

        Raises:
            JavaScriptError: the browser refuses the command.
        """
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + WITHIN_S
        while True:
            reply = self._read(end)
            if reply.get("id") == number:
                if "error" in reply:
                    raise JavaScriptError(f"{method}: {reply['error']['message']}")
                return dict(reply["result"])
            if "method" in reply:
                self.events.append(reply)

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._messages], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._messages, 1_048_576)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, url: str, **target: Any) -> "Page":
        """Open a URL in a tab of its own and wait until it is loaded."""
        target_id = self.call("Target.createTarget", url="about:blank", **target)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target_id, flatten=True)["sessionId"]
        page = Page(self, target_id, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.go(url)
        return page

    @contextlib.contextmanager
    def page(self, url: str) -> Iterator["Page"]:
        page = self.open(url)
        try:
            yield page
        finally:
            page.close()


class Page:
    """A tab."""

    def __init__(self, browser: Chromium, target_id: str, session: str) -> None:
        self._browser = browser
        self._target_id = target_id
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target_id)

    def run(self, expression: str) -> Any:
        """Return the value of an expression, or the result of a promise.

        Raises:
            JavaScriptError: the expression throws.
        """
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise JavaScriptError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true. It may throw while another document is being loaded."""
        last: object = None

        def is_true() -> bool:
            nonlocal last
            try:
                last = self.run(expression)
            except JavaScriptError as error:
                last = error
                return False
            return bool(last)

        try:
            block_until(is_true, WITHIN_S)
        except AssertionError:
            text = self.run("document.body?.innerText")
            raise AssertionError(f"still {last}: {expression}\n{text[:2_000]}") from None

    def press(self, key: str, text: str = "") -> None:
        """Press a key and release it."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text, **_key_code(key))
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, **_key_code(key))

    def events(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of this page so far."""
        return [
            event["params"] for event in self._browser.events
            if event["method"] == method and event.get("sessionId") == self._session
        ]  # fmt: skip

    def complaints(self) -> list[str]:
        """Return what the browser logged: exceptions, violations of the policy, failed requests."""
        self.run("0")  # reads the events that have arrived
        thrown = [event["exceptionDetails"]["text"] for event in self.events("Runtime.exceptionThrown")]
        return thrown + [event["entry"]["text"] for event in self.events("Log.entryAdded")]


def _key_code(key: str) -> dict[str, int]:
    codes = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowUp": 38, "ArrowDown": 40, "/": 191}
    return {"windowsVirtualKeyCode": codes[key]}
