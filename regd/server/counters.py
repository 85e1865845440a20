"""The counters that `stats` shows."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """Counts since the start, except `connections` and `readonly_connections`: the number of open connections."""

    connections: int = 0
    readonly_connections: int = 0  # of users who may only read
    connections_accepted: int = 0
    connections_refused: int = 0
    bad_protocol: int = 0  # connections closed because the client spoke another protocol
    dropped: int = 0  # connections closed because too many bytes were buffered for them
    commits: int = 0
    commits_failed: int = 0
    changes: int = 0
    requests: Counter[str] = field(default_factory=Counter)  # by command
    errors: Counter[str] = field(default_factory=Counter)  # by code
