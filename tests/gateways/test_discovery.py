"""Instances as Prometheus targets, as a configuration for Traefik, and as URLs."""

import json
import re
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as some

from regd.gateways.discovery import best_instances, location, prometheus_targets, traefik_configuration
from tests.gateways.instances import instance


def test_prometheus_target_of_an_instance() -> None:
    meta = {"metrics": "/stats", "scheme": "https", "zone": "a"}
    assert prometheus_targets([instance("shop.web", "2", host="::1", meta=meta, state="draining")]) == [
        {
            "targets": ["[::1]:5061"],
            "labels": {
                "job": "shop.web",
                "instance": "shop.web/2",
                "__metrics_path__": "/stats",
                "__scheme__": "https",
                "__meta_regd_name": "shop.web",
                "__meta_regd_instance": "2",
                "__meta_regd_state": "draining",
                "__meta_regd_meta_metrics": "/stats",
                "__meta_regd_meta_scheme": "https",
                "__meta_regd_meta_zone": "a",
            },
        }
    ]


def test_only_instances_with_metrics_unless_all_are_asked_for() -> None:
    plain, scraped = instance("a"), instance("b", meta={"metrics": "/metrics"})
    assert [group["labels"]["job"] for group in prometheus_targets([plain, scraped])] == ["b"]
    assert [group["labels"]["job"] for group in prometheus_targets([plain, scraped], every=True)] == ["a", "b"]
    assert "__metrics_path__" not in prometheus_targets([plain], every=True)[0]["labels"]
    assert prometheus_targets([]) == []


@pytest.mark.parametrize("scheme", ["", "ftp", "HTTP", "http\n", "javascript"])
def test_other_schemes_count_as_absent(scheme: str) -> None:
    found = instance(meta={"metrics": "/m", "scheme": scheme})
    assert "__scheme__" not in prometheus_targets([found])[0]["labels"]
    assert location(found, "web.localhost", "/") == "http://web.localhost:5061/"


def test_first_of_two_equal_label_names_wins() -> None:
    labels = prometheus_targets([instance(meta={"b_c": "last", "b-c": "first", "b.c": "second"})], every=True)[0]
    assert labels["labels"]["__meta_regd_meta_b_c"] == "first"  # "-" < "." < "_"


@given(some.dictionaries(some.text(max_size=8), some.text(max_size=8), max_size=6))
def test_any_meta_gives_valid_labels(meta: dict[str, str]) -> None:
    labels = prometheus_targets([instance(meta=meta)], every=True)[0]["labels"]
    assert all(re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) for name in labels)
    assert all(type(value) is str for value in labels.values())
    assert labels["job"] == "web"
    json.dumps(labels)


def test_traefik_routes_to_ready_instances_of_the_best_priority() -> None:
    instances = [
        instance("shop.web", "1", 1, priority=5),
        instance("shop.web", "2", 2, priority=5, meta={"scheme": "https"}),
        instance("shop.web", "3", 3, priority=9),
        instance("shop.web", "4", 4, state="draining"),
        instance("shop.web", "5", 1, priority=5),  # the address of 1 again
        instance("starting", state="starting"),
    ]
    assert traefik_configuration(instances) == {
        "http": {
            "routers": {"shop.web": {"rule": "Host(`shop.web.localhost`)", "service": "shop.web"}},
            "services": {
                "shop.web": {
                    "loadBalancer": {"servers": [{"url": "http://127.0.0.1:1"}, {"url": "https://127.0.0.1:2"}]}
                }
            },
        }
    }


def test_traefik_configuration_without_ready_instances_is_empty() -> None:
    assert traefik_configuration([]) == {}
    assert traefik_configuration([instance(state="draining")]) == {}


def test_best_instances() -> None:
    first, second, worse = instance(key="1"), instance(key="2", priority=0), instance(key="3", priority=1)
    assert best_instances([worse, first, second]) == [first, second]
    assert best_instances([worse, {**first, "state": "starting"}]) == [worse]
    assert best_instances([]) == []


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://web.localhost:5061/a//b?c=%2F"),
        ("::1", "http://web.localhost:5061/a//b?c=%2F"),
        ("localhost", "http://web.localhost:5061/a//b?c=%2F"),
        ("LocalHost", "http://web.localhost:5061/a//b?c=%2F"),
        ("127.0.0.2", "http://127.0.0.2:5061/a//b?c=%2F"),
        ("fd00::1", "http://[fd00::1]:5061/a//b?c=%2F"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:5061/a//b?c=%2F"),
        ("db.example", "http://db.example:5061/a//b?c=%2F"),
    ],
)
def test_location(host: str, url: str) -> None:
    assert location(instance(host=host), "web.localhost", "/a//b?c=%2F") == url


@given(some.text("/@:.a\\%?#", max_size=20))
def test_no_path_leads_to_another_host(path: str) -> None:
    assert urlsplit(location(instance(), "web.localhost", "/" + path)).netloc == "web.localhost:5061"
