"""The fields of `hello` and `stats`: the daemon's identity, its counters, and the state of its parts."""

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import regd
from regd.core.registry import Registry
from regd.server.counters import Counters
from regd.server.resolve_cache import ResolveCache
from regd.system.clock import Clock
from regd.system.namespaces import own_pid_namespace
from regd.system.processes import boot_id

PROTOCOL = 1
FEATURES = ("if", "force", "state", "hold", "pid", "ttl", "watch", "wait", "why", "history", "priority")


class DaemonInfo:
    """`epoch` is new at every start of a daemon; `log` is the log file, None if the log goes to stderr.

    `gauges` returns further fields of `stats`.
    """

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        counters: Counters,
        replies: ResolveCache,
        gauges: Callable[[], Mapping[str, object]],
        epoch: str,
        path: Path,
        log: Path | None,
    ) -> None:
        self._registry = registry
        self._clock = clock
        self._counters = counters
        self._replies = replies
        self._gauges = gauges
        self._epoch = epoch
        self._path = path
        self._log = log
        self._loop = ""
        self._boot: str | None = None
        self._pid_namespace: str | None = None
        self._started = 0.0  # monotonic seconds
        self._started_at = 0.0  # Unix seconds

    def open(self) -> None:
        """Record when the daemon started, in which event loop, boot and pid namespace."""
        self._started = self._clock.now()
        self._started_at = self._clock.wall()
        self._loop = type(asyncio.get_running_loop()).__module__.partition(".")[0]  # asyncio or uvloop
        self._boot = boot_id()
        self._pid_namespace = own_pid_namespace()

    def position(self) -> dict[str, object]:
        """Return the registry's epoch and revision."""
        return {"epoch": self._epoch, "rev": self._registry.rev}

    def hello(self) -> dict[str, object]:
        """Return the fields of `hello`.

        A client compares `host` with its own boot and pid namespace, to see whether a pid means the same to both.
        """
        return {
            "server": "regd",
            "version": regd.__version__,
            "protocol": PROTOCOL,
            "epoch": self._epoch,
            "rev": self._registry.rev,
            "features": FEATURES,
            "limits": self._registry.limits.values(),
            "host": {"boot": self._boot, "pid_namespace": self._pid_namespace},
            "loop": self._loop,
        }

    def stats(self) -> dict[str, object]:
        """Return the fields of `stats`."""
        registry, counters = self._registry, self._counters
        return {
            "version": regd.__version__,
            "pid": os.getpid(),
            "loop": self._loop,
            "registry": str(self._path),
            "log": None if self._log is None else str(self._log),
            "started_at": self._started_at,
            "uptime_s": round(self._clock.now() - self._started, 3),
            "epoch": self._epoch,
            "rev": registry.rev,
            "registrations": len(registry),
            "registry_bytes": registry.weight_bytes,
            **self._gauges(),
            "connections": counters.connections,
            "readonly_connections": counters.readonly_connections,
            "connections_accepted": counters.connections_accepted,
            "connections_refused": counters.connections_refused,
            "bad_protocol": counters.bad_protocol,
            "dropped": counters.dropped,
            "commits": counters.commits,
            "commits_failed": counters.commits_failed,
            "changes": counters.changes,
            "requests": counters.requests + Counter(resolve=self._replies.count),
            "errors": counters.errors,
            "limits": registry.limits.values(),
        }
