"""`/metrics`: the daemon's `stats` as metric families, which prometheus-client renders.

No metric has the name of a service as a label: names come and go, and Prometheus would keep a series for each.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import exposition
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector, CollectorRegistry

__all__ = ["families", "render"]

# The field of `stats`, the name of the metric without the prefix `regd_`, and its help.
_GAUGES = (
    ("started_at", "start_time_seconds", "When the daemon started, in Unix seconds."),
    ("rev", "revision", "The registry's revision."),
    ("registrations", "registrations", "Registrations in any state."),
    ("registry_bytes", "registry_bytes", "Memory that the registrations take, by estimate."),
    ("connections", "connections", "Open connections."),
    ("readonly_connections", "readonly_connections", "Open connections of users who may only read."),
    ("watches", "watches", "Current watches."),
    ("waiting", "waiting_requests", "Requests that wait for a service."),
    ("processes", "watched_processes", "Processes whose exit ends a registration."),
    ("lag_s", "loop_lag_seconds", "How late the last timer of the daemon's event loop was."),
    (
        "lag_max_s",
        "loop_lag_max_seconds",
        "How late a timer of the daemon's event loop was at most since the start.",
    ),
)
_COUNTERS = (
    ("changes", "changes", "Changes of the registry."),
    ("commits", "commits", "Batches of changes written to the journal."),
    ("commits_failed", "commits_failed", "Batches of changes that could not be written."),
    ("connections_accepted", "connections_accepted", "Connections since the start."),
    ("connections_refused", "connections_refused", "Connections beyond the limit."),
    ("dropped", "connections_dropped", "Connections whose peer did not read."),
    ("bad_protocol", "bad_protocol", "Connections of programs that speak another protocol."),
)
_LABELLED_COUNTERS = (
    ("requests", "requests", "cmd", "Requests, by command."),
    ("errors", "errors", "code", "Refused requests, by error code."),
)


def families(stats: Mapping[str, Any] | None) -> Iterator[Metric]:
    """Yield the metric families for a reply to `stats`. If there is no reply, yield only `regd_up` with 0.

    A field that the daemon does not send has no metric.
    """
    yield GaugeMetricFamily("regd_up", "Whether the daemon answers.", value=int(stats is not None))
    if stats is None:
        return
    build = {"version": str(stats.get("version", "")), "loop": str(stats.get("loop", ""))}
    yield InfoMetricFamily("regd_build", "The daemon's version and event loop.", value=build)
    for field, name, text in _GAUGES:
        if field in stats:
            yield GaugeMetricFamily(f"regd_{name}", text, value=stats[field])
    for field, name, text in _COUNTERS:
        if field in stats:
            yield CounterMetricFamily(f"regd_{name}", text, value=stats[field])
    for field, name, label, text in _LABELLED_COUNTERS:
        family = CounterMetricFamily(f"regd_{name}", text, labels=[label])
        for key, count in stats.get(field, {}).items():
            family.add_metric([key], count)
        yield family


def render(stats: Mapping[str, Any] | None, accept: str = "") -> tuple[str, bytes]:
    """Return the content type and the body: OpenMetrics if the header `Accept` names it, else Prometheus text.

    `choose_encoder` of prometheus-client is not used, because it raises ValueError for some headers.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Stats(stats))
    if "application/openmetrics-text" in accept:
        return openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
    return exposition.CONTENT_TYPE_PLAIN_0_0_4, exposition.generate_latest(registry)


class _Stats(Collector):
    def __init__(self, stats: Mapping[str, Any] | None) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        return families(self._stats)
