"""The holders of committed registrations: what each one holds, its deadlines, and the marks of gone holders.

`HolderGone` says which holder is gone; a transaction turns that into changes. In between, the holder is marked,
and its registrations are no longer resolved. The index has no timer: the caller passes `now` and asks
`next_deadline`.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from regd.core.model import Entry, Holder, Key, Process, Reason


@dataclass(frozen=True, slots=True)
class HolderGone:
    """A connection, a process or a single holder is gone. Exactly one of the three is set."""

    reason: Reason
    session: int | None = None
    process: Process | None = None
    holder: tuple[Key, int] | None = None


# The two kinds of deadline: of a lease, and of a loaded `hold` that must be claimed.
_CLAUSES = (Reason.EXPIRED, Reason.CLOSED)
_STEPS = 256  # outdated records that `next_deadline` removes at a time

Record = tuple[float, int, Reason, Key]


class HolderIndex:
    """The holders of all committed entries. `claim_s` is how long a loaded `hold` waits for its client.

    A loaded `hold` that has a process too waits longer: whenever its address is to be probed, its key and id are
    added to `unclaimed`.

    Deadlines are stored without the time that `prolong` has added, so that `prolong` need not touch them.
    """

    def __init__(self, claim_s: float) -> None:
        self.unclaimed: deque[tuple[Key, int]] = deque()
        self._claim_s = claim_s
        self._prolonged_s = 0.0
        # In order of registration, which is the order in which registrations end.
        self._of_session: defaultdict[int, dict[Key, None]] = defaultdict(dict)
        self._of_process: defaultdict[Process, dict[Key, None]] = defaultdict(dict)
        self._due: dict[tuple[int, Reason], float] = {}  # the current deadlines, by holder
        # Heaps of deadlines, some outdated. A heap with too many outdated records becomes `_shrinking`, whose
        # current records move to the other heap, a few at a time.
        self._queue: list[Record] = []
        self._shrinking: list[Record] = []
        self._awaits_probe: set[int] = set()  # unclaimed holders that have a process
        # The marks of gone sessions, processes and holders (by id) whose end is not committed yet.
        self._gone_sessions: set[int] = set()
        self._gone_processes: set[Process] = set()
        self._gone_holders: dict[int, Reason] = {}

    # Committed changes.

    def move(self, before: Entry | None, after: Entry | None, now: float) -> set[Process]:
        """Apply a change, and return the processes that no longer hold anything."""
        old = before.holders if before else ()
        new = after.holders if after else ()
        if old == new:
            return set()
        key = (after or before).key  # type: ignore[union-attr]  # both cannot be None: they differ
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

    def _push(self, key: Key, holder_id: int, clause: Reason, deadline: float) -> None:
        deadline -= self._prolonged_s
        self._due[holder_id, clause] = deadline
        heappush(self._queue, (deadline, holder_id, clause, key))
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
        for clause in _CLAUSES:
            self._due.pop((holder_id, clause), None)
        self._awaits_probe.discard(holder_id)

    def _leave(self, key: Key, old: Iterable[Holder], new: Iterable[Holder]) -> set[Process]:
        sessions = {holder.session for holder in new if holder.hold}
        processes = {holder.process for holder in new}
        free: set[Process] = set()
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
                    free.add(process)
        return free

    def held_by(self, ending: HolderGone) -> Collection[Key]:
        """Return the keys of the registrations that a gone holder held."""
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

    def knows(self, process: Process) -> bool:
        return process in self._of_process

    @property
    def is_empty(self) -> bool:
        """True if no registration has a holder, that is, all are static."""
        return not (self._of_session or self._of_process or self._due)

    @property
    def processes(self) -> list[Process]:
        return list(self._of_process)

    # Time.

    def renew(self, key: Key, holder: Holder, now: float, ttl_s: float) -> None:
        """Renew a lease for `ttl_s` from now."""
        if (holder.id, Reason.EXPIRED) in self._due:
            self._push(key, holder.id, Reason.EXPIRED, now + ttl_s)

    def prolong(self, seconds: float) -> None:
        """Move every deadline, by time in which the daemon could receive no renewal and no claim."""
        self._prolonged_s += seconds

    def next_deadline(self) -> float | None:
        """Return when to call `expire` next, None if there is no deadline.

        With many outdated records the time may be too early; `expire` then removes more of them.
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
        """Return the heap with the earliest deadline; an empty one if there is none."""
        if self._shrinking and (not self._queue or self._shrinking[0] < self._queue[0]):
            return self._shrinking
        return self._queue

    def expire(self, now: float, most: int) -> list[HolderGone]:
        """Mark up to `most` holders gone whose deadline has passed, and return them, each once.

        An unclaimed holder that has a process is added to `unclaimed` instead.
        """
        endings: list[HolderGone] = []
        for _ in range(most):
            queue = self._first()
            if not queue or queue[0][0] + self._prolonged_s > now:
                break
            record = heappop(queue)
            _, holder_id, clause, key = record
            if not self._is_current(record):
                continue
            del self._due[holder_id, clause]
            if clause is Reason.CLOSED and holder_id in self._awaits_probe:
                self.unclaimed.append((key, holder_id))
            elif holder_id not in self._gone_holders:
                self._gone_holders[holder_id] = clause
                endings.append(HolderGone(clause, holder=(key, holder_id)))
        return endings

    def wait_on(self, key: Key, holder_id: int, deadline: float) -> None:
        """Have an unclaimed holder probed again at `deadline`. Does nothing once its client has claimed it."""
        if holder_id in self._awaits_probe:
            self._push(key, holder_id, Reason.CLOSED, deadline)

    # Marks.

    def mark(self, ending: HolderGone) -> None:
        """Mark a holder gone."""
        if ending.session is not None:
            self._gone_sessions.add(ending.session)
        if ending.process is not None:
            self._gone_processes.add(ending.process)
        if ending.holder is not None:
            self._gone_holders[ending.holder[1]] = ending.reason

    def settle(self, ending: HolderGone) -> None:
        """Remove the mark of a holder whose end is committed."""
        if ending.session is not None:
            self._gone_sessions.discard(ending.session)
        if ending.process is not None:
            self._gone_processes.discard(ending.process)
        if ending.holder is not None:
            self._gone_holders.pop(ending.holder[1], None)

    def gone(self, holder: Holder) -> Reason | None:
        """Return why a holder is marked gone, None if it is not."""
        if holder.process is not None and holder.process in self._gone_processes:
            return Reason.EXITED
        if holder.hold and holder.session is not None and holder.session in self._gone_sessions:
            return Reason.CLOSED
        return self._gone_holders.get(holder.id)

    def is_alive(self, entry: Entry) -> bool:
        """Whether an entry is static, or has a holder that is neither withdrawn nor marked gone."""
        if not entry.holders:
            return True
        return any(not holder.withdrawn and self.gone(holder) is None for holder in entry.holders)

    def death(self, entry: Entry) -> Reason | None:
        """Return why an entry is presumed dead, None while it is alive."""
        if self.is_alive(entry):
            return None
        return next((reason for holder in entry.holders if (reason := self.gone(holder)) is not None), None)
