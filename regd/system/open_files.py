"""How many files this process may open (getrlimit(2)); each connection and each watched process takes one."""

import logging
import resource
from dataclasses import replace

from regd.core.limits import Limits
from regd.system.listener import ListenError

log = logging.getLogger("regd")

_SPARE_FILES = 192  # for everything else: the registry, listening sockets, connections that are being refused
_CONNECTIONS_MIN = 16  # fewer are of no use


def fit_limits(limits: Limits) -> Limits:
    """Raise the soft limit of open files as far as `limits` need, and return limits that fit what there is.

    Raises:
        ListenError: the process may open too few files.
    """
    wanted = limits.connections_max + limits.processes_max + limits.probes_max + limits.readonly_probes_max
    usable = raise_open_files(wanted)
    if usable >= wanted:
        return limits
    share = usable / wanted
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
    # Read-only users keep the same share of the fewer connections.
    return replace(
        limits,
        connections_max=connections,
        readonly_connections_max=max(1, int(limits.readonly_connections_max * share)),
        processes_max=max(1, int(limits.processes_max * share)),
        probes_max=max(1, int(limits.probes_max * share)),
        readonly_probes_max=max(1, int(limits.readonly_probes_max * share)),
    )


def raise_open_files(wanted: int) -> int:
    """Raise the soft limit as far as it can be raised, and return how many of `wanted` files may be open then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, soft - _SPARE_FILES))
