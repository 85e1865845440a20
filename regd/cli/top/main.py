"""`regctl top`: run the full-screen view or the plain one, and end it on signals."""

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
        RegdError: no daemon answers at the start, or the daemon refuses.
        KeyboardInterrupt: on Ctrl-C.
    """
    return asyncio.run(_run(address, as_json, arguments["name"], arguments["interval"]))


async def _run(address: str | None, as_json: bool, pattern: str | None, interval_s: float) -> int:
    source = Source(address, pattern, ViewState(), interval_s)
    async with source.running():
        if as_json or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
            plain.once(source, as_json)
            return 0
        return await _show_until_end(source)


async def _show_until_end(source: Source) -> int:
    """Show the view until the user quits or a signal arrives, and restore the terminal in both cases."""
    signal_number = 0
    view = asyncio.ensure_future(_show(source))
    polling = asyncio.ensure_future(source.poll())

    def end(number: int) -> None:
        nonlocal signal_number
        signal_number = number
        view.cancel()

    for number in _END_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, end, number)
    try:
        await asyncio.wait((view, polling), return_when=asyncio.FIRST_COMPLETED)
        if polling.done():
            polling.result()  # raises: polling ends only with an exception
        return view.result()
    except asyncio.CancelledError:
        if not signal_number:
            raise
        return 128 + signal_number
    finally:
        polling.cancel()
        view.cancel()
        await asyncio.wait((polling, view))


async def _show(source: Source) -> int:
    """Show the full-screen view if the extra `top` is installed and stdin is a terminal, else a plain table."""
    if sys.stdin is None or not sys.stdin.isatty():
        return await plain.show(source, "")
    try:
        from regd.cli.top.screen import show
    except ImportError:
        return await plain.show(source, " for more: pip install prompt_toolkit")
    return await show(source)
