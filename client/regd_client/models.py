"""The client's data types: endpoints, events, and the replies that it returns as dictionaries."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

from regd_client.protocol import host_port

__all__ = [
    "Departure",
    "Endpoint",
    "Event",
    "EventKind",
    "Hello",
    "Instance",
    "Key",
    "Owner",
    "Probe",
    "State",
    "Stats",
    "Why",
    "WhyInstance",
    "endpoint_of",
]

Key = tuple[str, str]  # name and instance
State = Literal["starting", "ready", "draining"]
EventKind = Literal["up", "change", "down", "sync"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address and labels of an instance of a service.

        endpoint = await regd_client.resolve("db")
        reader, writer = await asyncio.open_connection(*endpoint.address)

    Attributes:
        name: the service's name.
        instance: the instance's name; "" if it has none.
        host: an IP address or a host name.
        port: 1 to 65535.
        meta: the labels.
        stale_s: seconds for which the mirror that returned the endpoint has been stale; 0.0 if it is live, or if
            no mirror returned the endpoint.
        priority: 0 to 65535; lower is preferred.
    """

    name: str
    instance: str
    host: str
    port: int
    meta: Mapping[str, str] = field(hash=False)
    stale_s: float = field(default=0.0, compare=False)
    priority: int = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for `asyncio.open_connection(*address)` and `socket.create_connection(address)`."""
        return self.host, self.port

    def url(self, scheme: str = "http") -> str:
        """Return SCHEME://HOST:PORT, with an IPv6 address in brackets and its scope escaped (RFC 6874)."""
        return f"{scheme}://{host_port(self.host.replace('%', '%25'), self.port)}"

    def __str__(self) -> str:
        """Return HOST:PORT, with an IPv6 address in brackets."""
        return host_port(self.host, self.port)


def endpoint_of(fields: Mapping[str, Any]) -> Endpoint:
    """Return the endpoint of a reply or event. Its `meta` is a copy, since callers may share the fields."""
    return Endpoint(
        fields["name"],
        fields["instance"],
        fields["host"],
        fields["port"],
        {**fields["meta"]},
        priority=fields.get("priority", 0),
    )


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a service, from a watch.

    Attributes:
        kind: `up`, `change` or `down`; also `sync`, once, after the `up` events of the instances that existed
            when the watch began.
        endpoint: the instance; for `down`, its last endpoint; for `sync`, None.
        state: `starting`, `ready` or `draining`; for `sync`, "".
        reason: for `down`, why the instance ended; else "".
    """

    kind: EventKind
    endpoint: Endpoint | None = None
    state: State | Literal[""] = ""
    reason: str = ""


# Replies. PROTOCOL.md describes their fields.


class Instance(TypedDict):
    """A registration, as `instances` returns it."""

    name: str
    instance: str
    host: str
    port: int
    meta: dict[str, str]
    state: State
    rev: int
    registered_at: NotRequired[float]
    priority: NotRequired[int]
    hold: NotRequired[bool]
    pid: NotRequired[int]
    ttl: NotRequired[float]


class Owner(TypedDict, total=False):
    """An owner of a registration: a connection, a process or a lease. `static`: the registration has no owner."""

    connection: str | None
    pid: int
    ttl: float
    static: bool
    withdrawn: bool


class Probe(TypedDict):
    """The daemon's last attempt to connect to an instance."""

    accepted: bool
    age_s: float
    why: NotRequired[str]


class WhyInstance(TypedDict):
    """An instance, as `why` returns it."""

    instance: str
    host: str
    port: int
    state: State
    alive: bool
    rev: int
    since: float
    owners: list[Owner]
    probe: Probe | None
    priority: NotRequired[int]
    more_owners: NotRequired[bool]
    meta: NotRequired[dict[str, str]]


class Departure(TypedDict):
    """An instance that has ended, as `why` returns it."""

    instance: str
    reason: str
    age_s: float


class Why(TypedDict):
    """What the daemon knows about a name, as `why` returns it."""

    name: str
    instances: list[WhyInstance]
    departures: list[Departure]
    more: NotRequired[bool]


class ChangedBy(TypedDict, total=False):
    """Who made a change, as far as the daemon could find out at that moment."""

    pid: int
    uid: int
    command: str


class PastChange(TypedDict):
    """A change of the registry, as `history` returns it; `at` is in Unix seconds."""

    rev: int
    at: float
    op: Literal["up", "change", "down"]
    name: str
    instance: str
    host: str
    port: int
    state: State
    priority: NotRequired[int]
    reason: NotRequired[str]
    by: NotRequired[ChangedBy]


class History(TypedDict):
    """Past changes, oldest first, as `history` returns them; `next` is where the next page begins."""

    changes: list[PastChange]
    next: NotRequired[int]


class Host(TypedDict):
    """The daemon's boot id and PID namespace; None if the system does not provide them."""

    boot: str | None
    pid_namespace: str | None


class Hello(TypedDict):
    """The daemon's version, epoch, features and limits, as `hello` returns them."""

    server: str
    version: str
    protocol: int
    epoch: str
    rev: int
    features: list[str]
    limits: dict[str, float | None]
    host: Host
    loop: str


class SlowStep(TypedDict):
    """The step that blocked the daemon's event loop longest."""

    what: str
    took_s: float
    age_s: float


class Stats(TypedDict):
    """The daemon's counters, gauges and limits, as `stats` returns them."""

    version: str
    epoch: str
    rev: int
    registrations: int
    uptime_s: float
    connections: int
    watches: int
    waiting: int
    requests: dict[str, int]
    errors: dict[str, int]
    limits: dict[str, float | None]
    pid: NotRequired[int]
    loop: NotRequired[str]
    registry: NotRequired[str]
    log: NotRequired[str | None]
    lag_s: NotRequired[float]
    lag_max_s: NotRequired[float]
    slowest: NotRequired[SlowStep | None]
    started_at: NotRequired[float]
    registry_bytes: NotRequired[int]
    processes: NotRequired[int]
    readonly_connections: NotRequired[int]
    connections_accepted: NotRequired[int]
    connections_refused: NotRequired[int]
    bad_protocol: NotRequired[int]
    dropped: NotRequired[int]
    commits: NotRequired[int]
    commits_failed: NotRequired[int]
    changes: NotRequired[int]
