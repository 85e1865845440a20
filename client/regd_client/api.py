"""The verbs as functions, one call each, from any event loop, one after another.

Nothing stays open behind them, but for what is registered or followed. Must not know connections.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from regd_client.arguments import check_seconds, check_text, labels
from regd_client.client import Client
from regd_client.mirrors import Mirror
from regd_client.registration import RegistrationContext
from regd_client.watches import Endpoint, Event


def register(
    name: str,
    port: int,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    state: str | None = None,
    static: bool = False,
    force: bool = False,
    pid: int | None = None,
    timeout: float | None = None,
) -> RegistrationContext:
    """Register a service, as `Client.register` does, on a connection of its own."""
    made = Client().register(
        name,
        port,
        host=host,
        instance=instance,
        meta=meta,
        state=state,
        static=static,
        force=force,
        pid=pid,
        timeout=timeout,
    )
    made._own = True
    return made


async def deregister(name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
    """End a registration, as `Client.deregister` does."""
    async with _client() as client:
        await client.deregister(name, instance, timeout=timeout)


async def resolve(
    name: str,
    *,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    wait: float | None = None,
    timeout: float | None = None,
) -> Endpoint:
    """Return a ready instance, as `Client.resolve` does."""
    async with _client() as client:
        return await client.resolve(name, instance=instance, meta=meta, wait=wait, timeout=timeout)


async def resolve_all(
    name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> list[Endpoint]:
    """Return all ready instances, as `Client.resolve_all` does."""
    async with _client() as client:
        return await client.resolve_all(name, meta=meta, timeout=timeout)


def watch(
    pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> AsyncGenerator[Event, None]:
    """Yield what is there and every change, as `Client.watch` does."""
    check_text("pattern", pattern, required=True)
    check_seconds("timeout", timeout)
    return Client()._watch(pattern, labels(meta), timeout, own=True)


@contextlib.asynccontextmanager
async def mirror(
    pattern: str = "*",
    *,
    meta: Mapping[str, str] | None = None,
    stale_s_max: float | None = None,
    timeout: float | None = None,
) -> AsyncIterator[Mirror]:
    """Keep a local picture, as `Client.mirror` does."""
    async with (
        _client() as client,
        client.mirror(pattern, meta=meta, stale_s_max=stale_s_max, timeout=timeout) as made,
    ):
        yield made


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[Client]:
    """Close a client behind one call. The call connects it, within its own `timeout` and `wait`."""
    client = Client()
    try:
        yield client
    finally:
        await client.close()
