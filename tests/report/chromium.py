"""A headless Chromium that tests drive by the DevTools protocol, over the aiohttp that lopd has."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Self

import aiohttp

# What Chromium is called in Debian and elsewhere.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# A bound that only a hang exceeds.
_TIMEOUT_S = 120.0


def program() -> str | None:
    """The path of a Chromium, or None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Chromium:
    """One page. Every error and every request that it makes is kept."""

    def __init__(self, folder: Path) -> None:
        found = program()
        assert found is not None
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._process = subprocess.Popen(
            [
                found,
                "--headless=new",
                # The user of a container is root, which the sandbox refuses. Pages are our own.
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--remote-debugging-port=0",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._loaded = False

    def __enter__(self) -> Self:
        self._wait(self._connect())
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._close())
        self._process.terminate()
        self._process.wait()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, _TIMEOUT_S))

    async def _connect(self) -> None:
        port_file = self._folder / "DevToolsActivePort"
        while not port_file.is_file() or "\n" not in port_file.read_text():
            assert self._process.poll() is None, "chromium has ended"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        while True:
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                pages = [one for one in await reply.json() if one["type"] == "page"]
            if pages:
                break
            await asyncio.sleep(0.05)
        # A screenshot is one message of megabytes.
        self._socket = await self._session.ws_connect(
            pages[0]["webSocketDebuggerUrl"], max_msg_size=0
        )

    async def _close(self) -> None:
        await self._socket.close()
        await self._session.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol."""
        return dict(self._wait(self._call(method, parameters)))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        await self._socket.send_json(message)
        while True:
            reply = await self._socket.receive_json()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return dict(reply["result"])
            self._note(reply)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        name = event.get("method")
        if name == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif name == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(str(parameters["entry"]))
        elif name == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(str(parameters["args"]))
        elif name == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def open(self, path: Path) -> float:
        """Open a page from disk and wait until it has filled its sections; return the seconds."""
        began = time.monotonic()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("document.documentElement?.dataset.ready !== undefined")
        return time.monotonic() - began

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        began = time.monotonic()
        while not self.js(expression):
            assert time.monotonic() - began < _TIMEOUT_S, (expression, self.errors)
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key that has a name, such as ArrowRight, on the focused element."""
        about = {"key": key, "code": key, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def point_at(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        place = self.js(
            f"(() => {{ const e = document.querySelector({selector!r});"
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0];"
            "return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])

    def look(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the window and the preferred colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as PNG."""
        reply = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(reply["data"]))
