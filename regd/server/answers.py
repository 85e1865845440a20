"""What each command does: a request in, its reply out. Reads answer at once; writes are judged by the engine.

Must not know connections or disks.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import regd
from regd.core.errors import Code, Refused
from regd.core.limits import Limits
from regd.core.model import DEFAULT_HOST, Entry, Key, State, key_text
from regd.core.registry import Draft, Registry
from regd.protocol import messages
from regd.protocol.commands import COMMANDS, Request, described
from regd.server.clock import Clock
from regd.server.engine import Write
from regd.server.tally import Tally

PROTOCOL = 1
FEATURES = ("if", "force", "state")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this daemon is, from its start to its end.

    `epoch` is new at every start. `boot` and `pid_namespace` tell a client whether its process numbers are ours;
    None where the system does not say.
    """

    epoch: str
    loop: str
    registry: str
    boot: str | None
    pid_namespace: str | None
    pid: int
    started: float  # monotonic seconds


def identify(epoch: str, loop: str, registry: str, started: float) -> Identity:
    """Ask the system what there is to know of it (Linux: proc(5), namespaces(7))."""
    boot = namespace = None
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        pass
    return Identity(epoch, loop, registry, boot, namespace, os.getpid(), started)


class Answers:
    def __init__(
        self, registry: Registry, identity: Identity, clock: Clock, tally: Tally, limits: Limits
    ) -> None:
        self._registry = registry
        self._identity = identity
        self._clock = clock
        self._tally = tally
        self._limits = limits
        self._reads: Mapping[str, Callable[[Request], bytes]] = {
            "ping": lambda request: messages.ok(request.id, {}),
            "hello": self._hello,
            "help": self._help,
            "resolve": self._resolve,
            "list": self._list,
            "stats": self._stats,
        }
        self._writes: Mapping[str, Callable[[Draft, Mapping[str, Any]], Mapping[str, object]]] = {
            "register": _register,
            "deregister": _deregister,
            "update": _update,
        }
        assert self._reads.keys() | self._writes.keys() == COMMANDS.keys()

    def read(self, request: Request) -> bytes:
        """Answer a command that changes nothing.

        Raises:
            Refused: it cannot be answered.
        """
        return self._reads[request.cmd](request)

    def write(self, request: Request) -> Write:
        """Return how to judge a command that changes something."""
        do, arguments = self._writes[request.cmd], request.arguments

        def judge(draft: Draft) -> Mapping[str, object]:
            try:
                return do(draft, arguments)
            except Refused as refusal:
                if refusal.code is Code.NOT_FOUND:
                    refusal.details |= self._hints(arguments["name"], self._registry.near(arguments["name"]))
                raise

        return judge

    # Reads.

    def _hello(self, request: Request) -> bytes:
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

    def _help(self, request: Request) -> bytes:
        return messages.ok(request.id, {"commands": described(request.arguments.get("topic"))})

    def _resolve(self, request: Request) -> bytes:
        given = request.arguments
        name, instance, meta = given["name"], given.get("instance"), given.get("meta", {})
        if given.get("all"):
            return self._resolve_all(request.id, name, instance, meta)
        entry = self._registry.resolve(name, instance, meta)
        if entry is None:
            raise self._none_ready(name, instance, meta)
        return messages.resolved(request.id, entry)

    def _resolve_all(
        self, id: str | int | None, name: str, instance: str | None, meta: Mapping[str, str]
    ) -> bytes:
        ready = self._registry.ready(name)
        if instance is not None or meta:
            ready = [
                entry
                for entry in ready
                if (instance is None or entry.instance == instance) and entry.carries(meta)
            ]
        if not ready:
            raise self._none_ready(name, instance, meta)
        shown = ready[: self._limits.reply_instances_max]
        shown = shown[: messages.fitting(shown, self._limits.reply_bytes_max)]
        result: dict[str, object] = {"rev": self._registry.rev}
        if len(shown) < len(ready):
            result["more"] = True
        return messages.instances(id, result, shown)

    def _list(self, request: Request) -> bytes:
        given = request.arguments
        page = self._registry.page(
            given.get("name", "*"),
            given.get("meta", {}),
            given.get("after"),
            min(given.get("limit", self._limits.reply_instances_max), self._limits.reply_instances_max),
        )
        entries, after = page.entries, page.after
        fit = messages.fitting(entries, self._limits.reply_bytes_max)
        if fit < len(entries):
            entries, after = entries[:fit], entries[fit - 1].key
        result: dict[str, object] = {"epoch": self._identity.epoch, "rev": self._registry.rev}
        if after is not None:
            result["next"] = key_text(after)
        return messages.instances(request.id, result, entries)

    def _stats(self, request: Request) -> bytes:
        identity, tally = self._identity, self._tally
        return messages.ok(
            request.id,
            {
                "version": regd.__version__,
                "pid": identity.pid,
                "loop": identity.loop,
                "registry": identity.registry,
                "uptime_s": round(self._clock.now() - identity.started, 3),
                "epoch": identity.epoch,
                "rev": self._registry.rev,
                "registrations": len(self._registry),
                "registry_bytes": self._registry.weight_bytes,
                "connections": tally.connections,
                "connections_accepted": tally.connections_accepted,
                "connections_refused": tally.connections_refused,
                "strangers": tally.strangers,
                "cut": tally.cut,
                "commits": tally.commits,
                "commits_failed": tally.commits_failed,
                "changes": tally.changes,
                "requests": tally.requests,
                "errors": tally.errors,
                "limits": self._limits.values(),
            },
        )

    # Explaining.

    def _hints(self, name: str, near: list[str]) -> dict[str, object]:
        """Return what helps somebody who did not find `name`."""
        hints: dict[str, object] = {"near": near}
        last = self._registry.last(name)
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
        elif meta and self._registry.resolve(name, instance, {}):
            message = f"{which} is here, but none with that meta is ready"
        else:
            message = f"{which} is here, but none is {State.READY}"
        return Refused(Code.NOT_FOUND, message, **self._hints(name, near))


# Writes. The file holds the change when their result is sent.


def _key(given: Mapping[str, Any]) -> Key:
    return (given["name"], given.get("instance", ""))


def _register(draft: Draft, given: Mapping[str, Any]) -> Mapping[str, object]:
    name, instance = _key(given)
    wanted = Entry(
        name=name,
        instance=instance,
        host=given.get("host", DEFAULT_HOST),
        port=given["port"],
        meta=given.get("meta", {}),
        state=given.get("state", State.READY),
        rev=0,
        registered_at=0.0,
    )
    entry, replaced = draft.register(wanted, given.get("if"))
    result: dict[str, object] = {
        "name": entry.name,
        "instance": entry.instance,
        "host": entry.host,
        "port": entry.port,
        "rev": entry.rev,
    }
    if replaced:
        result["replaced"] = True
    return result


def _deregister(draft: Draft, given: Mapping[str, Any]) -> Mapping[str, object]:
    draft.deregister(_key(given), given.get("if"))
    return {"removed": 1, "rev": draft.rev}


def _update(draft: Draft, given: Mapping[str, Any]) -> Mapping[str, object]:
    meta, state = given.get("meta"), given.get("state")
    if meta is None and state is None:
        raise Refused(Code.BAD_ARGUMENT, "update needs meta, state or both", field="meta")
    return {"rev": draft.update(_key(given), meta, state, given.get("if")).rev}
