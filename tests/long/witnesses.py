"""The witnesses of the soak: watchers, listeners, and a model of the requests. Their states must be equal."""

import contextlib
import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from regd_client.models import Endpoint, Event

# Port, meta, state and priority; None if not registered.
Value = tuple[int, tuple[tuple[str, str], ...], str, int] | None
HISTORY = 100  # changes that the daemon keeps for watchers
_HISTORY_MIN = 50  # of these, after a restart: lines without a revision count as well
_KEPT = 30_000  # lines of history
_SHOWN = 60
_LONG = re.compile(r"(.)\1{8,}")  # padding in values, not shown


class Failure(Exception):
    """A broken promise about `subject`, a key or a witness."""

    def __init__(self, subject: str, message: str) -> None:
        super().__init__(f"{subject}: {message}")
        self.subject = subject


class Record:
    """The history of all witnesses."""

    def __init__(self) -> None:
        self.figures: Counter[str] = Counter()
        self.firm: set[str] = set()  # keys that must stay registered
        self._began = time.monotonic()
        self._lines: deque[tuple[float, str, str]] = deque(maxlen=_KEPT)
        self._digests: dict[tuple[str, int, str], tuple[str, int]] = {}

    def note(self, subject: str, text: str) -> None:
        self._lines.append((time.monotonic() - self._began, subject, _LONG.sub(r"\1…", text)))

    def about(self, subject: str) -> list[str]:
        """Return the latest notes about a key or a witness, or about everything."""
        lines = [
            f"{at:8.3f} {about}: {text}"
            for at, about, text in self._lines
            if about in (subject, "*") or f"{subject} " in text
        ]
        return lines[-_SHOWN:]

    def agree(self, who: str, where: tuple[str, int, str], state: int) -> None:
        """Compare a state with those of other witnesses at the same epoch, revision and pattern."""
        first, known = self._digests.setdefault(where, (who, state))
        self.figures["states compared"] += first != who
        if known != state:
            raise Failure(who, f"has another state at {where} than {first}")

    def settle(self) -> None:
        self._digests.clear()

    def down(self, who: str, key: str) -> None:
        if key in self.firm:
            raise Failure(key, f"down to {who}, though it stayed")


class Model:
    """The values that each key may have. An unanswered write may still be applied until `settle`."""

    def __init__(self) -> None:
        self.may: dict[str, list[Value]] = {}
        self.sure: set[str] = set()  # keys that the disk must have at any time, even after a kill
        self._doubt: set[str] = set()
        self._settled = 0

    @contextlib.contextmanager
    def write(self, key: str, value: Value) -> Iterator[Callable[[bool], None]]:
        """A context for a write. Call the yielded function with whether the write was applied."""
        settled, answered = self._settled, False
        self.may[key].append(value)

        def tell(made: bool) -> None:
            nonlocal answered
            answered = True
            if settled != self._settled or key in self._doubt:
                return
            if made:
                self.may[key] = [value]
            else:
                self.may[key].remove(value)

        try:
            yield tell
        finally:
            if not answered and settled == self._settled:
                self._doubt.add(key)

    def settle(self, found: dict[str, Value]) -> None:
        """Set the values to those of the registry, after all writes have ended."""
        for key in self.sure:
            if len(self.may[key]) > 1:
                self.may[key] = [found.get(key)]
        self._settled += 1
        self._doubt.clear()


def key_of(name: str, instance: str) -> str:
    return f"{name}/{instance}" if instance else name


def value_of(fields: dict[str, Any] | None) -> Value:
    """Return the value of an instance from the wire or the file."""
    if fields is None:
        return None
    meta = tuple(sorted(fields.get("meta", {}).items()))
    return fields["port"], meta, fields.get("state", "ready"), fields.get("priority", 0)


def endpoint_value(found: Endpoint, state: str = "ready") -> Value:
    return found.port, tuple(sorted(found.meta.items())), state, found.priority


