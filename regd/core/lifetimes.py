"""Who holds what that has landed, until when, and who is known to be gone.

`Ending` says who went; a draft turns it into changes. Between the two, what only the gone held is not resolved
any more. Must not know connections, processes or timers: `now` comes in, `next_deadline` goes out.
"""

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from regd.core.model import Entry, Holder, Key, Process, Reason


@dataclass(frozen=True, slots=True)
class Ending:
    """Somebody went: a connection, a process, or one holder whose time is over. Just one of the three is set."""

    reason: Reason
    session: int | None = None
    process: Process | None = None
    holder: tuple[Key, int] | None = None


# What a deadline is of: a lease, or the time in which a loaded `hold` must be claimed.
_CLAUSES = (Reason.EXPIRED, Reason.CLOSED)


class Lifetimes:
    """`claim_s` is how long a loaded `hold` waits for its client; with a living process it waits for ever."""

    def __init__(self, claim_s: float) -> None:
        self._claim_s = claim_s
        self._of_session: defaultdict[int, set[Key]] = defaultdict(set)
        self._of_process: defaultdict[Process, set[Key]] = defaultdict(set)
        self._due: dict[tuple[int, Reason], float] = {}  # by holder; the truth
        self._queue: list[tuple[float, int, Reason, Key]] = []  # a heap that may also hold what is over
        self._span_s: dict[tuple[int, Reason], float] = {}  # the full time, for a fresh start
        self._key: dict[int, Key] = {}  # of holders with a deadline
        # Known to be gone, and not landed yet: sessions, processes, and holders by their id.
        self._gone_sessions: set[int] = set()
        self._gone_processes: set[Process] = set()
        self._gone_holders: dict[int, Reason] = {}

    # What has landed.

    def move(self, before: Entry | None, after: Entry | None, now: float) -> set[Process]:
        """Follow one change, and return the processes of which nothing is held any more."""
        old = before.holders if before else ()
        new = after.holders if after else ()
        if old == new:
            return set()
        key = (after or before).key  # type: ignore[union-attr]  # one of them is there, or both were equal
        known = {holder.id for holder in old}
        for holder in new:
            if holder.id not in known:
                self._add(key, holder, now)
        kept = {holder.id for holder in new}
        for holder in old:
            if holder.id not in kept:
                for clause in _CLAUSES:
                    self._drop(holder.id, clause)
        return self._leave(key, old, new)

    def _add(self, key: Key, holder: Holder, now: float) -> None:
        if holder.hold and holder.session is not None:
            self._of_session[holder.session].add(key)
        if holder.process is not None:
            self._of_process[holder.process].add(key)
        self._set(key, holder.id, Reason.EXPIRED, holder.ttl_s, now)
        unclaimed = holder.hold and holder.session is None and holder.process is None
        self._set(key, holder.id, Reason.CLOSED, self._claim_s if unclaimed else None, now)

    def _set(self, key: Key, holder_id: int, clause: Reason, span_s: float | None, now: float) -> None:
        if span_s is None:
            self._drop(holder_id, clause)
            return
        self._key[holder_id] = key
        self._span_s[holder_id, clause] = span_s
        self._push(holder_id, clause, now + span_s)

    def _push(self, holder_id: int, clause: Reason, deadline: float) -> None:
        self._due[holder_id, clause] = deadline
        heapq.heappush(self._queue, (deadline, holder_id, clause, self._key[holder_id]))

    def _drop(self, holder_id: int, clause: Reason) -> None:
        self._due.pop((holder_id, clause), None)
        self._span_s.pop((holder_id, clause), None)
        if not any((holder_id, each) in self._due for each in _CLAUSES):
            self._key.pop(holder_id, None)

    def _leave(self, key: Key, old: Iterable[Holder], new: Iterable[Holder]) -> set[Process]:
        sessions = {holder.session for holder in new if holder.hold}
        processes = {holder.process for holder in new}
        free: set[Process] = set()
        for holder in old:
            session, process = holder.session, holder.process
            if holder.hold and session is not None and session not in sessions:
                self._of_session[session].discard(key)
                if not self._of_session[session]:
                    del self._of_session[session]
            if process is not None and process not in processes:
                self._of_process[process].discard(key)
                if not self._of_process[process]:
                    del self._of_process[process]
                    free.add(process)
        return free

    def held_by(self, ending: Ending) -> Collection[Key]:
        """Return the keys that an ending concerns."""
        if ending.session is not None:
            return self._of_session.get(ending.session, ())
        if ending.process is not None:
            return self._of_process.get(ending.process, ())
        return [ending.holder[0]] if ending.holder else []

    def held_count(self, session: int | None) -> int:
        return len(self._of_session.get(session, ())) if session is not None else 0

    def knows(self, process: Process) -> bool:
        return process in self._of_process

    @property
    def processes(self) -> list[Process]:
        return list(self._of_process)

    # Time.

    def renew(self, holder: Holder, now: float, ttl_s: float) -> None:
        """Start a lease anew, this time for `ttl_s`."""
        if (holder.id, Reason.EXPIRED) in self._due:
            self._push(holder.id, Reason.EXPIRED, now + ttl_s)
            if len(self._queue) > 64 + 4 * len(self._due):  # what was renewed often is in it often
                self._queue = [(due, id, clause, self._key[id]) for (id, clause), due in self._due.items()]
                heapq.heapify(self._queue)

    def next_deadline(self) -> float | None:
        """Return when `expire` has something to say, or None."""
        while self._queue and self._due.get(self._queue[0][1:3]) != self._queue[0][0]:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None

    def expire(self, now: float, most: int) -> list[Ending]:
        """Return up to `most` whose time is over, each once, and count them as gone."""
        endings: list[Ending] = []
        while len(endings) < most and (deadline := self.next_deadline()) is not None and deadline <= now:
            _, holder_id, clause, key = heapq.heappop(self._queue)
            del self._due[holder_id, clause]
            if holder_id not in self._gone_holders:
                self._gone_holders[holder_id] = clause
                endings.append(Ending(clause, holder=(key, holder_id)))
        return endings

    def refresh(self, now: float) -> None:
        """Give everybody the full time again: for a while nobody could be heard."""
        for (holder_id, clause), deadline in list(self._due.items()):
            fresh = now + self._span_s[holder_id, clause]
            if fresh > deadline:
                self._push(holder_id, clause, fresh)

    # Who is gone.

    def mark(self, ending: Ending) -> None:
        """Count somebody as gone from now on."""
        if ending.session is not None:
            self._gone_sessions.add(ending.session)
        if ending.process is not None:
            self._gone_processes.add(ending.process)
        if ending.holder is not None:
            self._gone_holders[ending.holder[1]] = ending.reason

    def settle(self, ending: Ending) -> None:
        """Forget an ending that has landed."""
        if ending.session is not None:
            self._gone_sessions.discard(ending.session)
        if ending.process is not None:
            self._gone_processes.discard(ending.process)
        if ending.holder is not None:
            self._gone_holders.pop(ending.holder[1], None)

    def gone(self, holder: Holder) -> Reason | None:
        """Return why a holder is counted as gone, None when it is not."""
        if holder.process is not None and holder.process in self._gone_processes:
            return Reason.EXITED
        if holder.hold and holder.session is not None and holder.session in self._gone_sessions:
            return Reason.CLOSED
        return self._gone_holders.get(holder.id)

    def is_alive(self, entry: Entry) -> bool:
        """Whether anybody still holds it, as far as is known now."""
        if not entry.holders:
            return True
        return any(not holder.withdrawn and self.gone(holder) is None for holder in entry.holders)

    def death(self, entry: Entry) -> Reason | None:
        """Return why nobody holds an entry any more, before that has landed; None while somebody does."""
        if self.is_alive(entry):
            return None
        return next((reason for each in entry.holders if (reason := self.gone(each)) is not None), None)
