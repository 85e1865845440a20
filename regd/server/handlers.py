"""What each command does: a request in, its reply out. Reads answer at once; writes are judged by the engine.

Must not know connections or disks.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import regd
from regd.core.errors import Code, Refused
from regd.core.instances import Search
from regd.core.limits import Limits
from regd.core.model import DEFAULT_HOST, Entry, Holder, Key, Process, State, key_text
from regd.core.registry import Page, Registry
from regd.core.transaction import OwnerConflict, Transaction
from regd.protocol import messages
from regd.protocol.bare import USAGES
from regd.protocol.commands import Request, described
from regd.server.counters import Counters
from regd.server.engine import Write
from regd.server.resolve_cache import ResolveCache
from regd.server.stalls import Stalls
from regd.system.clock import Clock
from regd.system.namespaces import HERE, Elsewhere
from regd.system.probes import ProbeResults, may_probe
from regd.system.processes import Processes, boot_id

PROTOCOL = 1
_SHOWN_MAX, _OWNERS_MAX = 100, 32  # instances that `why` tells of, and owners of each
_ENCODED_MAX = 200  # instances made into JSON in one turn of the loop
_AROUND_BYTES = 512  # `instances`, `more` and `next`, which is a name and an instance
FEATURES = ("if", "force", "state", "hold", "pid", "ttl", "watch", "wait", "why")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this daemon is, from its start to its end.

    `epoch` is new at every start. `boot` and `pid_namespace` tell a client whether its process numbers are ours;
    None where the system does not say. `log` is the file that the log goes to, None where it goes to stderr.
    """

    epoch: str
    loop: str
    registry: str
    log: str | None
    boot: str | None
    pid_namespace: str | None
    pid: int
    started: float  # monotonic seconds


def identify(epoch: str, loop: str, registry: str, log: str | None, started: float) -> Identity:
    """Ask the system what there is to know of it (Linux: proc(5), namespaces(7))."""
    namespace = None
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return Identity(epoch, loop, registry, log, boot_id(), namespace, os.getpid(), started)


IncrementalReply = Iterator[bytes | None]
"""A reply that takes more than one turn of the loop: None until it is there."""


class Caller(NamedTuple):
    """Who asks: a connection, its user where that is known, and its namespaces."""

    session: int
    uid: int | None
    elsewhere: Elsewhere = HERE
    is_readonly: bool = False  # may only read


