"""`regctl top`: choose the view, run it, and end it on signals."""

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

_END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def run(address: str | None, as_json: bool, arguments: Mapping[str, Any]) -> int:
    """Show the registry and return the exit status.

    Raises:
        RegdError: no daemon answers at the start, or it refuses.
        KeyboardInterrupt: on Ctrl-C.
    """
    return asyncio.run(_run(address, as_json, arguments["name"], arguments["interval"]))


async def _run(address: str | None, as_json: bool, pattern: str | None, interval_s: float) -> int:
    feed = Source(address, pattern, ViewState(), interval_s)
    async with feed.following():
        if as_json or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            plain.once(feed, as_json)
            return 0
        return await _shown(feed)


async def _shown(feed: Source) -> int:
    """Show the view until the user quits or a signal ends it; the terminal is restored in both cases."""
    ended_by = 0
    showing = asyncio.ensure_future(_view(feed))
    asking = asyncio.ensure_future(feed.ask())

    def end(number: int) -> None:
        nonlocal ended_by
        ended_by = number
        showing.cancel()

    for number in _END_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        await asyncio.wait((showing, asking), return_when=asyncio.FIRST_COMPLETED)
        if asking.done():
            asking.result()  # it ends only by a bug: raise it
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
    """Show the full-screen view if the extra `top` is installed and stdin is a terminal, else a plain table."""
    if sys.stdin is None or not sys.stdin.isatty():
        return await plain.show(feed, "")
    try:
        from regd.cli.top.screen import show
    except ImportError:
        return await plain.show(feed, " for more: pip install prompt_toolkit")
    return await show(feed)
