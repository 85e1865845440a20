"""What is registered at a fake, by whom it is held, and every change of it.

One request at a time, each in effect at once. Must not know connections: a session is whoever is the same again.
"""

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from regd_client.testing.arguments import Refused
from regd_client.testing.entries import (
    Change,
    Departure,
    Entry,
    Holder,
    Key,
    described,
    fits,
    is_mine,
    with_withdrawn,
)

_NEAR_MAX = 3
_DEPARTURES_KEPT = 8


class State:
    """`changed` hears of each change, `lost` of a session whose hold somebody else ended: entry, reason, rev."""

    def __init__(
        self, changed: Callable[[Change], None], lost: Callable[[object, Entry, str, int], None]
    ) -> None:
        self._changed = changed
        self._lost = lost
        self.rev = 0
        self._entries: dict[Key, Entry] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new epoch: what was held waits until it is claimed, and the past is forgotten."""
        self.epoch = uuid.uuid4().hex[:16]
        self.changes: list[Change] = []
        self.first_rev = self.rev  # that the changes go on from
        self._departures: dict[str, deque[Departure]] = {}
        self._served: dict[tuple[str, frozenset[tuple[str, str]]], str] = {}  # who was last, by name and meta
        now = time.time()
        for key, entry in self._entries.items():
            holders = tuple(replace(each, session=None) for each in entry.holders if not each.withdrawn)
            self._entries[key] = replace(entry, holders=holders, rev=self.rev, registered_at=now)

    # Reading.

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def fitting(self, pattern: str, meta: Mapping[str, str], after: Key = ("", "")) -> list[Entry]:
        """Return whose name is `pattern`, or begins with it before a `*`, and that carry `meta`, in order."""
        return [
            self._entries[key]
            for key in sorted(self._entries)
            if key > after and fits(pattern, key[0]) and self._entries[key].carries(meta)
        ]

    def ready(self, name: str, instance: str | None, meta: Mapping[str, str]) -> list[Entry]:
        """Return what can be resolved, in order of instance."""
        here = self.fitting(name, meta)
        return [each for each in here if each.state == "ready" and instance in (None, each.instance)]

    def next(self, name: str, instance: str | None, meta: Mapping[str, str]) -> Entry | None:
        """Return the one whose turn it is, and take its turn."""
        ready = self.ready(name, instance, meta)
        if not ready:
            return None
        last = self._served.get((name, frozenset(meta.items())), self._served.get((name, frozenset())))
        found = next((each for each in ready if last is not None and each.instance > last), ready[0])
        if len(self.fitting(name, {})) > 1:
            self._served[name, frozenset(meta.items())] = found.instance
        return found

    def near(self, name: str) -> list[str]:
        """Return names that may have been meant."""
        return get_close_matches(name, {each for each, _ in self._entries if each != name}, n=_NEAR_MAX)

    def departures(self, name: str) -> list[Departure]:
        """Return who left, the last first."""
        return list(self._departures.get(name, ()))

    def hints(self, name: str) -> dict[str, object]:
        """Return what helps somebody who did not find a name."""
        hints: dict[str, object] = {"near": self.near(name)}
        for last in self.departures(name)[:1]:
            hints["last"] = {"reason": last.reason, "age_s": last.age_s}
        return hints

    # Registering.

    def register(
        self, wanted: Entry, if_rev: int | None, session: object | None, force: bool
    ) -> tuple[Entry, bool]:
        """Register with the one holder of `wanted`, or none. Returns what stands, and whether it is replaced."""
        before = self.get(wanted.key)
        self._check_if(before, if_rev, wanted.text)
        if before is None:
            return self._up(wanted), False
        if (before.host, before.port) == (wanted.host, wanted.port):
            return self._join(wanted, before), False
        rivals = [each for each in before.holders if not is_mine(each, wanted, session)]
        owner = next((each for each in rivals if not each.withdrawn and not each.unclaimed), None)
        if owner is not None and not force:
            where = f"{before.text!r} is at {before.host}:{before.port}"
            raise Refused("conflict", f"{where}, held by somebody else", owner=described(owner), rev=before.rev)
        self._down(before, "replaced")
        self._tell(before, (each for each in before.holders if each.session is not session), "replaced")
        return self._up(wanted), True

    def _join(self, wanted: Entry, before: Entry) -> Entry:
        """Register at the address that is registered: one more holder, or the same one again."""
        if not wanted.holders:
            return self._alter(before, meta=wanted.meta, state=wanted.state, holders=())
        [wish] = wanted.holders
        old = next((each for each in before.holders if each.is_same(wish)), None)
        old = old or next((each for each in before.holders if each.is_claimed_by(wish)), None)
        others = any(each is not old and not each.withdrawn for each in before.holders)
        if wanted.state == "draining" and old is not None and others:
            return self._alter(before, holders=with_withdrawn(before.holders, {old}))
        kept = tuple(wish if each is old else each for each in before.holders)
        return self._alter(
            before, meta=wanted.meta, state=wanted.state, holders=kept if old is not None else (*kept, wish)
        )

    def update(
        self, key: Key, meta: Mapping[str, str] | None, state: str | None, if_rev: int | None, session: object
    ) -> Entry:
        """Set meta, state or both. `draining` by one of several holders withdraws that one alone."""
        before = self._must(key, if_rev)
        meta = before.meta if meta is None else meta
        own = {each for each in before.holders if session is not None and each.session is session}
        others = any(each not in own and not each.withdrawn for each in before.holders)
        if state == "draining" and own and others:
            return self._alter(before, meta=meta, holders=with_withdrawn(before.holders, own))
        if state is None:
            return self._alter(before, meta=meta)
        holders = tuple(replace(each, withdrawn=each.withdrawn and each not in own) for each in before.holders)
        return self._alter(before, meta=meta, state=state, holders=holders)

    def deregister(self, key: Key, if_rev: int | None, session: object | None) -> int:
        """End it; where the one who asks is one of several holders, only its own hold. Returns how many ended."""
        before = self._must(key, if_rev)
        others = tuple(each for each in before.holders if session is None or each.session is not session)
        if len(others) < len(before.holders) and not all(each.withdrawn for each in others):
            self._alter(before, holders=others)
            return 0
        self._down(before, "deregistered")
        self._tell(before, others, "deregistered")
        return 1

    # Ends that nobody asks for.

    def closed(self, session: object) -> None:
        """A connection broke: what it held ends with it, where nobody else holds it."""
        for _, before in sorted(self._entries.items()):
            gone = [each for each in before.holders if each.hold and each.session is session]
            kept = tuple(each for each in before.holders if each not in gone)
            if not gone:
                continue
            if all(each.withdrawn for each in kept):
                self._down(before, "connection closed")
            else:
                self._alter(before, holders=kept)

    def end(self, key: Key, reason: str) -> None:
        """End it whoever holds it, without a word to them."""
        self._down(self._must(key, None), reason)

    # Steps.

    def _must(self, key: Key, if_rev: int | None) -> Entry:
        before = self.get(key)
        if before is None:
            raise Refused(
                "not_found", f"no registration of {'/'.join(filter(None, key))!r}", **self.hints(key[0])
            )
        self._check_if(before, if_rev, before.text)
        return before

    @staticmethod
    def _check_if(before: Entry | None, if_rev: int | None, text: str) -> None:
        rev = before.rev if before is not None else 0
        if if_rev is not None and if_rev != rev:
            raise Refused("conflict", f"{text!r} is at revision {rev}, and `if` says {if_rev}", rev=rev)

    def _up(self, wanted: Entry) -> Entry:
        entry = replace(wanted, rev=self.rev + 1, registered_at=time.time())
        self._land("up", entry, None)
        return entry

    def _alter(self, before: Entry, **fields: Any) -> Entry:
        """Put it in its place with other fields. What nobody sees is no change."""
        after = replace(before, **fields)
        if after.looks_like(before):
            self._entries[after.key] = after
            return after
        after = replace(after, rev=self.rev + 1)
        self._land("change", after, before)
        return after

    def _down(self, before: Entry, reason: str) -> None:
        left = self._departures.setdefault(before.name, deque(maxlen=_DEPARTURES_KEPT))
        left.appendleft(Departure(before.instance, reason, time.monotonic()))
        self._land("down", before, before, reason)

    def _land(self, kind: str, entry: Entry, before: Entry | None, reason: str = "") -> None:
        self.rev += 1
        if kind == "down":
            del self._entries[entry.key]
            if not self.fitting(entry.name, {}):
                self._served.pop((entry.name, frozenset()), None)
        else:
            self._entries[entry.key] = entry
        self.changes.append(Change(self.rev, kind, entry, before, reason))
        self._changed(self.changes[-1])

    def _tell(self, entry: Entry, holders: Iterable[Holder], reason: str) -> None:
        for session in {each.session for each in holders if each.session is not None}:
            self._lost(session, entry, reason, self.rev)