def fitting(pattern: str, meta: dict[str, str], state: dict[str, Value]) -> dict[str, Value]:
    """Return the part of a state that matches a pattern and a filter."""
    labels = set(meta.items())
    return {
        key: value
        for key, value in state.items()
        if value is not None
        and labels <= set(value[1])
        and (key.startswith(pattern[:-1]) if pattern.endswith("*") else key.partition("/")[0] == pattern)
    }


def digest(instances: list[dict[str, Any]]) -> int:
    total = 0
    for instance in instances:
        total ^= hash(json.dumps(instance, sort_keys=True))
    return total


class Watcher:
    """The state that the events of a watch without the client add up to."""

    def __init__(self, record: Record, name: str, pattern: str) -> None:
        self.name, self.pattern, self.meta = name, pattern, dict[str, str]()
        self.picture: dict[str, dict[str, Any]] = {}
        self.epoch = ""
        self._record = record
        self._clear()

    def _clear(self) -> None:
        self.picture.clear()
        self._digest = 0
        self.rev: int | None = None  # to resume from; None if it needs a snapshot

    @property
    def position(self) -> dict[str, Any]:
        return {} if self.rev is None else {"epoch": self.epoch, "since": self.rev}

    def begin(self, epoch: str) -> None:
        """Take the reply to a watch from `position`."""
        if self.rev is None:
            self._clear()
        else:
            self._record.figures["raw resumed, after a restart"] += epoch != self.epoch
        self.epoch = epoch

    def take(self, event: dict[str, Any]) -> None:
        kind, rev = event.pop("event"), event["rev"]
        self._record.figures[f"raw {kind}"] += 1
        step = kind in ("up", "change", "down")
        if kind == "reset":
            if self.rev is not None and rev - self.rev < _HISTORY_MIN:
                raise Failure(self.name, f"reset at {rev}, behind {self.rev}")
            self._clear()
        elif step:
            self._fold(kind, event)
        else:
            self._record.note(self.name, f"hears {kind} {rev}")
        if self.rev is not None:
            right = rev == self.rev + step if self.pattern == "*" else rev >= self.rev + step
            if not right:
                raise Failure(self.name, f"{kind} {event} at revision {rev} behind {self.rev}")
        if self.rev is not None or kind == "sync":
            self.rev = rev
            self._record.agree(self.name, (self.epoch, rev, self.pattern), self._digest)

    def _fold(self, kind: str, event: dict[str, Any]) -> None:
        key = key_of(event["name"], event["instance"])
        self._record.note(key, f"{self.name} hears {kind} {event}")
        del event["watch"]
        before = self.picture.pop(key, None)
        if self.rev is not None and (before is None) is not (kind == "up"):
            raise Failure(key, f"{kind} to {self.name} , who had {before}")
        if before is not None:
            self._digest ^= digest([before])
        if kind == "down":
            self._record.down(self.name, key)
        else:
            self.picture[key] = event
            self._digest ^= digest([event])

    @property
    def view(self) -> dict[str, Value] | None:
        return None if self.rev is None else {key: value_of(fields) for key, fields in self.picture.items()}


class Listener:
    """The state that the events of the client's `watch` add up to."""

    def __init__(self, record: Record, name: str, pattern: str, meta: dict[str, str]) -> None:
        self.name, self.pattern, self.meta = name, pattern, meta
        self.picture: dict[str, Value] = {}
        self.synced = False
        self._record = record

    def take(self, event: Event) -> None:
        self._record.figures[f"told {event.kind}"] += 1
        endpoint = event.endpoint
        if endpoint is None:
            if self.synced:
                raise Failure(self.name, "told `sync` twice")
            self.synced = True
            return
        key = key_of(endpoint.name, endpoint.instance)
        self._record.note(key, f"{self.name} is told {event}")
        if (key in self.picture) is (event.kind == "up"):
            raise Failure(key, f"{event.kind} told to {self.name} , who had {self.picture.get(key)}")
        self.picture.pop(key, None)
        if event.kind != "down":
            self.picture[key] = endpoint_value(endpoint, event.state)
        elif not self.meta:  # registered, but the filter does not match
            self._record.down(self.name, key)

    @property
    def view(self) -> dict[str, Value] | None:
        return self.picture if self.synced else None
