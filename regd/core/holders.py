"""Who holds what that has landed, until when, and who is known to be gone.

`HolderGone` says who went; a transaction turns it into changes. Between the two, what only the gone held is not
resolved any more. Must not know connections, processes or timers: `now` comes in, `next_deadline` goes out.
"""

from collections import defaultdict, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from regd.core.model import Entry, Holder, Key, Process, Reason


@dataclass(frozen=True, slots=True)
class HolderGone:
    """Somebody went: a connection, a process, or one holder whose time is over. Just one of the three is set."""

    reason: Reason
    session: int | None = None
    process: Process | None = None
    holder: tuple[Key, int] | None = None


# What a deadline is of: a lease, or the time in which a loaded `hold` must be claimed.
_CLAUSES = (Reason.EXPIRED, Reason.CLOSED)
_STEPS = 256  # outdated records that one look takes off the queue

Record = tuple[float, int, Reason, Key]


class HolderIndex:
    """`claim_s` is how long a loaded `hold` waits for its client.

    A holder that has a process too goes on waiting, and is added to `unclaimed`, by key and id, whenever its
    address is to be probed.

    Deadlines are kept as if the time that `prolong` adds had not passed, so that adding it costs nothing.
    """

    def __init__(self, claim_s: float) -> None:
        self.unclaimed: deque[tuple[Key, int]] = deque()
        self._claim_s = claim_s
        self._prolonged_s = 0.0
        # In order of registration, so that an end has an order.
        self._of_session: defaultdict[int, dict[Key, None]] = defaultdict(dict)
        self._of_process: defaultdict[Process, dict[Key, None]] = defaultdict(dict)
        self._due: dict[tuple[int, Reason], float] = {}  # by holder; the truth
        # Heaps of deadlines, outdated ones among them. `_shrinking` is one with too many of these: it is emptied
        # into the other, some records at a time.
        self._queue: list[Record] = []
        self._shrinking: list[Record] = []
        self._awaits_probe: set[int] = set()  # unclaimed holders that have a process
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
        """Take up to `most` records off the queue that has too many outdated ones."""
        if not self._shrinking and len(self._queue) > 64 + 4 * len(self._due):
            self._queue, self._shrinking = self._shrinking, self._queue
        for _ in range(min(most, len(self._shrinking))):
            record = self._shrinking.pop()  # the last one: a heap without it is still a heap
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
        """Return the keys that an ending concerns."""
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
    def processes(self) -> list[Process]:
        return list(self._of_process)

    # Time.

    def renew(self, key: Key, holder: Holder, now: float, ttl_s: float) -> None:
        """Start a lease anew, this time for `ttl_s`."""
        if (holder.id, Reason.EXPIRED) in self._due:
            self._push(key, holder.id, Reason.EXPIRED, now + ttl_s)

    def prolong(self, seconds: float) -> None:
        """Add time in which no renewal and no claim could be heard to every deadline."""
        self._prolonged_s += seconds

    def next_deadline(self) -> float | None:
        """Return when `expire` has something to say, or None.

        So many records may be outdated that the answer is too early; `expire` then takes more of them off.
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
        """Return the queue with the earliest deadline, an empty one if there is none."""
        if self._shrinking and (not self._queue or self._shrinking[0] < self._queue[0]):
            return self._shrinking
        return self._queue

    def expire(self, now: float, most: int) -> list[HolderGone]:
        """Return up to `most` whose time is over, each once, and count them as gone.

        An unclaimed holder that has a process is not over: it is added to `unclaimed`.
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
        """Let an unclaimed holder that was in `unclaimed` be there again at `deadline`, if it still waits."""
        if holder_id in self._awaits_probe:
            self._push(key, holder_id, Reason.CLOSED, deadline)

    # Who is gone.

    def mark(self, ending: HolderGone) -> None:
        """Count somebody as gone from now on."""
        if ending.session is not None:
            self._gone_sessions.add(ending.session)
        if ending.process is not None:
            self._gone_processes.add(ending.process)
        if ending.holder is not None:
            self._gone_holders[ending.holder[1]] = ending.reason

    def settle(self, ending: HolderGone) -> None:
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
