"""The holders of committed registrations: what they hold, their deadlines, and which of them are gone.

The end of a holder takes effect in two steps. It is marked as gone, so that its registrations are no longer
resolved. Later a transaction ends the registrations, and the mark is removed once that is committed. `HolderEnd`
carries an end from the first step to the second.

There is no timer in here: the caller passes the time, and calls `expire` when `next_deadline` has passed.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from regd.core.model import Entry, Holder, Key, Process, Reason


@dataclass(frozen=True, slots=True)
class HolderEnd:
    """The end of a connection, a process or a single holder. Exactly one of the three is set.

    Attributes:
        holder: the key of a registration, and the id of one of its holders.
    """

    reason: Reason
    session: int | None = None
    process: Process | None = None
    holder: tuple[Key, int] | None = None


# The two kinds of deadline, named by the reason of the end: a lease expires, and a loaded `hold` was not claimed.
_DEADLINES = (Reason.EXPIRED, Reason.CLOSED)
_STEPS = 256  # one call of `next_deadline` removes up to so many outdated records

Record = tuple[float, int, Reason, Key]
"""A deadline in a heap: when, the holder's id, its kind, and the key of the registration."""


class HolderIndex:
    """The holders of all committed entries.

    Args:
        claim_s: the seconds that a client has to claim a loaded `hold`.

    Attributes:
        unclaimed: loaded `hold`s that have a process and were not claimed in time, each as a key and a holder id.
            They do not end by themselves: the caller probes their addresses, and either ends them or calls
            `probe_at`.
    """

    def __init__(self, claim_s: float) -> None:
        self.unclaimed: deque[tuple[Key, int]] = deque()
        self._claim_s = claim_s
        self._prolonged_s = 0.0  # added to each deadline when it is used, so that `prolong` need not change them
        # Dictionaries instead of sets, since registrations end in the order in which they were made.
        self._of_session: defaultdict[int, dict[Key, None]] = defaultdict(dict)
        self._of_process: defaultdict[Process, dict[Key, None]] = defaultdict(dict)
        self._due: dict[tuple[int, Reason], float] = {}  # the current deadlines, by holder
        # Heaps of deadlines. A renewal leaves an outdated record behind. A heap with too many of them becomes
        # `_shrinking`, and its current records move to the other heap, a few at a time.
        self._queue: list[Record] = []
        self._shrinking: list[Record] = []
        self._awaits_probe: set[int] = set()  # the ids of unclaimed holders that have a process
        # Marks: the sessions, processes and holders (by id) that are gone, and whose end is not committed yet.
        self._gone_sessions: set[int] = set()
        self._gone_processes: set[Process] = set()
        self._gone_holders: dict[int, Reason] = {}

    # Committed changes.

    def update(self, previous: Entry | None, entry: Entry | None, now: float) -> set[Process]:
        """Record a committed change of an entry. None: there is no entry before, or after the change.

        Returns:
            The processes that have lost their last registration.
        """
        old = previous.holders if previous else ()
        new = entry.holders if entry else ()
        if old == new:
            return set()
        key = (entry or previous).key  # type: ignore[union-attr]  # both cannot be None: their holders differ
        known = {holder.id for holder in old}
        for holder in new:
            if holder.id not in known:
                self._add(key, holder, now)
        kept = {holder.id for holder in new}
        for holder in old:
            if holder.id not in kept:
                self._drop(holder.id)
        return self._leave(key, old, new)

    def _add(self, key: Key, holder: Holder, now: float) -> None:
        if holder.hold and holder.session is not None:
            self._of_session[holder.session][key] = None
        if holder.process is not None:
            self._of_process[holder.process][key] = None
        if holder.ttl_s is not None:
            self._push(key, holder.id, Reason.EXPIRED, now + holder.ttl_s)
        if holder.unclaimed:
            self._push(key, holder.id, Reason.CLOSED, now + self._claim_s)
            if holder.process is not None:
                self._awaits_probe.add(holder.id)

    def _push(self, key: Key, holder_id: int, kind: Reason, deadline: float) -> None:
        deadline -= self._prolonged_s
        self._due[holder_id, kind] = deadline
        heappush(self._queue, (deadline, holder_id, kind, key))
        self._shrink(4)

    def _shrink(self, most: int) -> None:
        """Move up to `most` records out of the heap that has too many outdated ones."""
        if not self._shrinking and len(self._queue) > 64 + 4 * len(self._due):
            self._queue, self._shrinking = self._shrinking, self._queue
        for _ in range(min(most, len(self._shrinking))):
            record = self._shrinking.pop()  # a heap without its last record is still a heap
            if self._is_current(record):
                heappush(self._queue, record)

    def _is_current(self, record: Record) -> bool:
        return self._due.get(record[1:3]) == record[0]

    def _drop(self, holder_id: int) -> None:
        for kind in _DEADLINES:
            self._due.pop((holder_id, kind), None)
        self._awaits_probe.discard(holder_id)

    def _leave(self, key: Key, old: Iterable[Holder], new: Iterable[Holder]) -> set[Process]:
        sessions = {holder.session for holder in new if holder.hold}
        processes = {holder.process for holder in new}
        without_registrations: set[Process] = set()
        for holder in old:
            session, process = holder.session, holder.process
            if holder.hold and session is not None and session not in sessions:
                self._of_session[session].pop(key, None)
                if not self._of_session[session]:
                    del self._of_session[session]
            if process is not None and process not in processes:
                self._of_process[process].pop(key, None)
                if not self._of_process[process]:
                    del self._of_process[process]
                    without_registrations.add(process)
        return without_registrations

    def held_by(self, ending: HolderEnd) -> Collection[Key]:
        """Return the keys of the registrations that a gone connection, process or holder has."""
        if ending.session is not None:
            return self._of_session.get(ending.session, ())
        if ending.process is not None:
            return self._of_process.get(ending.process, ())
        return [ending.holder[0]] if ending.holder else []

    def held_count(self, owner: int | Process | None) -> int:
        """Return how many registrations a connection or a process holds."""
        if isinstance(owner, Process):
            return len(self._of_process.get(owner, ()))
        return len(self._of_session.get(owner, ())) if owner is not None else 0

    def has_process(self, process: Process) -> bool:
        """Whether a process holds a registration."""
        return process in self._of_process

    @property
    def is_empty(self) -> bool:
        """Whether all registrations are static."""
        return not (self._of_session or self._of_process or self._due)

    @property
    def processes(self) -> list[Process]:
        return list(self._of_process)

    # Time.

    def renew(self, key: Key, holder: Holder, now: float, ttl_s: float) -> None:
        """Renew a lease: it ends `ttl_s` seconds after `now`. Does nothing if the holder has no lease."""
        if (holder.id, Reason.EXPIRED) in self._due:
            self._push(key, holder.id, Reason.EXPIRED, now + ttl_s)

    def prolong(self, seconds: float) -> None:
        """Move every deadline by the time in which the daemon could receive no renewal and no claim."""
        self._prolonged_s += seconds

    def next_deadline(self) -> float | None:
        """Return when to call `expire` next; None if there is no deadline.

        If there are many outdated records, the time may be too early. Then `expire` returns nothing, but removes
        outdated records.
        """
        self._shrink(_STEPS)
        for queue in (self._queue, self._shrinking):
            for _ in range(min(_STEPS, len(queue))):
                if self._is_current(queue[0]):
                    break
                heappop(queue)
        queue = self._first()
        return queue[0][0] + self._prolonged_s if queue else None

    def _first(self) -> list[Record]:
        """Return the heap with the earliest deadline, or an empty heap."""
        if self._shrinking and (not self._queue or self._shrinking[0] < self._queue[0]):
            return self._shrinking
        return self._queue

    def expire(self, now: float, most: int) -> list[HolderEnd]:
        """Mark holders as gone whose deadline has passed, and return their ends. Look at up to `most` deadlines.

        An unclaimed holder that has a process is added to `unclaimed` instead.
        """
        endings: list[HolderEnd] = []
        for _ in range(most):
            queue = self._first()
            if not queue or queue[0][0] + self._prolonged_s > now:
                break
            record = heappop(queue)
            _, holder_id, kind, key = record
            if not self._is_current(record):
                continue
            del self._due[holder_id, kind]
            if kind is Reason.CLOSED and holder_id in self._awaits_probe:
                self.unclaimed.append((key, holder_id))
            elif holder_id not in self._gone_holders:
                self._gone_holders[holder_id] = kind
                endings.append(HolderEnd(kind, holder=(key, holder_id)))
        return endings

    def probe_at(self, key: Key, holder_id: int, deadline: float) -> None:
        """Add an unclaimed holder to `unclaimed` again at `deadline`, unless its client claims it before."""
        if holder_id in self._awaits_probe:
            self._push(key, holder_id, Reason.CLOSED, deadline)

    # Marks.

    def mark_gone(self, ending: HolderEnd) -> None:
        """Mark a connection, process or holder as gone."""
        if ending.session is not None:
            self._gone_sessions.add(ending.session)
        if ending.process is not None:
            self._gone_processes.add(ending.process)
        if ending.holder is not None:
            self._gone_holders[ending.holder[1]] = ending.reason

    def unmark(self, ending: HolderEnd) -> None:
        """Remove a mark, since the end is committed."""
        if ending.session is not None:
            self._gone_sessions.discard(ending.session)
        if ending.process is not None:
            self._gone_processes.discard(ending.process)
        if ending.holder is not None:
            self._gone_holders.pop(ending.holder[1], None)

    def gone_reason(self, holder: Holder) -> Reason | None:
        """Return why a holder is marked as gone; None if it is not."""
        if holder.process is not None and holder.process in self._gone_processes:
            return Reason.EXITED
        if holder.hold and holder.session is not None and holder.session in self._gone_sessions:
            return Reason.CLOSED
        return self._gone_holders.get(holder.id)

    def is_alive(self, entry: Entry) -> bool:
        """Whether an entry is static, or has a holder that is neither withdrawn nor marked as gone."""
        if not entry.holders:
            return True
        return any(not holder.withdrawn and self.gone_reason(holder) is None for holder in entry.holders)

    def end_reason(self, entry: Entry) -> Reason | None:
        """Return why an entry is no longer resolved although its end is not committed; None if it is alive."""
        if self.is_alive(entry):
            return None
        return next(
            (reason for holder in entry.holders if (reason := self.gone_reason(holder)) is not None), None
        )
