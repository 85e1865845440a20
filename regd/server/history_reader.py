"""Answers `history`. A thread reads the pages of the journal, so that the event loop never waits for the disk."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from regd.core.errors import Code, Refused
from regd.core.registry import Registry
from regd.protocol import messages
from regd.protocol.commands import Request
from regd.storage.history_pages import Query
from regd.storage.store import Store
from regd.system.clock import Clock

_PAGE_CHANGES = 100  # if the request has no `limit`
_POINTS = ("since", "before", "age_s")


class HistoryReader:
    """Reads one page at a time, because reading a page takes as much memory as a segment of the journal."""

    def __init__(self, store: Store, registry: Registry, clock: Clock) -> None:
        self._store = store
        self._registry = registry
        self._clock = clock
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="regd-history")

    def read(self, request: Request, *, is_readonly: bool) -> "asyncio.Future[bytes | Refused]":
        """Start to read the requested page. The result of the future is the reply or the refusal.

        Users who may only read (`is_readonly`) do not see who made the changes.

        Raises:
            Refused: `bad_argument`, arguments exclude each other.
        """
        arguments = request.arguments
        points = [point for point in _POINTS if point in arguments]
        if len(points) > 1:
            message = f"{points[1]} cannot be together with {points[0]}: give one of {', '.join(_POINTS)}"
            raise Refused(Code.BAD_ARGUMENT, message, field=points[1])
        query = Query(
            rev=self._registry.rev,
            limit=arguments.get("limit", _PAGE_CHANGES),
            name=arguments.get("name"),
            instance=arguments.get("instance"),
            since=arguments.get("since"),
            after=self._clock.wall() - arguments["age_s"] if "age_s" in arguments else None,
            before=arguments.get("before"),
        )
        return asyncio.get_running_loop().run_in_executor(self._thread, self._reply, request, query, is_readonly)

    def _reply(self, request: Request, query: Query, is_readonly: bool) -> bytes | Refused:
        try:
            page = self._store.page(query)
        except OSError as error:
            return Refused(Code.STORAGE_FAILED, f"the journal could not be read: {error.strerror}")
        if is_readonly:
            for change in page.changes:
                change.pop("by", None)
        result: dict[str, Any] = {"changes": page.changes}
        if page.next is not None:
            result["next"] = page.next
        return messages.ok(request.id, result)

    def close(self) -> None:
        """Cancel the reads that have not started. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)
