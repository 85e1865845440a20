"""Processes many items in time slices, so that the event loop serves connections in between."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from regd.server.loop_monitor import LoopMonitor
from regd.system.clock import Clock

_SLICE = 128  # items in one time slice

_Item = TypeVar("_Item", bound=Hashable)


class NextIteration:
    """Calls a function once in the next iteration of the event loop, however often that is requested."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._requested = False

    def request(self) -> None:
        if not self._requested:
            self._requested = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        self._requested = False
        self._call()


class WorkQueue(Generic[_Item]):
    """Processes items one after another, for one time slice per iteration of the event loop.

    An item is in the queue at most once. `process` may add it again. `what` names the work in `stats`.
    """

    def __init__(
        self, process: Callable[[_Item], None], slice_s: float, what: str, clock: Clock, monitor: LoopMonitor
    ) -> None:
        self._process = process
        self._slice_s = slice_s
        self._what = what
        self._clock = clock
        self._monitor = monitor
        self._items: OrderedDict[_Item, None] = OrderedDict()
        self._next = NextIteration(self._run_slice)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: _Item) -> None:
        """Have an item processed after those in the queue. Does nothing if it is already in the queue."""
        self._items[item] = None
        self._next.request()

    def add_first(self, item: _Item) -> None:
        """Have an item processed before all others."""
        self.add(item)
        self._items.move_to_end(item, last=False)

    def discard(self, item: _Item) -> None:
        """Remove an item. Idempotent."""
        self._items.pop(item, None)

    def _run_slice(self) -> None:
        began = self._clock.now()
        for _ in range(min(len(self._items), _SLICE)):
            item, _ = self._items.popitem(last=False)
            self._process(item)
            if not self._items or self._clock.now() > began + self._slice_s:
                break
        self._monitor.record(self._what, began)
        if self._items:
            self._next.request()
