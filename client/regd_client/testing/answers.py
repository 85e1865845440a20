"""What a fake says to each request. Must not know connections, nor how a line travels."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from regd_client import wire
from regd_client.testing.arguments import PAGE_MAX, Refused
from regd_client.testing.entries import Entry, Holder, Key, described, whole
from regd_client.testing.state import State

_FEATURES = ["if", "force", "state", "hold", "pid", "ttl", "watch", "wait", "why"]
_REPLY_BYTES_MAX = 1_048_576
_VERSION = "fake"


class Answers:
    """The commands that are answered at once. `gauges` are more of `stats`."""

    def __init__(self, state: State, gauges: Callable[[], Mapping[str, Any]]) -> None:
        self._state = state
        self._gauges = gauges
        self._began = time.monotonic()
        self._commands: Mapping[str, Callable[[dict[str, Any], object | None], dict[str, Any]]] = {
            "ping": lambda given, session: {},
            "hello": self._hello,
            "register": self._register,
            "deregister": self._deregister,
            "resolve": self._resolve,
            "list": self._list,
            "update": self._update,
            "renew": self._renew,
            "why": self._why,
            "stats": self._stats,
        }

    def answer(self, cmd: str, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        """Return the result of a command; `session` is None where nobody asks who could hold anything.

        Raises:
            Refused: there is none.
        """
        if cmd not in self._commands:
            raise Refused("unsupported", f"this is a fake, which knows no {cmd}")
        return self._commands[cmd](given, session)

    # Reads.

    @property
    def position(self) -> dict[str, Any]:
        return {"epoch": self._state.epoch, "rev": self._state.rev}

    def _hello(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        host, limits = wire.own_host(), _limits()
        about = {"server": "regd", "version": _VERSION, "protocol": 1, **self.position}
        return {**about, "features": _FEATURES, "limits": limits, "host": host, "loop": "none"}

    def _stats(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "registry": "in memory",
            "uptime_s": round(time.monotonic() - self._began, 3),
            **self.position,
            "registrations": len(self._state),
            **self._gauges(),
            "limits": _limits(),
        }

    def _resolve(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        found = self.found(given)
        if found is None:
            name = given["name"]
            raise Refused("not_found", self.why_none(given), **self._state.hints(name))
        return found

    def found(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what a `resolve` is answered with, None where there is nothing."""
        name, instance, meta = given["name"], given.get("instance"), given.get("meta", {})
        waited = "wait" in given
        if not given.get("all"):
            entry = self._state.next(name, instance, meta)
            return None if entry is None else entry.shown()
        found = self._state.ready(name, instance, meta)
        if not found:
            return None
        if waited:
            self._state.next(name, instance, meta)  # whoever was found takes its turn
        shown = _fitting(found, PAGE_MAX)
        more = {"more": True} if len(shown) < len(found) else {}
        return {"rev": self._state.rev, **more, "instances": shown}

    def why_none(self, given: Mapping[str, Any]) -> str:
        name = given["name"]
        if self._state.fitting(name, {}):
            return f"{name!r} is here, but none that fits is ready"
        near = self._state.near(name)
        return f"no service {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")

    def _list(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        found = self._state.fitting(given.get("name", "*"), given.get("meta", {}), given.get("after", ("", "")))
        shown = _fitting(found, given.get("limit", PAGE_MAX))
        more = {"next": found[len(shown) - 1].text} if len(shown) < len(found) else {}
        return {**self.position, **more, "instances": shown}

    def _renew(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        entry = self._state.get(_key(given))
        if entry is None:
            hints = self._state.hints(given["name"])
            raise Refused("not_found", f"no registration of {given['name']!r} any more", **hints)
        leases = [each for each in entry.holders if each.ttl is not None]
        if not leases:
            raise Refused("bad_argument", f"{entry.text!r} has no ttl to renew", field="name")
        last = ([each for each in leases if each.session is session] or leases)[-1]
        assert last.ttl is not None
        return {"ttl": whole(given.get("ttl", last.ttl))}

    def _why(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        name, instance = given["name"], given.get("instance")
        here = [each for each in self._state.fitting(name, {}) if instance in (None, each.instance)]
        left = [each for each in self._state.departures(name) if instance in (None, each.instance)]
        if not here and not left:
            raise Refused("not_found", f"nothing is known of {name!r}", near=self._state.near(name))
        return {
            "name": name,
            "instances": [_known(each) for each in here],
            "departures": [
                {"instance": each.instance, "reason": each.reason, "age_s": each.age_s} for each in left
            ],
        }

    # Writes.

    def _register(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        hold, pid, ttl = given.get("hold", False), given.get("pid"), given.get("ttl")
        bound = hold or pid is not None or ttl is not None
        name, instance = _key(given)
        wanted = Entry(
            name,
            instance,
            given.get("host", "127.0.0.1"),
            given["port"],
            given.get("meta", {}),
            given.get("state", "ready"),
            (Holder(session, hold, pid, ttl),) if bound else (),
        )
        entry, replaced = self._state.register(wanted, given.get("if"), session, given.get("force", False))
        stands = {"name": name, "instance": instance, "host": entry.host, "port": entry.port, "rev": entry.rev}
        return {**stands, "replaced": True} if replaced else stands

    def _deregister(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        removed = self._state.deregister(_key(given), given.get("if"), session)
        return {"removed": removed, "rev": self._state.rev}

    def _update(self, given: dict[str, Any], session: object | None) -> dict[str, Any]:
        meta, state = given.get("meta"), given.get("state")
        if meta is None and state is None:
            raise Refused("bad_argument", "update needs meta, state or both", field="meta")
        return {"rev": self._state.update(_key(given), meta, state, given.get("if"), session).rev}


def _key(given: Mapping[str, Any]) -> Key:
    return given["name"], given.get("instance", "")


def _fitting(found: list[Entry], most: int) -> list[dict[str, Any]]:
    """Return as many instance objects, from the first, as a reply holds."""
    shown: list[dict[str, Any]] = []
    size = 0
    for each in found[:most]:
        fields = each.shown()
        size += len(json.dumps(fields))
        if shown and size > _REPLY_BYTES_MAX:
            break
        shown.append(fields)
    return shown


def _known(entry: Entry) -> dict[str, Any]:
    return {
        "instance": entry.instance,
        "host": entry.host,
        "port": entry.port,
        "state": entry.state,
        "alive": True,
        "rev": entry.rev,
        "since": entry.registered_at,
        "owners": [described(each) for each in entry.holders] or [{"static": True}],
        "probe": None,
    }


def _limits() -> dict[str, Any]:
    return {"line_bytes_max": wire.LINE_BYTES_MAX, "reply_instances_max": PAGE_MAX}
