"""`/metrics` of the bridge: its status as metric families, which prometheus-client renders."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import exposition
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

__all__ = ["families", "render"]

# Where it is in the status, the name of the metric without the prefix `regd_bridge_`, and its help.
_GAUGES = (
    ("started_at", "start_time_seconds", "When the bridge started, in Unix seconds."),
    ("etcd.connected", "etcd_up", "Whether etcd answers, and has answered within the last 10 s."),
    ("etcd.silent_s", "etcd_silent_seconds", "Seconds since etcd has last answered anything."),
    ("etcd.lease_remaining_s", "lease_remaining_seconds", "Seconds that the lease lives at least."),
    ("daemon.connected", "daemon_up", "Whether the bridge has a connection to the daemon."),
    ("daemon.stale_s", "daemon_stale_seconds", "Seconds since the daemon's registrations may be out of date."),
    ("published", "published", "Instances of this machine in etcd."),
    ("not_published_count", "not_published", "Instances of this machine that are not published."),
    ("peers_count", "peers", "Other machines."),
    ("foreign.count", "foreign", "Instances of other machines to be registered here."),
    ("foreign.stale_s", "foreign_stale_seconds", "Seconds since these may be out of date."),
    ("foreign.refused", "foreign_refused", "Instances of other machines that the daemon refuses."),
    ("foreign.shadowed", "foreign_shadowed", "Instances of other machines that have the name of a local one."),
    ("foreign.ignored", "ignored_keys", "Keys in etcd that do not parse."),
    ("lag.publish_s", "publish_lag_seconds", "From the last local change to etcd's reply."),
    ("lag.publish_max_s", "publish_lag_max_seconds", "The longest time from a local change to etcd's reply."),
    ("lag.register_s", "register_lag_seconds", "From the last change of another machine to the daemon's reply."),
    ("lag.register_max_s", "register_lag_max_seconds", "The longest time of these."),
)
_COUNTERS = (
    ("counts.commits", "commits", "Transactions with etcd."),
    ("counts.requests", "requests", "Registrations and withdrawals at the daemon."),
    ("counts.leases_lost", "leases_lost", "Leases that etcd has ended."),
    ("counts.comparisons", "comparisons", "Comparisons of all that is known with etcd and the daemon."),
    ("counts.differences", "differences", "Differences that they have found; more than none is a bug."),
)


def families(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Yield the metric families for a status."""
    build = {"version": status["version"], "machine": status["machine"]}
    yield InfoMetricFamily("regd_bridge", "The bridge's version and machine.", value=build)
    for path, name, text in _GAUGES:
        yield GaugeMetricFamily(f"regd_bridge_{name}", text, value=_number(status, path))
    for path, name, text in _COUNTERS:
        yield CounterMetricFamily(f"regd_bridge_{name}", text, value=_number(status, path))
    peers = GaugeMetricFamily("regd_bridge_peer_instances", "Instances of another machine.", labels=["machine"])
    for peer in status["peers"]:
        peers.add_metric([peer["machine"]], peer["instances"])
    yield peers


def _number(status: Mapping[str, Any], path: str) -> float:
    value: Any = status
    for part in path.split("."):
        value = value[part]
    return float(value)


def render(status: Mapping[str, Any]) -> tuple[str, bytes]:
    """Return the content type and the body."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Status(status))
    return exposition.CONTENT_TYPE_PLAIN_0_0_4, exposition.generate_latest(registry)


class _Status(Collector):
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        return families(self._status)
