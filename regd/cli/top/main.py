"""`regctl top` from beginning to end: which view it is, and how it ends.

Must not know what is shown.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from regd.cli.top import plain
from regd.cli.top.source import Source
from regd.cli.top.view_state import ViewState

_ENDS = (signal.SIGTERM, signal.SIGHUP)


def run(address: str | None, as_json: bool, given: Mapping[str, Any]) -> int:
    """Show the registry, and return the exit status.

    Raises:
        RegdError: there is no daemon at the beginning, or it refuses.
        KeyboardInterrupt: on Ctrl-C.
    """
    return asyncio.run(_run(address, as_json, given["name"], given["interval"]))


async def _run(address: str | None, as_json: bool, pattern: str | None, interval_s: float) -> int:
    feed = Source(address, pattern, ViewState(), interval_s)
    async with feed.following():
        if as_json or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            plain.once(feed, as_json)
            return 0
        return await _shown(feed)


async def _shown(feed: Source) -> int:
    """Show it until the person has seen enough, or a signal says so: the terminal is restored then, too."""
    ended_by = 0
    showing = asyncio.ensure_future(_view(feed))
    asking = asyncio.ensure_future(feed.ask())

    def end(number: int) -> None:
        nonlocal ended_by
        ended_by = number
        showing.cancel()

    for each in _ENDS:
        asyncio.get_running_loop().add_signal_handler(each, end, each)
    try:
        await asyncio.wait((showing, asking), return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            asking.result()  # it ends by a bug only, which nobody shall have to guess
        return showing.result()
    except asyncio.CancelledError:
        if not ended_by:
            raise
        return 128 + ended_by
    finally:
        asking.cancel()
        showing.cancel()
        await asyncio.wait((asking, showing))


async def _view(feed: Source) -> int:
    """The whole screen where the extra `top` is installed and keys come from a terminal, else a plain table."""
    if sys.stdin is None or not sys.stdin.isatty():
        return await plain.show(feed, "")
    try:
        from regd.cli.top.screen import show
    except ImportError:
        return await plain.show(feed, " for more: pip install prompt_toolkit")
    return await show(feed)
