"""The request handlers. A read returns its reply; a write returns a function that the engine evaluates."""

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

_ENCODED_MAX = 200  # instances encoded in one time slice
_ENVELOPE_BYTES = 512  # room in a reply for `instances`, `more` and `next` (a name and an instance)


IncrementalReply = Iterator[bytes | None]
"""A reply that takes several time slices: yields None until the reply is complete, then the reply."""


class ClientIdentity(NamedTuple):
    """What is known about the client of a request: its session, user, namespaces and process."""

    session: int
    uid: int | None  # None if the system does not tell
    elsewhere: Elsewhere = HERE
    is_readonly: bool = False
    by: By | None = None  # None if the system does not tell


class Handlers:
    """The handlers of all commands except `watch`, `unwatch` and `history`, which `Dispatcher` carries out."""

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
        self._helps: dict[str | None, bytes] = {}  # encoded replies to `help`, by topic, without an id
        self._reads: Mapping[str, Callable[[Request, ClientIdentity], bytes | IncrementalReply]] = {
            "ping": lambda request, client: messages.ok(request.id, {}),
            "hello": self._hello,
            "help": self._help,
            "resolve": self._resolve,
            "list": self._list,
            "renew": self._renew,
            "why": self._why,
            "stats": self._stats,
        }
        self._writes: Mapping[str, Callable[[Transaction, Request, ClientIdentity], bytes]] = {
            "register": self._register,
            "deregister": self._deregister,
            "update": self._update,
        }

    def read(self, request: Request, client: ClientIdentity) -> bytes | IncrementalReply:
        """Return the reply to a command that changes nothing, or an iterator that makes the reply.

        Raises:
            Refused: the request is answered with an error.
        """
        return self._reads[request.cmd](request, client)

    def write(self, request: Request, client: ClientIdentity) -> Write:
        """Return the function with which the engine evaluates a command that changes something."""
        handler = self._writes[request.cmd]
        return lambda transaction: handler(transaction, request, client)

    def explain(self, request: Request, refusal: Refused) -> None:
        """Add hints to the refusal of a write that found no registration. Earlier writes must be committed."""
        if refusal.code is Code.NOT_FOUND:
            refusal.details |= self._explainer.hints(request.arguments["name"])

    def waited(self, request: Request, entry: Entry | None) -> bytes:
        """Return the reply to a `resolve` with `wait`, for which `entry` was found.

        Raises:
            Refused: `timeout`, `entry` is None.
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

    def _hello(self, request: Request, client: ClientIdentity) -> bytes:
        return messages.ok(request.id, self._info.hello())

    def _help(self, request: Request, client: ClientIdentity) -> bytes:
        if "short" in request.arguments:  # the bare line `help`
            return messages.ok(None, {"bare": USAGES, "more": '{"cmd":"help"}'})
        topic = request.arguments.get("topic")
        if topic not in self._helps:
            self._helps[topic] = messages.ok(None, {"commands": describe_commands(topic)})
        return messages.add_id(request.id, self._helps[topic])

    def _resolve(self, request: Request, client: ClientIdentity) -> bytes | IncrementalReply:
        search = self._search(request, client.is_readonly)
        if search.step(self._limits.search_step_max) and len(search.found) <= _ENCODED_MAX:
            return self._resolved(request, search.found, self._registry.rev, client.is_readonly)
        return self._resolve_slowly(request, client.is_readonly)

    def _search(self, request: Request, readonly: bool) -> Search:
        arguments = request.arguments
        name, instance, meta = arguments["name"], arguments.get("instance"), arguments.get("meta", {})
        if arguments.get("all"):
            return self._registry.search(name, instance, meta, self._limits.reply_instances_max + 1)
        return self._registry.search_round_robin(name, instance, meta, 1, readonly=readonly)

    def _resolve_slowly(self, request: Request, readonly: bool) -> IncrementalReply:
        """Answer a `resolve` in several time slices.

        The search starts anew: a reply that waits for a slot keeps no search, which would take memory.
        """
        yield None
        search, rev = self._search(request, readonly), self._registry.rev
        while not search.step(self._limits.search_step_max):
            yield None
        yield from self._encode(search.found)
        yield self._resolved(request, search.found, rev, readonly)

    @staticmethod
    def _encode(entries: list[Entry]) -> Iterator[None]:
        """Encode the instances of a long reply in several time slices. Each entry keeps its encoding."""
        for count, entry in enumerate(entries, 1):
            messages.instance(entry)
            if count % _ENCODED_MAX == 0:
                yield None

    def _resolved(self, request: Request, found: list[Entry], rev: int, readonly: bool) -> bytes:
        """Return the reply with the instances found at revision `rev`."""
        arguments = request.arguments
        if not found:
            raise self._explainer.none_ready(arguments)
        if not arguments.get("all"):
            entry = found[0]
            self._registry.mark_served(entry, arguments.get("meta", {}), readonly=readonly)
            if len(arguments) == 1 and self._registry.is_sole_ready(entry):
                self._replies.put(entry)
            return messages.resolved(request.id, entry)
        shown = found[: self._limits.reply_instances_max]
        result: dict[str, object] = {"rev": rev}
        room = self._limits.reply_bytes_max - len(messages.ok(request.id, result)) - _ENVELOPE_BYTES
        shown = shown[: messages.count_fitting(shown, room)]
        if len(shown) < len(found):
            result["more"] = True
        return messages.instances(request.id, result, shown)

    def _list(self, request: Request, client: ClientIdentity) -> bytes | IncrementalReply:
        page = self._page(request)
        if len(page.entries) <= _ENCODED_MAX:
            return self._listed(request, page, self.position())
        return self._list_slowly(request)

    def _page(self, request: Request) -> ListPage:
        arguments = request.arguments
        return self._registry.page(
            arguments.get("name", "*"),
            arguments.get("meta", {}),
            arguments.get("after"),
            min(arguments.get("limit", self._limits.reply_instances_max), self._limits.reply_instances_max),
        )

    def _list_slowly(self, request: Request) -> IncrementalReply:
        """Answer a `list` in several time slices.

        The page is read anew: a reply that waits for a slot keeps no page, which would take memory.
        """
        yield None
        page, position = self._page(request), self.position()
        yield from self._encode(page.entries)
        yield self._listed(request, page, position)

    def _listed(self, request: Request, page: ListPage, position: dict[str, object]) -> bytes:
        """Return the reply with a page of the registry at an epoch and revision."""
        entries, after, result = page.entries, page.after, position
        room = self._limits.reply_bytes_max - len(messages.ok(request.id, result)) - _ENVELOPE_BYTES
        fit = messages.count_fitting(entries, room)
        if fit < len(entries):
            entries, after = entries[:fit], entries[fit - 1].key
        if after is not None:
            result["next"] = key_text(after)
        return messages.instances(request.id, result, entries)

    def _stats(self, request: Request, client: ClientIdentity) -> bytes:
        return messages.ok(request.id, self._info.stats())

    def _renew(self, request: Request, client: ClientIdentity) -> bytes:
        """Renew the client's own lease if it has one, else all leases of the registration."""
        arguments = request.arguments
        name, key = arguments["name"], _key(arguments)
        entry = self._registry.get(key)
        if entry is None or not self._registry.holder_index.is_alive(entry):
            message = f"no registration of {key_text(key)!r} any more: register again"
            raise Refused(Code.NOT_FOUND, message, **self._explainer.hints(name))
        leases = [(holder, holder.ttl_s) for holder in entry.holders if holder.ttl_s is not None]
        if not leases:
            raise Refused(Code.BAD_ARGUMENT, f"{key_text(key)!r} has no ttl to renew", field="name")
        own = [lease for lease in leases if lease[0].session == client.session]
        granted, now = 0.0, self._stalls.now_after_prolonging()
        for holder, ttl_s in own or leases:
            granted = arguments.get("ttl", ttl_s)
            self._registry.holder_index.renew(key, holder, now, granted)
        return messages.ok(request.id, {"ttl": messages.seconds(granted)})

    def _why(self, request: Request, client: ClientIdentity) -> bytes:
        return messages.ok(
            request.id, self._explainer.why(request.arguments["name"], request.arguments.get("instance"))
        )

    # Writes. The engine calls these functions, and sends the replies once the changes are on disk.

    def _register(self, transaction: Transaction, request: Request, client: ClientIdentity) -> bytes:
        arguments = request.arguments
        name, instance = _key(arguments)
        host, meta, state = (
            arguments.get("host", DEFAULT_HOST),
            arguments.get("meta", {}),
            arguments.get("state", State.READY),
        )
        if client.elsewhere.network and may_probe(host):
            raise Refused(
                Code.BAD_ARGUMENT,
                f"{host} is in your network namespace, which is not regd's, so that nobody here could reach it; "
                "register an address that can be reached from here",
                field="host",
            )
        holders: tuple[Holder, ...] = ()
        hold, pid, ttl_s = arguments.get("hold", False), arguments.get("pid"), arguments.get("ttl")
        if hold or pid is not None or ttl_s is not None:
            process = None if pid is None else self._find_process(pid, client)
            holders = (Holder(0, client.session, hold, process, ttl_s),)
        proposed = Entry(
            name,
            instance,
            host,
            arguments["port"],
            meta,
            state,
            rev=0,
            registered_at=0.0,
            holders=holders,
            priority=arguments.get("priority", 0),
        )
        try:
            entry, replaced = transaction.register(
                proposed, arguments.get("if"), session=client.session, force=arguments.get("force", False)
            )
        except OwnerConflict as conflict:
            raise self._explainer.conflict(conflict) from None
        return messages.registered(request.id, entry, replaced)

    def _find_process(self, pid: int, client: ClientIdentity) -> Process:
        if client.elsewhere.pid:
            raise Refused(
                Code.UNSUPPORTED,
                f"regd cannot watch process {pid}: it is in another pid namespace; use hold or ttl",
                field="pid",
            )
        return self._processes.find(pid, client.uid)

    def _deregister(self, transaction: Transaction, request: Request, client: ClientIdentity) -> bytes:
        arguments = request.arguments
        removed = transaction.deregister(_key(arguments), arguments.get("if"), session=client.session)
        return messages.ok(request.id, {"removed": removed, "rev": transaction.rev})

    def _update(self, transaction: Transaction, request: Request, client: ClientIdentity) -> bytes:
        arguments = request.arguments
        meta, state, priority = arguments.get("meta"), arguments.get("state"), arguments.get("priority")
        if meta is None and state is None and priority is None:
            raise Refused(Code.BAD_ARGUMENT, "update needs meta, state or priority", field="meta")
        entry = transaction.update(
            _key(arguments), meta, state, arguments.get("if"), priority=priority, session=client.session
        )
        return messages.ok(request.id, {"rev": entry.rev})


def _key(arguments: Mapping[str, Any]) -> Key:
    return (arguments["name"], arguments.get("instance", ""))
