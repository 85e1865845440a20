"""A registry for tests: a private daemon on a free port, with its address in `REGD_ADDRESS`."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regd.testing.host_process import HostError, HostProcess, host
from regd_client.blocking import BlockingConnection
from regd_client.errors import RegdError, from_reply
from regd_client.models import Endpoint, endpoint_of

VARIABLE = "REGD_ADDRESS"


class Registry:
    """A registry for tests. `address` is `tcp://127.0.0.1:PORT`. `path` is its file, None if it is in memory."""

    def __init__(self, address: str, path: Path | None, *, shared: bool = False) -> None:
        self.address = address
        self.path = path
        self.is_shared = shared  # the whole test run uses it, so no test may stop it

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def instances(self, pattern: str = "*") -> list[dict[str, Any]]:
        """Return all registrations in order of name and instance, as in the reply to `list`.

        `pattern` is a name, or a prefix followed by `*`.

        Raises:
            Unavailable: the registry is stopped, or stopping.
            BadArgument: `pattern` is not valid.
        """
        instances: list[dict[str, Any]] = []
        after: str | None = None
        with self._connection() as connection:
            while True:
                page = _ask(connection, "list", name=pattern, after=after)
                instances += page["instances"]
                if "next" not in page:
                    return instances
                after = page["next"]

    def register(
        self,
        name: str,
        port: int,
        *,
        host: str | None = None,
        instance: str | None = None,
        meta: Mapping[str, str] | None = None,
        state: str | None = None,
        priority: int | None = None,
        force: bool = False,
    ) -> Endpoint:
        """Register a service that stays until it is deregistered.

            regd.register("db", 5432, meta={"role": "primary"})

        With `force`, the name is taken even from a live client, which receives `lost`.

        Raises:
            Conflict: a live client has registered the name with another address.
            BadArgument: a value is not valid.
            Unavailable: the registry is stopped, or stopping.
        """
        with self._connection() as connection:
            reply = _ask(
                connection,
                "register",
                name=name,
                port=port,
                host=host,
                instance=instance,
                meta=None if meta is None else dict(meta),
                state=state,
                priority=priority,
                force=force,
            )
        return endpoint_of({**reply, "meta": dict(meta or {}), "priority": priority or 0})

    def update(
        self,
        name: str,
        meta: Mapping[str, str] | None = None,
        *,
        state: str | None = None,
        priority: int | None = None,
        instance: str | None = None,
    ) -> None:
        """Replace the labels of a registration, or set its state or priority, whichever client made it.

        Raises:
            NotFound: there is no such registration.
            BadArgument: a value is not valid, or all three are missing.
            Unavailable: the registry is stopped, or stopping.
        """
        with self._connection() as connection:
            labels = None if meta is None else dict(meta)
            fields = {"meta": labels, "state": state, "priority": priority}
            _ask(connection, "update", name=name, instance=instance, **fields)

    def deregister(self, name: str, instance: str | None = None) -> None:
        """End a registration, whichever client made it. A client that holds it receives `lost`.

        Raises:
            NotFound: there is no such registration.
            Unavailable: the registry is stopped, or stopping.
        """
        with self._connection() as connection:
            _ask(connection, "deregister", name=name, instance=instance)

    def _connection(self) -> BlockingConnection:
        return BlockingConnection(self.address, autostart=False)

    def stop(self) -> None:
        """Stop the daemon. It keeps its port and the registrations. Idempotent."""
        self._refuse()

    def start(self) -> None:
        """Start the daemon again on the same port, with the registrations that it kept. Idempotent."""
        self._refuse()

    def restart(self) -> None:
        """Stop the daemon, and start it again on the same port, with the registrations that it kept."""
        self.stop()
        self.start()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Stop the daemon until the end of the `with`: connections end, and new ones are refused.

            with regd.away():
                assert mirror.resolve("db").stale_s > 0

        Afterwards the registrations are back, and clients reconnect, as after any restart.
        """
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _refuse(self) -> None:
        raise HostError(
            "regd: this registry is shared by the whole test run (regd_scope = run), so no test may stop it; "
            "take one of its own with regd.testing.running()"
        )

    def described(self) -> str:
        """Return the registrations as text, or a line that says why they cannot be read."""
        try:
            return "\n".join([f"{self!r}:", *map(json.dumps, self.instances())])
        except RegdError as error:
            return f"cannot read {self!r}: {error}"

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"<Registry {self.address} {self.path or 'in memory'}>"


def _ask(connection: BlockingConnection, cmd: str, **arguments: Any) -> dict[str, Any]:
    reply = connection.ask(cmd, **{key: value for key, value in arguments.items() if value is not None})
    if not reply["ok"]:
        raise from_reply(reply)
    return reply


class OwnRegistry(Registry):
    """A registry that this process has started."""

    def __init__(self, path: Path | None, *, shared: bool = False) -> None:
        self._host: HostProcess = host()
        opened = self._host.ask("open", path=str(path) if path else None)
        super().__init__(opened["address"], path, shared=shared)
        self._daemon: int = opened["daemon"]

    def _ask(self, do: str) -> dict[str, Any]:
        return self._host.ask(do, daemon=self._daemon)

    def stop(self) -> None:
        if self.is_shared:
            self._refuse()
        self._ask("stop")

    def start(self) -> None:
        if self.is_shared:
            self._refuse()
        self._ask("start")

    def described(self) -> str:
        try:
            shown = self._ask("show")
        except HostError as error:
            return f"cannot read {self!r}: {error}"
        state = "" if shown["running"] else ", stopped"
        return "\n".join([f"{self!r}{state}:", *shown["registry"], "It logged:", *shown["log"]])

    def logged(self) -> str:
        """Return the last lines of the daemon's log.

        Raises:
            HostError: the host process does not answer.
        """
        return "\n".join(self._ask("show")["log"])

    def end(self) -> None:
        """End the registry for good. Without effect in a forked child, and after its process was killed."""
        if self._host.owner == os.getpid() and not self._host.was_killed:
            self._ask("end")


@contextlib.contextmanager
def running(path: str | os.PathLike[str] | None = None) -> Iterator[Registry]:
    """Run a registry in memory, or in the file `path`. `REGD_ADDRESS` names it inside the `with`.

        with regd.testing.running() as registry:
            subprocess.run([sys.executable, "-m", "shop"], check=True)
            print(registry.instances())

    Raises:
        HostError: the registry cannot be started.
    """
    registry = OwnRegistry(Path(path).absolute() if path is not None else None)
    try:
        with found_by_children(registry):
            yield registry
    finally:
        registry.end()


@contextlib.contextmanager
def found_by_children(registry: Registry) -> Iterator[Registry]:
    """Name a registry in `REGD_ADDRESS`, and restore the variable afterwards.

    Unset `REGD_AUTOSTART` meanwhile, so that clients do not start a daemon while a test has stopped the registry.
    """
    previous = {name: os.environ.pop(name, None) for name in (VARIABLE, "REGD_AUTOSTART")}
    os.environ[VARIABLE] = registry.address
    try:
        yield registry
    finally:
        os.environ.pop(VARIABLE, None)
        os.environ.update({name: value for name, value in previous.items() if value is not None})
