"""Instances as a watch reports them, and the state for DNS that they make up."""

from typing import Any

from regd.gateways.name_index import NameIndex


def instance(name: str = "web", key: str = "", port: int = 5061, **more: Any) -> dict[str, Any]:
    """Return a ready instance on this machine; `key` is the name of the instance."""
    fields = {"host": "127.0.0.1", "meta": {}, "state": "ready", "rev": 1, "registered_at": 1.0}
    return {"name": name, "instance": key, "port": port, **fields, **more}


def index_of(*instances: dict[str, Any]) -> NameIndex:
    index = NameIndex()
    for entry in instances:
        index.put(entry)
    return index
