"""Explanations for people: similar names, `why`, and the messages of `not_found`, `timeout` and `conflict`."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from regd.core.errors import Code, Refused
from regd.core.model import Entry, Holder, State, key_text
from regd.core.registry import Registry
from regd.core.transaction import OwnerConflict
from regd.protocol import messages
from regd.system.clock import Clock
from regd.system.probes import ProbeResults

_INSTANCES_MAX = 100  # in one reply to `why`
_OWNERS_MAX = 32  # of each of these instances
_UNREACHABLE_MAX = 3  # addresses named in the message of a timeout


class Explainer:
    """`address_of` returns the address of a session's connection, None if it has closed."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        probe_results: ProbeResults,
        address_of: Callable[[int], str | None],
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._probe_results = probe_results
        self._address_of = address_of

    # Hints.

    def hints(self, name: str) -> dict[str, object]:
        """Return details for a client that did not find `name`: similar names, and how the last instance left."""
        return self._hints(name, self._registry.near(name))

    def _hints(self, name: str, near: list[str]) -> dict[str, object]:
        hints: dict[str, object] = {"near": near}
        last = self._registry.last_departure(name, self._clock.now())
        if last is not None:
            hints["last"] = {"reason": last.reason, "age_s": round(self._clock.now() - last.at, 3)}
        return hints

    # Refusals.

    def none_ready(self, arguments: Mapping[str, Any]) -> Refused:
        """Return the refusal of a `resolve` for which there is no ready instance."""
        name, instance, meta = arguments["name"], arguments.get("instance"), arguments.get("meta", {})
        which = f"{name!r} with instance {instance!r}" if instance else repr(name)
        near = self._registry.near(name)
        if not self._is_registered(name):
            message = f"no service {which}" + _did_you_mean(near)
        elif instance is not None and self._registry.get((name, instance)) is None:
            message = f"{name!r} is here, but has no instance {instance!r}"
        elif meta and self._some_ready(name, instance, {}, 1):
            message = f"{which} is here, but none with that meta is ready"
        else:
            message = f"{which} is here, but none is {State.READY}"
        return Refused(Code.NOT_FOUND, message, **self._hints(name, near))

    def timeout(self, arguments: Mapping[str, Any]) -> Refused:
        """Return the refusal of a `resolve` with `wait` for which no instance was found in time."""
        name = arguments["name"]
        near, last = self._registry.near(name), self._registry.last_departure(name, self._clock.now())
        unreachable = self._unreachable(arguments)
        if unreachable:
            shown = ", ".join(unreachable[:_UNREACHABLE_MAX])
            why = f"{name!r} is registered, and cannot be reached: {shown}"
        elif self._is_registered(name):
            why = self.none_ready(arguments).message
        elif last is not None:
            why = f"{name!r} left {self._clock.now() - last.at:.1f} s ago: {last.reason}"
        else:
            why = f"{name!r} was never registered" + _did_you_mean(near)
        message = f"waited {round(arguments['wait'], 1):g} s: {why}"
        return Refused(Code.TIMEOUT, message, **self._hints(name, near))

    def _is_registered(self, name: str) -> bool:
        return next(self._registry.instances_of(name), None) is not None

    def _unreachable(self, arguments: Mapping[str, Any]) -> list[str]:
        """Return the addresses of ready instances that did not accept the last probe, each with the reason."""
        name, instance, meta = arguments["name"], arguments.get("instance"), arguments.get("meta", {})
        return [
            f"{messages.host_port(entry.host, entry.port)} ({result.why})"
            for entry in self._some_ready(name, instance, meta, _INSTANCES_MAX)
            if (result := self._probe_results.last((entry.host, entry.port))) is not None and result.why
        ]

    def _some_ready(self, name: str, instance: str | None, meta: Mapping[str, str], most: int) -> list[Entry]:
        """Return up to `most` ready instances, as far as one step of a search finds them."""
        search = self._registry.search_round_robin(name, instance, meta, most)
        search.step(self._registry.limits.search_step_max)
        return search.found

    def conflict(self, conflict: OwnerConflict) -> Refused:
        """Return the refusal of a `register` whose name another owner holds."""
        entry, owner = conflict.entry, self._owner(conflict.owner)
        address = messages.host_port(entry.host, entry.port)
        holder = ", ".join(f"{term} {value}" for term, value in owner.items() if value is not None)
        return Refused(
            Code.CONFLICT,
            f"{key_text(entry.key)!r} is at {address}, held by {holder}; "
            "stop that one, take another name or instance, or take over with force",
            owner=owner,
            rev=entry.rev,
        )

    # `why`.

    def why(self, name: str, instance: str | None) -> dict[str, object]:
        """Return the fields of `why` for a name or one of its instances.

        Raises:
            Refused: `not_found`, nothing is known of the name or instance.
        """
        entries = list(islice(self._entries(name, instance), _INSTANCES_MAX + 1))
        departures = [
            departure
            for departure in self._registry.departures(name)
            if instance is None or departure.instance == instance
        ]
        if not entries and not departures:
            near = self._registry.near(name)
            raise Refused(Code.NOT_FOUND, f"nothing is known of {name!r}" + _did_you_mean(near), near=near)
        now = self._clock.now()
        result: dict[str, object] = {
            "name": name,
            "instances": [self._instance(entry) for entry in entries[:_INSTANCES_MAX]],
            "departures": [
                {
                    "instance": departure.instance,
                    "reason": departure.reason,
                    "age_s": round(now - departure.at, 3),
                }
                for departure in departures
            ],
        }
        if len(entries) > _INSTANCES_MAX:
            result["more"] = True
        return result

    def _entries(self, name: str, instance: str | None) -> Iterable[Entry]:
        if instance is None:
            return self._registry.instances_of(name)
        entry = self._registry.get((name, instance))
        return [] if entry is None else [entry]

    def _instance(self, entry: Entry) -> dict[str, object]:
        result = self._probe_results.last((entry.host, entry.port))
        probe: dict[str, object] | None = None
        if result is not None:
            probe = {"accepted": result.accepted, "age_s": round(self._clock.now() - result.at, 3)}
            if result.why:
                probe["why"] = result.why
        return {
            "instance": entry.instance,
            "host": entry.host,
            "port": entry.port,
            "state": entry.state,
            **({"priority": entry.priority} if entry.priority else {}),
            "alive": self._registry.holder_index.is_alive(entry),
            "rev": entry.rev,
            "since": entry.registered_at,
            "owners": [self._owner(holder) for holder in entry.holders[:_OWNERS_MAX]] or [{"static": True}],
            **({"more_owners": True} if len(entry.holders) > _OWNERS_MAX else {}),
            "probe": probe,
        }

    def _owner(self, holder: Holder) -> dict[str, object]:
        """Return the fields of a holder: its connection, process and lease."""
        owner: dict[str, object] = {}
        if holder.hold:
            owner["connection"] = self._address_of(holder.session) if holder.session is not None else None
        if holder.process is not None:
            owner["pid"] = holder.process.pid
        if holder.ttl_s is not None:
            owner["ttl"] = messages.seconds(holder.ttl_s)
        if holder.withdrawn:
            owner["withdrawn"] = True
        return owner


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""
