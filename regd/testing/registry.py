"""`running` runs a registry for tests, and `Registry` is what a test can do with it."""

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
    """A registry for tests: the real daemon, private to the test run.

    The fixture `regd` and `regd.testing.running` create it. Any thread may call its methods, with or without an
    event loop.

    Attributes:
        address: the daemon's address, `tcp://127.0.0.1:PORT`.
        path: the `pathlib.Path` of `registry.json`; None if the registry is in memory.
        port: the port of `address`.
        is_shared: the whole test run uses the registry (`regd_scope = run`), so no test may stop it.
    """

    def __init__(self, address: str, path: Path | None, *, shared: bool = False) -> None:
        self.address = address
        self.path = path
        self.is_shared = shared

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def instances(self, pattern: str = "*") -> list[dict[str, Any]]:
        """Return the registrations, in order of name and instance.

            regd.instances("work*")[0]["port"]

        Args:
            pattern: a name, or a prefix followed by `*`; by default all names.

        Returns:
            A dict for each registration, with the fields that the reply to `list` has.

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

        Args:
            name: the service's name.
            port: 1 to 65535.
            host: the address that clients connect to; by default 127.0.0.1.
            instance: the name of the instance; by default "".
            meta: labels; by default none.
            state: `starting`, `ready` (the default) or `draining`.
            priority: 0 (the default) to 65535, lower is preferred.
            force: take the name even from a live client. That client receives `lost`.

        Returns:
            The registered endpoint.

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
        """Change a registration, whichever client made it.

        Args:
            name: the service's name.
            meta: the new labels, which replace all previous ones; None leaves them as they are.
            state: `starting`, `ready` or `draining`; None leaves it as it is.
            priority: 0 to 65535; None leaves it as it is.
            instance: the name of the instance; by default "".

        Raises:
            NotFound: there is no such registration.
            BadArgument: a value is not valid, or `meta`, `state` and `priority` are all None.
            Unavailable: the registry is stopped, or stopping.
        """
        with self._connection() as connection:
            labels = None if meta is None else dict(meta)
            fields = {"meta": labels, "state": state, "priority": priority}
            _ask(connection, "update", name=name, instance=instance, **fields)

    def deregister(self, name: str, instance: str | None = None) -> None:
        """End a registration, whichever client made it. The clients that hold it receive `lost`.

        Args:
            name: the service's name.
            instance: the name of the instance; by default "".

        Raises:
            NotFound: there is no such registration.
            Unavailable: the registry is stopped, or stopping.
        """
        with self._connection() as connection:
            _ask(connection, "deregister", name=name, instance=instance)

    def _connection(self) -> BlockingConnection:
        return BlockingConnection(self.address, autostart=False)

    def stop(self) -> None:
        """Stop the daemon. Connections end, and new ones are refused. Registrations are kept. Idempotent.

        Raises:
            HostError: the registry is shared by the whole test run.
        """
        self._refuse()

    def start(self) -> None:
        """Start the daemon again at the same address, with the same registrations. Idempotent.

        Raises:
            HostError: the registry is shared by the whole test run, or the daemon cannot be started.
        """
        self._refuse()

    def restart(self) -> None:
        """Stop the daemon and start it again at the same address, with the same registrations.

        Raises:
            HostError: the registry is shared by the whole test run, or the daemon cannot be started.
        """
        self.stop()
        self.start()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Stop the daemon until the end of the `with`: connections end, and new ones are refused.

            with regd.away():
                assert mirror.resolve("db").stale_s > 0

        Afterwards the daemon has the same registrations, and clients reconnect.

        Raises:
            HostError: the registry is shared by the whole test run, or the daemon cannot be started.
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
        """End the registry for good. Does nothing in a forked child, or if the host process was killed."""
        if self._host.owner == os.getpid() and not self._host.was_killed:
            self._ask("end")


@contextlib.contextmanager
def running(path: str | os.PathLike[str] | None = None) -> Iterator[Registry]:
    """Run a registry. Inside the `with`, this process and its children find it by `REGD_ADDRESS`.

        with regd.testing.running() as registry:
            subprocess.run([sys.executable, "-m", "shop"], check=True)
            print(registry.instances())

    Args:
        path: the file of the registry; an existing file is loaded. By default the registry is kept in memory.

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
    """Set `REGD_ADDRESS` to the address of a registry, and restore the variable afterwards.

    `REGD_AUTOSTART` is unset, so that clients do not start a daemon while a test has stopped the registry.
    """
    previous = {name: os.environ.pop(name, None) for name in (VARIABLE, "REGD_AUTOSTART")}
    os.environ[VARIABLE] = registry.address
    try:
        yield registry
    finally:
        os.environ.pop(VARIABLE, None)
        os.environ.update({name: value for name, value in previous.items() if value is not None})
