"""The limit of open files (getrlimit(2)). Each connection and each watched process needs one."""

import logging
import resource
from dataclasses import replace

from regd.core.limits import Limits
from regd.system.listener import ListenError

log = logging.getLogger("regd")

_SPARE_FILES = 192  # for the registry, listening sockets, connections that are refused and the like
_CONNECTIONS_MIN = 16  # regd does not start if it can serve fewer


def fit_limits(limits: Limits) -> Limits:
    """Raise the soft limit of open files, and return `limits`, reduced if that limit is too low for them.

    Raises:
        ListenError: the process may open too few files.
    """
    needed = limits.connections_max + limits.processes_max + limits.probes_max + limits.readonly_probes_max
    usable = raise_open_files(needed)
    if usable >= needed:
        return limits
    share = usable / needed
    connections, files = int(limits.connections_max * share), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if connections < _CONNECTIONS_MIN:
        raise ListenError(
            f"this process may open {files} files, too few for {_CONNECTIONS_MIN} connections; "
            "raise the limit to 1024 or more (ulimit -Hn; LimitNOFILE= in a unit)"
        )
    log.warning(
        "this process may open %d files (ulimit -Hn): regd takes %d connections at a time, not %d",
        files,
        connections,
        limits.connections_max,
    )
    # All limits are reduced by the same factor.
    return replace(
        limits,
        connections_max=connections,
        readonly_connections_max=max(1, int(limits.readonly_connections_max * share)),
        processes_max=max(1, int(limits.processes_max * share)),
        probes_max=max(1, int(limits.probes_max * share)),
        readonly_probes_max=max(1, int(limits.readonly_probes_max * share)),
    )


def raise_open_files(needed: int) -> int:
    """Raise the soft limit of open files, at most to the hard limit.

    Args:
        needed: how many files are needed, besides a reserve.

    Returns:
        How many of them the limit allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    total = needed + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < total:
        soft = total if hard == resource.RLIM_INFINITY else min(total, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return needed
    return max(1, min(needed, soft - _SPARE_FILES))
