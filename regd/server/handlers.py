"""The request handlers: a request in, its reply out. Reads are answered at once, writes by the engine."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from regd.core.errors import Code, Refused
from regd.core.instances import Search
from regd.core.model import DEFAULT_HOST, By, Entry, Holder, Key, Process, State, key_text
from regd.core.registry import ListPage, Registry
from regd.core.transaction import OwnerConflict, Transaction
from regd.protocol import messages
from regd.protocol.bare import USAGES
from regd.protocol.commands import Request, describe_commands
from regd.server.daemon_info import DaemonInfo
from regd.server.engine import Write
from regd.server.explain import Explainer
from regd.server.resolve_cache import ResolveCache
from regd.server.stalls import Stalls
from regd.system.namespaces import HERE, Elsewhere
from regd.system.probes import may_probe
from regd.system.processes import Processes

_ENCODED_MAX = 200  # instances encoded in one loop iteration
_AROUND_BYTES = 512  # for `instances`, `more` and `next`, which is a name and an instance


IncrementalReply = Iterator[bytes | None]
"""A reply that takes several loop iterations: yields None until the reply is complete."""


class Caller(NamedTuple):
    """The peer of a request: its session, its user if known, and its namespaces."""

    session: int
    uid: int | None
    elsewhere: Elsewhere = HERE
    is_readonly: bool = False  # may only read
    by: By | None = None  # its process, where the system tells that


class Handlers:
    """The handlers of all commands but `watch` and `unwatch`, which belong to a connection, and `history`."""

    def __init__(
        self,
        registry: Registry,
        info: DaemonInfo,
        explainer: Explainer,
        stalls: Stalls,
        processes: Processes,
        replies: ResolveCache,
    ) -> None:
        self._registry = registry
        self._limits = registry.limits
        self._info = info
        self._explainer = explainer
        self._stalls = stalls
        self._processes = processes
        self._replies = replies
        self._helps: dict[str | None, bytes] = {}  # the replies to `help`, by topic, without an id
        self._reads: Mapping[str, Callable[[Request, Caller], bytes | IncrementalReply]] = {
            "ping": lambda request, caller: messages.ok(request.id, {}),
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

    def read(self, request: Request, caller: Caller) -> bytes | IncrementalReply:
        """Return the reply to a command that changes nothing, or an iterator that makes it.

        Raises:
            Refused: it cannot be answered.
        """
        return self._reads[request.cmd](request, caller)

    def write(self, request: Request, caller: Caller) -> Write:
        """Return the write of a command that changes something, for the engine."""
        do = self._writes[request.cmd]
        return lambda transaction: do(transaction, request, caller)

    def explain(self, request: Request, refusal: Refused) -> None:
        """Add hints to the refusal of a write that found no registration. The writes before it are committed."""
        if refusal.code is Code.NOT_FOUND:
            refusal.details |= self._explainer.hints(request.arguments["name"])

    def waited(self, request: Request, entry: Entry | None) -> bytes:
        """Return the reply to a `resolve` with `wait`, for which `entry` was found, or None in time.

        Raises:
            Refused: `timeout`.
        """
        if entry is None:
            raise self._explainer.timeout(request.arguments)
        if request.arguments.get("all"):
            search = self._search(request, readonly=False)
            search.step(self._limits.search_step_max)
            return self._resolved(request, search.found or [entry], self._registry.rev, readonly=False)
        return messages.resolved(request.id, entry)

    def position(self) -> dict[str, object]:
        """Return the registry's epoch and revision."""
        return self._info.position()

    # Reads.

    def _hello(self, request: Request, caller: Caller) -> bytes:
        return messages.ok(request.id, self._info.hello())

    def _help(self, request: Request, caller: Caller) -> bytes:
        if "short" in request.arguments:  # of a bare line
            return messages.ok(None, {"bare": USAGES, "more": '{"cmd":"help"}'})
        topic = request.arguments.get("topic")
        if topic not in self._helps:
            self._helps[topic] = messages.ok(None, {"commands": describe_commands(topic)})
        return messages.add_id(request.id, self._helps[topic])

    def _resolve(self, request: Request, caller: Caller) -> bytes | IncrementalReply:
        search = self._search(request, caller.is_readonly)
        if search.step(self._limits.search_step_max) and len(search.found) <= _ENCODED_MAX:
            return self._resolved(request, search.found, self._registry.rev, caller.is_readonly)
        return self._resolve_slowly(request, caller.is_readonly)

    def _search(self, request: Request, readonly: bool) -> Search:
        given = request.arguments
        name, instance, meta = given["name"], given.get("instance"), given.get("meta", {})
        if given.get("all"):
            return self._registry.search(name, instance, meta, self._limits.reply_instances_max + 1)
        return self._registry.search_round_robin(name, instance, meta, 1, readonly=readonly)

    def _resolve_slowly(self, request: Request, readonly: bool) -> IncrementalReply:
        """Search again: nothing is kept for a reply that waits for a slot."""
        yield None
        search, rev = self._search(request, readonly), self._registry.rev
        while not search.step(self._limits.search_step_max):
            yield None
        yield from self._encode(search.found)
        yield self._resolved(request, search.found, rev, readonly)

    @staticmethod
    def _encode(entries: list[Entry]) -> Iterator[None]:
        """Encode the instances of a long reply, some in each loop iteration."""
        for count, entry in enumerate(entries, 1):
            messages.instance(entry)
            if count % _ENCODED_MAX == 0:
                yield None

    def _resolved(self, request: Request, found: list[Entry], rev: int, readonly: bool) -> bytes:
        """Return the reply with the instances found at a revision."""
        given = request.arguments
        if not found:
            raise self._explainer.none_ready(given)
        if not given.get("all"):
            entry = found[0]
            self._registry.mark_served(entry, given.get("meta", {}), readonly=readonly)
            if len(given) == 1 and self._registry.is_sole_ready(entry):
                self._replies.put(entry)
            return messages.resolved(request.id, entry)
        shown = found[: self._limits.reply_instances_max]
        result: dict[str, object] = {"rev": rev}
        room = self._limits.reply_bytes_max - len(messages.ok(request.id, result)) - _AROUND_BYTES
        shown = shown[: messages.count_fitting(shown, room)]
        if len(shown) < len(found):
            result["more"] = True
        return messages.instances(request.id, result, shown)

    def _list(self, request: Request, caller: Caller) -> bytes | IncrementalReply:
        page = self._page(request)
        if len(page.entries) <= _ENCODED_MAX:
            return self._listed(request, page, self.position())
        return self._list_slowly(request)

    def _page(self, request: Request) -> ListPage:
        given = request.arguments
        return self._registry.page(
            given.get("name", "*"),
            given.get("meta", {}),
            given.get("after"),
            min(given.get("limit", self._limits.reply_instances_max), self._limits.reply_instances_max),
        )

    def _list_slowly(self, request: Request) -> IncrementalReply:
        """Take the page again: nothing is kept for a reply that waits for a slot."""
        yield None
        page, position = self._page(request), self.position()
        yield from self._encode(page.entries)
        yield self._listed(request, page, position)

    def _listed(self, request: Request, page: ListPage, position: dict[str, object]) -> bytes:
        """Return the reply with a page of the registry at a position."""
        entries, after, result = page.entries, page.after, position
        room = self._limits.reply_bytes_max - len(messages.ok(request.id, result)) - _AROUND_BYTES
        fit = messages.count_fitting(entries, room)
        if fit < len(entries):
            entries, after = entries[:fit], entries[fit - 1].key
        if after is not None:
            result["next"] = key_text(after)
        return messages.instances(request.id, result, entries)

    def _stats(self, request: Request, caller: Caller) -> bytes:
        return messages.ok(request.id, self._info.stats())

    def _renew(self, request: Request, caller: Caller) -> bytes:
        """Renew the caller's lease if it has one, else all leases of the registration."""
        given = request.arguments
        name, key = given["name"], _key(given)
        entry = self._registry.get(key)
        if entry is None or not self._registry.holders.is_alive(entry):
            message = f"no registration of {key_text(key)!r} any more: register again"
            raise Refused(Code.NOT_FOUND, message, **self._explainer.hints(name))
        leases = [(holder, holder.ttl_s) for holder in entry.holders if holder.ttl_s is not None]
        if not leases:
            raise Refused(Code.BAD_ARGUMENT, f"{key_text(key)!r} has no ttl to renew", field="name")
        own = [lease for lease in leases if lease[0].session == caller.session]
        granted, now = 0.0, self._stalls.now()
        for holder, ttl_s in own or leases:
            granted = given.get("ttl", ttl_s)
            self._registry.holders.renew(key, holder, now, granted)
        return messages.ok(request.id, {"ttl": messages.seconds(granted)})

    def _why(self, request: Request, caller: Caller) -> bytes:
        return messages.ok(
            request.id, self._explainer.why(request.arguments["name"], request.arguments.get("instance"))
        )

    # Writes. Their replies are sent once the journal has the changes on disk.

    def _register(self, transaction: Transaction, request: Request, caller: Caller) -> bytes:
        given = request.arguments
        name, instance = _key(given)
        host, meta, state = (
            given.get("host", DEFAULT_HOST),
            given.get("meta", {}),
            given.get("state", State.READY),
        )
        if caller.elsewhere.network and may_probe(host):
            raise Refused(
                Code.BAD_ARGUMENT,
                f"{host} is in your network namespace, which is not regd's, so that nobody here could reach it; "
                "register an address that can be reached from here",
                field="host",
            )
        holders: tuple[Holder, ...] = ()
        hold, pid, ttl_s = given.get("hold", False), given.get("pid"), given.get("ttl")
        if hold or pid is not None or ttl_s is not None:
            process = None if pid is None else self._find(pid, caller)
            holders = (Holder(0, caller.session, hold, process, ttl_s),)
        wanted = Entry(
            name,
            instance,
            host,
            given["port"],
            meta,
            state,
            rev=0,
            registered_at=0.0,
            holders=holders,
            priority=given.get("priority", 0),
        )
        try:
            entry, replaced = transaction.register(
                wanted, given.get("if"), session=caller.session, force=given.get("force", False)
            )
        except OwnerConflict as conflict:
            raise self._explainer.conflict(conflict) from None
        return messages.registered(request.id, entry, replaced)

    def _find(self, pid: int, caller: Caller) -> Process:
        if caller.elsewhere.pid:
            raise Refused(
                Code.UNSUPPORTED,
                f"regd cannot watch process {pid}: it is in another pid namespace; use hold or ttl",
                field="pid",
            )
        return self._processes.find(pid, caller.uid)

    def _deregister(self, transaction: Transaction, request: Request, caller: Caller) -> bytes:
        given = request.arguments
        removed = transaction.deregister(_key(given), given.get("if"), session=caller.session)
        return messages.ok(request.id, {"removed": removed, "rev": transaction.rev})

    def _update(self, transaction: Transaction, request: Request, caller: Caller) -> bytes:
        given = request.arguments
        meta, state, priority = given.get("meta"), given.get("state"), given.get("priority")
        if meta is None and state is None and priority is None:
            raise Refused(Code.BAD_ARGUMENT, "update needs meta, state or priority", field="meta")
        entry = transaction.update(
            _key(given), meta, state, given.get("if"), priority=priority, session=caller.session
        )
        return messages.ok(request.id, {"rev": entry.rev})


def _key(given: Mapping[str, Any]) -> Key:
    return (given["name"], given.get("instance", ""))
