"""The client's verbs as functions. Each call opens a connection and closes it again.

Registrations, watches and mirrors keep their connection open until they end. The functions share no state, so
they work in any event loop.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping

from regd_client.arguments import RegistrationRequest, check_integer, check_seconds, check_text, copy_meta
from regd_client.client import Client
from regd_client.mirrors import Mirror
from regd_client.models import Endpoint, Event, State
from regd_client.registration import RegistrationContext

__all__ = ["deregister", "mirror", "register", "resolve", "resolve_all", "watch"]


def register(
    name: str,
    port: int,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    state: State | None = None,
    priority: int | None = None,
    static: bool = False,
    force: bool = False,
    pid: int | None = None,
    timeout: float | None = None,
) -> RegistrationContext:
    """Register a service. `await` the result for a `Registration`, or use it with `async with`.

        async with regd_client.register("runner", 5050) as registration:
            await registration.lost.wait()

    The registration lasts as long as its connection and this process, and ends with the `async with`. After a
    reconnect, the client restores it. Open the port first; `listen` and `lifespan` register a service at the
    right moment.

    Args:
        name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
        port: 1 to 65535.
        host: the address at which others reach the service; by default 127.0.0.1.
        instance: a name for this instance, if the service has several. `auto`: the lowest number from 1 that no
            live owner holds; `Registration.instance` is that number.
        meta: labels that `resolve` can filter by.
        state: `starting` (not ready yet), `ready` or `draining` (about to stop); by default `ready`.
        priority: 0 to 65535, lower is preferred: others resolve this instance only while no ready instance has a
            lower number; by default 0.
        static: keep the registration after the connection and the process end, until it is deregistered.
        force: take the name even if its owner is alive.
        pid: the process to bind the registration to, instead of this one. If the daemon cannot see the
            process, the registration lasts as long as the connection.
        timeout: seconds for the whole call; by default it waits up to 5 s for a daemon.

    Returns:
        A `RegistrationContext`; awaiting or entering it returns a `Registration`.

    Raises:
        Conflict: a live owner holds the name; `details["owner"]` describes it.
        Denied: this user may not register.
        Unavailable: no daemon answers.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    check_integer("port", port, required=True)
    request = RegistrationRequest(name, port, host, instance, meta, state, priority, static, force, pid, timeout)
    return RegistrationContext(Client(), request, standalone=True)


async def deregister(name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
    """End a registration, whichever client made it.

        await regd_client.deregister("db")

    Args:
        name: the service's name.
        instance: the instance's name; by default the instance without a name.
        timeout: seconds for the whole call.

    Raises:
        NotFound: there is no such registration.
        Denied: this user may not deregister.
        Unavailable: no daemon answers.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
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
    """Return the endpoint of a ready instance of the best priority; calls rotate through all such instances.

        endpoint = await regd_client.resolve("db", wait=10)
        reader, writer = await asyncio.open_connection(*endpoint.address)

    Args:
        name: the service's name.
        instance: only this instance.
        meta: labels; the instance must have all of them.
        wait: seconds (at most 3600) to wait for the daemon, and for an instance that accepts a connection; if the
            connection to the daemon is lost, the client reconnects. By default the call fails at once.
        timeout: seconds for the whole call.

    Returns:
        An `Endpoint`: `name`, `instance`, `host`, `port`, `meta`, `priority`, `address`, `url()`.

    Raises:
        NotFound: no ready instance matches; `details["near"]` may have similar names.
        Timeout: no instance accepted a connection within `wait`; the message says why.
        Unavailable: no daemon answers.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    async with _client() as client:
        return await client.resolve(name, instance=instance, meta=meta, wait=wait, timeout=timeout)


async def resolve_all(
    name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> list[Endpoint]:
    """Return the endpoints of all ready instances, in order of priority and instance; [] if there are none.

        for endpoint in await regd_client.resolve_all("worker"):
            print(endpoint)

    Args:
        name: the service's name.
        meta: only instances with all of these labels.
        timeout: seconds for the whole call.

    Raises:
        Unavailable: no daemon answers.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    async with _client() as client:
        return await client.resolve_all(name, meta=meta, timeout=timeout)


def watch(
    pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> AsyncGenerator[Event, None]:
    """Yield an `up` event for each existing instance, then `sync`, and then every change as it happens.

        async for event in regd_client.watch("worker*"):
            print(event.kind, event.endpoint)

    After a reconnect, the events are only the differences from the state before. A consumer that falls more than
    10,000 events behind also gets only the differences.

    Args:
        pattern: a name, or a prefix followed by `*`.
        meta: only instances with all of these labels.
        timeout: seconds to wait for the daemon to accept the watch.

    Returns:
        An asynchronous generator of `Event`: `kind`, `endpoint`, `state`, `reason`.

    Raises:
        Unavailable: no daemon answers at the beginning.
        Timeout: the daemon did not accept the watch within `timeout`.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    check_text("pattern", pattern, required=True)
    check_seconds("timeout", timeout)
    return Client()._watch(pattern, copy_meta(meta), timeout, close=True)


@contextlib.asynccontextmanager
async def mirror(
    pattern: str = "*",
    *,
    meta: Mapping[str, str] | None = None,
    stale_s_max: float | None = None,
    timeout: float | None = None,
) -> AsyncIterator[Mirror]:
    """Keep a local copy of the matching instances, to resolve names without a round trip.

        async with regd_client.mirror("worker*") as mirror:
            endpoint = mirror.resolve("worker")

    Args:
        pattern: a name, or a prefix followed by `*`.
        meta: only instances with all of these labels.
        stale_s_max: seconds for which the copy may be out of date before `resolve` raises `Unavailable`; by
            default without a limit.
        timeout: seconds to wait for the first complete copy; by default 15 s.

    Returns:
        An async context manager that yields a `Mirror`.

    Raises:
        Unavailable: no daemon answers, or the first copy was not complete in time.
        BadArgument: an argument has the wrong type or an invalid value.
    """
    async with (
        _client() as client,
        client.mirror(pattern, meta=meta, stale_s_max=stale_s_max, timeout=timeout) as mirror,
    ):
        yield mirror


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[Client]:
    """Yield a client for one call. It connects during the call, so within the call's `timeout` and `wait`."""
    client = Client()
    try:
        yield client
    finally:
        await client.close()
