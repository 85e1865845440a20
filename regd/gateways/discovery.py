"""Service discovery for other programs: instances become Prometheus targets, a Traefik configuration, or a URL.

Pure functions of the instance objects of `list` and `resolve`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from regd_client.protocol import host_port

__all__ = ["best_instances", "location", "prometheus_targets", "traefik_configuration"]

Instance = Mapping[str, Any]

_NOT_IN_LABELS = re.compile(r"[^a-zA-Z0-9_]")  # characters that Prometheus does not permit in a label name
_SCHEMES = ("http", "https")
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def prometheus_targets(instances: Iterable[Instance], *, every: bool = False) -> list[dict[str, Any]]:
    """Return the groups of `http_sd_configs`: one for each instance with `metrics` in `meta`, or for all."""
    return [_target(instance) for instance in instances if every or "metrics" in instance["meta"]]


def _target(instance: Instance) -> dict[str, Any]:
    name, meta = instance["name"], instance["meta"]
    labels = {
        "job": name,
        "instance": f"{name}/{instance['instance']}" if instance["instance"] else name,
        "__meta_regd_name": name,
        "__meta_regd_instance": instance["instance"],
        "__meta_regd_state": instance["state"],
    }
    if meta.get("metrics"):
        labels["__metrics_path__"] = meta["metrics"]
    if scheme := _scheme(instance):
        labels["__scheme__"] = scheme
    for key in sorted(meta):
        labels.setdefault("__meta_regd_meta_" + _NOT_IN_LABELS.sub("_", key), meta[key])
    return {"targets": [host_port(instance["host"], instance["port"])], "labels": labels}


def traefik_configuration(instances: Iterable[Instance]) -> dict[str, Any]:
    """Return the configuration for Traefik's HTTP provider: a router for each name with ready instances.

    Without such names the whole configuration is empty, because Traefik treats an empty table of routers as an
    error.
    """
    names: dict[str, list[Instance]] = {}
    for instance in instances:
        names.setdefault(instance["name"], []).append(instance)
    servers = {name: _servers(of_name) for name, of_name in names.items()}
    routed = [name for name in servers if servers[name]]
    if not routed:
        return {}
    return {
        "http": {
            "routers": {name: {"rule": f"Host(`{name}.localhost`)", "service": name} for name in routed},
            "services": {name: {"loadBalancer": {"servers": servers[name]}} for name in routed},
        }
    }


def _servers(of_name: Iterable[Instance]) -> list[dict[str, str]]:
    urls = dict.fromkeys(_url(instance, instance["host"]) for instance in best_instances(of_name))
    return [{"url": url} for url in urls]


def best_instances(of_name: Iterable[Instance]) -> list[Instance]:
    """Return the ready instances of the best priority among those of one name."""
    ready = [instance for instance in of_name if instance["state"] == "ready"]
    best = min((_priority(instance) for instance in ready), default=0)
    return [instance for instance in ready if _priority(instance) == best]


def _priority(instance: Instance) -> int:
    return int(instance.get("priority", 0))


def location(instance: Instance, named_host: str, path_and_query: str) -> str:
    """Return the URL of an instance, for a browser that has requested `named_host`.

    If the instance listens on this machine's loopback, the URL keeps the host that the browser has requested, so
    that each service has its own cookies.
    """
    host = named_host if instance["host"].lower() in _LOOPBACK else instance["host"]
    return _url(instance, host) + path_and_query


def _url(instance: Instance, host: str) -> str:
    # A zone index is separated by %25 in a URL (RFC 6874).
    return f"{_scheme(instance) or 'http'}://{host_port(host.replace('%', '%25'), instance['port'])}"


def _scheme(instance: Instance) -> str:
    """Return `http` or `https` from `meta`; any other value counts as absent."""
    scheme = instance["meta"].get("scheme", "")
    return scheme if scheme in _SCHEMES else ""
