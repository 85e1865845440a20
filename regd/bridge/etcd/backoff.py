"""Pauses between attempts."""

import asyncio
import random

__all__ = ["Backoff"]

_FIRST_S = 0.05


class Backoff:
    """Pauses that double up to `longest_s`, with jitter, so that many clients do not reconnect at once."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._pause_s = _FIRST_S

    def reset(self) -> None:
        """Return to the shortest pause, after a success."""
        self._pause_s = _FIRST_S

    async def pause(self) -> None:
        """Pause after a failure."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, self._longest_s)
        await asyncio.sleep(random.uniform(pause_s / 2, pause_s))