class Handlers:
    """`peer_of` names a session's connection for people, None when it has ended; `gauges` are more of `stats`."""

    def __init__(
        self,
        registry: Registry,
        identity: Identity,
        clock: Clock,
        tally: Counters,
        limits: Limits,
        stalls: Stalls,
        processes: Processes,
        findings: ProbeResults,
        replies: ResolveCache,
        peer_of: Callable[[int], str | None],
        gauges: Callable[[], Mapping[str, object]],
    ) -> None:
        self._registry = registry
        self._identity = identity
        self._clock = clock
        self._tally = tally
        self._limits = limits
        self._stalls = stalls
        self._processes = processes
        self._findings = findings
        self._replies = replies
        self._peer_of = peer_of
        self._gauges = gauges
        self._helps: dict[str | None, bytes] = {}  # the replies to `help`, by topic, without an id
        self._reads: Mapping[str, Callable[[Request, Caller], bytes | IncrementalReply]] = {
            "ping": lambda request, asker: messages.ok(request.id, {}),
            "hello": self._hello,
            "help": self._help,
            "resolve": self._resolve,
            "list": self._list,
            "renew": self._renew,
            "why": self._why,
            "stats": self._stats,
        }
        self._writes: Mapping[str, Callable[[Transaction, Request, Caller], bytes]] = {
            "register": self._register,
            "deregister": self._deregister,
            "update": self._update,
        }

    def read(self, request: Request, asker: Caller) -> bytes | IncrementalReply:
        """Answer a command that changes nothing.

        Raises:
            Refused: it cannot be answered.
        """
        return self._reads[request.cmd](request, asker)

    def write(self, request: Request, asker: Caller) -> Write:
        """Return how to judge a command that changes something."""
        do = self._writes[request.cmd]
        return lambda transaction: do(transaction, request, asker)

    def explain(self, request: Request, refusal: Refused) -> None:
        """Say of a write what helps somebody who found nothing. What was before it has landed."""
        if refusal.code is Code.NOT_FOUND:
            name = request.arguments["name"]
            refusal.details |= self._hints(name, self._registry.near(name))

    def waited(self, request: Request, entry: Entry | None) -> bytes:
        """Answer a `resolve` that waited, with what it got.

        Raises:
            Refused: `timeout`, and why.
        """
        if entry is None:
            raise self._timeout(request)
        if request.arguments.get("all"):
            search = self._search(request, readonly=False)
            search.go_on(self._limits.search_step_max)
            return self._resolved(request, search.found or [entry], self._registry.rev, readonly=False)
        return messages.resolved(request.id, entry)

    def position(self) -> dict[str, object]:
        """Return where the registry is now."""
        return {"epoch": self._identity.epoch, "rev": self._registry.rev}

    # Reads.

    def _hello(self, request: Request, asker: Caller) -> bytes:
        identity = self._identity
        return messages.ok(
            request.id,
            {
                "server": "regd",
                "version": regd.__version__,
                "protocol": PROTOCOL,
                "epoch": identity.epoch,
                "rev": self._registry.rev,
                "features": FEATURES,
                "limits": self._limits.values(),
                "host": {"boot": identity.boot, "pid_namespace": identity.pid_namespace},
                "loop": identity.loop,
            },
        )

    def _help(self, request: Request, asker: Caller) -> bytes:
        if "short" in request.arguments:  # of a bare line
            return messages.ok(None, {"bare": USAGES, "more": '{"cmd":"help"}'})
        topic = request.arguments.get("topic")
        if topic not in self._helps:
            self._helps[topic] = messages.ok(None, {"commands": described(topic)})
        return messages.identified(request.id, self._helps[topic])

    def _resolve(self, request: Request, asker: Caller) -> bytes | IncrementalReply:
        search = self._search(request, asker.is_readonly)
        if search.go_on(self._limits.search_step_max) and len(search.found) <= _ENCODED_MAX:
            return self._resolved(request, search.found, self._registry.rev, asker.is_readonly)
        return self._resolve_slowly(request, asker.is_readonly)

    def _search(self, request: Request, readonly: bool) -> Search:
        given = request.arguments
        name, instance, meta = given["name"], given.get("instance"), given.get("meta", {})
        if given.get("all"):
            return self._registry.search(name, instance, meta, self._limits.reply_instances_max + 1)
        return self._registry.search_in_turn(name, instance, meta, 1, readonly=readonly)

    def _resolve_slowly(self, request: Request, readonly: bool) -> IncrementalReply:
        """Search anew: until it is this reply's turn nothing is kept for it."""
        yield None
        search, rev = self._search(request, readonly), self._registry.rev
        while not search.go_on(self._limits.search_step_max):
            yield None
        yield from self._encode(search.found)
        yield self._resolved(request, search.found, rev, readonly)

    @staticmethod
    def _encode(entries: list[Entry]) -> Iterator[None]:
        """Make what a reply of many instances is put together from, some in each turn."""
        for count, entry in enumerate(entries, 1):
            messages.instance(entry)
            if count % _ENCODED_MAX == 0:
                yield None

    def _resolved(self, request: Request, found: list[Entry], rev: int, readonly: bool) -> bytes:
        """Answer with what was found at a revision."""
        given = request.arguments
        if not found:
            raise self._none_ready(given["name"], given.get("instance"), given.get("meta", {}))
        if not given.get("all"):
            entry = found[0]
            self._registry.mark_served(entry, given.get("meta", {}), readonly=readonly)
            if len(given) == 1 and self._registry.is_sole_ready(entry):
                self._replies.put(entry)
            return messages.resolved(request.id, entry)
        shown = found[: self._limits.reply_instances_max]
        result: dict[str, object] = {"rev": rev}
        room = self._limits.reply_bytes_max - len(messages.ok(request.id, result)) - _AROUND_BYTES
        shown = shown[: messages.fitting(shown, room)]
        if len(shown) < len(found):
            result["more"] = True
        return messages.instances(request.id, result, shown)

    def _list(self, request: Request, asker: Caller) -> bytes | IncrementalReply:
        page = self._page(request)
        if len(page.entries) <= _ENCODED_MAX:
            return self._listed(request, page, self.position())
        return self._list_slowly(request)

    def _page(self, request: Request) -> Page:
        given = request.arguments
        return self._registry.page(
            given.get("name", "*"),
            given.get("meta", {}),
            given.get("after"),
            min(given.get("limit", self._limits.reply_instances_max), self._limits.reply_instances_max),
        )

    def _list_slowly(self, request: Request) -> IncrementalReply:
        """Take the page anew: until it is this reply's turn nothing is kept for it."""
        yield None
        page, position = self._page(request), self.position()
        yield from self._encode(page.entries)
        yield self._listed(request, page, position)

    def _listed(self, request: Request, page: Page, position: dict[str, object]) -> bytes:
        """Answer with a page of the registry as it was at a position."""
        entries, after, result = page.entries, page.after, position
        room = self._limits.reply_bytes_max - len(messages.ok(request.id, result)) - _AROUND_BYTES
        fit = messages.fitting(entries, room)
        if fit < len(entries):
            entries, after = entries[:fit], entries[fit - 1].key
        if after is not None:
            result["next"] = key_text(after)
        return messages.instances(request.id, result, entries)

    def _stats(self, request: Request, asker: Caller) -> bytes:
        identity, tally = self._identity, self._tally
        return messages.ok(
            request.id,
            {
                "version": regd.__version__,
                "pid": identity.pid,
                "loop": identity.loop,
                "registry": identity.registry,
                "log": identity.log,
                "uptime_s": round(self._clock.now() - identity.started, 3),
                "epoch": identity.epoch,
                "rev": self._registry.rev,
                "registrations": len(self._registry),
                "registry_bytes": self._registry.weight_bytes,
                **self._gauges(),
                "connections": tally.connections,
                "readonly_connections": tally.readonly_connections,
                "connections_accepted": tally.connections_accepted,
                "connections_refused": tally.connections_refused,
                "bad_protocol": tally.bad_protocol,
                "dropped": tally.dropped,
                "commits": tally.commits,
                "commits_failed": tally.commits_failed,
                "changes": tally.changes,
                "requests": tally.requests + Counter(resolve=self._replies.count),
                "errors": tally.errors,
                "limits": self._limits.values(),
            },
        )

    def _renew(self, request: Request, asker: Caller) -> bytes:
        """Renew the lease of whoever asks, where it has one, else all of that registration."""
        given = request.arguments
        name, key = given["name"], _key(given)
        entry = self._registry.get(key)
        if entry is None or not self._registry.lifetimes.is_alive(entry):
            message = f"no registration of {key_text(key)!r} any more: register again"
            raise Refused(Code.NOT_FOUND, message, **self._hints(name, self._registry.near(name)))
        leases = [(each, each.ttl_s) for each in entry.holders if each.ttl_s is not None]
        if not leases:
            raise Refused(Code.BAD_ARGUMENT, f"{key_text(key)!r} has no ttl to renew", field="name")
        own = [lease for lease in leases if lease[0].session == asker.session]
        granted, now = 0.0, self._stalls.now()
        for holder, ttl_s in own or leases:
            granted = given.get("ttl", ttl_s)
            self._registry.lifetimes.renew(key, holder, now, granted)
        return messages.ok(request.id, {"ttl": messages.seconds(granted)})

    # Explaining.

    def _why(self, request: Request, asker: Caller) -> bytes:
        name, instance = request.arguments["name"], request.arguments.get("instance")
        entries = (
            self._registry.instances_of(name)
            if instance is None
            else filter(None, [self._registry.get((name, instance))])
        )
        fits = list(islice(entries, _SHOWN_MAX + 1))
        left = [each for each in self._registry.departures(name) if instance is None or each.instance == instance]
        if not fits and not left:
            near = self._registry.near(name)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise Refused(Code.NOT_FOUND, f"nothing is known of {name!r}{hint}", near=near)
        now = self._clock.now()
        shown = fits[:_SHOWN_MAX]
        result: dict[str, object] = {
            "name": name,
            "instances": [self._known(entry) for entry in shown],
            "departures": [
                {"instance": each.instance, "reason": each.reason, "age_s": round(now - each.at, 3)}
                for each in left
            ],
        }
        if len(shown) < len(fits):
            result["more"] = True
        return messages.ok(request.id, result)

    def _known(self, entry: Entry) -> dict[str, object]:
        """Return all that is known of an instance."""
        alive = self._registry.lifetimes.is_alive(entry)
        finding = self._findings.last((entry.host, entry.port))
        return {
            "instance": entry.instance,
            "host": entry.host,
            "port": entry.port,
            "state": entry.state,
            "alive": alive,
            "rev": entry.rev,
            "since": entry.registered_at,
            "owners": [self._owner(each) for each in entry.holders[:_OWNERS_MAX]] or [{"static": True}],
            **({"more_owners": True} if len(entry.holders) > _OWNERS_MAX else {}),
            "probe": None
            if finding is None
            else {
                "accepted": finding.accepted,
                "age_s": round(self._clock.now() - finding.at, 3),
                **({"why": finding.why} if finding.why else {}),
            },
        }

    def _owner(self, holder: Holder) -> dict[str, object]:
        """Return who holds, as far as it may be told: its connection, process and lease."""
        owner: dict[str, object] = {}
        if holder.hold:
            owner["connection"] = self._peer_of(holder.session) if holder.session is not None else None
        if holder.process is not None:
            owner["pid"] = holder.process.pid
        if holder.ttl_s is not None:
            owner["ttl"] = messages.seconds(holder.ttl_s)
        if holder.withdrawn:
            owner["withdrawn"] = True
        return owner

    def _timeout(self, request: Request) -> Refused:
        """Say why nothing came of waiting."""
        given = request.arguments
        name, instance, meta = given["name"], given.get("instance"), given.get("meta", {})
        near, last = self._registry.near(name), self._registry.last(name, self._clock.now())
        here = self._registry.page(name, {}, None, 1).entries
        refusing = [
            f"{messages.joined(each.host, each.port)} ({finding.why})"
            for each in self._some_ready(name, instance, meta, _SHOWN_MAX)
            if (finding := self._findings.last((each.host, each.port))) is not None and finding.why
        ]
        if refusing:
            why = f"{name!r} is registered, and cannot be reached: {', '.join(refusing[:3])}"
        elif here:
            why = self._none_ready(name, instance, meta).message
        elif last is not None:
            why = f"{name!r} left {self._clock.now() - last.at:.1f} s ago: {last.reason}"
        else:
            why = f"{name!r} was never registered" + (f"; did you mean {near[0]!r}?" if near else "")
        return Refused(Code.TIMEOUT, f"waited {round(given['wait'], 1):g} s: {why}", **self._hints(name, near))

    def _some_ready(self, name: str, instance: str | None, meta: Mapping[str, str], most: int) -> list[Entry]:
        """Return some that could be resolved, of those that are looked at in one turn."""
        search = self._registry.search_in_turn(name, instance, meta, most)
        search.go_on(self._limits.search_step_max)
        return search.found

    def _hints(self, name: str, near: list[str]) -> dict[str, object]:
        """Return what helps somebody who did not find `name`."""
        hints: dict[str, object] = {"near": near}
        last = self._registry.last(name, self._clock.now())
        if last is not None:
            hints["last"] = {"reason": last.reason, "age_s": round(self._clock.now() - last.at, 3)}
        return hints

    def _none_ready(self, name: str, instance: str | None, meta: Mapping[str, str]) -> Refused:
        near = self._registry.near(name)
        which = f"{name!r} with instance {instance!r}" if instance else repr(name)
        here = self._registry.page(name, {}, None, 1).entries
        if not here:
            message = f"no service {which}"
            if near:
                message += f"; did you mean {near[0]!r}?"
        elif instance is not None and self._registry.get((name, instance)) is None:
            message = f"{name!r} is here, but has no instance {instance!r}"
        elif meta and self._some_ready(name, instance, {}, 1):
            message = f"{which} is here, but none with that meta is ready"
        else:
            message = f"{which} is here, but none is {State.READY}"
        return Refused(Code.NOT_FOUND, message, **self._hints(name, near))

    # Writes. The file holds the change when their reply is sent.

    def _register(self, transaction: Transaction, request: Request, asker: Caller) -> bytes:
        given = request.arguments
        name, instance = _key(given)
        host, meta, state = (
            given.get("host", DEFAULT_HOST),
            given.get("meta", {}),
            given.get("state", State.READY),
        )
        if asker.elsewhere.network and may_probe(host):
            raise Refused(
                Code.BAD_ARGUMENT,
                f"{host} is of your network namespace, which is not regd's, so that nobody here could reach it; "
                "register an address that can be reached from here",
                field="host",
            )
        holders: tuple[Holder, ...] = ()
        hold, pid, ttl_s = given.get("hold", False), given.get("pid"), given.get("ttl")
        if hold or pid is not None or ttl_s is not None:
            process = None if pid is None else self._find(pid, asker)
            holders = (Holder(0, asker.session, hold, process, ttl_s),)
        wanted = Entry(
            name, instance, host, given["port"], meta, state, rev=0, registered_at=0.0, holders=holders
        )
        try:
            entry, replaced = transaction.register(
                wanted, given.get("if"), session=asker.session, force=given.get("force", False)
            )
        except OwnerConflict as contested:
            raise self._conflict(contested) from None
        return messages.registered(request.id, entry, replaced)

    def _find(self, pid: int, asker: Caller) -> Process:
        if asker.elsewhere.pid:
            raise Refused(
                Code.UNSUPPORTED,
                f"regd cannot watch process {pid}: it is in another pid namespace; use hold or ttl",
                field="pid",
            )
        return self._processes.find(pid, asker.uid)

    def _conflict(self, contested: OwnerConflict) -> Refused:
        entry, owner = contested.entry, self._owner(contested.owner)
        who = [f"{what} {value}" for what, value in owner.items() if value is not None]
        return Refused(
            Code.CONFLICT,
            f"{key_text(entry.key)!r} is at {messages.joined(entry.host, entry.port)}, held by {', '.join(who)}; "
            "stop that one, take another name or instance, or take over with force",
            owner=owner,
            rev=entry.rev,
        )

    def _deregister(self, transaction: Transaction, request: Request, asker: Caller) -> bytes:
        given = request.arguments
        removed = transaction.deregister(_key(given), given.get("if"), session=asker.session)
        return messages.ok(request.id, {"removed": removed, "rev": transaction.rev})

    def _update(self, transaction: Transaction, request: Request, asker: Caller) -> bytes:
        given = request.arguments
        meta, state = given.get("meta"), given.get("state")
        if meta is None and state is None:
            raise Refused(Code.BAD_ARGUMENT, "update needs meta, state or both", field="meta")
        entry = transaction.update(_key(given), meta, state, given.get("if"), session=asker.session)
        return messages.ok(request.id, {"rev": entry.rev})


def _key(given: Mapping[str, Any]) -> Key:
    return (given["name"], given.get("instance", ""))
