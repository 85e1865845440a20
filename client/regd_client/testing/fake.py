"""The fake registry: where clients of this process come instead of to a daemon, and what a test does with it.

Must not know what a request means.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from regd_client import blocking, link
from regd_client.connection import Connection, Lost
from regd_client.errors import Unavailable, from_reply
from regd_client.following import Endpoint, endpoint
from regd_client.testing.arguments import Refused, checked
from regd_client.testing.desk import Desk, Session
from regd_client.testing.pipes import Socket, Transport
from regd_client.wire import Address

_AWAY = "the fake registry is away"
_OVER = "the fake registry that this client was at has ended; close the client, and it goes to the next one"


class FakeRegistry:
    """What `fake` gives. Its methods do not wait; any thread may call them, with an event loop or not."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._desk = Desk()
        self._pipes: dict[Session, Transport | Socket] = {}
        self._refusing = ""  # why nobody can connect

    # What others have done.

    def register(
        self,
        name: str,
        port: int,
        *,
        host: str | None = None,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        state: str | None = None,
        force: bool = False,
    ) -> Endpoint:
        """Say that a service is there, until it is deregistered. `force` takes the name from who has it.

        Raises:
            Conflict: a client of this process has the name.
            BadArgument: an argument is none that a daemon would take.
        """
        given = {"name": name, "port": port, "host": host, "instance": instance, "state": state, "force": force}
        stands = self._ask("register", **given, meta=None if meta is None else dict(meta))
        return endpoint({**stands, "meta": meta or {}})

    def update(
        self,
        name: str,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        instance: str | None = None,
    ) -> None:
        """Replace the meta of a registration as a whole, set its state, or both, whoever made it.

        Raises:
            NotFound: there is none.
        """
        self._ask("update", name=name, instance=instance, state=state, meta=None if meta is None else dict(meta))

    def deregister(self, name: str, instance: str | None = None) -> None:
        """End a registration, whoever made it; who holds it is told that it is lost.

        Raises:
            NotFound: there is none.
        """
        self._ask("deregister", name=name, instance=instance)

    def kill(self, name: str, instance: str | None = None) -> None:
        """End a registration as if its process had died: `down`, with the reason `process exited`.

        Raises:
            NotFound: there is none.
        """
        self._end(name, instance, "process exited")

    def expire(self, name: str, instance: str | None = None) -> None:
        """End a registration as if it had not been renewed in time: `down`, with the reason `ttl expired`.

        Raises:
            NotFound: there is none.
        """
        self._end(name, instance, "ttl expired")

    # What there is.

    def instances(self, pattern: str = "*") -> list[dict[str, Any]]:
        """Return what is registered under a name, or the beginning of names and a `*`, as the wire has it."""
        with self._asking():
            found = self._desk.state.fitting(checked("list", {"name": pattern})["name"], {})
            return [each.shown() for each in found]

    # The daemon's own life.

    def cut(self) -> None:
        """Break every connection, and end what they hold. Clients come back, and register again."""
        with self._asking():
            for session in list(self._pipes):
                self._desk.closed(session)
            self._break()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Stop the daemon until the end of the `with`: every connection breaks, and none can be had.

        Whoever asks meanwhile gets `Unavailable` at once. What was registered is there afterwards, as it is after
        a daemon's restart, and waits for its client to come back.
        """
        with self._asking():
            if self._refusing:
                raise RuntimeError(f"{self._refusing}: it cannot go away once more")
            self._refusing = _AWAY
            self._stop()
        try:
            yield
        finally:
            with self._lock:
                if self._refusing == _AWAY:
                    self._refusing = ""

    def restart(self) -> None:
        """Stop the daemon and start it: as `away`, and back at once."""
        with self.away():
            pass

    # Within.

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        with self._lock:
            for session, pipe in list(self._pipes.items()):
                if isinstance(pipe, Transport) and pipe.loop.is_closed():
                    self._closed(session)  # its event loop ended without a word
            try:
                yield
            except Refused as refused:
                fields = {"error": refused.code, "message": str(refused), **refused.details}
                raise from_reply(fields) from None

    def _ask(self, cmd: str, **given: Any) -> dict[str, Any]:
        with self._asking():
            plain = {key: value for key, value in given.items() if value is not None}
            return self._desk.answer(cmd, plain)

    def _end(self, name: str, instance: str | None, reason: str) -> None:
        with self._asking():
            self._desk.state.end((name, instance or ""), reason)

    def _stop(self) -> None:
        for session in self._pipes:
            self._desk.forget(session)
        self._break()
        self._desk.state.restart()

    def _break(self) -> None:
        pipes, self._pipes = self._pipes, {}
        for pipe in pipes.values():
            pipe.cut()

    # The clients' way here.

    async def _open(self, address: Address, lost: Lost) -> Connection:
        made = Connection(address, lost)
        transport = Transport(made)
        self._connect(transport)
        made.connection_made(transport)
        return made

    def _open_socket(self, timeout_s: float) -> Socket:
        made = Socket(timeout_s)
        self._connect(made)
        return made

    def _connect(self, pipe: Transport | Socket) -> None:
        with self._asking():
            if self._refusing:
                raise Unavailable(self._refusing)
            session = self._desk.connected(pipe)
            self._pipes[session] = pipe
            pipe.end = _End(self, session)

    def _take(self, session: Session, line: bytes) -> None:
        with self._asking():
            if session in self._pipes:
                self._desk.take(session, line)

    def _closed(self, session: Session) -> None:
        with self._lock:
            self._pipes.pop(session, None)
            self._desk.closed(session)

    def _call(self, work: Callable[[], None]) -> None:
        with self._lock:
            work()

    def _over(self) -> None:
        """Let nobody come back, and have clients give up what they hold: else they would take it to a daemon."""
        with self._lock:
            self._refusing = _OVER
            self._desk.end("the fake registry ended")
            self._break()


class _End:
    """The fake's end of a connection."""

    def __init__(self, registry: FakeRegistry, session: Session) -> None:
        self._registry = registry
        self._session = session

    def take(self, line: bytes) -> None:
        self._registry._take(self._session, line)

    def closed(self) -> None:
        self._registry._closed(self._session)

    def call(self, work: Callable[[], None]) -> None:
        self._registry._call(work)


_installing = threading.Lock()
_installed: FakeRegistry | None = None


@contextlib.contextmanager
def fake() -> Iterator[FakeRegistry]:
    """Put a fake in the daemon's place, for every client and every thread of this process, until the end.

        with regd_client.testing.fake() as registry:
            registry.register("db", 5432)

    Clients that are connected to a daemon already stay there.

    Raises:
        RuntimeError: there is one in this process already.
    """
    global _installed
    with _installing:
        if _installed is not None:
            raise RuntimeError("a fake registry is in place already: one at a time in a process")
        registry = _installed = FakeRegistry()
        before = link.opener, blocking.opener
        link.opener, blocking.opener = registry._open, cast(Any, registry._open_socket)
    try:
        yield registry
    finally:
        with _installing:
            link.opener, blocking.opener = before
            _installed = None
        registry._over()


def fixture() -> Iterator[FakeRegistry]:
    """Do as `fake`, as a generator: `registry = pytest.fixture(regd_client.testing.fixture)`."""
    with fake() as registry:
        yield registry
