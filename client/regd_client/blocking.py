"""The registry for programs without an event loop: the verbs as api that block, over the async client.

    with regd_client.blocking.register("shop", 8000):
        found = regd_client.blocking.resolve("db", wait=10)

`Client(address)` has every verb of the async client, `watch` and `mirror` too, on one connection.

Beside them `BlockingConnection`, which asks one thing after the other: `regctl` is built on it. Until a verb is
called, this imports no asyncio, and of socket only what is written in C, so that a command starts quickly.
"""

from __future__ import annotations

from _socket import AF_UNIX, SOCK_STREAM, getaddrinfo, socket
from time import monotonic  # bound here: what a test patches into the module `time` does not stop the clock

from regd_client import wire
from regd_client.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Any, Self

    from regd_client.thread import BlockingRegistration, BlockingSocket
    from regd_client.thread import Client as Client
    from regd_client.watches import Endpoint

_EVENTS_MAX = 10_000  # before one reply


class BlockingConnection:
    """Ask one thing after the other.

    `timeout_s` bounds every wait, the connecting one too; there are no second tries. With `starts` a daemon may
    be started where none is, if REGD_AUTOSTART says so; not for who only looks on.
    """

    def __init__(self, address: str | None = None, timeout_s: float = 5.0, *, starts: bool = True) -> None:
        self.address = wire.find_address(address)
        self._rest = b""
        self._events: list[dict[str, Any]] = []  # those that came before a reply
        self._timeout_s = timeout_s
        try:
            self._open(starts and wire.autostarts(self.address))
        except Unavailable:
            raise
        except OSError as error:
            raise wire.unavailable(self.address, error.strerror or str(error)) from error

    def _open(self, starts: bool) -> None:
        if not starts:
            self._socket = self._connect(self._timeout_s)
            return
        try:
            self._meet()
        except OSError as error:
            from regd_client import autostart

            if not autostart.is_gone(error):
                raise
            autostart.until_open(self.address, self._timeout_s, self._meet)

    def _meet(self) -> None:
        """Connect, and see that the daemon is there: one that ends for want of work takes nobody any more."""
        self._socket = self._connect(self._timeout_s)
        try:
            self._socket.sendall(wire.request("ping", None, {}))
            reply = wire.checked("ping", {}, wire.reply(self._line(monotonic() + self._timeout_s)))
            if not reply["ok"]:
                raise wire.refused(self.address, reply)
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, timeout_s: float) -> socket:
        if self.address.path:
            return _connected(AF_UNIX, self.address.path, timeout_s)
        host, trouble = self.address.host, OSError("no address")
        # As bytes where it is ASCII: else it is encoded by a codec whose import takes longer than all the rest.
        for family, *_, where in getaddrinfo(
            host.encode() if host.isascii() else host, self.address.port, type=SOCK_STREAM
        ):
            try:
                return _connected(family, where, timeout_s)
            except OSError as error:
                trouble = error
        raise trouble

    def ask(self, cmd: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the daemon's reply, whether it is `ok` or not. Every value in it is checked.

        Raises:
            Unavailable: the connection broke, the answer took too long, or it is not from a regd.
            BadArgument: the request cannot be sent.
        """
        line = wire.request(cmd, None, arguments)
        wait = arguments.get("wait")
        timeout_s = self._timeout_s + (0.0 if wait is None else wait)
        until = monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            self._socket.sendall(line)
            while "event" in (fields := wire.reply(self._line(until))):
                self._events.append(fields)
                if len(self._events) > _EVENTS_MAX:
                    raise wire.not_a_reply(f"to {cmd}: events, and no reply")
        except OSError as error:
            if isinstance(error, Unavailable):
                raise
            raise wire.unavailable(self.address, error.strerror or str(error)) from error
        return wire.checked(cmd, arguments, fields)

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what comes without being asked for, for ever. Behind a `watch`. A refusal ends it.

        Raises:
            Unavailable: the connection broke, or what came is not from a regd.
        """
        while self._events:
            yield self._events.pop(0)
        try:
            self._socket.settimeout(None)
            while True:
                fields = wire.reply(self._line())
                if fields.get("ok"):
                    raise wire.not_a_reply("a reply to nothing")
                yield fields
        except OSError as error:
            if isinstance(error, Unavailable):
                raise
            raise wire.unavailable(self.address, error.strerror or str(error)) from error

    def _line(self, until: float | None = None) -> bytes:
        """Return the next line. `until` (by `time.monotonic`) bounds it, else the socket's timeout each piece."""
        parts = [self._rest]
        size = 0
        while b"\n" not in parts[-1]:
            if until is not None:
                left_s = until - monotonic()
                if left_s <= 0:
                    raise TimeoutError("timed out")
                self._socket.settimeout(left_s)
            part = self._socket.recv(65_536)
            size += len(part)
            if not part:
                raise ConnectionResetError("the connection ended before the answer")
            if size > wire.REPLY_BYTES_MAX:
                raise wire.not_a_reply("a line without an end")
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connected(family: int, where: Any, timeout_s: float) -> socket:
    made = socket(family, SOCK_STREAM)
    try:
        made.settimeout(timeout_s)
        made.connect(where)
    except BaseException:
        made.close()
        raise
    return made


def _modules() -> tuple[Any, Any]:
    """Return the modules that import asyncio, loaded when a verb is called first.

    Raises:
        Unavailable: the process is ending, and nothing can be loaded.
    """
    try:
        from regd_client import api, thread
    except ImportError:
        raise Unavailable("this process is ending: regd_client.blocking can be used no more") from None
    return api, thread


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
) -> BlockingRegistration:
    """Register a service, as `regd_client.register` does; use it with `with`, or call its `deregister`."""
    api, thread = _modules()

    async def registered() -> Any:
        return await api.register(
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

    own = thread.client_thread()
    made: BlockingRegistration = thread.BlockingRegistration(own.call(registered()), own)
    return made


def register_process(
    name: str,
    port: int,
    *,
    host: str | None = None,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    drain_s: float = 0.1,
) -> None:
    """Register a server whose port is open, for as long as this process lives.

        def when_ready(server):  # in gunicorn.conf.py
            blocking.register_process("shop", server.LISTENERS[0].getsockname()[1])

    Call it in the main thread of the process that owns the port, when that handles signals already: before the
    handlers of SIGTERM and SIGINT are called, the name is withdrawn and `drain_s` seconds pass. No thread stays
    behind, and no connection where the daemon can see this process, so workers may be forked from it. While no
    daemon answers or another owner has the name, registering is tried again every second (by SIGALRM).

    Raises:
        BadArgument: the daemon does not take the arguments.
        RegdError: it cannot be registered now, and not be tried again: SIGALRM is in use, or this is not the main
            thread.
    """
    from regd_client.ending import ProcessName

    given = {"host": host, "instance": instance, "meta": None if meta is None else dict(meta)}
    ProcessName(name, port, given, drain_s).register()


def listen(
    name: str,
    port: int = 0,
    *,
    host: str = "127.0.0.1",
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> BlockingSocket:
    """Listen on a free port, or on `port`, and register it, as `regd_client.listen` does."""
    _, thread = _modules()

    async def listened() -> Any:
        return await thread.listening.listen(name, port, host=host, instance=instance, meta=meta, timeout=timeout)

    own = thread.client_thread()
    made: BlockingSocket = thread.BlockingSocket(own.call(listened()), own)
    return made


def deregister(name: str, instance: str | None = None, *, timeout: float | None = None) -> None:
    """End a registration, whoever made it, as `regd_client.deregister` does."""
    api, thread = _modules()

    thread.client_thread().call(api.deregister(name, instance, timeout=timeout))


def resolve(
    name: str,
    *,
    instance: str | None = None,
    meta: Mapping[str, str] | None = None,
    wait: float | None = None,
    timeout: float | None = None,
) -> Endpoint:
    """Return a ready instance, as `regd_client.resolve` does."""
    api, thread = _modules()

    found: Endpoint = thread.client_thread().call(
        api.resolve(name, instance=instance, meta=meta, wait=wait, timeout=timeout)
    )
    return found


def resolve_all(
    name: str, *, meta: Mapping[str, str] | None = None, timeout: float | None = None
) -> list[Endpoint]:
    """Return all ready instances, as `regd_client.resolve_all` does."""
    api, thread = _modules()

    found: list[Endpoint] = thread.client_thread().call(api.resolve_all(name, meta=meta, timeout=timeout))
    return found


if not TYPE_CHECKING:  # a checker has the class itself

    def __getattr__(name: str) -> object:
        if name == "Client":
            from regd_client.thread import Client

            return Client
        raise AttributeError(f"module 'regd_client.blocking' has no attribute {name!r}")
