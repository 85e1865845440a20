"""The connections of a fake: what each has asked for, what it is answered, and what it is told without asking.

Must not know how a line travels.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from regd_client.testing.answers import Answers
from regd_client.testing.arguments import Refused, checked
from regd_client.testing.entries import Change, Entry, fits
from regd_client.testing.state import State

_ID_CHARS_MAX = 64


class Pipe(Protocol):
    """The way back to a client. It may be used from any thread."""

    def send(self, fields: Mapping[str, Any]) -> None: ...

    def later(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        """Have something called, unless what is returned is called before."""


@dataclass(frozen=True, eq=False)
class Watch:
    number: int
    pattern: str
    meta: Mapping[str, str]

    def seen(self, change: Change) -> dict[str, Any] | None:
        """Return the event that a change is here, None where it is none."""
        entry = change.entry
        if not fits(self.pattern, entry.name):
            return None
        was = change.before is not None and change.before.carries(self.meta)
        if change.kind != "down" and entry.carries(self.meta):
            return self.told("change" if was else "up", entry.shown())
        if not was:
            return None
        reason = change.reason or "filtered"
        gone = {"name": entry.name, "instance": entry.instance, "reason": reason, "rev": change.rev}
        return self.told("down", gone)

    def told(self, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {"event": kind, "watch": self.number, **fields}


@dataclass(eq=False)
class Wait:
    """A `resolve` that is answered once there is something to answer with."""

    id: str | int | None
    given: Mapping[str, Any]
    cancel: Callable[[], None] = lambda: None


class Session:
    """One connection."""

    def __init__(self, number: int, pipe: Pipe) -> None:
        self._number = number
        self.pipe = pipe
        self.watches: dict[int, Watch] = {}
        self.watch_count = 0
        self.waits: list[Wait] = []

    def __str__(self) -> str:
        return f"fake:{self._number}"


class Desk:
    """Where all connections end. Whoever calls sees to it that only one thread is here at a time."""

    def __init__(self) -> None:
        self.state = State(self._changed, self._lost)
        self.sessions: list[Session] = []
        self._answers = Answers(self.state, self._gauges)
        self._count = 0
        self._requests: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()

    def _gauges(self) -> dict[str, Any]:
        return {
            "connections": len(self.sessions),
            "watches": sum(len(each.watches) for each in self.sessions),
            "waiting": sum(len(each.waits) for each in self.sessions),
            "requests": dict(self._requests),
            "errors": dict(self._errors),
        }

    def connected(self, pipe: Pipe) -> Session:
        self._count += 1
        session = Session(self._count, pipe)
        self.sessions.append(session)
        return session

    def closed(self, session: Session) -> None:
        """Forget a connection, and end what it held. Twice is harmless."""
        if session in self.sessions:
            self.forget(session)
            self.state.closed(session)

    def forget(self, session: Session) -> None:
        """Forget a connection, and leave what it held."""
        self.sessions.remove(session)
        for wait in session.waits:
            wait.cancel()

    def end(self, reason: str) -> None:
        """Tell everybody that what they hold is lost, and forget them."""
        for entry in self.state.fitting("*", {}):
            for each in {holder.session for holder in entry.holders if holder.session is not None}:
                self._lost(each, entry, reason, self.state.rev)
        for session in list(self.sessions):
            self.forget(session)

    def take(self, session: Session, line: bytes) -> None:
        """Take a request, and answer it, or have it wait."""
        fields: dict[str, Any] = {}
        id = None
        try:
            fields = _read(line)
            id = _id(fields)
            cmd = fields.pop("cmd", None)
            if type(cmd) is not str:
                raise Refused("bad_request", 'a request needs "cmd", a string')
            given = checked(cmd, fields)
            self._requests[cmd] += 1
            if cmd == "watch":
                self._watch(session, id, given)
            elif "wait" in given:
                self._wait(session, id, given)
            elif cmd == "unwatch":
                self._unwatch(session, given)
                _reply(session, id, {})
            else:
                _reply(session, id, self._answers.answer(cmd, given, session))
        except Refused as refused:
            self._refuse(session, id, refused)

    def answer(self, cmd: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of a command that no connection asks for.

        Raises:
            Refused: there is none.
        """
        return self._answers.answer(cmd, checked(cmd, given), None)

    def _refuse(self, session: Session, id: str | int | None, refused: Refused) -> None:
        self._errors[refused.code] += 1
        said = {"ok": False, "error": refused.code, "message": str(refused), **refused.details}
        session.pipe.send(said if id is None else {**said, "id": id})

    # What is told without being asked.

    def _changed(self, change: Change) -> None:
        for session in self.sessions:
            for watch in session.watches.values():
                if (event := watch.seen(change)) is not None:
                    session.pipe.send(event)
        for session in self.sessions:
            for wait in list(session.waits):
                if wait.given["name"] == change.entry.name:
                    self._try(session, wait)

    @staticmethod
    def _lost(session: object, entry: Entry, reason: str, rev: int) -> None:
        assert isinstance(session, Session)  # and perhaps it has closed: what is bound to a process alone stays
        lost = {"name": entry.name, "instance": entry.instance, "reason": reason, "rev": rev}
        session.pipe.send({"event": "lost", **lost})

    # What goes on.

    def _watch(self, session: Session, id: str | int | None, given: Mapping[str, Any]) -> None:
        if ("epoch" in given) is not ("since" in given):
            missing = "since" if "epoch" in given else "epoch"
            raise Refused("bad_argument", "epoch and since go together", field=missing)
        state = self.state
        session.watch_count += 1
        watch = Watch(session.watch_count, given.get("name", "*"), given.get("meta", {}))
        session.watches[watch.number] = watch
        _reply(session, id, {"watch": watch.number, **self._answers.position})
        events: Iterable[dict[str, Any] | None]
        rev, since = {"rev": state.rev}, given.get("since")
        if since is not None and given["epoch"] == state.epoch and state.first_rev <= since <= state.rev:
            events = [watch.seen(each) for each in state.changes if each.rev > since]
            tail = [watch.told("progress", rev)]
        else:
            events = [] if since is None else [watch.told("reset", rev)]
            events += [watch.told("up", each.shown()) for each in state.fitting(watch.pattern, watch.meta)]
            tail = [watch.told("sync", rev)]
        for event in (*events, *tail):
            if event is not None:
                session.pipe.send(event)

    @staticmethod
    def _unwatch(session: Session, given: Mapping[str, Any]) -> None:
        if session.watches.pop(given["watch"], None) is None:
            raise Refused("not_found", f"this connection has no watch {given['watch']}")

    def _wait(self, session: Session, id: str | int | None, given: Mapping[str, Any]) -> None:
        found = self._answers.found(given)
        if found is not None:
            _reply(session, id, found)
            return
        wait = Wait(id, given)
        session.waits.append(wait)
        if given["wait"]:
            wait.cancel = session.pipe.later(given["wait"], lambda: self._late(session, wait))
        else:
            self._late(session, wait)

    def _late(self, session: Session, wait: Wait) -> None:
        if wait in session.waits and session in self.sessions:
            session.waits.remove(wait)
            name, seconds = wait.given["name"], wait.given["wait"]
            why = f"waited {seconds:g} s: {self._answers.why_none(wait.given)}"
            self._refuse(session, wait.id, Refused("timeout", why, **self.state.hints(name)))

    def _try(self, session: Session, wait: Wait) -> None:
        found = self._answers.found(wait.given)
        if found is not None:
            session.waits.remove(wait)
            wait.cancel()
            _reply(session, wait.id, found)


def _reply(session: Session, id: str | int | None, result: Mapping[str, Any]) -> None:
    session.pipe.send({"ok": True, **({} if id is None else {"id": id}), **result})


def _read(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:
        fields = None
    if type(fields) is not dict:
        raise Refused("bad_json", "not a JSON object")
    return fields


def _id(fields: dict[str, Any]) -> str | int | None:
    id = fields.pop("id", None)
    if id is None or type(id) is int or (type(id) is str and len(id) <= _ID_CHARS_MAX):
        return id
    raise Refused("bad_request", f"id must be a whole number, or a string of at most {_ID_CHARS_MAX} characters")
