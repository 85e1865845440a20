"""`/metrics`: the values that Prometheus' parsers read are those of the daemon's `stats`."""

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from regd.gateways.metrics import render
from tests.support.daemon import InLoop

STATS: dict[str, Any] = {
    "version": '0.1 "quoted"\\\n', "loop": "asyncio", "started_at": 1_790_000_000.25, "rev": 42,
    "registrations": 7, "registry_bytes": 7_000, "connections": 3, "readonly_connections": 1, "watches": 2,
    "waiting": 4, "processes": 5, "lag_s": 0.000125, "lag_max_s": 0.5, "changes": 11, "commits": 9,
    "commits_failed": 1, "connections_accepted": 100, "connections_refused": 2, "dropped": 6, "bad_protocol": 8,
    "requests": {"resolve": 1_000, "list": 2}, "errors": {"not_found": 3},
}  # fmt: skip
SAMPLES = {
    ("regd_up",): 1, ("regd_build_info", STATS["version"], "asyncio"): 1,
    ("regd_start_time_seconds",): 1_790_000_000.25, ("regd_revision",): 42, ("regd_registrations",): 7,
    ("regd_registry_bytes",): 7_000, ("regd_connections",): 3, ("regd_readonly_connections",): 1,
    ("regd_watches",): 2, ("regd_waiting_requests",): 4, ("regd_watched_processes",): 5,
    ("regd_loop_lag_seconds",): 0.000125, ("regd_loop_lag_max_seconds",): 0.5, ("regd_changes_total",): 11,
    ("regd_commits_total",): 9, ("regd_commits_failed_total",): 1, ("regd_connections_accepted_total",): 100,
    ("regd_connections_refused_total",): 2, ("regd_connections_dropped_total",): 6,
    ("regd_bad_protocol_total",): 8, ("regd_requests_total", "resolve"): 1_000, ("regd_requests_total", "list"): 2,
    ("regd_errors_total", "not_found"): 3,
}  # fmt: skip
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1"


def samples(accept: str, stats: dict[str, Any] | None) -> dict[tuple[str, ...], float]:
    content_type, body = render(stats, accept)
    is_openmetrics = "openmetrics" in content_type
    assert is_openmetrics == ("openmetrics" in accept)
    parse = parse_openmetrics if is_openmetrics else parse_text
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels, reverse=True))): sample.value
        for family in parse(body.decode())
        for sample in family.samples
    }


@pytest.mark.parametrize("accept", ["", "*/*", "text/plain;version=x", OPENMETRICS])
def test_metrics_equal_stats(accept: str) -> None:
    assert samples(accept, STATS) == SAMPLES


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_without_a_daemon_only_up(accept: str) -> None:
    assert samples(accept, None) == {("regd_up",): 0}


def test_a_field_that_is_missing_has_no_metric() -> None:
    assert samples("", {"rev": 3, "version": "1"}) == {
        ("regd_up",): 1,
        ("regd_build_info", "1", ""): 1,
        ("regd_revision",): 3,
    }


@pytest.mark.socket
async def test_a_real_daemon_has_every_metric(tmp_path: Path) -> None:
    async with InLoop(tmp_path / "registry.json") as daemon:
        peer = await daemon.peer()
        await peer.ask(cmd="resolve", name="nobody")
        stats = await peer.ask(cmd="stats")
    assert {name for name, *_ in samples("", stats)} == {name for name, *_ in SAMPLES}
