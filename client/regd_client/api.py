"""The verbs as functions. Each call opens a connection and closes it again.

Registrations, watches and mirrors keep their connection open until they end. The functions work in any event
loop, also in one that runs after another has ended.
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
    static: bool = False,
    force: bool = False,
    pid: int | None = None,
    timeout: float | None = None,
) -> RegistrationContext:
    """Register a service. `await` the result for a `Registration`, or use it with `async with`.

        async with regd_client.register("runner", 5050) as registration:
            await registration.lost.wait()

    The registration lasts as long as its connection and this process, is restored after a break, and ends with
    the `async with`. The port should be open already: a service uses `listen` or `lifespan`, which see to that.

    Args:
        name: the service's name: labels of a-z, 0-9, `-` and `_`, joined by dots.
        port: 1 to 65535.
        host: the address at which others reach the service; by default 127.0.0.1.
        instance: a name for this instance, if the service has several. `auto`: the lowest number from 1 that no
            living owner holds, `Registration.instance` tells it.
        meta: labels, by which `resolve` can select.
        state: `starting` for a service that is not ready yet, `draining` for one that ends; by default `ready`.
        static: the registration outlives the connection and the process, until somebody deregisters it.
        force: take the name from a living owner.
        pid: bind the registration to that process instead of this one. If the daemon does not see the same
            processes, it lasts as long as the connection.
        timeout: seconds for the whole call; by default 5 s to wait for a daemon.

    Returns:
        A `RegistrationContext`, which gives a `Registration` when it is awaited or entered.

    Raises:
        Conflict: another owner has the name, and lives; `details["owner"]` describes it.
        Denied: this user may not register.
        Unavailable: no daemon answers.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has a wrong type or value.
    """
    check_integer("port", port, required=True)
    request = RegistrationRequest(name, port, host, instance, meta, state, static, force, pid, timeout)
    return RegistrationContext(Client(), request, standalone=True)


async def deregister(name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
    """End a registration, whoever made it.

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
        BadArgument: an argument has a wrong type or value.
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
    """Return where a ready instance listens, taking turns among those that match.

        endpoint = await regd_client.resolve("db", wait=10)
        reader, writer = await asyncio.open_connection(*endpoint.address)

    Args:
        name: the service's name.
        instance: only this instance.
        meta: labels that the instance must carry, all of them.
        wait: seconds (at most 3600) to wait for an instance that accepts a connection, and for the daemon,
            whatever breaks meanwhile. By default the call fails at once.
        timeout: seconds for the whole call.

    Returns:
        An `Endpoint`: `name`, `instance`, `host`, `port`, `meta`, `address`, `url()`.

    Raises:
        NotFound: no ready instance matches; `details["near"]` may have similar names.
        Timeout: no instance accepted a connection within `wait`; the message says why.
        Unavailable: no daemon answers.
        BadArgument: an argument has a wrong type or value.
    """
    async with _client() as client:
        return await client.resolve(name, instance=instance, meta=meta, wait=wait, timeout=timeout)


async def resolve_all(
    name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> list[Endpoint]:
    """Return the endpoints of all ready instances, in order of instance; [] if there are none.

        for endpoint in await regd_client.resolve_all("worker"):
            print(endpoint)

    Args:
        name: the service's name.
        meta: only instances that have all of these labels.
        timeout: seconds for the whole call.

    Raises:
        Unavailable: no daemon answers.
        Timeout: the daemon did not reply within `timeout`.
        BadArgument: an argument has a wrong type or value.
    """
    async with _client() as client:
        return await client.resolve_all(name, meta=meta, timeout=timeout)


def watch(
    pattern: str = "*", *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> AsyncGenerator[Event, None]:
    """Yield an `up` event for each existing instance, then `sync`, and then every change as it happens.

        async for event in regd_client.watch("worker*"):
            print(event.kind, event.endpoint)

    After a break, the events are the differences between the last picture and the new one. A listener that falls
    more than 10,000 events behind gets the differences too.

    Args:
        pattern: a name, or the beginning of one followed by `*`.
        meta: only instances that have all of these labels.
        timeout: seconds until the daemon has accepted the watch.

    Returns:
        An asynchronous generator of `Event`: `kind`, `endpoint`, `state`, `reason`.

    Raises:
        Unavailable: no daemon answers at the beginning.
        Timeout: the daemon did not accept the watch within `timeout`.
        BadArgument: an argument has a wrong type or value.
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
    """Keep a local picture of services, from which names are resolved without a round trip.

        async with regd_client.mirror("worker*") as mirror:
            endpoint = mirror.resolve("worker")

    Args:
        pattern: a name, or the beginning of one followed by `*`.
        meta: only instances that have all of these labels.
        stale_s_max: seconds for which the daemon may be away before `resolve` raises `Unavailable`; by default
            the last picture is used for ever.
        timeout: seconds until the first picture is complete; by default 15 s.

    Returns:
        An `async with` that gives a `Mirror`.

    Raises:
        Unavailable: no daemon answers, or the first picture was not complete in time.
        BadArgument: an argument has a wrong type or value.
    """
    async with (
        _client() as client,
        client.mirror(pattern, meta=meta, stale_s_max=stale_s_max, timeout=timeout) as mirror,
    ):
        yield mirror


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[Client]:
    """Yield a client for one call. The call connects it, within its own `timeout` and `wait`."""
    client = Client()
    try:
        yield client
    finally:
        await client.close()
